"""A control: the longest responses, or the shortest."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal, get_args

import numpy as np

from ntkjax.errors import ConfigError
from ntkjax.selection.base import Selection, SelectionProblem, select_top
from ntkjax.selection.diagnostics import describe

Order = Literal["longest", "shortest"]


@dataclasses.dataclass(frozen=True)
class LengthSelector:
    """score_j = +|S(x_j)| (``order`` longest) or -|S(x_j)| (shortest), response tokens; top n, ties by lower row.

    Source: none, a control of ours; it looks at neither the domain nor the model. Tangent-kernel scores
    correlate with length, so a selector must be better than this one. Lengths are counted after truncation to the
    longest sequence.

    Raises:
      ConfigError: an unknown ``order``.
    """

    order: str = "longest"

    uses_model: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.order not in get_args(Order):
            raise ConfigError(f"order is {self.order!r}; expected one of {', '.join(get_args(Order))}")

    def __call__(self, problem: SelectionProblem) -> Selection:
        lengths = np.asarray(problem.pool.response_lengths, np.float64)
        chosen = select_top("length", lengths if self.order == "longest" else -lengths, problem.n)
        return dataclasses.replace(chosen, diagnostics=describe(chosen, problem.pool, None) | {"order": self.order})
