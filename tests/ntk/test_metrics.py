"""Agreement of scores against formulas written out."""

import itertools

import numpy as np
import pytest
import scipy.stats

from ntkjax.ntk import bootstrap_interval, kendall, pearson, spearman, top_n_overlap


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    a = rng.normal(size=40).round(1)  # rounding makes ties
    return a, (a + rng.normal(size=40)).round(1)


def mean_ranks(x):
    return np.array([(x < v).sum() + ((x == v).sum() + 1) / 2 for v in x])


def test_pearson_and_spearman(pair):
    a, b = pair
    r = lambda x, y: ((x - x.mean()) * (y - y.mean())).sum() / (x.std() * y.std() * len(x))
    assert pearson(a, b) == pytest.approx(r(a, b), abs=1e-12)
    assert spearman(a, b) == pytest.approx(r(mean_ranks(a), mean_ranks(b)), abs=1e-12)


def test_kendall_counts_pairs(pair):
    a, b = pair
    pairs = list(itertools.combinations(range(len(a)), 2))
    signs = np.array([[np.sign(a[i] - a[j]), np.sign(b[i] - b[j])] for i, j in pairs])
    tau = signs.prod(axis=1).sum() / np.sqrt((signs[:, 0] ** 2).sum() * (signs[:, 1] ** 2).sum())
    assert kendall(a, b) == pytest.approx(tau, abs=1e-12)


def test_top_n_overlap_breaks_ties_by_index():
    assert top_n_overlap(np.array([3.0, 2, 1, 0]), np.array([0.0, 1, 2, 3]), 2) == 0
    assert top_n_overlap(np.array([3.0, 2, 1, 0]), np.array([2.0, 3, 1, 0]), 2) == 1
    assert top_n_overlap(np.zeros(4), np.array([1.0, 0, 0, 0]), 2) == 1


@pytest.mark.parametrize("scale, shift", [(1.0, 0.0), (1e-200, 0.0), (1e200, 0.0), (1.0, 1e6)])
@pytest.mark.parametrize("values", [2, 7, 1_000_000])
def test_the_rank_correlation_is_that_of_scipy_whatever_the_ties_and_scale(values, scale, shift):
    rng = np.random.default_rng(values)
    a, b = rng.integers(values, size=(2, 500)) * scale + shift
    assert spearman(a, b + a / 2) == pytest.approx(scipy.stats.spearmanr(a, b + a / 2).statistic, abs=1e-12)


def test_no_correlation_is_beyond_one():
    for n in range(2, 200):
        a = np.random.default_rng(n).normal(size=n)
        assert spearman(a, 3 * a) <= 1 and pearson(a, -a) >= -1 and pearson(a, 0.1 * a) <= 1


def test_constant_scores_have_no_correlation():
    for correlation in (spearman, pearson):
        assert np.isnan(correlation(np.ones(4), np.arange(4.0)))
        assert np.isnan(correlation(np.arange(4.0), np.full(4, 0.1)))


def test_scores_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="finite"):
        spearman(np.array([1.0, np.nan]), np.ones(2))
    with pytest.raises(ValueError, match="length"):
        pearson(np.ones(3), np.ones(2))
    with pytest.raises(ValueError, match="between"):
        top_n_overlap(np.ones(3), np.ones(3), 4)


def test_bootstrap_interval_of_a_mean_is_near_the_normal_one():
    x = np.random.default_rng(1).normal(size=400)
    low, high = bootstrap_interval(lambda v: float(v.mean()), x, seed=0, samples=2000)
    half = 1.96 * x.std() / 20
    assert low == pytest.approx(x.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(x.mean() + half, abs=0.15 * half)
    assert (low, high) == bootstrap_interval(lambda v: float(v.mean()), x, seed=0, samples=2000)


def test_bootstrap_keeps_rows_paired():
    x = np.random.default_rng(1).normal(size=50)
    assert bootstrap_interval(pearson, x, x.copy(), seed=0, samples=50) == pytest.approx((1, 1))
    assert np.isnan(bootstrap_interval(pearson, x, np.ones(50), seed=0, samples=5)).all()
