"""Diversity: of a method's best candidates the n that repeat each other least, in kernel features.

The top n by a mean score may be near-duplicates: whatever is good about one is good about all. This pass takes the
``factor`` * n best rows of any selection and picks n of them greedily, over phi_j = Pi g_j (see
`ntkjax.selection.gradients`) scaled to length 1, so that phi_i . phi_j is the cosine of two gradients:

``facility-location``  F(S) = sum_{i in T} max(0, max_{j in S} phi_i . phi_j): every row of T has one like it. T: the
                       candidates, or `TARGETS` of them drawn from the seed. Lazily: a gain only falls as S grows, so
                       an old gain is a bound, and few are worked out again (Minoux, 1978).
``d-optimal``          F(S) = log det(I + 1/`RIDGE` sum_{j in S} phi_j phi_j^T): the directions seen so far count less.
                       By Sherman and Morrison: with A = RIDGE I + sum_{j in S} phi_j phi_j^T the gain of j is
                       log(1 + q_j), q_j = phi_j^T A^-1 phi_j, and choosing s leaves q_j - (phi_j^T A^-1 phi_s)^2 /
                       (1 + q_s); A^-1 is kept as I / RIDGE - sum_s u_s u_s^T.

Both F are monotone and submodular, so that the greedy S reaches at least (1 - 1/e) of the best F that any n candidates
have (Nemhauser et al., 1978). Ties go to the row that the method ranks higher. Among the candidates scores do not
count: the larger the factor, the lower the scores that a diverse choice may have. Cost: C K |T| for the similarities,
or n C K (C candidates, K numbers a feature): linear in the candidates. Memory: C (|T| + K) or (C + n) K numbers.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterator
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

from ntkjax.errors import ConfigError
from ntkjax.ntk.kernels import parse
from ntkjax.ntk.sketch import SKETCH_SIZE
from ntkjax.ntk.sketches import DEFAULT_SKETCH
from ntkjax.rng import numpy_rng
from ntkjax.selection.base import Selection, SelectionProblem, ranks_after
from ntkjax.selection.gradients import gradient_features, in_blocks
from ntkjax.selection.options import SketchOptions, check_choice
from ntkjax.selection.vote import unit_rows

DiversityName = Literal["none", "facility-location", "d-optimal"]
TARGETS = 2048
RIDGE = 0.1
TIE = 1e-5
"""Gains of d-optimal that differ by less, relative to the highest, are equal: at first all are, but for rounding."""


@dataclasses.dataclass(frozen=True)
class DiversityOptions(SketchOptions):
    """A pass for diversity after any method."""

    diversity: DiversityName = "none"
    """A pass after any method: of its best candidates those whose gradients repeat each other least.
    facility-location: every candidate has one like it; d-optimal: as many directions as can be."""
    diversity_factor: int = 2
    """Candidates of the pass for each example wanted: the method's best. The more there are, the lower the scores that
    a diverse choice may have."""
    diversity_kernel: str = "loss"
    """Whose gradients are compared, as in --kernel."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_diversity(self.diversity, self.diversity_factor)
        parse(self.diversity_kernel)


def check_diversity(diversity: str, factor: int) -> None:
    """Raise ConfigError for an unknown name or a factor that leaves nothing to choose from."""
    check_choice("diversity", diversity, DiversityName)
    if factor < 2:
        raise ConfigError(f"diversity_factor must be at least 2 candidates for each one wanted, got {factor}")


def diversify(
    selection: Selection,
    problem: SelectionProblem,
    *,
    diversity: str,
    factor: int = 2,
    kernel: str = "loss",
    sketch: str = DEFAULT_SKETCH,
    size: int = SKETCH_SIZE,
) -> Selection:
    """``selection`` with its n rows chosen anew among its ``factor`` * n best, in the order of the greedy choice.

    Scores stay as they are; ranks are the greedy order, then the other rows by score. The report says how many of the
    method's own n were replaced and what F is of both.

    Args:
      kernel, sketch, size: of the features, as for `gradient_features`.

    Raises:
      ConfigError: see `check_diversity`. NonFiniteError: candidates whose gradient is NaN or infinite.
    """
    check_diversity(diversity, factor)
    if diversity == "none":
        return selection
    n = len(selection.selected)
    # The method's own choice first: it need not be the highest scores (turns, draws).
    order = np.argsort(np.where(selection.scored, selection.ranks, np.iinfo(np.int64).max), kind="stable")
    candidates = order[: min(factor * n, int(selection.scored.sum()))]
    _, read = gradient_features(problem, np.sort(candidates), kernel=kernel, sketch=sketch, size=size)
    features = np.concatenate([read(rows) for _, rows in in_blocks(candidates)])
    features, zero = unit_rows(features)
    before = np.flatnonzero(np.isin(candidates, selection.selected))
    if diversity == "facility-location":
        targets = features
        if len(candidates) > TARGETS:
            rng = numpy_rng(problem.seed, "selection", "facility location targets")
            targets = features[np.sort(rng.choice(len(candidates), TARGETS, replace=False))]
        similarity = np.maximum(features @ targets.T, 0)
        chosen = facility_location(similarity, n, progress=problem.progress)
        value = lambda places: facility_value(similarity, places)
    else:
        chosen = d_optimal(features, n, ridge=RIDGE, progress=problem.progress)
        value = lambda places: d_value(features, places, RIDGE)
    selected = candidates[chosen]
    report = {
        "diversity": diversity,
        "diversity_candidates": len(candidates),
        "diversity_replaced": int(np.sum(~np.isin(selection.selected, selected))),
        "diversity_of_the_choice": value(chosen),
        "diversity_without_the_pass": value(before),
        "diversity_zero_gradients": zero,
    }
    return dataclasses.replace(
        selection,
        selected=selected,
        ranks=ranks_after(selected, selection.scores),
        diagnostics=selection.diagnostics | report,
    )


def facility_value(similarity: Float[np.ndarray, "C T"], places: Int[np.ndarray, " s"]) -> float:
    """F(S) = sum_i max_{j in S} similarity_ji, similarities at least 0."""
    return float(similarity[places].max(axis=0, initial=0).sum(dtype=np.float64))


def facility_location(similarity: Float[np.ndarray, "C T"], n: int, *, progress: bool = False) -> Int[np.ndarray, " n"]:
    """The greedy choice of n of C candidates for the T targets, in order, ties to the lower place.

    ``similarity``: of every candidate to every target, at least 0.
    """
    covered = np.zeros(similarity.shape[1], similarity.dtype)
    gain = lambda j: float(np.maximum(similarity[j] - covered, 0).sum(dtype=np.float64))
    # (-gain, place, size of S when the gain was worked out); an old gain is a bound from above.
    heap = [(-float(row.sum(dtype=np.float64)), j, 0) for j, row in enumerate(similarity)]
    heapq.heapify(heap)
    chosen: list[int] = []
    for _ in _steps(n, progress):
        while True:
            _, j, age = heapq.heappop(heap)
            if age == len(chosen):
                break
            heapq.heappush(heap, (-gain(j), j, len(chosen)))
        chosen.append(j)
        covered = np.maximum(covered, similarity[j])
    return np.asarray(chosen, np.int64)


def d_value(features: Float[np.ndarray, "C K"], places: Int[np.ndarray, " s"], ridge: float) -> float:
    """F(S) = log det(I + 1/ridge sum_{j in S} phi_j phi_j^T), by the smaller of its two matrices."""
    rows = features[places].astype(np.float64)
    gram = rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows
    return float(np.linalg.slogdet(np.eye(len(gram)) + gram / ridge)[1])


def d_optimal(
    features: Float[np.ndarray, "C K"], n: int, *, ridge: float, progress: bool = False
) -> Int[np.ndarray, " n"]:
    """The greedy choice of n of C candidates, in order, ties to the lower place."""
    gains = np.einsum("ck,ck->c", features, features, dtype=np.float64) / ridge  # q_j
    factors = np.zeros((n, features.shape[1]), features.dtype)  # u_s
    chosen = np.zeros(n, np.int64)
    for step in _steps(n, progress):
        # argmax of a mask: the lowest of the candidates that tie but for rounding.
        best = int(np.argmax(gains >= (1 - TIE) * gains.max()))
        chosen[step], scale = best, 1 + gains[best]
        row, before = features[best], factors[:step]
        # A^-1 phi_s, from the sum that A^-1 is kept as; divided by sqrt(1 + q_s) it is u_s.
        along = row / features.dtype.type(ridge) - (before @ row) @ before  # A^-1 phi_s
        factors[step] = along / np.sqrt(features.dtype.type(scale))
        left = np.maximum(gains - (features @ factors[step]).astype(np.float64) ** 2, 0)  # below 0 is rounding
        gains = np.where(gains == -np.inf, gains, left)
        gains[best] = -np.inf
    return chosen


def _steps(n: int, progress: bool) -> Iterator[int]:
    yield from tqdm(range(n), desc="choose diverse examples", disable=not progress, unit="example")
