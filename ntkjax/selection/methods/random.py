"""The control: n pool rows drawn uniformly without replacement."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from ntkjax.rng import numpy_rng
from ntkjax.selection.base import Selection, SelectionProblem, Selector, select_top


@dataclasses.dataclass(frozen=True)
class RandomSelector(Selector):
    """score_j ~ U(0, 1), from the problem's seed; top n."""

    uses_model: ClassVar[bool] = False

    def __call__(self, problem: SelectionProblem) -> Selection:
        scores = numpy_rng(problem.seed, "selection", "random").random(len(problem.pool))
        return select_top("random", scores, problem.n)


def random_rows(pool: int, n: int, seed: int) -> np.ndarray:
    """The rows that ``RandomSelector`` chooses, best first."""
    return np.argsort(-numpy_rng(seed, "selection", "random").random(pool), kind="stable")[:n]
