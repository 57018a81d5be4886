"""The domain examples take turns (RDS+, arXiv 2503.01807; greedy round-robin of arXiv 2602.14696)."""

from __future__ import annotations

import dataclasses

import numpy as np

from ntkjax.selection.base import SelectionProblem
from ntkjax.selection.options import Options
from ntkjax.selection.parts import Algorithm, Choice, Similarities
from ntkjax.selection.vote import take_turns


@dataclasses.dataclass(frozen=True)
class RoundRobin(Options, Algorithm):
    """The domain examples, as they stand in the file, take turns, each taking the row with the highest s_ij that is not
    taken yet (ties: the lower), until n are. score_j = max_i s_ij; rows that nobody took follow by score.

    Memory: the n best rows of every domain example, [M, n]; no example can need more.
    """

    def __call__(self, similarities: Similarities, problem: SelectionProblem) -> Choice:
        neighbours = similarities.nearest(problem.n)
        order = take_turns(neighbours.rows, min(problem.n, len(similarities.rows)))
        return Choice(neighbours.highest.astype(np.float64), order, zeros=neighbours.zero_norm)
