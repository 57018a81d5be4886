"""A control: the longest responses, or the shortest."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import numpy as np

from ntkjax.selection.base import Selection, SelectionProblem, Selector, select_top
from ntkjax.selection.options import Options, check_choice

Order = Literal["longest", "shortest"]


@dataclasses.dataclass(frozen=True)
class LengthOptions(Options):
    """Options of ``length``."""

    order: Order = "longest"
    """Which responses come first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("order", self.order, Order)


@dataclasses.dataclass(frozen=True)
class LengthSelector(LengthOptions, Selector):
    """score_j = +|S(x_j)| (``order`` longest) or -|S(x_j)| (shortest), response tokens; top n, ties by lower row.

    Source: none, a control of ours; it looks at neither the domain nor the model. Tangent-kernel scores are correlated
    with length, so what a method gains over a random choice must be compared with what this control gains. Lengths are
    counted after truncation to the longest sequence.

    Raises:
      ConfigError: an unknown ``order``.
    """

    uses_model: ClassVar[bool] = False

    def __call__(self, problem: SelectionProblem) -> Selection:
        lengths = np.asarray(problem.pool.response_lengths, np.float64)
        chosen = select_top("length", lengths if self.order == "longest" else -lengths, problem.n)
        return dataclasses.replace(chosen, diagnostics={"order": self.order})
