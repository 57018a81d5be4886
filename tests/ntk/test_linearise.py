"""f_lin against explicit Jacobians, against models that are linear already, and against Taylor's theorem."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkjax.ntk.linearise import evaluate, linearisation_error, linearise, parameter_distance


def net(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def linear_in_parameters(params, x):
    """phi(x) W + b with features that are anything but linear in x."""
    features = jnp.concatenate([jnp.sin(3 * x), x * x], axis=1)
    return features @ params["w"] + params["b"][None]


def draw(seed, shapes, dtype=np.float32, scale=1.0):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(scale * rng.normal(size=shape), dtype) for name, shape in shapes.items()}


NET = {"a": (3, 5), "b": (5, 2)}
X = np.random.default_rng(7).normal(size=(4, 3))


def test_it_is_f0_plus_the_jacobian_times_the_change(x64):
    base, moved = draw(0, NET, np.float64), draw(1, NET, np.float64)
    jacobian = jax.jacobian(net)(base, X)
    change = sum(np.tensordot(np.asarray(jacobian[name]), np.asarray(moved[name] - base[name]), axes=2) for name in NET)
    np.testing.assert_allclose(linearise(net, base)(moved, X), net(base, X) + change, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(linearise(net, base)(base, X), net(base, X))


def test_a_model_that_is_linear_in_its_parameters_is_its_own_linearisation(x64):
    shapes = {"w": (6, 2), "b": (2,)}
    base, moved = draw(0, shapes, np.float64), draw(1, shapes, np.float64)
    f, f_lin = linear_in_parameters(moved, X), linearise(linear_in_parameters, base)(moved, X)
    np.testing.assert_allclose(f_lin, f, rtol=0, atol=1e-12)
    error = linearisation_error(linear_in_parameters(base, X), f_lin, f)
    assert error.relative < 1e-12 and abs(error.cosine - 1) < 1e-12 and abs(error.scale - 1) < 1e-12


def test_the_error_is_of_second_order(x64):
    base, direction = draw(0, NET, np.float64), draw(1, NET, np.float64)
    errors = []
    for step in (2e-3, 1e-3, 5e-4):
        moved = jax.tree.map(lambda p, d, s=step: p + s * d, base, direction)
        errors.append(np.abs(linearise(net, base)(moved, X) - net(moved, X)).max())
    assert errors[0] > 1e-9
    np.testing.assert_allclose([errors[0] / errors[1], errors[1] / errors[2]], 4, rtol=0.02)


def test_it_is_a_function_like_any_other_and_compiles_once():
    evaluate.clear_cache()
    for seed in (1, 2, 3):
        base, moved = draw(0, NET), draw(seed, NET)
        found = evaluate(linearise(net, base), moved, X.astype(np.float32))
        np.testing.assert_allclose(found, linearise(net, base)(moved, X.astype(np.float32)), rtol=1e-5, atol=1e-5)
    assert evaluate._cache_size() == 1


def test_half_precision_parameters_move_in_half_and_answer_in_float32():
    base, moved = draw(0, NET, jnp.bfloat16), draw(1, NET, jnp.bfloat16)
    found = linearise(net, base)(moved, X.astype(jnp.bfloat16))
    assert found.dtype == jnp.float32 and np.isfinite(found).all()


def test_the_error_by_hand():
    f0, f = np.zeros((1, 2)), np.array([[3.0, 4.0]])
    exact = linearisation_error(f0, f, f)
    assert (exact.relative, exact.cosine, exact.scale) == (0, 1, 1)
    half = linearisation_error(f0, f / 2, f)
    assert (half.relative, half.cosine, half.scale) == (0.5, 1, 0.5)
    across = linearisation_error(f0 + 1, np.array([[5.0, -2.0]]), f + 1)  # the change turned by a right angle
    np.testing.assert_allclose([across.relative, across.cosine, across.scale], [np.sqrt(2), 0, 1], atol=1e-15)
    nothing = linearisation_error(f0, f0, f)
    assert nothing.relative == 1 and np.isnan(nothing.cosine) and nothing.scale == 0
    still = linearisation_error(f, f, f)
    assert np.isnan([still.relative, still.cosine, still.scale]).all()
    with pytest.raises(ValueError, match=r"\(1, 2\), \(2,\)"):
        linearisation_error(f0, f[0], f)


def test_how_far_the_parameters_moved():
    base = {"a": jnp.asarray([3.0, 0.0]), "b": jnp.asarray([[4.0]])}
    moved = {"a": jnp.asarray([3.0, 2.0]), "b": jnp.asarray([[4.0]])}
    assert parameter_distance(moved, base) == (2.0, pytest.approx(0.4))
    zero = jax.tree.map(jnp.zeros_like, base)
    distance, relative = parameter_distance(moved, zero)
    assert distance == pytest.approx(np.sqrt(29)) and np.isnan(relative)
