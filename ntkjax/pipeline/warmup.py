"""The warm-up before a selection: fine-tuning on the domain, with the checkpoints and moments that methods ask for."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ntkjax.job import barrier, broadcast, is_primary
from ntkjax.models import LanguageModel, save_adapter
from ntkjax.parallel import spans_processes
from ntkjax.pipeline.load import Loaded
from ntkjax.pipeline.options import SelectorOptions, part_of
from ntkjax.selection import METHODS
from ntkjax.selection.base import WarmupCheckpoint
from ntkjax.training import EpochPlan, TrainConfig, fit, learning_rates, saved_state
from ntkjax.types import Params, float32_or_better


@dataclasses.dataclass(frozen=True)
class WarmUp:
    """What a warm-up ends with.

    Attributes:
      params: theta, with which the pool is looked at.
      checkpoints: the run at the end of each of its epochs, oldest first; empty where nobody asked for them.
    """

    params: Params
    checkpoints: tuple[WarmupCheckpoint, ...] = ()


def needs_checkpoints(options: SelectorOptions) -> bool:
    """Whether the method of ``options``, with the options that it has, looks at the warm-up's epochs."""
    return part_of(options, METHODS[options.method]).uses_checkpoints


def warm_up(
    model: LanguageModel,
    params: Params,
    domain: Loaded,
    config: TrainConfig,
    *,
    seed: int,
    out: Path,
    progress: bool,
    checkpoints: bool = False,
) -> WarmUp:
    """theta fine-tuned on the domain, OUT/warmup and OUT/adapter written; in a job of several processes the first one
    trains and the others receive, on a mesh over all of them they train together. A warm-up that OUT holds is read
    back; one that was killed goes on.

    Args:
      params: theta before.
      checkpoints: keep theta and Adam's moments at the end of every epoch (the last one may be a part of an epoch).
        On disk each takes three times the parameters.

    Raises:
      CheckpointError: OUT holds the end of a warm-up that did not keep them (delete OUT/warmup to repeat it).
    """
    ends = epoch_ends(config, domain) if checkpoints else []
    if checkpoints:
        # A step is saved where ``save_every`` divides it: the greatest common divisor also keeps the ends of all
        # epochs.
        every = ends[0] if config.save_every is None else math.gcd(config.save_every, ends[0])
        config = dataclasses.replace(config, save_every=every, keep_checkpoints=None)
    # Of the right structure on every process: `broadcast` sends into what each has.
    warmed, states = params, [(params, *(_moments_like(params),) * 2) for _ in ends]
    if is_primary() or spans_processes(model.mesh):
        progress = progress and is_primary()
        folder = out / "warmup"
        warmed = fit(model.nll_fn, params, domain.tokens, config, seed=seed, out_dir=folder, progress=progress).params
        if model.lora_config is not None:
            save_adapter(out / "adapter", model, warmed)
        states = [saved_state(folder, step, params, config) for step in ends]
    barrier("warmed up")  # what the first process wrote may be read
    warmed, states = broadcast((warmed, states))
    return WarmUp(warmed, tuple(map(WarmupCheckpoint, *zip(*states), epoch_rates(config, ends), ends)) if ends else ())


def epoch_ends(config: TrainConfig, domain: Loaded) -> list[int]:
    """Optimiser steps taken at the end of each epoch, the last entry the end of the run."""
    lengths = np.asarray(domain.tokens.lengths)
    per_epoch = EpochPlan(lengths, config.batch_size, 0, np.zeros(0, np.int64)).steps_per_epoch
    steps = config.steps or max(1, round(config.epochs * per_epoch))
    return [*range(per_epoch, steps, per_epoch), steps]


def epoch_rates(config: TrainConfig, ends: list[int]) -> list[float]:
    """Mean learning rate over the steps of each epoch."""
    rates = learning_rates(config, ends[-1]) if ends else np.zeros(0)
    return [float(np.mean(rates[first:last])) for first, last in zip([0, *ends], ends)]


def _moments_like(params: Params) -> Params:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, float32_or_better(leaf.dtype)), params)
