"""Influence: first-order change of the domain's loss by a preconditioned gradient step on a pool example."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Int

from ntkjax.selection.base import Selection, SelectionProblem
from ntkjax.selection.cost import Sizes
from ntkjax.selection.directional import Directional
from ntkjax.selection.gradients import Stage1Selector
from ntkjax.selection.methods.ntk import NtkSelector, check_precondition
from ntkjax.selection.options import CgOptions, DampingOptions, DirectionOptions, Stage1Options, check_choice

CurvatureName = Literal["kfac", "ekfac", "cg", "adam"]


@dataclasses.dataclass(frozen=True)
class InfluenceOptions(DirectionOptions, Stage1Options, DampingOptions, CgOptions):
    """Options of ``influence``."""

    curvature: CurvatureName = "kfac"
    """kfac: P = H + lambda I; ekfac: H's eigenvalues measured by one more pass over the domain; cg: H whole, by
    conjugate gradients (slow); adam: P = diag(sqrt(v)) + eps, the step sizes that Adam would take on the domain."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("curvature", self.curvature, CurvatureName)
        check_precondition(self.curvature, "forward", self.direction)


@dataclasses.dataclass(frozen=True)
class InfluenceSelector(InfluenceOptions, Stage1Selector):
    """score_j = <P^-1 g_bar, g_j>, g the gradient of the loss at theta, g_bar the domain's mean; top n.

    With P = H + lambda I that is, to first order, how much the mean loss of the domain falls for each unit of weight
    put on x_j in training (minus the influence function of Koh and Liang, arXiv 1703.04730, whose sign is that of the
    rise). ``ntk`` with the ``loss`` kernel and ``--precondition``: one forward-mode pass over the candidates, exact but
    for P (see `ntkjax.ntk.precondition`).

    Open in the source and chosen by us: H is the Kronecker-factored empirical Fisher of the domain's loss, not of the
    training set's (the domain is what theta was warmed up on); damping is relative to the mean curvature.

    Raises:
      ConfigError: options out of range.
    """

    def as_ntk(self) -> NtkSelector:
        """The same as options of ``ntk``."""
        options = dataclasses.asdict(self)
        return NtkSelector(kernel="loss", precondition=options.pop("curvature"), **options)

    def forward_tokens(self, sizes: Sizes) -> float:
        """Forward-equivalent tokens, as counted in `ntkjax.selection.cost`."""
        return self.as_ntk().forward_tokens(sizes)

    @property
    def no_parts(self) -> str | None:
        """As of ``ntk``."""
        return self.as_ntk().no_parts

    def directional(self, problem: SelectionProblem, rows: Int[np.ndarray, " C"]) -> Directional:
        """As of ``ntk``."""
        return self.as_ntk().directional(problem, rows)

    def __call__(self, problem: SelectionProblem) -> Selection:
        return dataclasses.replace(self.as_ntk()(problem), method="influence")
