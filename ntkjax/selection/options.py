"""Options that several methods share, and their checks.

The options of a method are a frozen dataclass in the method's file that inherits from these. The options of the command
line inherit from all of them (`ntkjax.pipeline.options.SelectorOptions`), so that an option stands once, with its help
in the string below it: one that several methods have belongs here. Order of bases where a class has several of them:
`KernelOptions`, `DirectionOptions`, `AdamOptions`, `SketchOptions`, `Stage1Options`, `PreconditionOptions` (or
`DampingOptions`), `CgOptions`, `ClusterOptions`.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal, get_args

from tyro.conf import arg

from ntkjax.errors import ConfigError
from ntkjax.ntk.kernels import describe_kernels, parse
from ntkjax.ntk.precondition import CG_ITERATIONS, CG_TOLERANCE, DAMPING, PreconditionerName
from ntkjax.ntk.sketch import SKETCH_SIZE
from ntkjax.ntk.sketches import DEFAULT_SKETCH, SKETCHES, SketchName

KernelName = Annotated[str, arg(help=f"The tangent kernel. {describe_kernels()}.")]
"""A name of `ntkjax.ntk.kernels.KERNELS`, with the table as its help on the command line."""
DirectionName = Literal["raw", "contrast", "cosine"]
Switch = Literal["on", "off"]


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of a method. A subclass checks its own after those that it inherits.

    Raises:
      ConfigError: an option out of range, or options that do not go together.
    """

    def __post_init__(self) -> None:
        """Nothing to check."""


@dataclasses.dataclass(frozen=True)
class SketchOptions(Options):
    """The projection of gradients to features, where gradients are kept."""

    sketch: SketchName = DEFAULT_SKETCH
    """The projection of gradients (scores=sketch, and methods that keep gradients). rademacher: the paper's, dense;
    sparse: ranks like it, at next to no cost; kronecker: of both sides of each matrix."""
    sketch_size: int = SKETCH_SIZE
    """K, the numbers that a gradient is projected to."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("sketch", self.sketch, SketchName)
        check_least(self, "sketch_size")


@dataclasses.dataclass(frozen=True)
class PrefilterOptions(Options):
    """How many candidates the embedding vote keeps."""

    prefilter_factor: int = 4
    """M_pre / N: how many candidates stage 1 keeps for each example wanted; each domain point votes for M_pre / 4."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, "prefilter_factor")


@dataclasses.dataclass(frozen=True)
class Stage1Options(PrefilterOptions):
    """The embedding vote before the scores."""

    stage1: Switch = "on"
    """on: embedding vote first; off: score the whole pool."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("stage1", self.stage1, Switch)

    def scored_rows(self, n: int, rows: int) -> int:
        """Of ``rows`` pool rows those that are scored to select n: M_pre = ``prefilter_factor`` * n, or all."""
        return min(self.prefilter_factor * n, rows) if self.stage1 == "on" else rows


@dataclasses.dataclass(frozen=True)
class GradientOptions(SketchOptions, Stage1Options):
    """What the methods share that keep a sketched gradient of every candidate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        SKETCHES[self.sketch](self.sketch_size)  # a size that the sketch cannot have is refused here


@dataclasses.dataclass(frozen=True)
class KernelOptions(Options):
    """Whose gradients are taken."""

    kernel: KernelName = "sum_logits"
    """sum_logits: the paper's Jacobian-free kernel; loss: label-aware; trace, centred_trace: exact; spectral:m,
    centred_spectral:m, hutchinson:m: m outputs that approximate the trace."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse(self.kernel)


@dataclasses.dataclass(frozen=True)
class ClusterOptions(Options):
    """Groups of domain examples."""

    domain_clusters: int = 8
    """Groups of domain examples, at most (aggregation=clusters, algorithm=clusters)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, "domain_clusters")


@dataclasses.dataclass(frozen=True)
class AdamOptions(Options):
    """Whether a pool example counts by its gradient or by Adam's step (see `ntkjax.selection.gradients`)."""

    adam: Switch = "on"
    """on: a pool example is the step that Adam would take on it; off: its plain gradient."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("adam", self.adam, Switch)


@dataclasses.dataclass(frozen=True)
class DirectionOptions(Options):
    """The direction along which the pool is scored."""

    direction: DirectionName = "raw"
    """raw: the paper's mean kernel value <g_bar, g_j>; contrast: <g_bar - proj_p g_bar, g_j>, without what the pool's
    mean gradient p shares with the domain's; cosine: <g_bar, g_j> / (|g_bar| |g_j|) (costs per-example gradients)."""
    pool_sample: int = 512
    """Pool examples, drawn from the seed, whose mean gradient p is the second tangent of the report."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("direction", self.direction, DirectionName)
        check_least(self, "pool_sample")


@dataclasses.dataclass(frozen=True)
class DampingOptions(Options):
    """The damping of a curvature."""

    damping: float = DAMPING
    """lambda over the mean curvature (precondition or curvature one of kfac, ekfac, cg; method=quad, trak)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.damping > 0:
            raise ConfigError(f"damping must be above 0, got {self.damping}")


@dataclasses.dataclass(frozen=True)
class PreconditionOptions(DampingOptions):
    """P of preconditioned gradients."""

    precondition: PreconditionerName = "none"
    """none: the paper's inner product. kfac: influence <(H + lambda I)^-1 g_bar, g_j>, H the Kronecker-factored Fisher
    of the domain's loss; ekfac: its eigenvalues measured by one more pass over the domain; cg: H the whole Fisher,
    by conjugate gradients (slow); adam: divided by the root of the mean squared batch gradient. One pass over the
    pool in any case."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("precondition", self.precondition, PreconditionerName)


@dataclasses.dataclass(frozen=True)
class CgOptions(Options):
    """Where conjugate gradients stop."""

    cg_iterations: int = CG_ITERATIONS
    """Steps of conjugate gradients for each direction, at most (precondition=cg, curvature=cg)."""
    cg_tolerance: float = CG_TOLERANCE
    """Stop at a residual |(H + lambda I) x - u| of this times |u|; the report says what was reached."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, "cg_iterations")
        if not 0 < self.cg_tolerance < 1:
            raise ConfigError(f"cg_tolerance must be between 0 and 1, got {self.cg_tolerance}")


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raise ConfigError unless ``value`` is one of the values of the Literal ``choices``."""
    if value not in get_args(choices):
        raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(get_args(choices))}")


def check_least(options: Any, *names: str, least: int = 1) -> None:
    """Raise ConfigError where one of the named options is below ``least``."""
    for name in names:
        if getattr(options, name) < least:
            raise ConfigError(f"{name} must be at least {least}, got {getattr(options, name)}")
