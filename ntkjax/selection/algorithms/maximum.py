"""The nearest domain example decides; also called doubly greedy (arXiv 2602.14696)."""

from __future__ import annotations

import dataclasses

import numpy as np

from ntkjax.selection.base import SelectionProblem
from ntkjax.selection.options import Options
from ntkjax.selection.parts import Algorithm, Choice, Similarities


@dataclasses.dataclass(frozen=True)
class Maximum(Options, Algorithm):
    """score_j = max_i s_ij; the n highest.

    ``doubly-greedy`` is the same under the name of arXiv 2602.14696: of all pairs (i, j) whose row is not taken the one
    with the highest s_ij, and again, until n rows are taken. A row is taken when its best pair comes up, so the rows
    come in the order of max_i s_ij.
    """

    def __call__(self, similarities: Similarities, problem: SelectionProblem) -> Choice:
        neighbours = similarities.nearest(1)
        return Choice(neighbours.highest.astype(np.float64), zeros=neighbours.zero_norm)
