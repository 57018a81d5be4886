"""Sketched gradients of a kernel's outputs: at theta, or over the warm-up's epochs as in LESS (arXiv 2402.04333)."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from ntkjax.errors import ConfigError
from ntkjax.ntk.kernels import KERNELS, parse
from ntkjax.ntk.precondition import PASSES
from ntkjax.selection.base import SelectionProblem
from ntkjax.selection.cost import FORWARD, TRAIN, Sizes
from ntkjax.selection.gradients import Candidates, find_candidates, gradient_features
from ntkjax.selection.options import GradientOptions, KernelOptions, PreconditionOptions, check_choice
from ntkjax.selection.parts import Part, Representation

TrajectoryName = Literal["end", "epochs", "adam"]


@dataclasses.dataclass(frozen=True)
class GradientFeatureOptions(KernelOptions, GradientOptions, PreconditionOptions):
    """Options of representation=gradients."""

    trajectory: TrajectoryName = "end"
    """Where gradients are taken. end: at theta; epochs: at the end of every epoch of the warm-up, weighted by its
    learning rate; adam: the same, the pool's gradients replaced by Adam's steps (LESS)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("trajectory", self.trajectory, TrajectoryName)
        if self.precondition == "cg":
            raise ConfigError(
                "precondition cg with representation gradients: every example would be solved for by itself, and no "
                "residual reported; use precondition ekfac or kfac, or --method ntk --precondition cg"
            )
        if self.trajectory != "adam":
            return
        if not parse(self.kernel).kind.single:
            single = " or ".join(name for name, kind in KERNELS.items() if kind.single)
            raise ConfigError(f"trajectory adam needs a kernel of one output ({single}), got {self.kernel}")
        if self.precondition != "none":
            raise ConfigError(
                f"trajectory adam with precondition {self.precondition}: Adam's step is scaled already; use trajectory "
                "end or epochs"
            )


@dataclasses.dataclass(frozen=True)
class Gradients(GradientFeatureOptions, Representation):
    """phi(x) = Pi grad F(x; theta), F the outputs of ``kernel``, Pi a sketch to ``sketch_size`` numbers, so that
    <phi(x), phi(x')> estimates the kernel.

    ``trajectory`` epochs: one part for the end of each epoch t of the warm-up, at theta_t, with the weight eta_t /
    sum_t' eta_t' (mean learning rates of the epochs); adam: besides, psi(x_j) = Pi Gamma_t(x_j), Adam's step from the
    gradient of a pool row (see `ntkjax.selection.gradients`). ``precondition``: phi(x_i) = Pi P^-1 grad F(x_i), P of
    the domain's loss at the same theta (`ntkjax.ntk.precondition`), psi(x_j) as it was, so that inner products are
    <P^-1 g_i, g_j>.

    The pool rows are those that stage 1 keeps, as for every gradient method; ``stage1`` off: all.
    """

    @property
    def uses_checkpoints(self) -> bool:
        """Those of a trajectory."""
        return self.trajectory != "end"

    def candidates(self, problem: SelectionProblem) -> Candidates:
        """Those of stage 1."""
        return find_candidates(problem, stage1=self.stage1, prefilter_factor=self.prefilter_factor)

    def parts(self, problem: SelectionProblem, rows: Int[np.ndarray, " C"]) -> tuple[Part, ...]:
        """One part at theta, or one for the end of each epoch."""
        options: dict[str, Any] = {"kernel": self.kernel, "sketch": self.sketch, "size": self.sketch_size}
        options |= {"precondition": self.precondition, "damping": self.damping}
        if not self.uses_checkpoints:
            return (Part(*gradient_features(problem, rows, **options)),)
        if not problem.checkpoints:
            raise ConfigError(
                f"trajectory {self.trajectory} looks at the warm-up's epochs and there are none; warm up first, with "
                "checkpoints"
            )
        rates = np.array([checkpoint.learning_rate for checkpoint in problem.checkpoints])
        options["adam"] = self.trajectory == "adam"
        return tuple(
            Part(*gradient_features(problem, rows, checkpoint=checkpoint, **options), weight=float(weight))
            for checkpoint, weight in zip(problem.checkpoints, rates / rates.sum())
        )

    def forward_tokens(self, sizes: Sizes) -> float:
        """A backward pass for each output and theta, and those over the domain for the curvature."""
        gradient = FORWARD + 2 * parse(self.kernel).outputs(sizes.width)
        curvature = TRAIN * PASSES[self.precondition] * sizes.domain
        points = sizes.checkpoints if self.uses_checkpoints else 1
        return sizes.stage1(self.stage1) + points * (gradient * (sizes.domain + sizes.scored) + curvature)

    @property
    def embeds_pool(self) -> bool:
        """For stage 1."""
        return self.stage1 == "on"

    @property
    def feature_size(self) -> int:
        """K."""
        return self.sketch_size
