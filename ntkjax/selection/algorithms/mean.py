"""The mean over the domain (NTK-Selector, arXiv 2511.07380)."""

from __future__ import annotations

import dataclasses

import numpy as np

from ntkjax.selection.base import SelectionProblem
from ntkjax.selection.options import Options
from ntkjax.selection.parts import Algorithm, Choice, Similarities


@dataclasses.dataclass(frozen=True)
class Mean(Options, Algorithm):
    """score_j = 1/M sum_i s_ij; the n highest.

    One product a row: the mean of the domain's vectors stands for all of them. For gradients ``ntk`` and ``influence``
    have the same mean exactly, without a sketch.
    """

    def __call__(self, similarities: Similarities, problem: SelectionProblem) -> Choice:
        scores, zeros = np.empty(len(similarities.rows)), 0
        weights = np.full((1, similarities.members), 1 / similarities.members)
        for at, products, zero in similarities.blocks(weights):
            scores[at], zeros = products[:, 0], zeros + zero
        return Choice(scores, zeros=int(np.max(zeros)))
