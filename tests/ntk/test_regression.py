"""Kernel regression against closed forms in NumPy, against ridge regression and gradient descent on linear models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkjax.errors import ConfigError
from ntkjax.ntk.regression import (
    FORMULAS,
    accuracy,
    as_matrix,
    centred_targets,
    choose_ridge,
    fit_kernel_regression,
    output_kernels,
    ridge_grid,
    right_answers,
)


def net(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def linear(params, x):
    return x @ params["w"]


def draw(seed, shapes, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


NET = {"a": (3, 4), "b": (4, 2)}
rng = np.random.default_rng(11)
X1, X2 = rng.normal(size=(5, 3)), rng.normal(size=(7, 3))


def explicit(params, x):
    """[n, m, P] by jax.jacobian."""
    tree = jax.jacobian(net)(params, jnp.asarray(x))
    return np.concatenate([np.asarray(leaf, np.float64).reshape(len(x), 2, -1) for leaf in jax.tree.leaves(tree)], 2)


ORACLE = {
    "sgd": lambda a, b: np.einsum("icp,jdp->icjd", a, b),
    "asymmetric_signgd": lambda a, b: np.einsum("icp,jdp->icjd", a, np.sign(b)),
    "signgd": lambda a, b: np.einsum("icp,jdp->icjd", np.sign(a), np.sign(b)),
}


@pytest.mark.parametrize("memory_budget", [1, 500, 1 << 30], ids=["one row", "few rows", "all"])
def test_kernels_against_explicit_jacobians(memory_budget):
    params = draw(0, NET)
    x1, x2 = X1.astype(np.float32), X2.astype(np.float32)
    g1, g2 = explicit(params, x1), explicit(params, x2)
    between = output_kernels(net, params, x1, x2, memory_budget=memory_budget)
    within = output_kernels(net, params, x2, memory_budget=memory_budget)
    for formula in FORMULAS:
        np.testing.assert_allclose(between[formula], ORACLE[formula](g1, g2), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(within[formula], ORACLE[formula](g2, g2), rtol=1e-4, atol=1e-5)
    assert not np.allclose(as_matrix(within["asymmetric_signgd"]), as_matrix(within["asymmetric_signgd"]).T, rtol=0.1)


def test_kernels_in_double_precision_and_of_one_output(x64):
    params = draw(0, NET, np.float64)
    one = lambda p, x: net(p, x)[:, 0]
    found = output_kernels(one, params, X1, X2, formulas=["sgd"])["sgd"]
    assert found.shape == (5, 1, 7, 1)
    wanted = ORACLE["sgd"](explicit(params, X1)[:, :1], explicit(params, X2)[:, :1])
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)


def test_a_gradient_of_exactly_zero_has_no_sign():
    params = draw(0, NET) | {"unused": jnp.ones(50)}
    found = output_kernels(net, params, X1.astype(np.float32), formulas=["signgd"])["signgd"]
    assert found[0, 0, 0, 0] <= 12 + 8  # as many as f depends on, not 50 more


def test_an_unknown_formula_is_named():
    with pytest.raises(ConfigError, match="adam"):
        output_kernels(net, draw(0, NET), X1, formulas=["adam"])


@pytest.mark.parametrize("symmetric", [True, False])
def test_closed_form(symmetric):
    rng = np.random.default_rng(3)
    a = rng.normal(size=(6, 6))
    kernel = a @ a.T if symmetric else a + 4 * np.eye(6)
    y, f0, k_test, f0_test = (rng.normal(size=s) for s in ((6, 2), (6, 2), (3, 6), (3, 2)))
    for ridge, weight, n in ((0.1, 1.0, None), (0.02, 0.3, 3), (0.5, 0.0, 6)):
        model = fit_kernel_regression(kernel, y, f0, ridge=ridge, f0_weight=weight, examples=n)
        alpha = np.linalg.inv(kernel + (n or 6) * ridge * np.eye(6)) @ (y - weight * f0)
        np.testing.assert_allclose(model.alpha, alpha, atol=1e-12)
        np.testing.assert_allclose(model.predict(k_test, f0_test), weight * f0_test + k_test @ alpha, atol=1e-11)
    with pytest.raises(ConfigError, match=r"-1\.0"):
        fit_kernel_regression(kernel, y, f0, ridge=-1.0)


def linear_problem(seed, n=12, d=5, outputs=3):
    rng = np.random.default_rng(seed)
    x, x_test = rng.normal(size=(n, d)), rng.normal(size=(4, d))
    return x, x_test, rng.normal(size=(n, outputs)), {"w": jnp.asarray(rng.normal(size=(d, outputs)))}


@pytest.mark.parametrize("ridge", [1e-4, 0.3, 20.0])
def test_on_a_linear_model_it_is_ridge_regression(x64, ridge):
    """min_W 1/n |X W - Y|^2 + lambda |W - W_0|^2 has W - W_0 = (X^T X + n lambda I)^{-1} X^T (Y - X W_0)."""
    x, x_test, y, params = linear_problem(0)
    kernel = as_matrix(output_kernels(linear, params, x, formulas=["sgd"])["sgd"])
    cross = as_matrix(output_kernels(linear, params, x_test, x, formulas=["sgd"])["sgd"])
    w0 = np.asarray(params["w"])
    model = fit_kernel_regression(
        kernel, y.reshape(-1, 1), (x @ w0).reshape(-1, 1), ridge=ridge, examples=len(x)
    )  # all outputs of all examples share one lambda and one kernel
    w = w0 + np.linalg.solve(x.T @ x + len(x) * ridge * np.eye(5), x.T @ (y - x @ w0))
    predicted = model.predict(cross, (x_test @ w0).reshape(-1, 1)).reshape(4, 3)
    np.testing.assert_allclose(predicted, x_test @ w, rtol=0, atol=1e-10)


def test_gradient_descent_from_theta_0_ends_at_the_regression_without_ridge(x64):
    """n < P: many interpolating solutions; descent finds the one nearest theta_0, and so does the least-norm alpha."""
    rng = np.random.default_rng(1)
    x, x_test, y = rng.normal(size=(4, 9)), rng.normal(size=(3, 9)), rng.normal(size=(4, 1))
    w0 = rng.normal(size=(9, 1))
    w = w0.copy()
    for _ in range(20_000):
        w -= 0.05 * x.T @ (x @ w - y)
    model = fit_kernel_regression(x @ x.T, y, x @ w0, ridge=0.0)
    np.testing.assert_allclose(model.predict(x_test @ x.T, x_test @ w0), x_test @ w, rtol=0, atol=1e-9)


def test_order_and_copies_of_the_training_examples_do_not_matter():
    rng = np.random.default_rng(5)
    g, g_test, y, f0 = (rng.normal(size=s) for s in ((8, 20), (3, 20), (8, 2), (8, 2)))
    predict = lambda rows: fit_kernel_regression(
        g[rows] @ g[rows].T, y[rows], f0[rows], ridge=0.05
    ).predict(g_test @ g[rows].T, np.zeros((3, 2)))  # fmt: skip
    once = predict(np.arange(8))
    np.testing.assert_allclose(predict(rng.permutation(8)), once, atol=1e-10)
    np.testing.assert_allclose(predict(np.tile(np.arange(8), 3)), once, atol=1e-10)  # n lambda grows with n
    assert np.abs(predict(np.r_[np.arange(8), 0, 0, 0]) - once).max() > 1e-3  # but not where one counts more


def planted(noise, seed=0, n=120, d=40):
    """y = x w + noise, w ~ N(0, 1/d): the best lambda of ridge regression is noise^2 d / n."""
    rng = np.random.default_rng(seed)
    x, w = rng.normal(size=(n, d)), rng.normal(size=(d, 1)) / np.sqrt(d)
    return x, x @ w + noise * rng.normal(size=(n, 1)), noise**2 * d / n


@pytest.mark.parametrize("noise", [0.1, 1.0, 3.0])
def test_cross_validation_finds_the_ridge_that_was_planted(noise):
    x, y, best = planted(noise)
    ridges = [best * factor for factor in (1e-4, 1e-2, 1.0, 1e2, 1e4)]
    found = choose_ridge(x @ x.T, y, np.zeros_like(y), ridges=ridges)
    assert found.ridge == best and not found.at_edge


def test_cross_validation_against_a_plain_loop():
    x, y, best = planted(1.0, n=10, d=3)
    rng = np.random.default_rng(2)
    f0, kernel = rng.normal(size=y.shape), x @ x.T
    found = choose_ridge(kernel, y, f0, ridges=[best, 3.0], f0_weights=(1.0, 0.5), folds=10)  # leave one out
    for row in found.table:
        errors = []
        for i in range(10):
            rest = np.delete(np.arange(10), i)
            lhs = kernel[np.ix_(rest, rest)] + 9 * row["ridge"] * np.eye(9)
            alpha = np.linalg.solve(lhs, (y - row["f0_weight"] * f0)[rest])
            errors.append((row["f0_weight"] * f0[i] + kernel[i, rest] @ alpha - y[i]) ** 2)
        assert row["squared"] == pytest.approx(np.mean(errors), rel=1e-9)
    assert found.ridge in (best, 3.0) and found.at_edge
    assert min(row["squared"] for row in found.table) == next(
        row["squared"] for row in found.table if (row["ridge"], row["f0_weight"]) == (found.ridge, found.f0_weight)
    )


def test_cross_validation_keeps_the_outputs_of_an_example_together():
    """Each example's two outputs are copies: with one left in, the other would be known."""
    rng = np.random.default_rng(4)
    g = np.repeat(rng.normal(size=(9, 30)), 2, axis=0)
    y = np.repeat(rng.normal(size=(9, 1)), 2, axis=0)
    found = choose_ridge(g @ g.T, y, np.zeros_like(y), ridges=[1e-6], examples=9, folds=9)
    assert found.table[0]["squared"] > 0.2
    assert choose_ridge(g @ g.T, y, np.zeros_like(y), ridges=[1e-6], folds=18).table[0]["squared"] < 1e-3


def test_accuracy_decides_and_squared_error_breaks_ties():
    rng = np.random.default_rng(0)
    valid = np.ones((30, 3), bool)
    gold = rng.integers(0, 3, 30)
    features = np.eye(3)[gold] + 0.05 * rng.normal(size=(30, 3))
    targets = centred_targets(gold, valid)
    kernel = features @ features.T
    found = choose_ridge(
        kernel, targets, np.zeros_like(targets), ridges=[1e-8, 1e-4, 1e3], criterion="accuracy", seed=3
    )
    accuracies = {row["ridge"]: row["accuracy"] for row in found.table}
    assert accuracies[1e-8] == accuracies[1e-4] == 1.0
    squared = {row["ridge"]: row["squared"] for row in found.table}
    assert found.ridge == min(squared, key=squared.get)
    for wrong in ({"criterion": "f1"}, {"folds": 1}):
        with pytest.raises(ConfigError):
            choose_ridge(kernel, targets, np.zeros_like(targets), ridges=[1.0], **wrong)


def test_choices_that_do_not_exist_never_win():
    outputs = np.array([[-3.0, -2.0, 0.0], [1.0, 0.0, 5.0]])
    valid = np.array([[True, True, False], [True, True, True]])
    targets = centred_targets(np.array([1, 0]), valid)
    np.testing.assert_allclose(targets, [[-0.5, 0.5, 0], [2 / 3, -1 / 3, -1 / 3]])
    np.testing.assert_array_equal(right_answers(outputs, targets, valid), [True, False])
    assert accuracy(outputs, targets, valid) == 0.5 and accuracy(outputs, targets) == 0.0


def test_the_grid_is_in_units_of_the_kernel():
    kernel = np.diag([1.0, 3.0, 2.0, 2.0])
    assert ridge_grid(kernel, 2, relative=(0.5, 1.0)) == [0.5, 1.0]
    assert ridge_grid(10 * kernel, 2, relative=(0.5,)) == [5.0]
    with pytest.raises(ConfigError, match="zero"):
        ridge_grid(np.zeros((2, 2)), 2)
