"""``ntkjax finetune``: optax fine-tuning on a domain, with or without auxiliary (selected) data."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import numpy as np
from tyro.conf import arg

from ntkjax.data import concat
from ntkjax.models import LanguageModel, save_adapter, save_merged
from ntkjax.stages.inputs import inputs_of
from ntkjax.stages.loading import Loaded, load_data, load_model, trained_parameters
from ntkjax.stages.options import DataOptions, ModelOptions
from ntkjax.stages.rundir import RunDir
from ntkjax.training import FitResult, TrainConfig, fit
from ntkjax.types import Params


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tune on domain examples and, where given, auxiliary ones (the selected.jsonl of a selection)."""

    model: Annotated[ModelOptions, arg(name="")]
    domain: tuple[str, ...]
    """Training files of the domain."""
    out: str
    """Run directory; a run that was stopped goes on there."""
    auxiliary: tuple[str, ...] = ()
    """Auxiliary training files, e.g. RUN/selected.jsonl."""
    dev: tuple[str, ...] = ()
    """Held-out files: their loss is logged, chooses the best step and, with --train.patience, stops early."""
    seed: int = 0
    merge: bool = False
    """Also write a merged Hugging Face checkpoint to OUT/merged."""
    data: Annotated[DataOptions, arg(name="")] = DataOptions()
    train: TrainConfig = TrainConfig()


def finetune(config: FinetuneConfig, *, progress: bool = True) -> FitResult:
    """Fine-tune as ``config`` says; writes OUT/adapter (or OUT/merged for all parameters) and OUT/finetune.json.

    Returns:
      FitResult: the parameters of the best step (lowest dev loss) or the last, and the history.

    Raises:
      UserError: unusable model, data or options; a loss that is not finite; a full disk.
    """
    RunDir.check(config.out, "finetune", config)
    model = load_model(config.model, seed=config.seed)
    domain = load_data(config.domain, model, config.data)
    auxiliary = load_data(config.auxiliary, model, config.data) if config.auxiliary else None
    dev = load_data(config.dev, model, config.data) if config.dev else None
    data = {"domain": domain, "auxiliary": auxiliary, "dev": dev}
    run = RunDir.create(config.out, "finetune", config, inputs=inputs_of(model, config.model, **data))
    run.tell("finetune.json", progress)
    result = train_on(
        model,
        trained_parameters(model, config.model),
        domain,
        auxiliary,
        config.train,
        seed=config.seed,
        dev=dev,
        out=run.path / "training",
        progress=progress,
    )
    save_result(run.path, model, result.params, merge=config.merge)
    run.write_json(
        "finetune.json", summary(result) | {"data": {k: v.report() for k, v in data.items() if v is not None}}
    )
    return result


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
    """What a fine-tuning run came to, as plain numbers."""
    return {
        "steps": result.steps,
        "best_step": result.best_step,
        "stopped_early": result.stopped_early,
        "clipped_steps": result.clipped_steps,
        "tokens_per_second": result.tokens_per_second,
        "mean_learning_rate": result.mean_lr,
    }
