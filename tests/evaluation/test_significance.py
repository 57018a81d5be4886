"""Intervals and tests against scipy, closed forms, published values and simulated coverage."""

import numpy as np
import pytest
from scipy import stats

from ntkjax.errors import ConfigError, UserError
from ntkjax.evaluation.significance import (
    bootstrap_mean,
    hierarchical_bootstrap,
    hierarchical_p,
    holm,
    mcnemar,
    paired_bootstrap,
    wilson_interval,
)
from ntkjax.rng import numpy_rng


def table(both: int, first: int, second: int, neither: int):
    a = [1] * both + [1] * first + [0] * second + [0] * neither
    b = [1] * both + [0] * first + [1] * second + [0] * neither
    return np.array(a, bool), np.array(b, bool)


@pytest.mark.parametrize("method", ["bca", "percentile"])
def test_bootstrap_equals_scipy(method):
    values = np.random.default_rng(0).exponential(size=40)
    got = bootstrap_mean(values, resamples=2000, method=method, seed=5)
    expected = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=2000,
        method="BCa" if method == "bca" else "percentile",
        random_state=numpy_rng(5, "bootstrap_mean"),
    ).confidence_interval
    assert got.estimate == values.mean()
    assert (got.low, got.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert (got.n, got.method, got.level) == (40, method, 0.95)


def test_bca_of_a_mean_by_its_formula():
    """BCa written out: z0 from the share of resamples below, a from the third moment (exact jackknife of a mean)."""
    values = np.random.default_rng(1).exponential(size=60)
    got = bootstrap_mean(values, resamples=20_000, seed=1)
    means = values[np.random.default_rng(2).integers(0, 60, (20_000, 60))].mean(axis=1)
    z0 = stats.norm.ppf(np.mean(means < values.mean()))
    d = values - values.mean()
    a = np.sum(d**3) / (6 * np.sum(d**2) ** 1.5)
    ends = []
    for q in (0.025, 0.975):
        z = z0 + stats.norm.ppf(q)
        ends.append(np.quantile(means, stats.norm.cdf(z0 + z / (1 - a * z))))
    # Two sets of 20,000 resamples differ by about 1% of the width at these quantiles.
    assert (got.low, got.high) == pytest.approx(ends, abs=0.03 * (ends[1] - ends[0]))


def test_bootstrap_repeats_and_its_seed_matters():
    values = np.random.default_rng(0).normal(size=30)
    assert bootstrap_mean(values, seed=1, resamples=500) == bootstrap_mean(values, seed=1, resamples=500)
    assert bootstrap_mean(values, seed=1, resamples=500) != bootstrap_mean(values, seed=2, resamples=500)


def test_large_sample_is_the_normal_interval():
    values = np.random.default_rng(3).normal(2.0, 1.0, 2000)
    half = 1.96 * values.std(ddof=1) / np.sqrt(values.size)
    for method in ("bca", "percentile"):
        got = bootstrap_mean(values, method=method, resamples=4000)
        assert (got.low, got.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


@pytest.mark.parametrize("method", ["bca", "percentile"])
def test_coverage_of_the_paired_interval(method):
    """Right/wrong outcomes of two correlated runs, true difference 0.1: 95% intervals hold it 90 to 99% of the time."""
    rng, held, trials = np.random.default_rng(4), 0, 300
    for trial in range(trials):
        skill = rng.random(120)
        a, b = skill < 0.5, (skill < 0.5) ^ (rng.random(120) < np.where(skill < 0.5, 0.1, 0.3))
        got = paired_bootstrap(a, b, resamples=400, seed=trial, method=method)
        held += got.low <= 0.1 <= got.high
    assert 0.90 <= held / trials <= 0.99


def test_pairing_narrows_the_interval():
    rng = np.random.default_rng(5)
    hard = rng.normal(0, 3, 200)
    a, b = hard + rng.normal(0, 0.1, 200), hard + 0.2 + rng.normal(0, 0.1, 200)
    paired = paired_bootstrap(a, b, resamples=1000)
    assert paired.low > 0.15 and paired.high < 0.25
    shuffled = paired_bootstrap(a, rng.permutation(b), resamples=1000)
    assert shuffled.high - shuffled.low > 5 * (paired.high - paired.low)


def test_equal_values_have_a_degenerate_interval():
    got = bootstrap_mean([0.25] * 9)
    assert (got.estimate, got.low, got.high, got.method) == (0.25, 0.25, 0.25, "degenerate")
    assert bootstrap_mean([3.0]).method == "degenerate"


def test_bad_values_are_refused():
    with pytest.raises(UserError, match=r"1 of 3 values are not finite \(first at position 1: nan\)"):
        bootstrap_mean([1.0, np.nan, 2.0])
    with pytest.raises(UserError, match="non-empty"):
        bootstrap_mean([])
    with pytest.raises(UserError, match="2 outcomes against 3"):
        paired_bootstrap([1, 0], [1, 0, 1])
    with pytest.raises(ConfigError, match="level"):
        bootstrap_mean([1.0, 2.0], level=95.0)
    with pytest.raises(ConfigError, match="resamples"):
        bootstrap_mean([1.0, 2.0], resamples=3)


def test_wilson_known_values():
    # Newcombe (1998), table I: 81 of 263, and 0 of 20.
    got = wilson_interval(81, 263)
    assert (got.low, got.high) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    none = wilson_interval(0, 20)
    assert (none.low, none.high) == pytest.approx((0.0, 0.1611), abs=5e-5)
    with pytest.raises(UserError, match="3 of 2"):
        wilson_interval(3, 2)


def test_mcnemar_known_table():
    """Fagerland, Lydersen and Laake (2013), table 1 (b = 1, c = 7): exact 0.0703, mid-p 0.0391."""
    got = mcnemar(*table(1, 1, 7, 12))
    assert (got.both, got.only_first, got.only_second, got.neither) == (1, 1, 7, 12)
    assert got.p_exact == pytest.approx(0.0703125)
    assert got.p_mid == pytest.approx(0.0390625)


def test_mcnemar_against_scipy_and_by_enumeration():
    for b in range(8):
        for c in range(8):
            got = mcnemar(*table(3, b, c, 2))
            if b + c == 0:
                assert (got.p_exact, got.p_mid) == (1.0, 1.0)
                continue
            assert got.p_exact == pytest.approx(stats.binomtest(b, b + c, 0.5).pvalue)
            pmf = stats.binom.pmf(np.arange(b + c + 1), b + c, 0.5)
            distance = np.abs(2 * np.arange(b + c + 1) - (b + c))
            # Mid-p: outcomes more extreme, plus half of those as extreme.
            mid = pmf[distance > abs(b - c)].sum() + 0.5 * pmf[distance == abs(b - c)].sum()
            assert got.p_mid == pytest.approx(mid)
            assert got.p_mid < got.p_exact


def test_mcnemar_refuses_what_is_not_right_or_wrong():
    with pytest.raises(UserError, match="second holds values other than"):
        mcnemar([1, 0], [0.5, 1])
    with pytest.raises(UserError, match="two equally long"):
        mcnemar([1, 0], [1])


def test_holm_by_hand_and_order():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert holm([]).size == 0
    with pytest.raises(UserError, match="between 0 and 1"):
        holm([0.5, np.nan])


def test_holm_keeps_the_family_wise_error():
    p = np.random.default_rng(6).random((2000, 5))
    p[:, 0] = 1e-6  # one false hypothesis beside four true ones
    wrong = np.mean([np.any(holm(row)[1:] <= 0.05) for row in p])
    # At most 5%; and not far below, since Holm then tests the four at 0.05/4: 1 - (1 - 0.0125)^4 = 0.049.
    assert 0.03 <= wrong <= 0.065


def test_hierarchical_estimate_and_fixed_seeds():
    rng = np.random.default_rng(7)
    differences = rng.normal(0.3, 1.0, (3, 150)) + np.array([[-0.1], [0.0], [0.1]])
    fixed = hierarchical_bootstrap(differences, resample_seeds=False, resamples=4000)
    assert fixed.estimate == pytest.approx(differences.mean())
    # With the seeds fixed it is the bootstrap of the mean over seeds of each example.
    plain = bootstrap_mean(differences.mean(axis=0), method="percentile", resamples=4000)
    width = plain.high - plain.low
    assert (fixed.low, fixed.high) == pytest.approx((plain.low, plain.high), abs=0.05 * width)


def test_hierarchical_variance_is_seeds_plus_examples():
    """Closed form: examples give s^2/n of the seed means, seeds give the (biased) variance of the seed means / S."""
    rng = np.random.default_rng(8)
    seeds, n = 6, 400
    differences = rng.normal(0, 0.2, (seeds, 1)) + rng.normal(0, 1.0, (1, n)) * np.ones((seeds, 1))
    got = hierarchical_bootstrap(differences, resamples=8000)
    variance = differences.mean(axis=1).var() / seeds + differences.mean(axis=0).var() / n
    assert (got.high - got.low) / (2 * 1.96) == pytest.approx(np.sqrt(variance), rel=0.06)
    narrower = hierarchical_bootstrap(differences, resamples=8000, resample_seeds=False)
    assert narrower.high - narrower.low < 0.8 * (got.high - got.low)


def test_hierarchical_one_seed_and_block_size(monkeypatch):
    import ntkjax.evaluation.significance as module

    values = np.random.default_rng(9).normal(size=(1, 50))
    one = hierarchical_bootstrap(values, resamples=1000)
    assert one.low < values.mean() < one.high
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 500)
    small = hierarchical_bootstrap(values, resamples=1000)
    assert (small.low, small.high) == pytest.approx((one.low, one.high), abs=0.1)
    with pytest.raises(UserError, match="seeds x examples"):
        hierarchical_bootstrap(values[0])


def test_hierarchical_p_agrees_with_the_interval_and_with_a_normal_tail():
    rng = np.random.default_rng(10)
    differences = rng.normal(0.0, 1.0, (1, 900))
    differences += 0.07 - differences.mean()
    p = hierarchical_p(differences, resamples=8000)
    z = differences.mean() / (differences.std() / 30)
    assert p == pytest.approx(2 * stats.norm.sf(z), rel=0.25)
    for level in (0.5, 0.9, 0.95, 0.99):  # the same replicates: 0 is outside the interval where p is below alpha
        interval = hierarchical_bootstrap(differences, level=level, resamples=8000)
        assert (interval.low > 0) == (p < 1 - level)
    assert hierarchical_p(-differences, resamples=8000) == pytest.approx(p)


def test_hierarchical_p_at_its_ends():
    assert hierarchical_p(np.zeros((2, 5)), resamples=200) == 1.0
    assert hierarchical_p(np.ones((2, 5)), resamples=200) == pytest.approx(2 / 201)
    # Differences that cancel: every replicate of whole pairs is 0 but for rounding.
    assert hierarchical_p(np.array([[0.1], [0.1]]) - 0.1, resamples=200) == 1.0
    with pytest.raises(UserError, match="seeds x examples"):
        hierarchical_p(np.zeros(3))


def test_hierarchical_p_holds_its_level_under_the_null():
    rng = np.random.default_rng(11)
    p = [hierarchical_p(rng.normal(size=(1, 60)), resamples=400, seed=i) for i in range(300)]
    assert 0.02 < np.mean(np.asarray(p) < 0.05) < 0.10
