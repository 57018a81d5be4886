"""How far two sets of scores agree, with bootstrap intervals."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import scipy.stats
from jaxtyping import Float

Vector = Float[np.ndarray, " n"]


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
    return _statistic(scipy.stats.spearmanr, a, b)


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
