"""Train on loaded data and keep the weights: the step that commands share."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ntkjax.data import concat
from ntkjax.models import LanguageModel, save_adapter, save_merged
from ntkjax.pipeline.load import Loaded
from ntkjax.training import FitResult, TrainConfig, fit
from ntkjax.types import Params


def train_on(
    model: LanguageModel,
    params: Params,
    domain: Loaded,
    auxiliary: Loaded | None,
    config: TrainConfig,
    *,
    seed: int,
    dev: Loaded | None,
    out: Path | None,
    progress: bool = True,
) -> FitResult:
    """``fit`` on domain examples followed by auxiliary ones (the order of training is drawn from ``seed``)."""
    tokens = domain.tokens if auxiliary is None else concat(domain.tokens, auxiliary.tokens)
    return fit(
        model.nll_fn,
        params,
        tokens,
        config,
        seed=seed,
        dev=None if dev is None else dev.tokens,
        domain=np.arange(len(domain)),
        out_dir=out,
        progress=progress,
    )


def save_result(out: Path, model: LanguageModel, params: Params, *, merge: bool = False) -> None:
    """LoRA factors go to OUT/adapter in PEFT format; all parameters (or ``merge``) to OUT/merged in HF format."""
    lora_only = model.lora_config is not None
    if lora_only:
        save_adapter(out / "adapter", model, params)
    if merge or not lora_only:
        save_merged(out / "merged", model, params)


def summary(result: FitResult) -> dict:
    """The result of a fine-tuning run, as plain numbers."""
    return {
        "steps": result.steps,
        "best_step": result.best_step,
        "stopped_early": result.stopped_early,
        "clipped_steps": result.clipped_steps,
        "tokens_per_second": result.tokens_per_second,
        "mean_learning_rate": result.mean_lr,
    }
