"""How well scores predict: LDS, its noise ceiling, and the area under the curve for finding marked examples."""

from __future__ import annotations

import itertools
import math

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import rankdata

from ntkjax.ntk.metrics import bootstrap_interval, spearman


def predictions(members: Bool[np.ndarray, "m N"], scores: Float[np.ndarray, " N"]) -> Float[np.ndarray, " m"]:
    """sum_{j in S_k} s_j for every subset: row k of ``members`` says which pool rows are in S_k."""
    return members.astype(np.float64) @ scores


def lds(
    gains: Float[np.ndarray, " m"],
    members: Bool[np.ndarray, "m N"],
    scores: Float[np.ndarray, " N"],
    *,
    seed: int,
    samples: int,
) -> dict[str, float]:
    """The linear datamodeling score: Spearman over subsets of the measured gain with sum_{j in S_k} s_j.

    1: the scores order the subsets as training does; 0: they say nothing; below 0: the wrong way round. NaN where the
    sums are all equal.

    Args:
      gains: what was measured, the larger the better: -L_k of a loss L_k, or an accuracy.
      seed, samples: of the bootstrap over subsets.

    Returns:
      ``value``, and ``low`` and ``high`` of its 95% percentile interval.

    Source: Park et al., TRAK (arXiv 2303.14186), section 3.1, there for each test example; here for their mean.
    """
    predicted = predictions(members, scores)
    low, high = bootstrap_interval(spearman, predicted, gains, seed=seed, samples=samples)
    return {"value": spearman(predicted, gains), "low": low, "high": high}


def ceiling(losses: Float[np.ndarray, "R m"], *, seed: int, samples: int) -> dict[str, float]:
    """How far trainings of the same subsets with R seeds agree, and what scores could reach at most.

    ``between_seeds``: r, the mean over pairs of seeds of the Spearman correlation of L_k, with ``low`` and ``high`` of
    its 95% interval over subsets. ``ceiling``: sqrt(R r / (1 + (R - 1) r)), the correlation of the mean over R seeds
    with its expectation if each seed adds noise of its own (Spearman-Brown, with ranks in the place of values); 0 where
    r is not above 0. NaN where the losses of a seed are all equal.
    """
    pairs = list(itertools.combinations(range(len(losses)), 2))

    def agreement(rows: Float[np.ndarray, "m R"]) -> float:
        return float(np.mean([spearman(rows[:, a], rows[:, b]) for a, b in pairs]))

    r, seeds = agreement(losses.T), len(losses)
    low, high = bootstrap_interval(agreement, losses.T, seed=seed, samples=samples)
    positive = max(r, 0.0)
    # Spearman-Brown gives the reliability of a mean of R trainings; its root is the correlation of that mean with the
    # truth, which no score can pass.
    most = r if math.isnan(r) else math.sqrt(seeds * positive / (1 + (seeds - 1) * positive))
    return {"between_seeds": r, "low": low, "high": high, "ceiling": most}


def auc(marked: Bool[np.ndarray, " n"], scores: Float[np.ndarray, " n"]) -> float:
    """P(score of a marked example < score of another) + P(equal) / 2 over all pairs, in [0, 1]; chance is 1/2.

    Mann-Whitney in closed form: (n_1 n_0 - (R_1 - n_1 (n_1 + 1) / 2)) / (n_1 n_0), R_1 the sum of the ranks (ties share
    their mean) of the n_1 marked ones. ValueError where none or all are marked.
    """
    first, second = int(marked.sum()), int((~marked).sum())
    if not first or not second:
        raise ValueError(f"expected marked and other examples, got {first} and {second}")
    above = float(rankdata(scores)[marked].sum()) - first * (first + 1) / 2
    return 1 - above / (first * second)


def tenths(scores: Float[np.ndarray, " N"]) -> dict[str, list[int]]:
    """Rows of the best, the middle and the worst N // 10, ascending; equal scores in the order of the rows."""
    order, size = np.argsort(-scores, kind="stable"), len(scores) // 10
    start = (len(scores) - size) // 2
    groups = {"best": order[:size], "middle": order[start : start + size], "worst": order[len(scores) - size :]}
    return {name: np.sort(rows).tolist() for name, rows in groups.items()}
