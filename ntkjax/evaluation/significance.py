"""Intervals and tests of the difference between two runs, over paired per-example outcomes.

Everything is paired: both runs answered the same examples, and what is resampled are examples (and, where
several seeds were run, seeds). Numbers are float64 on the host; every resampling is seeded and repeats
exactly.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
from scipy import stats

from ntkjax.errors import ConfigError, UserError
from ntkjax.rng import numpy_rng

BLOCK_ELEMENTS = 1 << 22
"""Numbers drawn at once while resampling: 32 MiB of float64, whatever the number of examples."""

Method = Literal["bca", "percentile"]


@dataclasses.dataclass(frozen=True)
class Interval:
    """A point estimate with a confidence interval.

    Attributes:
      estimate: the statistic on the data as given.
      low, high: ends of the interval, in the units of the estimate.
      level: nominal coverage, e.g. 0.95.
      method: ``"bca"``, ``"percentile"``, ``"wilson"``, ``"hierarchical-percentile"`` or ``"degenerate"``
        (all values equal or only one value: nothing to resample, low = high = estimate).
      n: number of examples.
    """

    estimate: float
    low: float
    high: float
    level: float
    method: str
    n: int

    def as_dict(self) -> dict:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class McNemar:
    """McNemar's test of equal accuracy on paired right/wrong outcomes.

    Attributes:
      both, only_first, only_second, neither: the 2 x 2 table of counts.
      p_exact: two-sided exact (binomial) p-value, conditional on the discordant pairs.
      p_mid: the mid-p variant, less conservative (Fagerland, Lydersen and Laake 2013, doi
        10.1186/1471-2288-13-91).
    """

    both: int
    only_first: int
    only_second: int
    neither: int
    p_exact: float
    p_mid: float

    def as_dict(self) -> dict:
        return dataclasses.asdict(self)


def _vector(values, name: str) -> np.ndarray:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or vector.size == 0:
        raise UserError(f"{name}: expected a non-empty 1-dimensional array of numbers, got shape {vector.shape}")
    bad = np.flatnonzero(~np.isfinite(vector))
    if bad.size:
        raise UserError(
            f"{name}: {bad.size} of {vector.size} values are not finite (first at position {bad[0]}: "
            f"{vector[bad[0]]}); "
            "find out which examples gave them before comparing runs"
        )
    return vector


def _check_settings(level: float, resamples: int) -> None:
    if not 0.0 < level < 1.0:
        raise ConfigError(f"level: expected a number strictly between 0 and 1, got {level}")
    if resamples < 100:
        raise ConfigError(f"resamples: expected at least 100, got {resamples}")


def bootstrap_mean(
    values, *, level: float = 0.95, resamples: int = 10_000, method: Method = "bca", seed: int = 0
) -> Interval:
    """Bootstrap interval of a mean over examples (``scipy.stats.bootstrap``, seeded).

    Args:
      values: [n] numbers, one for each example.
      method: ``"bca"`` (bias-corrected and accelerated, Efron 1987) or ``"percentile"``.

    Raises:
      UserError: not one-dimensional, empty or not finite. ConfigError: an impossible level or method.
    """
    _check_settings(level, resamples)
    if method not in ("bca", "percentile"):
        raise ConfigError(f"method: expected 'bca' or 'percentile', got {method!r}")
    values = _vector(values, "values")
    estimate = float(values.mean())
    # BCa divides by the spread of the values: nothing varies, nothing is resampled.
    if np.all(values == values[0]):
        return Interval(estimate, estimate, estimate, level, "degenerate", values.size)
    result = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, BLOCK_ELEMENTS // values.size),
        vectorized=True,
        confidence_level=level,
        method="BCa" if method == "bca" else "percentile",
        # The name that every scipy since 1.7 takes (rng, its successor, came with 1.15).
        random_state=numpy_rng(seed, "bootstrap_mean"),  # pyright: ignore[reportCallIssue]
    )
    low, high = map(float, result.confidence_interval)
    return Interval(estimate, low, high, level, method, values.size)


def paired_bootstrap(
    first, second, *, level: float = 0.95, resamples: int = 10_000, method: Method = "bca", seed: int = 0
) -> Interval:
    """Interval of mean(second - first) over the same examples, resampling examples as pairs.

    Args:
      first, second: [n] per-example outcomes (right or wrong, or a likelihood) in the same order.

    Raises:
      UserError: different numbers of examples, or values that are not finite.
    """
    first, second = _vector(first, "first"), _vector(second, "second")
    if first.size != second.size:
        raise UserError(
            f"paired bootstrap: {first.size} outcomes against {second.size}; both runs must cover the same examples"
        )
    return bootstrap_mean(second - first, level=level, resamples=resamples, method=method, seed=seed)


def wilson_interval(successes: int, n: int, *, level: float = 0.95) -> Interval:
    """Wilson score interval of a proportion (Wilson 1927): sound at 0 and at 1, where a bootstrap has no width.

    centre = (p + z^2/2n) / (1 + z^2/n), half-width = z sqrt(p(1-p)/n + z^2/4n^2) / (1 + z^2/n).
    """
    _check_settings(level, 100)
    if n <= 0 or not 0 <= successes <= n:
        raise UserError(f"proportion: expected 0 <= successes <= n and n > 0, got {successes} of {n}")
    interval = stats.binomtest(int(successes), int(n)).proportion_ci(level, method="wilson")
    return Interval(successes / n, float(interval.low), float(interval.high), level, "wilson", int(n))


def mcnemar(first_correct, second_correct) -> McNemar:
    """McNemar's exact and mid-p tests.

    With b = only the first right, c = only the second right, m = min(b, c) and X ~ Binomial(b + c, 1/2):
    p_exact = min(1, 2 P(X <= m)); p_mid = p_exact - P(X = m), and 1 - P(X = m)/2 where b = c; both 1 where b
    + c = 0.

    Args:
      first_correct, second_correct: bool [n], the same examples in the same order.
    """
    first, second = np.asarray(first_correct), np.asarray(second_correct)
    if first.shape != second.shape or first.ndim != 1 or first.size == 0:
        raise UserError(
            f"McNemar: expected two equally long non-empty vectors, got shapes {first.shape} and {second.shape}"
        )
    for name, values in (("first", first), ("second", second)):
        if not np.all((values == 0) | (values == 1)):
            raise UserError(f"McNemar: {name} holds values other than right (1) and wrong (0)")
    first, second = first.astype(bool), second.astype(bool)
    b, c = int(np.sum(first & ~second)), int(np.sum(~first & second))
    both, neither = int(np.sum(first & second)), int(np.sum(~first & ~second))
    return McNemar(both, b, c, neither, *_mcnemar_p(b, c))


def _mcnemar_p(b: int, c: int) -> tuple[float, float]:
    if b + c == 0:
        return 1.0, 1.0
    smaller = min(b, c)
    point = float(stats.binom.pmf(smaller, b + c, 0.5))
    if b == c:
        return 1.0, 1.0 - point / 2
    exact = min(1.0, 2 * float(stats.binom.cdf(smaller, b + c, 0.5)))
    return exact, exact - point


def holm(p_values) -> np.ndarray:
    """Holm's step-down adjusted p-values (Holm 1979), float64 in the order given.

    Sorted p_(1) <= ... <= p_(m): adjusted p_(i) = max over j <= i of min(1, (m - j + 1) p_(j)).
    """
    p = np.asarray(p_values, dtype=np.float64)
    if p.ndim != 1 or np.any(~((p >= 0) & (p <= 1))):
        raise UserError("Holm: expected a vector of p-values between 0 and 1")
    order = np.argsort(p, kind="stable")
    scaled = np.minimum(1.0, p[order] * np.arange(p.size, 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(scaled)
    return adjusted


def hierarchical_bootstrap(
    differences,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    resample_seeds: bool = True,
    seed: int = 0,
) -> Interval:
    """Interval of the mean over seeds and examples of paired differences, resampling both.

    Each replicate draws S seeds and n examples with replacement; the *same* examples for every seed drawn,
    since every seed answered the same test set. With few seeds the seed part is understated (a bootstrap of S
    values sees (S - 1)/S of their variance): report the per-seed numbers too.

    Args:
      differences: [S, n], run s minus its baseline on example i.
      resample_seeds: False treats the seeds as the whole population (examples alone are resampled).
    """
    _check_settings(level, resamples)
    table = _seeds_by_examples(differences)
    estimate, n = float(table.mean()), table.shape[1]
    if np.all(table == table[0, 0]):
        return Interval(estimate, estimate, estimate, level, "degenerate", n)
    means = _hierarchical_means(table, resamples, resample_seeds, seed)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate, float(low), float(high), level, "hierarchical-percentile", n)


def hierarchical_p(differences, *, resamples: int = 10_000, resample_seeds: bool = True, seed: int = 0) -> float:
    """Two-sided bootstrap p-value of "the mean difference is 0", from the replicates of ``hierarchical_bootstrap``.

    p = min(1, 2 (1 + min(#{m <= 0}, #{m >= 0})) / (1 + R)) over the R replicate means m: below alpha about where the
    interval of level 1 - alpha leaves 0 out, and never 0. The remark on few seeds there holds here: p is then too
    small. Differences that are all equal have p = 1 where they are 0, else the smallest p there is.

    Args:
      differences: [S, n], run s minus its baseline on example i.
    """
    _check_settings(0.95, resamples)
    means = _hierarchical_means(_seeds_by_examples(differences), resamples, resample_seeds, seed)
    # A mean of differences that cancel is 0 up to rounding: such replicates speak for neither side.
    tiny = 1e-12
    fewer = min(int(np.sum(means <= tiny)), int(np.sum(means >= -tiny)))
    return min(1.0, 2 * (1 + fewer) / (1 + resamples))


def _seeds_by_examples(differences) -> np.ndarray:
    table = np.asarray(differences, dtype=np.float64)
    if table.ndim != 2 or table.size == 0:
        raise UserError(f"differences: expected seeds x examples, got shape {table.shape}")
    _vector(table.ravel(), "differences")
    return table


def _hierarchical_means(table: np.ndarray, resamples: int, resample_seeds: bool, seed: int) -> np.ndarray:
    seeds, n = table.shape
    rng = numpy_rng(seed, "hierarchical_bootstrap")
    blocks = _blocks(resamples, max(1, BLOCK_ELEMENTS // (n * seeds)))
    return np.concatenate([_hierarchical_block(table, rng, size, resample_seeds) for size in blocks])


def _blocks(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]


def _hierarchical_block(table: np.ndarray, rng: np.random.Generator, size: int, resample_seeds: bool) -> np.ndarray:
    seeds, n = table.shape
    per_seed = table[:, rng.integers(0, n, (size, n))].mean(axis=2)  # [S, size]
    if not resample_seeds:
        return per_seed.mean(axis=0)
    drawn = rng.integers(0, seeds, (seeds, size))
    return np.take_along_axis(per_seed, drawn, axis=0).mean(axis=0)
