"""Every setting of a fine-tuning run, checked when it is made."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

from ntkjax.errors import ConfigError
from ntkjax.training.loss_reweighting import Reweighting
from ntkjax.training.trackers import TRACKERS, TrackerName

SCHEDULES = ("linear", "cosine", "constant")
NO_EFFECT = ("save_every", "keep_checkpoints", "tracker")
"""Settings that change no number: runs that differ in them alone are one, and may go on under others."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of one fine-tuning run (AdamW, response-only token-mean loss).

    Raises:
      ConfigError: a value is out of range or of the wrong type; the message names the field.
    """

    epochs: float | int = 3
    """Passes over the training examples (paper: 3). Ignored where ``steps`` is given."""
    steps: int | None = None
    """Optimiser steps; overrides ``epochs``. Give two runs the same number to compare them at equal steps."""
    batch_size: int = 16
    """Examples per optimiser step."""
    accumulation: int = 1
    """Micro-batches per optimiser step; the result does not depend on it beyond rounding (1e-6)."""
    micro_batch_tokens: int | None = None
    """Most padded tokens in one micro-batch: long buckets then take more micro-batches. None: no bound."""
    max_buckets: int = 4
    """Padded lengths that batches are rounded up to; the step is compiled once for each."""
    buckets: tuple[int, ...] | None = None
    """The padded lengths themselves, ascending, in tokens: runs on different data that are given the same ones
    share their compiled steps. None: at most ``max_buckets`` are chosen for the data."""
    learning_rate: float = 2e-5
    """Peak learning rate (paper: 2e-5 for an 8B model; smaller models want more: 1e-3 at 10M)."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Shape of the learning rate after warm-up: to zero linearly, to zero by a half cosine, or constant."""
    warmup_ratio: float = 0.03
    """Share of all steps over which the learning rate rises linearly to its peak (paper: 0.03)."""
    weight_decay: float = 0.0
    """Decoupled weight decay per unit of learning rate; not applied to leaves named ``bias`` or ``scale``."""
    b1: float = 0.9
    """Decay of AdamW's first moment, per step."""
    b2: float = 0.999
    """Decay of AdamW's second moment, per step."""
    eps: float = 1e-8
    """Added to the root of AdamW's second moment."""
    clip_norm: float | None = 1.0
    """Largest global L2 norm of the gradient; clipped steps are counted and reported. None: never clip."""
    domain_share: float | None = None
    """Least share of each epoch that domain examples make, reached by repeating them. None: no repeats."""
    eval_every: int | None = None
    """Optimiser steps between evaluations on dev. None: once per epoch. The last step is always evaluated."""
    patience: int | None = None
    """Evaluations without improvement of the dev loss after which training stops. None: never stop early."""
    restore_best: bool = True
    """With a dev set, return the parameters of the evaluation with the lowest dev loss, not the last ones."""
    save_every: int | None = None
    """Optimiser steps between checkpoints. None: once per epoch. The last step is always saved."""
    keep_checkpoints: int | None = 2
    """Newest checkpoints kept on disk. None: all of them (to look at training over time)."""
    loss_reweighting: Reweighting = "none"
    """Weigh the examples of a batch by their loss (arXiv 2502.06733): linupper, quadratic or extremes."""
    reweighting_temperature: float = 0.4
    """r of loss_reweighting: the larger, the closer to equal weights."""
    lift_rank: int | None = None
    """LIFT (arXiv 2506.00772): train only the entries of each linear layer that are largest after its reduction to
    this rank, as many as LoRA of this rank would train. Needs all parameters to be trained. None: off."""
    lift_interval: int = 200
    """Optimiser steps between two choices of those entries."""
    tracker: TrackerName = "none"

    def epochs_over(self, examples: int) -> float:
        """Passes over so many training examples: ``epochs``, or what ``steps`` amount to."""
        return float(self.epochs) if self.steps is None else self.steps * self.batch_size / examples

    def __post_init__(self) -> None:
        _check_types(self)
        _check_ranges(self)


_OPTIONAL_COUNTS = (
    *("steps", "micro_batch_tokens", "eval_every", "patience", "save_every", "keep_checkpoints", "lift_rank"),
)
_COUNTS = ("batch_size", "accumulation", "max_buckets", "lift_interval", *_OPTIONAL_COUNTS)
_OPTIONAL_REALS = ("clip_norm", "domain_share")
_REALS = (
    *("epochs", "learning_rate", "warmup_ratio", "weight_decay", "b1", "b2", "eps", "reweighting_temperature"),
    *_OPTIONAL_REALS,
)
_OPTIONAL = (*_OPTIONAL_COUNTS, *_OPTIONAL_REALS)


def _fail(name: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(f"training option {name} = {value!r}: expected {expected}")


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_types(config: TrainConfig) -> None:
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        if value is None and name in _OPTIONAL:
            continue
        if name in _COUNTS and (isinstance(value, bool) or not isinstance(value, int)):
            raise _fail(name, value, "a whole number" + (" or none" if name in _OPTIONAL else ""))
        if name in _REALS and not _is_finite_number(value):
            # YAML reads 1e-4 as text: the remedy belongs in the message.
            hint = " (in YAML write 1.0e-4, not 1e-4)" if isinstance(value, str) else ""
            raise _fail(name, value, "a finite number" + hint)
    buckets = config.buckets
    if buckets is not None and not (
        isinstance(buckets, tuple) and buckets and all(type(b) is int and b > 1 for b in buckets)
        and list(buckets) == sorted(set(buckets))
    ):  # fmt: skip
        raise _fail("buckets", buckets, "ascending whole numbers above 1, or none")
    if not isinstance(config.restore_best, bool):
        raise _fail("restore_best", config.restore_best, "true or false")


def _check_ranges(config: TrainConfig) -> None:
    for name in sorted(_COUNTS):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise _fail(name, value, "at least 1")
    for name in ("epochs", "learning_rate", "eps", "reweighting_temperature"):
        if getattr(config, name) <= 0:
            raise _fail(name, getattr(config, name), "a number above 0")
    if config.weight_decay < 0:
        raise _fail("weight_decay", config.weight_decay, "a number of at least 0")
    if config.clip_norm is not None and config.clip_norm <= 0:
        raise _fail("clip_norm", config.clip_norm, "a number above 0, or none for no clipping")
    for name in ("b1", "b2", "warmup_ratio"):
        if not 0 <= getattr(config, name) < 1:
            raise _fail(name, getattr(config, name), "a number in [0, 1)")
    if config.domain_share is not None and not 0 < config.domain_share < 1:
        raise _fail("domain_share", config.domain_share, "a number strictly between 0 and 1, or none")
    if config.schedule not in SCHEDULES:
        raise _fail("schedule", config.schedule, "one of " + ", ".join(SCHEDULES))
    if config.tracker not in tuple(TRACKERS):
        raise _fail("tracker", config.tracker, "one of " + ", ".join(TRACKERS))
    if config.loss_reweighting not in get_args(Reweighting):
        raise _fail("loss_reweighting", config.loss_reweighting, "one of " + ", ".join(get_args(Reweighting)))
    if config.accumulation > config.batch_size:
        raise _fail("accumulation", config.accumulation, f"at most batch_size = {config.batch_size}")
