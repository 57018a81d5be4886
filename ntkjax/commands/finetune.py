"""``ntkjax finetune``: optax fine-tuning on a domain, with or without auxiliary (selected) data."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from ntkjax.commands.base import Command
from ntkjax.job import is_primary
from ntkjax.pipeline.finetune import save_result, summary, train_on
from ntkjax.pipeline.inputs import inputs_of
from ntkjax.pipeline.load import load_data, load_model, trained_parameters, weights_read
from ntkjax.pipeline.options import DataOptions, ModelOptions
from ntkjax.pipeline.reading import reading_of_run
from ntkjax.pipeline.run_dir import RunDir
from ntkjax.training import FitResult, TrainConfig
from ntkjax.training.trackers import check_tracker


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
    check_tracker(config.train.tracker)
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
        progress=progress and is_primary(),
    )
    save_result(run.path, model, result.params, merge=config.merge)
    reports = {name: loaded.report() for name, loaded in data.items() if loaded is not None}
    run.write_json("finetune.json", summary(result) | {"data": reports} | weights_read(model))
    return result


def describe(config: Any, result: Any) -> str:
    """Steps, speed and where the weights are."""
    kept = "adapter" if config.model.parameters == "lora" else "merged"
    early = " (stopped early)" if result.stopped_early else ""
    speed = f"{result.tokens_per_second:.0f} tokens/s, {result.clipped_steps} steps clipped"
    said = f"{result.steps} steps{early}, weights of step {result.best_step}, {speed}"
    merged = f", merged {Path(config.out) / 'merged'}" if config.merge and kept == "adapter" else ""
    return f"{reading_of_run(config, 'finetune.json')}\n{said}\nweights: {Path(config.out) / kept}{merged}"


COMMAND = Command(FinetuneConfig, finetune, describe, spans=True)
