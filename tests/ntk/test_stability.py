"""The collinearity bound is never violated and nearly attained; stability by hand and along real descent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkjax.ntk import kernel_matrix
from ntkjax.ntk.stability import METRICS, collinearity, collinearity_bound, kernel_stability


def random_kernel(rng, n, rank):
    features = rng.normal(size=(n, rank)) * np.exp(rng.normal(size=rank))
    return features @ features.T


@pytest.mark.parametrize("closeness", [0.0, 0.5, 0.9, 0.999, 1 - 1e-9])
def test_the_bound_is_never_violated(closeness):
    rng = np.random.default_rng(0)
    for _ in range(200):
        n = int(rng.integers(2, 9))
        theta_0, other = (random_kernel(rng, n, int(rng.integers(1, 12))) for _ in range(2))
        theta = 10 ** rng.uniform(-3, 3) * (closeness * theta_0 + (1 - closeness) * other)
        split, size = collinearity(theta, theta_0), np.linalg.norm(theta_0)
        np.testing.assert_allclose(split.scale * theta_0 + split.remainder, theta, atol=1e-9 * np.abs(theta).max())
        cosine = np.sum(theta * theta_0) / (np.linalg.norm(theta) * size)
        assert split.epsilon == pytest.approx(1 - cosine, abs=1e-12)
        eta, gammas = rng.uniform(0.1, 2), rng.normal(size=(20, n))
        for gamma in [*gammas, *np.linalg.eigh(split.remainder)[1].T]:
            moved = np.linalg.norm(eta * (theta @ gamma - split.scale * theta_0 @ gamma))
            allowed = eta * split.scale * size * np.linalg.norm(gamma)
            assert moved <= allowed * split.perturbation * (1 + 1e-6) + 1e-12 * allowed
        assert split.perturbation <= split.bound * (1 + 1e-6) + 1e-12


@pytest.mark.parametrize("tangent", [1e-4, 1e-2, 0.3, 2.0])
@pytest.mark.parametrize("scale", [0.1, 7.0])
def test_the_bound_is_attained_by_a_remainder_of_rank_one(tangent, scale):
    theta_0 = np.diag([1.0, 2.0, 2.0, 0.0])  # |Theta_0| = 3, blind to the last example
    remainder = np.zeros((4, 4))
    remainder[3, 3] = tangent * scale * 3
    split = collinearity(scale * theta_0 + remainder, theta_0)
    assert split.perturbation == pytest.approx(tangent, rel=1e-9)
    assert split.epsilon == pytest.approx(1 - 1 / np.sqrt(1 + tangent**2), rel=1e-6)
    assert split.bound == pytest.approx(np.sqrt(2 * split.epsilon) / (1 - split.epsilon))
    if tangent <= 1e-2:  # sqrt(2 eps - eps^2) / sqrt(2 eps) -> 1
        assert split.bound == pytest.approx(split.perturbation, rel=2e-5)
    else:
        assert split.bound > split.perturbation


def test_the_bound_needs_the_rate_of_the_kernel_step():
    """A kernel that grew tenfold and turned a little: eta |Theta_0| ... without c is less than what happens."""
    theta_0, gamma = np.diag([1.0, 0.0]), np.array([0.0, 1.0])
    theta = np.diag([10.0, 1.0])
    split = collinearity(theta, theta_0)
    moved = np.linalg.norm(theta @ gamma - split.scale * theta_0 @ gamma)
    assert split.scale == pytest.approx(10) and np.linalg.norm(theta_0) == 1
    assert split.bound < moved <= split.scale * split.bound


def test_kernels_without_anything_in_common():
    split = collinearity(np.diag([0.0, 1.0]), np.diag([1.0, 0.0]))
    assert split.scale == 0 and split.epsilon == 1 and split.bound == split.perturbation == np.inf
    assert collinearity_bound(0.0) == 0 and collinearity_bound(1.5) == np.inf
    assert np.isnan(collinearity(np.eye(2), np.zeros((2, 2))).scale)


def test_a_kernel_that_only_grows_is_stable():
    rng = np.random.default_rng(1)
    theta = random_kernel(rng, 6, 4)
    rows = kernel_stability([theta, 3 * theta, 3 * theta], [0, 5, 9])
    assert [set(row) for row in rows] == [{"step", *METRICS}] * 3
    for row in rows:
        for name in ("cos_F", "cka", "rank_correlation", "score_spearman", "score_overlap"):
            assert row[name] == pytest.approx(1, abs=1e-12), name
        assert row["bound"] < 1e-7 and row["perturbation"] < 1e-7
        values = np.linalg.eigvalsh(theta)
        assert row["participation_ratio"] == pytest.approx(values.sum() ** 2 / np.sum(values**2))
    assert np.isnan(rows[0]["velocity"]) and np.isnan(rows[0]["turning"])
    assert rows[1]["velocity"] == pytest.approx(2 / 3 / 5) and rows[2]["velocity"] == 0
    assert rows[1]["turning"] == pytest.approx(0, abs=1e-12)
    assert [row["growth"] for row in rows] == pytest.approx([1, 3, 3])


def test_turning_is_the_kernel_distance_per_step():
    a, b = np.diag([1.0, 0.0, 0.0]), np.diag([1.0, 1.0, 0.0])
    rows = kernel_stability([a, b, b], [0, 4, 6], scores=[np.arange(4.0), np.arange(4.0)[::-1], np.arange(4.0)], top=1)
    assert rows[1]["turning"] == pytest.approx((1 - 1 / np.sqrt(2)) / 4) and rows[2]["turning"] < 1e-15
    assert rows[1]["cos_F"] == pytest.approx(1 / np.sqrt(2))
    assert [row["score_spearman"] for row in rows] == pytest.approx([1, -1, 1])
    assert [row["score_overlap"] for row in rows] == [1, 0, 1]
    for wrong in ({"steps": [0, 1]}, {"steps": [0, 2, 2]}, {"steps": [0, 1, 2], "scores": [np.arange(4.0)]}):
        with pytest.raises(ValueError):
            kernel_stability([a, b, b], **wrong)


def net(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def test_a_real_step_of_descent_stays_within_the_bound(x64):
    """f moves by -eta Theta_t gamma, and what that differs from the frozen kernel's step is within the bound."""
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(6, 3)), rng.normal(size=6)
    params = {"a": jnp.asarray(rng.normal(size=(3, 8))), "b": jnp.asarray(rng.normal(size=8))}
    loss = jax.grad(lambda p: 0.5 * jnp.sum((net(p, x) - y) ** 2))
    descend = lambda p, eta: jax.tree.map(lambda leaf, g: leaf - eta * g, p, loss(p))
    theta_0 = kernel_matrix(net, params, x)
    for _ in range(30):
        params = descend(params, 0.02)
    theta, gamma, eta = kernel_matrix(net, params, x), np.asarray(net(params, x)) - y, 1e-6
    moved = (np.asarray(net(descend(params, eta), x)) - np.asarray(net(params, x))) / eta
    np.testing.assert_allclose(moved, -theta @ gamma, rtol=1e-3, atol=1e-4)
    split = collinearity(theta, theta_0)
    assert 1e-4 < split.epsilon < 0.5  # it did turn
    away = np.linalg.norm(moved + split.scale * theta_0 @ gamma)
    assert away <= split.scale * np.linalg.norm(theta_0) * split.bound * np.linalg.norm(gamma)


def test_the_kernel_of_a_linear_model_never_moves(x64):
    features = np.random.default_rng(3).normal(size=(5, 4))
    model = lambda p, x: x @ p["w"]
    kernels = [kernel_matrix(model, {"w": jnp.full(4, w)}, features) for w in (0.0, 3.0)]
    last = kernel_stability(kernels, [0, 10])[1]
    assert last["cos_F"] == pytest.approx(1, abs=1e-12) and last["velocity"] < 1e-15 and last["bound"] < 1e-14
