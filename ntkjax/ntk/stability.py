"""How far a tangent kernel moves along fine-tuning, and what a kernel that only grows is worth.

One step of gradient descent with rate eta moves the outputs on the n examples, to first order, by -eta Theta_t gamma,
gamma = d loss / d f. In the kernel regime Theta_t is Theta_0. A kernel that merely grew would do as well: split

    Theta_t = c Theta_0 + R,   c = <Theta_t, Theta_0> / |Theta_0|^2,   <R, Theta_0> = 0      (Frobenius throughout).

The step is then the kernel-regime step of rate eta c, and a perturbation eta R gamma. With cos a =
cos_F(Theta_t, Theta_0), |R| = |Theta_t| sin a and |Theta_t| cos a = c |Theta_0|. So |R| = c |Theta_0| tan a, and since
|R gamma| <= |R|_2 |gamma| <= |R| |gamma|,

    |eta R gamma|  <=  eta c |Theta_0| tan a |gamma|  <=  eta c |Theta_0| sqrt(2 eps) / (1 - eps) |gamma|

wherever cos_F >= 1 - eps: tan a = sqrt(1 - cos^2) / cos, and 1 - (1 - eps)^2 <= 2 eps. The first inequality is an
equality where R has rank one and gamma is its direction, the second in the limit of small eps. The bound of
NTK-Selector (arXiv 2511.07380) has no c: it holds with eta standing for the rate of the kernel-regime step, eta c here,
and fails with the rate of the actual step once the kernel has grown.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from ntkjax.ntk.metrics import (
    cka,
    cos_frobenius,
    matrix_scores,
    off_diagonal,
    participation_ratio,
    spearman,
    square,
    top_n_overlap,
)

METRICS = {
    "cos_F": "cos_F against step 0",
    "cka": "CKA against step 0",
    "rank_correlation": "Spearman of off-diagonal entries against step 0",
    "score_spearman": "Spearman of scores against step 0",
    "score_overlap": "top-N overlap of scores against step 0",
    "velocity": "|Theta_t - Theta_s| / |Theta_t| per step since the last kernel",
    "turning": "1 - cos_F with the last kernel, per step",
    "participation_ratio": "(tr Theta)^2 / |Theta|^2",
    "growth": "|Theta_t| / |Theta_0|",
    "bound": "sqrt(2 eps) / (1 - eps), eps = 1 - cos_F",
    "perturbation": "|R|_2 / (c |Theta_0|), at most the bound",
}
"""What `kernel_stability` gives, and how to read it."""


@dataclasses.dataclass(frozen=True)
class Collinearity:
    """Theta_t = c Theta_0 + R with R orthogonal to Theta_0; see the top of this file.

    Attributes:
      scale: c.
      remainder: R [n, n].
      epsilon: 1 - cos_F(Theta_t, Theta_0).
      bound: sqrt(2 eps) / (1 - eps), no less than |R gamma| / (c |Theta_0| |gamma|) for any gamma; infinite for
        eps >= 1.
      perturbation: |R|_2 / (c |Theta_0|): that ratio for the worst gamma there is.
    """

    scale: float
    remainder: Float[np.ndarray, "n n"]
    epsilon: float
    bound: float
    perturbation: float


def collinearity_bound(epsilon: float) -> float:
    """sqrt(2 eps) / (1 - eps): the largest perturbation of a step, relative to eta c |Theta_0| |gamma|, at cos_F = 1 -
    eps; infinite from eps = 1 on."""
    return math.sqrt(2 * max(0.0, epsilon)) / (1 - epsilon) if epsilon < 1 else math.inf


def collinearity(theta: Float[np.ndarray, "n n"], theta_0: Float[np.ndarray, "n n"]) -> Collinearity:
    """Split ``theta`` along ``theta_0``; NaN and infinity where ``theta_0`` is 0 or they have nothing in common.

    Raises:
      ValueError: matrices that are not square, symmetric and finite.
    """
    theta, theta_0 = square(theta), square(theta_0)
    # Frobenius, over all entries: c is the least-squares fit of Theta_t by Theta_0.
    size = float(np.linalg.norm(theta_0))
    scale = float(np.sum(theta * theta_0) / size**2) if size > 0 else float("nan")
    remainder = theta - scale * theta_0
    # 1 - cos_F cancels as the two grow alike: from R it keeps its digits, eps = tan^2 / (1 + tan^2 + sqrt(1 + tan^2)).
    tangent = float(np.linalg.norm(remainder)) / (scale * size) if scale * size > 0 else math.inf
    root = math.sqrt(1 + tangent**2) if math.isfinite(tangent) else math.inf
    epsilon = 1 - cos_frobenius(theta, theta_0) if not math.isfinite(root) else tangent**2 / (root**2 + root)
    worst = float(np.linalg.norm(remainder, 2)) / (scale * size) if scale * size > 0 else math.inf
    return Collinearity(scale, remainder, epsilon, collinearity_bound(epsilon), worst)


def kernel_stability(
    kernels: Sequence[Float[np.ndarray, "n n"]],
    steps: Sequence[int],
    *,
    scores: Sequence[Float[np.ndarray, " N"]] | None = None,
    top: int | None = None,
) -> list[dict[str, float | int]]:
    """The measures of `METRICS` for kernels of the same n examples along one training run.

    Velocity is |Theta_t - Theta_s| / (|Theta_t| (t - s)) between consecutive kernels at steps s < t: the relative
    change per optimiser step, growth included. ``turning`` leaves growth out: (1 - cos_F(Theta_t, Theta_s)) / (t - s),
    the "kernel velocity" of Fort et al. 2020 (arXiv 2010.15110).

    Args:
      kernels: Theta_0, ..., Theta_t of n >= 3 examples; the first is what the others are compared with.
      steps: the optimiser step of each, increasing.
      scores: s_j of N examples at each step; None: each of the n examples against the others, from the kernel.
      top: N of the top-N overlap; None: a quarter of the scored examples, at least 1.

    Returns:
      One dict for each kernel: ``step`` and the measures; NaN where one is undefined (velocity of the first kernel).

    Raises:
      ValueError: different numbers of kernels, steps and scores, or steps that do not increase.
    """
    if not len(kernels) == len(steps) == len(kernels if scores is None else scores) or len(kernels) == 0:
        raise ValueError(f"{len(kernels)} kernels, {len(steps)} steps, {scores and len(scores)} sets of scores")
    if any(b <= a for a, b in itertools.pairwise(steps)):
        raise ValueError(f"steps must increase, got {list(steps)}")
    scores = [matrix_scores(kernel) for kernel in kernels] if scores is None else list(scores)
    top = max(1, len(scores[0]) // 4) if top is None else top
    rows: list[dict[str, float | int]] = []
    for i, (theta, step) in enumerate(zip(kernels, steps)):
        row = {"step": step, **_against_first(theta, kernels[0], scores[i], scores[0], top)}
        since = _since_last(theta, kernels[i - 1], step - steps[i - 1]) if i else {}
        rows.append(row | {"velocity": float("nan"), "turning": float("nan")} | since)
    return rows


def _against_first(
    theta: np.ndarray, theta_0: np.ndarray, scores: np.ndarray, scores_0: np.ndarray, top: int
) -> dict[str, float]:
    split = collinearity(theta, theta_0)
    return {
        "cos_F": cos_frobenius(theta, theta_0),
        "cka": cka(theta, theta_0),
        "rank_correlation": spearman(off_diagonal(theta), off_diagonal(theta_0)),
        "score_spearman": spearman(scores, scores_0),
        "score_overlap": top_n_overlap(scores, scores_0, top),
        "participation_ratio": participation_ratio(theta),
        "growth": _ratio(np.linalg.norm(theta), np.linalg.norm(theta_0)),
        "bound": split.bound,
        "perturbation": split.perturbation,
    }


def _since_last(theta: np.ndarray, last: np.ndarray, steps: int) -> dict[str, float]:
    return {
        "velocity": _ratio(np.linalg.norm(theta - last), np.linalg.norm(theta)) / steps,
        "turning": collinearity(theta, last).epsilon / steps,
    }


def _ratio(a: np.floating | float, b: np.floating | float) -> float:
    return float(a / b) if b > 0 else float("nan")
