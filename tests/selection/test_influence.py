"""influence against the inverse written out, and a planted group that only curvature shows."""

import numpy as np
import pytest

from ntkjax.errors import ConfigError
from ntkjax.selection import METHODS

OPTIONS = {"stage1": "off", "pool_sample": 8}


def gradients(seed, rows, width=6):
    return np.random.default_rng(seed).normal(size=(rows, width)) + 0.3


def test_kfac_of_one_vector_is_the_inverse_fisher(given):
    domain, pool = gradients(0, 7), gradients(1, 20)
    chosen = METHODS["influence"](damping=0.2, **OPTIONS)(given(domain, pool, 4))
    fisher = domain.T @ domain / 7
    damped = fisher + 0.2 * np.trace(fisher) / 6 * np.eye(6)
    expected = pool @ np.linalg.solve(damped, domain.mean(axis=0))
    np.testing.assert_allclose(chosen.scores, expected, rtol=1e-3, atol=1e-4)
    assert chosen.method == "influence" and chosen.diagnostics["precondition"] == "kfac"
    assert chosen.selected.tolist() == np.argsort(-expected)[:4].tolist()


def test_adam_divides_by_the_root_of_the_mean_squared_batch_gradient(given):
    domain, pool = gradients(0, 7), gradients(1, 20)
    chosen = METHODS["influence"](curvature="adam", **OPTIONS)(given(domain, pool, 4))
    mean = domain.mean(axis=0)
    second = mean**2 + ((domain**2).mean(axis=0) - mean**2) / 16
    np.testing.assert_allclose(chosen.scores, pool @ (mean / (np.sqrt(second) + 1e-8)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("iterations, converged", [(50, True), (1, False)])
def test_conjugate_gradients_say_what_they_reached(given, iterations, converged):
    domain, pool = gradients(0, 7), gradients(1, 20)
    options = {"curvature": "cg", "damping": 0.2, "cg_iterations": iterations, "cg_tolerance": 1e-4} | OPTIONS
    chosen = METHODS["influence"](**options)(given(domain, pool, 4))
    fisher = domain.T @ domain / 7
    damped = fisher + 0.2 * np.trace(fisher) / 6 * np.eye(6)
    expected = pool @ np.linalg.solve(damped, domain.mean(axis=0))
    assert np.allclose(chosen.scores, expected, rtol=1e-3, atol=1e-3) == converged
    assert chosen.diagnostics["cg_converged"] == converged
    assert (chosen.diagnostics["cg_residual"] <= 1e-4) == converged
    assert ("did not converge" in chosen.diagnostics.get("cg_warning", "")) != converged


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
def test_it_is_ntk_with_the_loss_kernel_and_a_preconditioner(make, curvature):
    one = METHODS["influence"](curvature=curvature, **OPTIONS)(make())
    other = METHODS["ntk"](kernel="loss", precondition=curvature, **OPTIONS)(make())
    np.testing.assert_array_equal(one.scores, other.scores)
    assert one.diagnostics == other.diagnostics


def test_it_finds_a_group_that_noise_hides_from_the_plain_score(given):
    rng = np.random.default_rng(3)
    signal, noise = np.eye(6)[0], np.eye(6)[1]
    domain = signal + 0.1 * rng.normal(size=(20, 6)) + (3 + 10 * rng.normal(size=(20, 1))) * noise
    useful = signal + 0.1 * rng.normal(size=(10, 6))
    loud = 0.1 * rng.normal(size=(50, 6)) + np.sign(domain[:, 1].mean()) * 5 * noise
    problem = given(domain, np.concatenate([useful, loud]), 10)
    assert sorted(METHODS["influence"](damping=0.01, **OPTIONS)(problem).selected) == list(range(10))
    assert not set(METHODS["ntk"](kernel="loss", **OPTIONS)(problem).selected) & set(range(10))
    assert np.sum(METHODS["random"]()(problem).selected < 10) < 5


@pytest.mark.parametrize("bad", [{"pool_sample": 0}, {"damping": 0.0}, {"direction": "cosine"}, {"cg_tolerance": 1.0}])
def test_what_cannot_be_is_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        METHODS["influence"](**bad)
