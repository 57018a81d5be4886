"""What a study is: its model, its data, the arms that it compares and how they are trained.

`ntkjax.commands.study.spec` reads it from YAML files; `ntkjax.commands.adapt` makes one from its flags.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from ntkjax.assets import DEMO
from ntkjax.data.mapping import Source
from ntkjax.errors import ConfigError
from ntkjax.evaluation.options import EvaluationOptions
from ntkjax.ntk.kernels import parse
from ntkjax.pipeline.options import DataOptions, DedupOptions, ModelOptions, SelectorOptions
from ntkjax.training import TrainConfig

EMBEDDED = "embedded"
"""The model that ships with the package; as a study file: the study that ships."""
ALL = "all"
"""In the place of a method, or of a list of representations or algorithms: each that there is."""
WHOLE = "all"
"""A domain size: the whole training file."""


@dataclasses.dataclass(frozen=True)
class EmbeddedTask:
    """Sizes of the task that ships with the package, and its seed."""

    task_seed: int = 7
    pool_size: int = DEMO.pool_size
    domain_size: int = DEMO.domain_size
    dev_size: int = DEMO.dev_size
    test_size: int = DEMO.test_size


@dataclasses.dataclass(frozen=True)
class DomainSpec:
    """A domain: its files, the sizes of its training set (default: the study's), and what truly helps.

    ``truth``: a JSON file with ``useful_ids``, the ids of the pool examples that help; adds precision at N.
    """

    train: tuple[Source, ...] = ()
    dev: tuple[Source, ...] = ()
    test: tuple[Source, ...] = ()
    sizes: tuple[int | Literal["all"], ...] = ()
    truth: str | None = None

    def __post_init__(self) -> None:
        _at_least_one("sizes", self.sizes)


@dataclasses.dataclass(frozen=True)
class MethodSpec:
    """One entry of ``methods``.

    Attributes:
      method: a selector, a training-time method (``loss-reweighting``, ``lift``: on randomly chosen data unless
        ``method`` and ``train`` are given), or ``all``.
      label: its name in the tables; default: the method.
      options: of the selector, over the study's ``select``.
      train: fields of ``train`` that this arm changes (not those that decide the steps).
      warmup: ``shared``: the study's; ``none``: this arm selects with parameters that were not warmed up.
      parameters: what this arm trains (selection is as for all); default: the model's.
      learning_rates: this arm's own; default: the study's.
      representations, algorithms: of method ``parts``: an arm for each pair, in the place of its option of that name.
    """

    method: str
    label: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    train: dict[str, Any] = dataclasses.field(default_factory=dict)
    warmup: Literal["shared", "none"] = "shared"
    parameters: Literal["lora", "all"] | None = None
    learning_rates: tuple[float, ...] = ()
    representations: tuple[str, ...] = ()
    algorithms: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class StudySpec:
    """A study as its file says it; the keys are explained in `ntkjax.commands.study.spec`."""

    title: str = "Which selection helps?"
    model: ModelOptions | None = None
    embedded: EmbeddedTask | None = None
    pool: tuple[Source, ...] = ()
    domains: dict[str, DomainSpec] = dataclasses.field(default_factory=dict)
    methods: tuple[MethodSpec, ...] = ()
    kernels: tuple[str, ...] = ()
    budgets: tuple[int, ...] = ()
    domain_sizes: tuple[int | Literal["all"], ...] = (WHOLE,)
    seeds: tuple[int, ...] = (0, 1, 2)
    select: SelectorOptions = SelectorOptions()
    warmup: TrainConfig | None = TrainConfig(epochs=1)
    train: TrainConfig = TrainConfig()
    learning_rates: tuple[float, ...] = ()
    data: DataOptions = DataOptions()
    dedup: DedupOptions = DedupOptions()
    evaluation: EvaluationOptions = EvaluationOptions()
    focus: tuple[str, ...] = ()
    select_only: bool = False
    keep_weights: bool = False

    def __post_init__(self) -> None:
        _at_least_one("budgets", self.budgets)
        _at_least_one("domain_sizes", self.domain_sizes)
        for name in ("budgets", "domain_sizes", "seeds", "kernels", "learning_rates"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise ConfigError(f"{name}: {list(given)} names a value twice")
        for kernel in self.kernels:
            try:
                parse(kernel)
            except ConfigError as error:
                raise ConfigError(f"kernels: {error}") from None
        if any(rate <= 0 for rate in self.learning_rates):
            raise ConfigError(f"learning_rates: expected numbers above 0, got {list(self.learning_rates)}")


def _at_least_one(name: str, values: Sequence[Any]) -> None:
    if any(value != WHOLE and value < 1 for value in values):
        raise ConfigError(f"{name}: expected whole numbers of at least 1, got {list(values)}")
