"""Agreement of a kernel matrix A with a reference E: all metrics, with bootstrap intervals over examples.

**The bootstrap.** Examples are drawn with replacement, rows and columns together, so a resample is a vector w of
multiplicities. An example drawn twice would put its diagonal entry K_ii among the off-diagonal pairs, and inflate the
diagonal's share of every sum. Such pairs are therefore left out: the pair (i, j) counts W_ij = w_i w_j times for
i != j, and the diagonal entry W_ii = w_i times. All metrics are written with these weights, and the estimate itself is
the case w = 1; of CKA, H K H is what remains of K after its W-weighted least-squares fit c_i + c_j, which for w = 1 is
exactly H K H. Domain examples are resampled among themselves, and so are the scored ones.

**Draws.** What is random in a kernel (LoRA factors, probes, signs) gives several matrices of the same examples. Metrics
are averaged over them within each resample, so the interval is that of the mean over these draws; the spread over
draws is reported beside it and is no part of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from ntkjax.ntk.metrics import NOTHING, resample, square
from ntkjax.rng import numpy_rng

METRICS = (
    *("cos_f", "frobenius_error", "cka", "pearson", "spearman", "kendall"),
    *("score_spearman", "top_n_overlap", "participation", "participation_exact"),
)
"""Names in what `agreement` returns that have an interval over examples."""

CHUNK = 1 << 22  # numbers in one block of a resampled matrix or of pairs of pairs


@dataclasses.dataclass(frozen=True)
class Roles:
    """Which examples are the domain, and which are scored.

    Attributes:
      domain: rows that are averaged over, None for all others of each example.
      scored: columns that have a score.
      top: N, how many of the scored would be selected.
    """

    domain: np.ndarray | None
    scored: np.ndarray
    top: int


def roles_of(examples: int, domain_rows: np.ndarray | None, top: int | None) -> Roles:
    """The roles of ``examples`` examples; ``top`` None is a quarter of those scored.

    Raises:
      ValueError: fewer than 2 scored examples, a row outside the matrix or named twice, or ``top`` out of range.
    """
    domain = None if domain_rows is None else np.asarray(domain_rows, np.int64)
    if domain is not None and (
        not len(domain) or len(np.unique(domain)) < len(domain) or domain.min() < 0 or domain.max() >= examples
    ):
        raise ValueError(f"domain_rows must be distinct rows of 0 to {examples - 1}, at least one; got {domain}")
    scored = np.arange(examples) if domain is None else np.delete(np.arange(examples), domain)
    if len(scored) < 2:
        raise ValueError(f"{len(scored)} of {examples} examples are outside the domain; expected at least 2 to rank")
    top = max(1, len(scored) // 4) if top is None else top
    if not 1 <= top <= len(scored):
        raise ValueError(f"n must be between 1 and the {len(scored)} scored examples, got {top}")
    return Roles(domain, scored, top)


def agreement(
    approx: np.ndarray,
    exact: np.ndarray,
    *,
    domain_rows: np.ndarray | None = None,
    n: int | None = None,
    seed: int = 0,
    samples: int = 200,
    level: float = 0.95,
) -> dict[str, float]:
    """All that is reported of an approximation A of a kernel matrix E.

    Args:
      approx, exact: [n, n], or draws [S, n, n] of the same examples (one matrix goes with every draw of the other).
      domain_rows: the rows whose mean is the score s_j of each of the other examples; None: every example is scored
        against all others.
      n: N, examples selected; None: a quarter of those scored.
      seed, samples, level: of the bootstrap.

    Returns:
      A flat dict. For each name of `METRICS` its value (mean over draws), ``NAME_low`` and ``NAME_high`` (percentile
      interval over examples) and ``NAME_sd`` (over draws, NaN for one): cos_F, relative Frobenius error after the best
      scale and CKA (defined in ``ntkjax.ntk.metrics``); Pearson, Spearman and Kendall tau-b of the off-diagonal
      entries; Spearman of the scores and the share of the top N in common; participation ratios (tr K)^2 / |K|_F^2.

      With T(K, w) the top N by the scores s_j = sum_i w_i K_ij / sum_i w_i, and w^b the b-th resample of the domain:

      - ``flips`` = N - |T(A, 1) n T(E, 1)|: how many of the N selected change;
      - ``expected_flips`` = mean_b [N - |T(A, w^b) n T(E, w^b)|], ``_low`` and ``_high`` its percentiles over b: the
        same for a domain of other examples from the same source;
      - ``domain_flips`` = mean_b [N - |T(E, w^b) n T(E, 1)|]: what drawing another domain changes by itself, to
        compare the one above with;
      - ``examples``, ``scored``, ``n``, ``draws``; ``undefined_resamples``: those left out of some interval because a
        metric was not defined there (a constant matrix, say). A metric that is not defined at all is NaN.
    """
    first, second = _draws(approx, exact)
    roles = roles_of(first.shape[1], domain_rows, n)
    rng = numpy_rng(seed, "agreement")
    groups = [roles.scored] if roles.domain is None else [roles.domain, roles.scored]
    # The estimate is row 0, all weights 1; the resamples follow.
    resamples = resample(rng, first.shape[1], samples, groups)
    weights = np.concatenate([np.ones((1, first.shape[1])), resamples])
    entries = [statistics(a, e, weights, roles) for a, e in zip(first, second)]
    result: dict[str, float] = {}
    undefined = np.zeros(samples, bool)
    for name in METRICS:
        values = np.stack([entry[name] for entry in entries])  # [S, 1 + samples]
        means = values.mean(axis=0)
        # Where a metric is NaN on the examples themselves, no resample is to blame.
        undefined |= np.isnan(means[1:]) & ~np.isnan(means[0])
        result[name] = float(means[0])
        result[f"{name}_low"], result[f"{name}_high"] = _interval(means, level)
        result[f"{name}_sd"] = float(values[:, 0].std(ddof=1)) if len(values) > 1 else float("nan")
    result |= _flips(first, second, resamples, roles, level)
    counts = {"examples": first.shape[1], "scored": len(roles.scored), "n": roles.top, "draws": len(first)}
    return result | counts | {"undefined_resamples": int(undefined.sum())}


def statistics(
    approx: Float[np.ndarray, "n n"],
    exact: Float[np.ndarray, "n n"],
    weights: Float[np.ndarray, "B n"],
    roles: Roles,
) -> dict[str, Float[np.ndarray, " B"]]:
    """Each of `METRICS` under B vectors of multiplicities (all ones: the plain metric), NaN where not defined."""
    a, e = square(approx), square(exact)
    upper = np.triu_indices(len(a), 1)
    pairs = weights[:, upper[0]] * weights[:, upper[1]]  # [B, P]
    product = lambda x, y: weights @ (np.diag(x) * np.diag(y)) + 2 * (pairs @ (x[upper] * y[upper]))
    with np.errstate(divide="ignore", invalid="ignore"):
        aa, ee = product(a, a), product(e, e)
        cos = product(a, e) / np.sqrt(aa * ee)
        values = {
            "cos_f": cos,
            "frobenius_error": np.sqrt(np.maximum(0.0, 1.0 - cos * cos)),
            "cka": _cka(a, e, weights),
            "pearson": weighted_pearson(*np.broadcast_arrays(a[upper], e[upper], pairs)),
            "spearman": weighted_pearson(mean_ranks(a[upper], pairs), mean_ranks(e[upper], pairs), pairs),
            "kendall": weighted_kendall(a[upper], e[upper], pairs),
            "participation": (weights @ np.diag(a)) ** 2 / aa,
            "participation_exact": (weights @ np.diag(e)) ** 2 / ee,
        }
    of_a, of_e = weighted_scores(a, weights, roles), weighted_scores(e, weights, roles)
    counts = weights[:, roles.scored]
    values["score_spearman"] = weighted_pearson(ranks_by_row(of_a, counts), ranks_by_row(of_e, counts), counts)
    shared = np.minimum(selected_counts(of_a, counts, roles.top), selected_counts(of_e, counts, roles.top))
    values["top_n_overlap"] = shared.sum(axis=1) / roles.top
    return values


def weighted_scores(
    matrix: Float[np.ndarray, "n n"], weights: Float[np.ndarray, "B n"], roles: Roles
) -> Float[np.ndarray, "B scored"]:
    """s_j = sum_i w_i K_ij / sum_i w_i over the domain rows i, or over all i != j; NaN where no row is left."""
    with np.errstate(divide="ignore", invalid="ignore"):
        if roles.domain is None:
            own = weights * np.diag(matrix)
            return (weights @ matrix - own) / (weights.sum(axis=1, keepdims=True) - weights)
        kept = weights[:, roles.domain]
        return kept @ matrix[np.ix_(roles.domain, roles.scored)] / kept.sum(axis=1, keepdims=True)


def selected_counts(
    scores: Float[np.ndarray, "B p"], counts: Float[np.ndarray, "B p"], top: int
) -> Float[np.ndarray, "B p"]:
    """How many of the ``counts`` copies of each example are among the ``top`` highest scores, ties by lower index."""
    order = np.argsort(-scores, axis=1, kind="stable")
    sizes = np.take_along_axis(counts, order, axis=1)
    before = np.cumsum(sizes, axis=1) - sizes
    chosen = np.empty_like(sizes)
    # An example at the edge may have some of its copies inside and others outside.
    np.put_along_axis(chosen, order, np.clip(top - before, 0, sizes), axis=1)
    return chosen


def mean_ranks(values: Float[np.ndarray, " P"], weights: Float[np.ndarray, "B P"]) -> Float[np.ndarray, "B P"]:
    """Ranks of ``values`` from 1, each repeated as often as its weight says, equal values sharing their mean rank."""
    group, sizes = _groups(values, weights)
    before = np.cumsum(sizes, axis=1) - sizes
    return (before + (sizes + 1) / 2)[:, group]


def ranks_by_row(values: Float[np.ndarray, "B p"], weights: Float[np.ndarray, "B p"]) -> Float[np.ndarray, "B p"]:
    """`mean_ranks` where every row has values of its own: sum_k w_k [v_k < v_j] + (1 + sum_k w_k [v_k = v_j]) / 2."""
    size = max(1, CHUNK // values.shape[1] ** 2)
    parts = []
    for start in range(0, len(values), size):
        v, w = values[start : start + size], weights[start : start + size]
        below, equal = v[:, None, :] < v[:, :, None], v[:, None, :] == v[:, :, None]
        parts.append(np.einsum("bjk,bk->bj", below, w) + (1 + np.einsum("bjk,bk->bj", equal, w)) / 2)
    ranks = np.concatenate(parts)
    return np.where(np.isfinite(values).all(axis=1, keepdims=True), ranks, np.nan)


def weighted_pearson(
    a: Float[np.ndarray, "B P"], b: Float[np.ndarray, "B P"], weights: Float[np.ndarray, "B P"]
) -> Float[np.ndarray, " B"]:
    """Pearson correlation of pairs (a_p, b_p), each counted ``weights`` times; NaN where one is constant."""
    total = weights.sum(axis=1)
    mean = lambda x: np.einsum("bp,bp->b", weights, x) / np.maximum(total, 1)
    dot = lambda x, y: np.einsum("bp,bp,bp->b", weights, x, y)
    with np.errstate(divide="ignore", invalid="ignore"):
        whole = dot(a, a), dot(b, b)
        a, b = a - mean(a)[:, None], b - mean(b)[:, None]
        squares = dot(a, a), dot(b, b)
        # Constant but for rounding: the variance is nothing beside the mean square. A quotient of roundings would be a
        # correlation between -1 and 1 that means nothing.
        varies = (squares[0] > NOTHING**2 * whole[0]) & (squares[1] > NOTHING**2 * whole[1])
        return np.where(varies, dot(a, b) / np.sqrt(squares[0] * squares[1]), np.nan)


def weighted_kendall(
    a: Float[np.ndarray, " P"], b: Float[np.ndarray, " P"], weights: Float[np.ndarray, "B P"]
) -> Float[np.ndarray, " B"]:
    """tau-b = sum_pq w_p w_q s_pq t_pq / sqrt(sum w w s^2 sum w w t^2), s = sign(a_p - a_q), t = sign(b_p - b_q)."""
    total, size = np.zeros(len(weights)), len(a)
    rows = max(1, CHUNK // size)
    of_a, of_b = _groups(a, weights), _groups(b, weights)
    s, t = (group.astype(np.float32) for group, _ in (of_a, of_b))  # their order is that of the values
    small = weights.astype(np.float32)  # whole numbers: sums below 2^24 are exact
    for start in range(0, size, rows):
        block = slice(start, start + rows)
        signs = np.sign((s[block, None] - s[None]) * (t[block, None] - t[None]))
        total += np.einsum("bp,bp->b", weights[:, block], (small @ signs.T).astype(np.float64))
    pairs = weights.sum(axis=1) ** 2
    untied = [pairs - np.sum(sizes**2, axis=1) for _, sizes in (of_a, of_b)]
    with np.errstate(divide="ignore", invalid="ignore"):
        return total / np.sqrt(untied[0] * untied[1])


def _groups(
    values: Float[np.ndarray, " P"], weights: Float[np.ndarray, "B P"]
) -> tuple[Int[np.ndarray, " P"], Float[np.ndarray, "B g"]]:
    """The group of equal values that each belongs to, smallest first, and the weight of each group."""
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], np.diff(values[order]) > 0]))
    group = np.empty(len(values), np.int64)
    group[order] = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(values))))
    return group, np.add.reduceat(weights[:, order], starts, axis=1)


def _cka(a: np.ndarray, e: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """CKA under B weight vectors, a chunk of them at a time."""
    size, n = max(1, CHUNK // a.size), len(a)
    parts = []
    for start in range(0, len(weights), size):
        w = weights[start : start + size]
        pairs = w[:, :, None] * w[:, None, :]
        # The diagonal counts w_i times, not w_i^2: see the bootstrap above.
        pairs[:, np.arange(n), np.arange(n)] = w
        left = [_without_means(x, w, pairs) for x in (a, e)]
        dot = lambda x, y, pairs=pairs: np.einsum("bij,bij,bij->b", pairs, x, y)
        norms = [dot(x, x) for x in left]
        whole = [np.einsum("bij,ij,ij->b", pairs, x, x) for x in (a, e)]
        varies = (norms[0] > NOTHING**2 * whole[0]) & (norms[1] > NOTHING**2 * whole[1])
        parts.append(np.where(varies, dot(left[0], left[1]) / np.sqrt(norms[0] * norms[1]), np.nan))
    return np.concatenate(parts)


def _without_means(
    matrix: np.ndarray, w: Float[np.ndarray, "B n"], pairs: Float[np.ndarray, "B n n"]
) -> Float[np.ndarray, "B n n"]:
    """K_ij - c_i - c_j with c the weighted least-squares fit: (diag(W 1) + W) c = (W o K) 1.

    With W = w w^T - diag(w^2 - w) that is (D + w w^T) c = r, D = diag(w_i (sum w - 2 w_i + 2)): solved in closed form.
    """
    right = np.einsum("bij,ij->bi", pairs, matrix)
    diagonal = w * (w.sum(axis=1, keepdims=True) - 2 * w + 2)
    diagonal = np.where(w > 0, diagonal, 1.0)  # an example not drawn: c_i = 0, weight 0
    alone, shared = right / diagonal, w / diagonal
    dot = lambda x: np.einsum("bi,bi->b", w, x)
    # Sherman and Morrison: (D + w w^T)^-1 r = D^-1 r - D^-1 w (w^T D^-1 r) / (1 + w^T D^-1 w).
    fit = alone - shared * (dot(alone) / (1 + dot(shared)))[:, None]
    return matrix[None] - fit[:, :, None] - fit[:, None, :]


def _flips(first: np.ndarray, second: np.ndarray, resamples: np.ndarray, roles: Roles, level: float) -> dict:
    """What `agreement` says of flips: of all scored examples, under resamples of the domain rows alone."""
    weights = np.concatenate([np.ones((1, first.shape[1])), resamples])
    # The scored examples count once in every resample; only the domain is drawn anew.
    once = np.ones((len(weights), len(roles.scored)))
    chosen: Callable = lambda matrix: selected_counts(weighted_scores(matrix, weights, roles), once, roles.top)
    across, within = [], []
    for a, e in zip(first, second):
        of_a, of_e = chosen(a), chosen(e)
        across.append(roles.top - np.minimum(of_a, of_e).sum(axis=1))
        within.append(roles.top - np.minimum(of_e, of_e[:1]).sum(axis=1))
    flips, by_domain = np.mean(across, axis=0), np.mean(within, axis=0)
    low, high = np.quantile(flips[1:], [(1 - level) / 2, (1 + level) / 2])
    return {
        "flips": float(flips[0]),
        "expected_flips": float(flips[1:].mean()),
        "expected_flips_low": float(low),
        "expected_flips_high": float(high),
        "domain_flips": float(by_domain[1:].mean()),
    }


def _draws(approx: np.ndarray, exact: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as [S, n, n]."""
    first, second = (np.asarray(x, np.float64) for x in (approx, exact))
    first, second = (x[None] if x.ndim == 2 else x for x in (first, second))
    if first.ndim != 3 or first.shape[1:] != second.shape[1:] or (1 < len(first) != len(second) > 1):
        raise ValueError(
            f"expected kernel matrices [n, n] or draws [S, n, n] of one shape, got {approx.shape} and {exact.shape}"
        )
    count = max(len(first), len(second))
    return np.broadcast_to(first, (count, *first.shape[1:])), np.broadcast_to(second, (count, *second.shape[1:]))


def _interval(means: np.ndarray, level: float) -> tuple[float, float]:
    """Percentiles of the resamples on which the metric is defined; NaN where the estimate is not."""
    values = means[1:][~np.isnan(means[1:])]
    if np.isnan(means[0]) or not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
