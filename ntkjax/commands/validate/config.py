"""The options of ``ntkjax validate``, and the scores that it judges."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from tyro.conf import arg

from ntkjax.errors import ConfigError
from ntkjax.evaluation.options import EvaluationOptions
from ntkjax.ntk.kernels import describe_kernels, parse
from ntkjax.pipeline.cost import uses_model
from ntkjax.pipeline.options import DataOptions, DedupOptions, ModelOptions, SelectorOptions, check_method
from ntkjax.pipeline.select import make_selector
from ntkjax.pipeline.study.arms import Arm
from ntkjax.pipeline.warmup import needs_checkpoints
from ntkjax.selection import METHODS
from ntkjax.training import TrainConfig

KernelNames = Annotated[
    tuple[str, ...], arg(help=f"Kernels, crossed with the methods that have one. {describe_kernels()}.")
]
"""Names of `ntkjax.ntk.kernels.KERNELS`, with the table as their help on the command line."""
EXTENT = ("methods", "kernels", "subsets", "reseeds", "leave_in", "flip", "flip_in", "truth", "bootstrap", "dry_run")
"""Options that say how much is measured, not of what: a run goes on under others, and what it has stays."""


@dataclasses.dataclass(frozen=True)
class ValidateConfig:
    """Train on random subsets of the pool and ask whether scores predict the test loss (LDS); then on the best, middle
    and worst scored; and whether scores find flipped answers. Every method is judged by the same trainings."""

    model: Annotated[ModelOptions, arg(name="")]
    domain: tuple[str, ...]
    """Training files of the domain: what the scores are about."""
    pool: tuple[str, ...]
    """Files of the pool, all of which is scored: hundreds or a few thousand examples."""
    test: tuple[str, ...]
    """Held-out files of the domain, on which every training is measured."""
    out: str
    """Run directory: scores.parquet, subsets.parquet, results.json, report.html. A stopped run goes on there, and so
    does one that is asked for more subsets, seeds or methods."""
    methods: tuple[str, ...] = ()
    """Methods whose scores are judged, a,b,c or with blanks between them. None: all there are."""
    kernels: KernelNames = ("sum_logits", "loss")
    subsets: int = 64
    """m: random subsets of the pool."""
    alpha: float = 0.5
    """Share of the pool in each of them."""
    with_domain: Literal["on", "off"] = "on"
    """on: every subset is trained on together with the domain; off: alone."""
    reseeds: int = 1
    """R: how often the same subsets are trained again, with seeds seed + 1, ..., seed + R (initial adapters and order
    of the data). Losses are means over all seeds; how far two seeds agree is the noise ceiling. 0: no ceiling."""
    leave_in: int = 1
    """Seeds with which the domain is trained with the best, the middle and the worst tenth of each score, and alone for
    equally many steps. 0: leave that out."""
    flip: float = 0.0
    """Share of the answers that are flipped in a copy of the data, whose examples are scored anew: do low scores find
    them? 0: leave that out."""
    flip_in: Literal["pool", "domain"] = "pool"
    """Whose answers are flipped. domain: its examples, too, are then scored against the domain."""
    truth: str | None = None
    """JSON file with `useful_ids`, the ids of the pool examples that help, where that is known: 1 for these and 0 for
    the others is then judged as one more score, `truth`, which tells a wrong score from too few subsets."""
    n: int | None = None
    """N that the methods are told, where their scores depend on it. None: a tenth of the pool."""
    bootstrap: int = 1000
    """Resamples of the subsets behind each interval."""
    seed: int = 0
    skip_warmup: bool = False
    """Score with the parameters as they are, without warming up on the domain."""
    dry_run: bool = False
    """Say how many trainings there are and how many tokens they take, and do nothing else."""
    data: Annotated[DataOptions, arg(name="")] = DataOptions()
    select: Annotated[SelectorOptions, arg(name="")] = SelectorOptions(stage1="off")
    dedup: DedupOptions = DedupOptions()
    evaluation: Annotated[EvaluationOptions, arg(name="")] = EvaluationOptions()
    warmup: TrainConfig = TrainConfig(epochs=1)
    """Warm-up on the domain before the pool is scored, as in select."""
    train: TrainConfig = TrainConfig(save_every=1000)
    """Every training. The steps follow from the epochs and the number of examples, or are train.steps."""

    def __post_init__(self):
        for name, least in (("subsets", 4), ("reseeds", 0), ("leave_in", 0), ("bootstrap", 10)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.alpha < 1:
            raise ConfigError(f"alpha must lie between 0 and 1, got {self.alpha}")
        if not 0 <= self.flip < 1:
            raise ConfigError(f"flip must be at least 0 and below 1, got {self.flip}")
        if self.n is not None and self.n < 1:
            raise ConfigError(f"n must be at least 1, got {self.n}")
        if self.train.patience is not None:
            raise ConfigError("--train.patience: every training takes equally many steps; leave it out")
        if self.with_domain == "off" and self.train.domain_share is not None:
            raise ConfigError(
                "--train.domain-share needs the domain, and --with-domain is off; leave out one of the two"
            )
        plain = SelectorOptions()
        for name, flag in (("method", "--methods"), ("kernel", "--kernels")):
            if getattr(self.select, name) != getattr(plain, name):
                raise ConfigError(f"--{name}: validate judges several; name them with {flag}")
        if self.select.diversity != "none":
            raise ConfigError("--diversity changes what is selected, and validate judges scores; leave it out")
        for name in self.method_names:
            check_method(name)
        for name in self.kernels:
            parse(name)

    @property
    def method_names(self) -> tuple[str, ...]:
        """The methods that are judged, each once, in the order given."""
        given = (name.strip() for text in self.methods for name in text.split(","))
        return tuple(dict.fromkeys(name for name in given if name)) or tuple(METHODS)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the trainings: that of the subsets, and the others that they are trained again with."""
        return tuple(range(self.seed, self.seed + self.reseeds + 1))

    @property
    def leave_in_seeds(self) -> tuple[int, ...]:
        """Of the trainings with a tenth of the pool."""
        return tuple(range(self.seed, self.seed + self.leave_in))


def scores_of(config: ValidateConfig) -> tuple[Arm, ...]:
    """One arm for each score: a method, or a method with one of the kernels."""
    made = []
    for method in config.method_names:
        used = make_selector(dataclasses.replace(config.select, method=method)).used_options()
        kernels = config.kernels if "kernel" in used else ()
        for kernel in kernels or (None,):
            chosen = {} if kernel is None else {"kernel": kernel}
            options = dataclasses.replace(config.select, method=method, **chosen)
            warmup = config.warmup if uses_model(options) and not config.skip_warmup else None
            label = method if kernel is None else f"{method} ({kernel})"
            rates = (config.train.learning_rate,)
            made.append(Arm(label, "selected", options, config.train, warmup, config.model.parameters, rates))
    return tuple(made)


def impossible(config: ValidateConfig, arm: Arm) -> str | None:
    """Why a score cannot be had under this config; None where it can."""
    assert arm.select is not None
    if config.skip_warmup and needs_checkpoints(arm.select):
        return "looks at the epochs of the warm-up, and --skip-warmup leaves none"
    if config.skip_warmup and make_selector(arm.select).uses_start:
        return "looks at the model before and after the warm-up, and --skip-warmup leaves none"
    return None
