"""What a fine-tuning run carries from step to step, and what it ends with."""

from __future__ import annotations

import dataclasses
from typing import Any

from ntkjax.types import Params


@dataclasses.dataclass(frozen=True)
class FitResult:
    """What a fine-tuning run ends with.

    Attributes:
      params: the trained parameters, structure and dtypes as given; those of ``best_step``.
      steps: optimiser steps taken.
      best_step: the step whose parameters these are: that of the lowest dev loss, or ``steps`` without a dev
        set.
      stopped_early: whether ``patience`` ended the run.
      history: the lines of metrics.jsonl.
      tokens_per_second: real tokens (padding not counted) over the time of the steps that did not compile.
      clipped_steps: steps whose gradient norm exceeded ``clip_norm``.
      mean_lr: mean learning rate over the steps taken.
      opt_state: the optimiser's state after the last step; see :func:`ntkjax.training.adam_moments`.
    """

    params: Params
    steps: int
    best_step: int
    stopped_early: bool
    history: list[dict[str, Any]]
    tokens_per_second: float
    clipped_steps: int
    mean_lr: float
    opt_state: Any


@dataclasses.dataclass
class Progress:
    """The part of a run's state that is not arrays; saved as JSON with every checkpoint."""

    step: int = 0
    best_step: int = 0
    best_loss: float | None = None
    stale: int = 0
    stopped_early: bool = False
    clipped_steps: int = 0
    timed_tokens: int = 0
    timed_seconds: float = 0.0
    metrics_bytes: int = 0
