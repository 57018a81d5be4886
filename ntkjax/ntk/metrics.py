"""How far two sets of scores, or two kernel matrices, agree; bootstrap intervals.

``agreement`` in ``ntkjax.ntk.agreement`` reports all of them at once, with intervals over examples.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import scipy.stats
from jaxtyping import Float

Vector = Float[np.ndarray, " n"]
NOTHING = 1e-12  # of a norm: what is left of a matrix after centring is rounding below this share


def _pair(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel()
    if a.shape != b.shape or a.size < 2:
        raise ValueError(f"expected two vectors of one length >= 2, got {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("scores to compare must be finite: leave out the rows that were not scored")
    return a, b


def _statistic(function: Callable, a: np.ndarray, b: np.ndarray) -> float:
    a, b = _pair(a, b)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.stats.ConstantInputWarning)
        return float(function(a, b).statistic)


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """sum (a - mean a)(b - mean b) / (|a - mean a| |b - mean b|); NaN (undefined) if either is constant."""
    return _statistic(scipy.stats.pearsonr, a, b)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation of the ranks, ties sharing their mean rank; NaN if either is constant."""
    # Written out: scipy's ranks and correlation take more memory at a pool's length than scoring the pool.
    a, b = (_centred_ranks(x) for x in _pair(a, b))
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    # Beyond 1 by rounding only (Cauchy-Schwarz).
    return float(np.clip(a @ b / norms, -1.0, 1.0)) if norms > 0 else float("nan")


def _centred_ranks(x: Vector) -> Vector:
    """Rank minus the mean rank (n + 1) / 2, where the rank of equal values is the mean of their places in order."""
    ordered = np.sort(x)
    places = np.searchsorted(ordered, x, "left")
    places += np.searchsorted(ordered, x, "right")  # first place and last add up to this plus one
    return (places - len(x)) / 2


def kendall(a: np.ndarray, b: np.ndarray) -> float:
    """tau-b = (C - D) / sqrt((C + D + T_a)(C + D + T_b)): pairs concordant, discordant, tied in one only."""
    return _statistic(scipy.stats.kendalltau, a, b)


def top_n(scores: np.ndarray, n: int) -> np.ndarray:
    """Indices of the n largest scores, best first, ties by lower index."""
    return np.argsort(-np.asarray(scores), kind="stable")[:n]


def top_n_overlap(a: np.ndarray, b: np.ndarray, n: int) -> float:
    """|top_n(a) intersect top_n(b)| / n, in [0, 1]; chance level is n / len(a)."""
    a, b = _pair(a, b)
    if not 1 <= n <= a.size:
        raise ValueError(f"n must be between 1 and {a.size}, got {n}")
    return len(np.intersect1d(top_n(a, n), top_n(b, n))) / n


def relative_error(a: np.ndarray, e: np.ndarray, *, scaled: bool = False) -> float:
    """|a - e| / |e|, NaN where e is 0; ``scaled``: min over c of |c a - e| / |e|, what is left at the best scale."""
    a, e = _pair(a, e)
    size, own = np.linalg.norm(e), a @ a
    if size == 0 or (scaled and own == 0):
        return float("nan")
    return float(np.linalg.norm((a @ e / own if scaled else 1.0) * a - e) / size)


def bootstrap_interval(
    statistic: Callable[..., float],
    *arrays: np.ndarray,
    seed: int,
    samples: int = 1000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval of ``statistic(*arrays)``, rows of all arrays resampled together.

    Args:
      statistic: a function of the arrays; resamples on which it is NaN (say, a constant one) are left out.
      arrays: of one length n along axis 0 (paired rows).
      seed: of the resampling (PCG64).
      samples: number of resamples.
      level: coverage.

    Returns:
      (low, high); (NaN, NaN) when the statistic is undefined on every resample.
    """
    sizes = {len(a) for a in arrays}
    if len(sizes) != 1:
        raise ValueError(f"arrays must have one length, got {sorted(sizes)}")
    rng, n = np.random.default_rng(seed), sizes.pop()
    draws = (rng.integers(0, n, n) for _ in range(samples))
    values = np.array([statistic(*(np.asarray(a)[rows] for a in arrays)) for rows in draws])
    values = values[~np.isnan(values)]
    if values.size == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def resample(
    rng: np.random.Generator, examples: int, samples: int, groups: Sequence[np.ndarray] | None = None
) -> Float[np.ndarray, "samples examples"]:
    """How often each example is drawn in each of ``samples`` bootstrap resamples, float64.

    ``groups`` of rows are resampled among themselves, rows in none of them never drawn; None: all rows are one group.
    """
    weights = np.zeros((samples, examples))
    for rows in [np.arange(examples)] if groups is None else groups:
        weights[:, rows] = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=samples)
    return weights


# ---- kernel matrices: A approximates E, both [n, n] and symmetric ----


def square(matrix: np.ndarray) -> Float[np.ndarray, "n n"]:
    """``matrix`` as float64; ValueError unless it is square, symmetric to 1e-4 of its largest entry, and finite."""
    matrix = np.asarray(matrix, np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) < 2:
        raise ValueError(f"expected a square kernel matrix of at least 2 rows, got shape {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise ValueError("a kernel matrix to compare must be finite: leave out the examples that overflow")
    if np.abs(matrix - matrix.T).max() > 1e-4 * np.abs(matrix).max():
        raise ValueError("expected a symmetric kernel matrix, the kernel of a set of examples with itself")
    return matrix


def off_diagonal(matrix: np.ndarray) -> Float[np.ndarray, " p"]:
    """The n (n - 1) / 2 entries K_ij with i < j, row by row."""
    return np.asarray(matrix, np.float64)[np.triu_indices(len(matrix), 1)]


def cos_frobenius(a: np.ndarray, e: np.ndarray) -> float:
    """cos_F = <A, E> / (|A| |E|) with <A, E> = sum_ij A_ij E_ij; NaN where either is 0.

    Near 1 whenever the gradients of all examples share a common component: read it beside `cka`.
    """
    a, e = square(a), square(e)
    norm = np.linalg.norm(a) * np.linalg.norm(e)
    return float(np.sum(a * e) / norm) if norm > 0 else float("nan")


def frobenius_error(a: np.ndarray, e: np.ndarray) -> float:
    """min over c of |c A - E|_F / |E|_F = sqrt(1 - cos_F^2), at c = <A, E> / |A|^2: what is left at the best scale."""
    a, e = square(a), square(e)
    if not np.any(a) or not np.any(e):
        return float("nan")
    return float(np.linalg.norm(np.sum(a * e) / np.sum(a * a) * a - e) / np.linalg.norm(e))


def centred(matrix: np.ndarray) -> Float[np.ndarray, "n n"]:
    """H K H with H = I - 11^T / n: the kernel of features without their mean; K minus its best fit c_i + c_j."""
    matrix = square(matrix)
    means = matrix.mean(axis=0)
    return matrix - means[:, None] - means[None, :] + means.mean()


def cka(a: np.ndarray, e: np.ndarray) -> float:
    """Centred alignment <HAH, HEH> / (|HAH| |HEH|) [Cortes et al. 2012]; NaN where one has only means."""
    first, second = centred(a), centred(e)
    norms = np.linalg.norm(first), np.linalg.norm(second)
    if norms[0] <= NOTHING * np.linalg.norm(a) or norms[1] <= NOTHING * np.linalg.norm(e):
        return float("nan")
    return float(np.sum(first * second) / (norms[0] * norms[1]))


def participation_ratio(matrix: np.ndarray) -> float:
    """(tr K)^2 / |K|_F^2 = (sum_i l_i)^2 / sum_i l_i^2: how many eigen-directions share the kernel, 1 to n."""
    matrix = square(matrix)
    total = float(np.sum(matrix * matrix))
    return float(np.trace(matrix) ** 2 / total) if total > 0 else float("nan")


def matrix_scores(matrix: np.ndarray, domain_rows: np.ndarray | None = None) -> Float[np.ndarray, " scored"]:
    """s_j = 1/M sum_{i in domain} K_ij for every j outside the domain, in order: what a selection ranks.

    Without ``domain_rows`` every example is scored against all others: s_j = 1/(n - 1) sum_{i != j} K_ij.
    """
    matrix = square(matrix)
    if domain_rows is None:
        return (matrix.sum(axis=0) - np.diag(matrix)) / (len(matrix) - 1)
    return np.delete(matrix[np.asarray(domain_rows)].mean(axis=0), domain_rows)
