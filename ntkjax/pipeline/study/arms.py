"""The arms of a comparison: their names, and what each does."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from ntkjax.pipeline.options import SelectorOptions
from ntkjax.training import TrainConfig

BASE = "base"
"""The model as it is."""
DOMAIN = "domain-only"
"""Fine-tuned on the domain for its own epochs."""
EQUAL = "domain-only-equal-steps"
"""The domain alone for as many optimiser steps as the arms with auxiliary data."""
RANDOM = "random"
"""The domain and pool examples drawn uniformly."""

Kind = Literal["base", "domain-only", "domain-only-equal-steps", "selected", "given"]


@dataclasses.dataclass(frozen=True)
class Given:
    """Pool rows that an arm trains on without choosing them.

    Attributes:
      rows: of the pool as the grid holds it (without duplicates), ascending.
      domain: whether the domain's training examples are trained on as well.
    """

    rows: tuple[int, ...]
    domain: bool = True


@dataclasses.dataclass(frozen=True)
class Arm:
    """One line of the tables.

    Attributes:
      label: its name.
      kind: ``base``: nothing is trained; ``domain-only``: the domain for its own epochs; ``domain-only-equal-steps``:
        the domain for as many steps as the arms with chosen data; ``selected``: domain and chosen data.
      select: how the data are chosen (kind ``selected``).
      train: settings of the fine-tuning, with the first of ``rates`` as learning rate.
      warmup: what happens before the choice; None: nothing, as for methods that do not look at the model.
      parameters: what is fine-tuned.
      rates: learning rates to choose from on dev.
      given: the pool rows of an arm of kind ``given``.
    """

    label: str
    kind: Kind
    select: SelectorOptions | None
    train: TrainConfig
    warmup: TrainConfig | None
    parameters: Literal["lora", "all"]
    rates: tuple[float, ...]
    given: Given | None = None

    @property
    def uses_budget(self) -> bool:
        """Whether the arm is another one for another budget."""
        return self.kind in ("selected", "given", EQUAL)

    @property
    def uses_domain(self) -> bool:
        """Whether the domain's training examples are trained on."""
        return self.given is None or self.given.domain

    def steps(self, domain: int, budget: int) -> int:
        """Optimiser steps: those of a run over domain and budget, for every arm but ``domain-only``."""
        if self.train.steps is not None:
            return self.train.steps
        examples = (domain if self.uses_domain else 0) + (0 if self.kind == DOMAIN else budget)
        return max(1, round(self.train.epochs * math.ceil(examples / self.train.batch_size)))

    def config(self, rate: float, steps: int) -> TrainConfig:
        """The fine-tuning at a learning rate, in so many steps."""
        return dataclasses.replace(self.train, learning_rate=rate, steps=steps)
