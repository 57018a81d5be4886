"""Votes: every domain example spreads its mass evenly over its k nearest (KNN-Uniform, arXiv 2410.11303)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np

from ntkjax.selection.algorithms.knn_kde import TransportOptions, distances, spread
from ntkjax.selection.base import SelectionProblem
from ntkjax.selection.options import check_least
from ntkjax.selection.parts import Algorithm, Choice, Similarities
from ntkjax.selection.vote import Votes


@dataclasses.dataclass(frozen=True)
class KnnOptions(TransportOptions):
    """Options of algorithm=knn-uniform."""

    nearest: int = 0
    """k, the nearest pool examples a domain example votes for; 0: as transport_alpha asks, at most neighbours."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, "nearest", least=0)


@dataclasses.dataclass(frozen=True)
class KnnUniform(KnnOptions, Algorithm):
    """score_j = v_j + (1 + mean_i s_ij) / 4, v_j = |{i : j among the k nearest of x_i}|; the n highest.

    The second term lies in [0, 1/2], so it orders rows with equal votes and no others. p_j = v_j / (k M) is the mass
    that row j gets when every domain example spreads 1/M evenly over its k nearest. ``nearest`` 0 takes the k for which
    this solves the problem of `ntkjax.selection.algorithms.knn_kde.KnnKde` with every rho = 1: the least k with

        alpha / C sum_i sum_{l <= k} (d_i,k+1 - d_il) >= (1 - alpha) M

    Source: arXiv 2410.11303 (KNN-Uniform; it draws in proportion to p, where arXiv 2602.14696 and we take the highest);
    with k = n it is stage 1 of NTK-Selector (arXiv 2511.07380), ``--method embedding``.
    """

    of_cosines: ClassVar[bool] = True

    def __call__(self, similarities: Similarities, problem: SelectionProblem) -> Choice:
        neighbours = similarities.nearest(self.nearest or self.neighbours)
        k = neighbours.rows.shape[1]
        if not self.nearest:
            distance = distances(neighbours.similarity)
            k = round(spread(distance, np.ones_like(distance), self.price, self.weight))
        votes = Votes.of(neighbours, len(similarities.rows), k)
        scores = votes.votes + (1 + votes.similarity.astype(np.float64)) / 4
        report: dict[str, Any] = {"nearest": k, "rows_with_votes": int(np.sum(votes.votes > 0))}
        if self.nearest > k:
            report["nearest_warning"] = (
                f"nearest {self.nearest} is more than the {k} pool examples that were compared: every domain example "
                "votes for all of them, which tells none from another; ask for fewer"
            )
        return Choice(scores, zeros=neighbours.zero_norm, votes=votes.votes, report=report)
