"""The options of ``ntkjax verify``."""

from __future__ import annotations

import dataclasses
from typing import Annotated, get_args

from tyro.conf import arg

from ntkjax.errors import ConfigError
from ntkjax.ntk.precondition import DAMPING, PreconditionerName
from ntkjax.pipeline.options import DataOptions, ModelOptions
from ntkjax.training import TrainConfig


@dataclasses.dataclass(frozen=True)
class VerifyConfig:
    """Measure every approximation of the tangent kernel against the exact one, on a sample of examples."""

    model: Annotated[ModelOptions, arg(name="")]
    data: tuple[str, ...]
    """Files whose examples are scored, as the pool of a selection is."""
    out: str
    """Run directory: ladder.csv, .md, .tex, kernels.npz, plots/, report.html. A stopped run goes on there."""
    domain: tuple[str, ...] = ()
    """Files of the domain that the scores are about. None: a part of the sample from --data stands for it."""
    n: int = 64
    """Examples in every kernel matrix, the domain's included, drawn at random."""
    n_domain: int | None = None
    """How many of them are the domain. None: a quarter."""
    n_full: int = 32
    """How many of the n examples the kernels of all parameters are computed on, which take longest; 0: none."""
    top: int | None = None
    """N: examples that would be selected of those scored. None: a quarter."""
    m: tuple[int, ...] = (4, 16)
    """Outputs of the kernels that take a size, spectral:m for one."""
    sketch_size: int = 8192
    """K of the sketched kernels."""
    max_signs: float = 5e8
    """Sketches of more random signs than this (outputs x parameters x K) are drawn from the law of a Gaussian sketch,
    which the kernel matrix determines, instead of being applied to the gradients; the tables say which."""
    seeds: int = 3
    """Draws of what is random (LoRA factors, warm-up, probes, signs), with seeds seed, seed + 1, ..."""
    full_seeds: int = 1
    """Of these, how many have the kernels of all parameters computed at their own warmed-up weights."""
    seed: int = 0
    skip_warmup: bool = False
    """Kernels at the parameters as they are (fresh LoRA: B = 0), without warming up on the domain."""
    cross_examples: int = 16
    """Examples on which the gradients of different outputs are compared; 0: leave that out."""
    cross_outputs: int = 2048
    """Most outputs compared with each other, a uniform sample of the vocabulary; fewer where their gradients do not fit
    into memory_gib and the head is trained."""
    precondition: tuple[PreconditionerName, ...] = get_args(PreconditionerName)
    """Preconditioners whose scores by the loss kernel are compared with those of the whole Fisher, inverted exactly;
    none: leave that out."""
    damping: tuple[float, ...] = (DAMPING,)
    """lambda over the mean curvature tr F / P, for these comparisons; each value makes a set of them."""
    bootstrap: int = 200
    """Resamples of the examples behind each interval."""
    memory_gib: float = 1.0
    """Gradients held at a time; twice that is in use at the peak."""
    reading: Annotated[DataOptions, arg(name="")] = DataOptions()
    warmup: TrainConfig = TrainConfig(epochs=1)
    """Warm-up on the domain (on --data without one) before the kernels are taken, as in select."""

    def __post_init__(self):
        for name, least in (("n", 6), ("seeds", 1), ("full_seeds", 1), ("sketch_size", 1), ("bootstrap", 10)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("n_full", "cross_examples"):
            value = getattr(self, name)
            if value < 0 or (0 < value < (6 if name == "n_full" else 2)):
                raise ConfigError(f"{name} must be 0 or at least {6 if name == 'n_full' else 2}, got {value}")
        if not self.m or min(self.m) < 1:
            raise ConfigError(f"m must be one or more numbers of outputs from 1, got {list(self.m)}")
        if self.precondition and not (self.damping and min(self.damping) > 0):
            raise ConfigError(f"damping must be one or more numbers above 0, got {list(self.damping)}")
        if self.memory_gib <= 0:
            raise ConfigError(f"memory_gib must be above 0, got {self.memory_gib}")
        if not 1 <= self.domain_count <= self.n - 4:
            raise ConfigError(
                f"n_domain must leave at least 4 of the n = {self.n} examples to score, and be at least 1; "
                f"got {self.domain_count}"
            )
        scored = self.n - self.domain_count
        if self.top is not None and not 1 <= self.top < scored:
            raise ConfigError(f"top must be from 1 to {scored - 1}, fewer than the {scored} scored; got {self.top}")

    @property
    def domain_count(self) -> int:
        """M: the domain examples in the sample."""
        return max(1, self.n // 4) if self.n_domain is None else self.n_domain

    @property
    def memory_budget(self) -> int:
        """Bytes of gradients held at a time."""
        return int(self.memory_gib * (1 << 30))
