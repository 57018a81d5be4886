"""Influence: first-order change of the domain's loss by a preconditioned gradient step on a pool example."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from ntkjax.errors import ConfigError
from ntkjax.ntk.precondition import DAMPING
from ntkjax.selection.base import Selection, SelectionProblem
from ntkjax.selection.cost import Sizes
from ntkjax.selection.gradients import Switch
from ntkjax.selection.ntk import DirectionName, NtkSelector

CurvatureName = Literal["kfac", "adam"]


@dataclasses.dataclass(frozen=True)
class InfluenceSelector:
    """score_j = <P^-1 g_bar, g_j>, g the gradient of the loss at theta, g_bar the domain's mean; top n.

    With P = H + lambda I that is, to first order, how much the mean loss of the domain falls for each unit of weight
    put on x_j in training (minus the influence function of Koh and Liang, arXiv 1703.04730, whose sign is that of the
    rise). ``ntk`` with the ``loss`` kernel and ``--precondition``: one forward-mode pass over the candidates, exact but
    for P (see `ntkjax.ntk.precondition`).

    Open in the source and chosen by us: H is the Kronecker-factored empirical Fisher of the domain's loss, not of the
    training set's (the domain is what theta was warmed up on); damping is relative to the mean curvature.

    Attributes:
      curvature: ``kfac``; or ``adam``, P = diag(sqrt(v)) + eps, the step sizes that Adam would take on the domain.
      damping: lambda of ``kfac``, over the mean curvature.
      direction: ``raw``; ``contrast``: without what the pool's mean gradient shares with the domain's.
      stage1, prefilter_factor, pool_sample: as for ``ntk``.

    Raises:
      ConfigError: options out of range.
    """

    curvature: CurvatureName = "kfac"
    damping: float = DAMPING
    direction: DirectionName = "raw"
    stage1: Switch = "on"
    prefilter_factor: int = 4
    pool_sample: int = 512

    def __post_init__(self) -> None:
        if self.curvature not in get_args(CurvatureName):
            expected = ", ".join(get_args(CurvatureName))
            raise ConfigError(f"curvature is {self.curvature!r}; expected one of {expected}")
        self.as_ntk()

    def as_ntk(self) -> NtkSelector:
        """The same as options of ``ntk``."""
        options = dataclasses.asdict(self)
        return NtkSelector(kernel="loss", precondition=options.pop("curvature"), **options)

    def passes(self, sizes: Sizes) -> float:
        """Forward-equivalent tokens, as counted in `ntkjax.selection.cost`."""
        return self.as_ntk().passes(sizes)

    def __call__(self, problem: SelectionProblem) -> Selection:
        return dataclasses.replace(self.as_ntk()(problem), method="influence")
