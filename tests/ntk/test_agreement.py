"""Agreement of kernel matrices: against scipy, written-out formulas and resamples made explicitly."""

import numpy as np
import pytest
import scipy.stats

from ntkjax.ntk import agreement as module
from ntkjax.ntk.agreement import METRICS, agreement, roles_of, statistics
from ntkjax.ntk.metrics import (
    centred,
    cka,
    cos_frobenius,
    frobenius_error,
    kendall,
    matrix_scores,
    off_diagonal,
    participation_ratio,
    pearson,
    spearman,
    top_n_overlap,
)

N = 14
DOMAIN = np.array([0, 3, 4, 9])


@pytest.fixture(scope="module")
def pair():
    """Two Gram matrices that agree in part; rounding makes ties."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(N, 6)) + 1.0
    noise = rng.normal(size=(N, 6))
    gram = lambda f: np.round(f @ f.T, 1)
    return gram(features + 0.7 * noise), gram(features)


def plain(a, e, domain=DOMAIN, n=3):
    """The metrics of `METRICS` from the functions of metrics.py."""
    scores = matrix_scores(a, domain), matrix_scores(e, domain)
    return {
        "cos_f": cos_frobenius(a, e),
        "frobenius_error": frobenius_error(a, e),
        "cka": cka(a, e),
        "pearson": pearson(off_diagonal(a), off_diagonal(e)),
        "spearman": spearman(off_diagonal(a), off_diagonal(e)),
        "kendall": kendall(off_diagonal(a), off_diagonal(e)),
        "score_spearman": spearman(*scores),
        "top_n_overlap": top_n_overlap(*scores, n),
        "participation": participation_ratio(a),
        "participation_exact": participation_ratio(e),
    }


def test_matrix_metrics_are_their_equations(pair):
    a, e = pair
    h = np.eye(N) - 1 / N
    assert cos_frobenius(a, e) == pytest.approx(np.trace(a @ e) / np.sqrt(np.trace(a @ a) * np.trace(e @ e)))
    np.testing.assert_allclose(centred(a), h @ a @ h, atol=1e-12)
    assert cka(a, e) == pytest.approx(cos_frobenius(h @ a @ h, h @ e @ h))
    best = min(np.linalg.norm(c * a - e) for c in np.linspace(0, 2, 20001)) / np.linalg.norm(e)
    assert frobenius_error(a, e) == pytest.approx(best, rel=1e-6)
    assert frobenius_error(a, e) == pytest.approx(np.sqrt(1 - cos_frobenius(a, e) ** 2))
    values = np.linalg.eigvalsh(a)
    assert participation_ratio(a) == pytest.approx(values.sum() ** 2 / (values**2).sum())
    assert participation_ratio(np.eye(5)) == pytest.approx(5)
    assert participation_ratio(np.ones((5, 5))) == pytest.approx(1)
    assert matrix_scores(a, DOMAIN)[0] == pytest.approx(a[DOMAIN, 1].mean())  # row 0 is in the domain
    assert matrix_scores(a)[2] == pytest.approx(np.delete(a[2], 2).mean())


@pytest.mark.parametrize("domain", [DOMAIN, None])
def test_the_estimate_is_the_plain_metric(pair, domain):
    found = agreement(*pair, domain_rows=domain, n=3, samples=10)
    for name, value in plain(*pair, domain).items():
        assert found[name] == pytest.approx(value, abs=1e-12), name
    assert set(METRICS) == set(plain(*pair, domain))
    assert found["flips"] == pytest.approx(3 * (1 - found["top_n_overlap"]))
    assert found["examples"] == N and found["draws"] == 1 and found["n"] == 3


def test_a_resample_is_the_matrix_of_its_draws_without_pairs_of_one_example(pair):
    a, e = pair
    rows = np.array([0, 0, 3, 9, 1, 2, 2, 2, 5, 6, 7, 8, 13, 13])  # 4 of the domain, then 10 scored
    weights = np.bincount(rows, minlength=N)[None].astype(float)
    found = statistics(a, e, weights, roles_of(N, DOMAIN, 3))
    distinct = rows[:, None] != rows[None]
    pairs = [(i, j) for i in range(N) for j in range(i) if distinct[i, j]]
    off = [np.array([k[rows[i], rows[j]] for i, j in pairs]) for k in (a, e)]
    assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(*off).statistic, abs=1e-12)
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(*off).statistic, abs=1e-12)
    assert found["kendall"] == pytest.approx(scipy.stats.kendalltau(*off).statistic, abs=1e-12)
    kept = distinct | np.eye(N, dtype=bool)  # every draw's own entry, and pairs of different examples
    x, y = (np.where(kept, k[np.ix_(rows, rows)], 0) for k in (a, e))
    assert found["cos_f"] == pytest.approx((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum()), abs=1e-12)
    assert found["participation"] == pytest.approx(np.trace(x) ** 2 / (x * x).sum(), abs=1e-12)
    left = [without_fit(k[np.ix_(rows, rows)], kept) for k in (a, e)]
    norms = [np.sqrt((m * m).sum()) for m in left]
    assert found["cka"] == pytest.approx((left[0] * left[1]).sum() / norms[0] / norms[1], abs=1e-10)
    scores = [k[np.ix_(rows[:4], rows[4:])].mean(axis=0) for k in (a, e)]
    assert found["score_spearman"] == pytest.approx(scipy.stats.spearmanr(*scores).statistic, abs=1e-12)
    assert found["top_n_overlap"] == pytest.approx(top_n_overlap(*scores, 3))


def without_fit(matrix, kept):
    """What least squares c_i + c_j over the ``kept`` entries leaves, one c for each draw; 0 elsewhere."""
    n = len(matrix)
    where = np.argwhere(kept)
    design = np.zeros((len(where), n))
    for row, (i, j) in enumerate(where):
        design[row, i] += 1
        design[row, j] += 1
    fit = np.linalg.lstsq(design, matrix[kept], rcond=None)[0]
    return np.where(kept, matrix - fit[:, None] - fit[None], 0)


def test_diagonals_of_examples_drawn_twice_do_not_bias_the_resamples():
    """With K = I the off-diagonal entries are all 0, whatever is drawn: participation stays at n."""
    found = agreement(np.eye(20), np.eye(20), samples=50)
    assert found["participation_low"] == found["participation_high"] == pytest.approx(20)
    assert np.isnan(found["pearson"]) and np.isnan(found["pearson_low"])


def test_invariances(pair):
    jitter = np.random.default_rng(2).normal(size=(N, N)) * 1e-3  # no ties: a sum in another order would break them
    a, e = (k + jitter + jitter.T for k in pair)
    base = agreement(a, e, domain_rows=DOMAIN, n=3, samples=20)
    scaled = agreement(7 * a, 0.1 * e, domain_rows=DOMAIN, n=3, samples=20)
    swapped = agreement(e, a, domain_rows=DOMAIN, n=3, samples=20)
    order = np.random.default_rng(1).permutation(N)
    moved = agreement(
        a[np.ix_(order, order)], e[np.ix_(order, order)], domain_rows=np.argsort(order)[DOMAIN], n=3, samples=20
    )
    for name in METRICS:
        assert scaled[name] == pytest.approx(base[name]), name
        assert scaled[f"{name}_low"] == pytest.approx(base[f"{name}_low"]), name
        if name not in ("participation", "participation_exact"):
            assert swapped[name] == pytest.approx(base[name]), name
        if name != "top_n_overlap":  # ties are broken by position
            assert moved[name] == pytest.approx(base[name]), name
    perfect = agreement(2 * e, e, domain_rows=DOMAIN, n=3, samples=20)
    for name in METRICS[:8]:
        best = 0 if name == "frobenius_error" else 1
        assert perfect[name] == pytest.approx(best, abs=1e-7)
        assert perfect[f"{name}_high"] == pytest.approx(best, abs=1e-7)
    assert perfect["expected_flips"] == 0 and perfect["domain_flips"] > 0


def test_a_constant_matrix_agrees_with_nothing_and_says_so(pair):
    found = agreement(np.full((N, N), 3.0), pair[1], domain_rows=DOMAIN, samples=10)
    for name in ("cka", "pearson", "spearman", "kendall", "score_spearman"):
        assert np.isnan(found[name]) and np.isnan(found[f"{name}_low"]), name
    assert np.isfinite(found["cos_f"]) and found["participation"] == pytest.approx(1)
    zero = agreement(np.zeros((N, N)), pair[1], domain_rows=DOMAIN, samples=10)
    assert np.isnan(zero["cos_f"]) and np.isnan(zero["frobenius_error"]) and np.isnan(zero["participation"])
    assert np.isnan(cos_frobenius(np.zeros((3, 3)), np.eye(3))) and np.isnan(cka(np.ones((3, 3)), np.eye(3)))
    assert np.isnan(frobenius_error(np.eye(3), np.zeros((3, 3)))) and np.isnan(participation_ratio(np.zeros((3, 3))))


def test_resamples_on_which_a_metric_is_not_defined_are_counted():
    """Two examples of a scored three differ: whoever draws neither sees a constant."""
    k = np.ones((5, 5))
    k[2, 0] = k[0, 2] = 2.0
    found = agreement(k, k, domain_rows=np.array([0, 1]), n=1, samples=100)
    assert found["score_spearman"] == pytest.approx(1) and 0 < found["undefined_resamples"] < 100


def test_what_cannot_be_compared_is_refused(pair):
    a, e = pair
    for wrong, message in [
        ((a[:-1], e), "square|shape"),
        ((np.where(np.eye(N), np.nan, a), e), "finite"),
        ((a + np.triu(np.ones((N, N)), 1) * 9, e), "symmetric"),
    ]:
        with pytest.raises(ValueError, match=message):
            agreement(*wrong)
    for options, message in [
        ({"domain_rows": [0, 0]}, "distinct"),
        ({"domain_rows": [N]}, "rows of 0 to 13"),
        ({"domain_rows": range(N - 1)}, "at least 2"),
        ({"domain_rows": DOMAIN, "n": 11}, "between 1 and the 10"),
    ]:
        with pytest.raises(ValueError, match=message):
            agreement(a, e, **{k: np.array(v) if k != "n" else v for k, v in options.items()})


def test_draws_are_averaged_and_their_spread_is_reported(pair):
    a, e = pair
    draws = np.stack([a, e, (a + e) / 2])
    found = agreement(draws, e, domain_rows=DOMAIN, n=3, samples=30)
    each = [plain(d, e)["cka"] for d in draws]
    assert found["cka"] == pytest.approx(np.mean(each)) and found["draws"] == 3
    assert found["cka_sd"] == pytest.approx(np.std(each, ddof=1))
    assert found["cka_low"] <= found["cka"] <= found["cka_high"]
    assert np.isnan(agreement(a, e, samples=5)["cka_sd"])


def test_intervals_cover_as_often_as_they_say():
    """Spearman of the scores of two kernels that share half of their features; the truth from many examples."""
    rng = np.random.default_rng(3)
    mix = rng.normal(size=(8, 2, 3))

    def draw(count):
        z = rng.normal(size=(count, 8))
        first, second = np.tanh(z @ mix[:, 0]), np.tanh(z @ mix[:, 1])
        shared = np.tanh(z[:, :3])
        return [np.concatenate([f, shared], axis=1) @ np.concatenate([f, shared], axis=1).T for f in (first, second)]

    truth = np.mean([pearson(*map(off_diagonal, draw(200))) for _ in range(5)])
    inside = 0
    for _ in range(20):
        found = agreement(*draw(32), samples=60)
        inside += found["pearson_low"] <= truth <= found["pearson_high"]
    assert inside >= 16  # 19 expected


def test_pairs_in_chunks_are_the_same(pair, monkeypatch):
    whole = agreement(*pair, domain_rows=DOMAIN, samples=20)
    monkeypatch.setattr(module, "CHUNK", 500)
    parts = agreement(*pair, domain_rows=DOMAIN, samples=20)
    assert parts == pytest.approx(whole, nan_ok=True)
