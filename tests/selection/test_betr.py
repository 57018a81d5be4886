"""BETR: ranks by hand, the classifier against Newton's method, and a planted group that the sample barely shows."""

import numpy as np
import pytest

from ntkjax.errors import ConfigError, UserError
from ntkjax.selection import METHODS
from ntkjax.selection.methods.betr import best_share, closeness
from ntkjax.selection.vote import unit_rows


def gaussian(rows, seed, width=4):
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


def labels_by_hand(domain, sample, count):
    """r_j = max_i log2(1 / rank_i(j)) one pair at a time, ranks by counting who is nearer."""
    unit = lambda x: x.astype(np.float64) / np.linalg.norm(x, axis=1, keepdims=True)
    similarity = unit(domain) @ unit(sample).T
    r = [max(np.log2(1 / (1 + np.sum(row > row[j]))) for row in similarity) for j in range(len(sample))]
    order = sorted(range(len(sample)), key=lambda j: (-r[j], -similarity[:, j].max()))
    return np.array(r), np.isin(np.arange(len(sample)), order[:count])


@pytest.mark.parametrize("members", [1, 5, 70])
def test_ranks_and_labels_are_those_by_hand(members):
    domain, sample = gaussian(members, 0), gaussian(50, 1)
    ranks, highest = closeness(unit_rows(domain)[0], unit_rows(sample)[0])
    r, positive = labels_by_hand(domain, sample, 10)
    np.testing.assert_allclose(-np.log2(ranks), r, atol=1e-12)
    np.testing.assert_array_equal(best_share(ranks, highest, 0.2), positive)


def test_labels_are_neither_none_nor_all():
    ranks, highest = np.arange(1, 6), np.zeros(5)
    assert [best_share(ranks, highest, s).sum() for s in (0.01, 0.5, 0.99)] == [1, 2, 4]


def newton(z, y, steps=50):
    """The minimum of 1/2 |w|^2 + sum log(1 + exp(-y (w z + b))), y in {0, 1}: weights and intercept."""
    x = np.concatenate([z, np.ones((len(z), 1))], axis=1)
    ridge, theta = np.diag([1.0] * z.shape[1] + [0.0]), np.zeros(z.shape[1] + 1)
    for _ in range(steps):
        p = 1 / (1 + np.exp(-x @ theta))
        theta -= np.linalg.solve(ridge + (x.T * (p * (1 - p))) @ x, ridge @ theta + x.T @ (p - y))
    return theta


def test_scores_are_the_log_odds_of_the_logistic_regression(planted):
    domain, pool = gaussian(6, 0), gaussian(60, 1)
    chosen = METHODS["betr"](classifier_share=0.2)(planted(domain, pool, 5))
    unit = pool.astype(np.float64) / np.linalg.norm(pool, axis=1, keepdims=True)
    z = (unit - unit.mean(0)) / unit.std(0)
    theta = newton(z, labels_by_hand(domain, pool, 12)[1].astype(float))
    np.testing.assert_allclose(chosen.scores, z @ theta[:-1] + theta[-1], atol=2e-3)
    assert chosen.diagnostics["classifier_positives"] == 12 and chosen.diagnostics["classifier_converged"]


def test_it_finds_a_planted_group_from_a_sample(planted):
    rng = np.random.default_rng(3)
    centre = np.array([2.0, 0, 0, 0, 0, 0])
    domain = centre + 0.3 * rng.normal(size=(8, 6))
    pool = rng.normal(size=(200, 6))
    near = np.arange(0, 200, 10)
    pool[near] = centre + 0.3 * rng.normal(size=(20, 6))
    problem = planted(domain, pool, 20)
    chosen = METHODS["betr"](classifier_sample=100)(problem)
    found = lambda rows: int(np.isin(rows, near).sum())
    assert chosen.diagnostics["classifier_sample"] == 100
    assert found(chosen.selected) >= 16 and found(METHODS["random"]()(problem).selected) <= 8


def test_what_it_cannot_do_is_refused(planted):
    for options in ({"classifier_sample": 1}, {"classifier_share": 0.0}, {"classifier_share": 1.0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            METHODS["betr"](**options)
    with pytest.raises(ConfigError, match="at least 2 rows"):
        METHODS["betr"]()(planted(gaussian(2, 0), gaussian(1, 1), 1))
    with pytest.raises(UserError, match="1 domain examples"):
        METHODS["betr"]()(planted(np.zeros((1, 4)), gaussian(5, 1), 1))
