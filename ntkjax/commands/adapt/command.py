"""``ntkjax adapt``: fine-tuning with selected examples, against the domain alone and against random examples.

Arms, each from the same fresh parameters with the same order of data for a given seed:

- ``base``: the model as it is.
- ``domain-only``: fine-tuned on the domain for ``train.epochs``.
- ``domain-only-equal-steps``: the domain alone for as many optimiser steps as the arms with auxiliary data.
- ``random``: domain + n pool examples drawn uniformly.
- ``ntk-selector``: domain + n pool examples chosen by the tangent kernel.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tyro.conf import arg

from ntkjax.commands.adapt.report import choices_line, difference_rows, method_rows, write_report
from ntkjax.commands.base import Command
from ntkjax.errors import ConfigError
from ntkjax.evaluation import METRICS, Outcome
from ntkjax.evaluation.metrics import means
from ntkjax.evaluation.options import EvaluationOptions
from ntkjax.evaluation.summary import majority_accuracy
from ntkjax.files import read_json
from ntkjax.models import LanguageModel
from ntkjax.pipeline.arms import BASE, DOMAIN, EQUAL, RANDOM
from ntkjax.pipeline.compare import compare_methods, summarise_method
from ntkjax.pipeline.deduplicate import deduplicate, summary, totals
from ntkjax.pipeline.evaluate import evaluate_on
from ntkjax.pipeline.finetune import save_result, train_on
from ntkjax.pipeline.finetune import summary as training_summary
from ntkjax.pipeline.inputs import inputs_of
from ntkjax.pipeline.load import Loaded, fresh_parameters, load_data, load_model
from ntkjax.pipeline.options import (
    DataOptions,
    DedupOptions,
    ModelOptions,
    SelectorOptions,
    check_used,
)
from ntkjax.pipeline.reading import reading
from ntkjax.pipeline.run_dir import RunDir
from ntkjax.pipeline.select import choose
from ntkjax.report.tables import to_markdown
from ntkjax.selection.base import check_size
from ntkjax.selection.methods.random import random_rows
from ntkjax.training import TrainConfig
from ntkjax.types import Params

NTK = "ntk-selector"
ARMS = (BASE, DOMAIN, EQUAL, RANDOM, NTK)
PAIRS = ((NTK, RANDOM), (NTK, EQUAL), (NTK, DOMAIN), (NTK, BASE), (RANDOM, EQUAL), (EQUAL, DOMAIN), (DOMAIN, BASE))
"""(method, reference): the differences that are reported."""


@dataclasses.dataclass(frozen=True)
class AdaptConfig:
    """Select, fine-tune and evaluate every arm for several seeds; one table, one report."""

    model: Annotated[ModelOptions, arg(name="")]
    domain: tuple[str, ...]
    """Training files of the domain."""
    pool: tuple[str, ...]
    """Files of the general pool to select from."""
    test: tuple[str, ...]
    n: int
    """N: pool examples to select."""
    out: str
    dev: tuple[str, ...] = ()
    """Held-out files that choose the best step of every arm."""
    seeds: int = 3
    """Runs of every arm, with seeds seed, seed + 1, ..."""
    seed: int = 0
    arms: tuple[str, ...] = ARMS
    data: Annotated[DataOptions, arg(name="")] = DataOptions()
    select: Annotated[SelectorOptions, arg(name="")] = SelectorOptions()
    dedup: DedupOptions = DedupOptions()
    evaluation: Annotated[EvaluationOptions, arg(name="")] = EvaluationOptions()
    warmup: TrainConfig = TrainConfig(epochs=1)
    train: TrainConfig = TrainConfig()

    def __post_init__(self):
        unknown = [name for name in self.arms if name not in ARMS]
        if unknown or not self.arms:
            raise ConfigError(f"unknown arm {', '.join(unknown) or '(none given)'}; expected some of {', '.join(ARMS)}")
        if self.n < 1 or self.seeds < 1:
            raise ConfigError(f"n and seeds must be at least 1, got n={self.n} and seeds={self.seeds}")


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """What an adaptation came to; ``results`` is the content of results.json.

    Attributes:
      results: config, per-method summaries, comparisons, selections.
      outcomes: method -> one list of per-example outcomes for each seed.
      selected: seed -> rows that NTK-Selector chose, best first, of the pool without its duplicates.
    """

    results: dict[str, Any]
    outcomes: Mapping[str, list[list[Outcome]]]
    selected: Mapping[int, np.ndarray]


@dataclasses.dataclass(frozen=True)
class _Study:
    """What every arm shares."""

    config: AdaptConfig
    run: RunDir
    model: LanguageModel
    domain: Loaded
    pool: Loaded
    test: Loaded
    dev: Loaded | None
    progress: bool
    duplicates: dict[str, Any] | None

    def folder(self, seed: int, arm: str) -> Path:
        return self.run.path / f"seed-{seed}" / arm

    def start(self, seed: int) -> Params:
        """Fresh parameters of this seed, the same for every arm."""
        return fresh_parameters(self.model, self.config.model, seed)

    @property
    def equal_steps(self) -> int:
        """Optimiser steps of the arms with auxiliary data."""
        examples = len(self.domain) + self.config.n
        per_epoch = math.ceil(examples / self.config.train.batch_size)
        return self.config.train.steps or max(1, round(self.config.train.epochs * per_epoch))


def adapt(config: AdaptConfig, *, progress: bool = True) -> Adaptation:
    """Run every arm and seed of ``config``; writes results.json, results.md, plots/ and report.html into OUT.

    An arm that has finished is not run again: the same command goes on where it was stopped.

    Raises:
      UserError: unusable model, data or options; a loss that is not finite; a full disk.
    """

    began = time.monotonic()
    RunDir.check(config.out, "adapt", config)
    study = _load(config, progress)
    run = study.run
    outcomes: dict[str, list[list[Outcome]]] = {}
    details: list[dict] = []
    selected: dict[int, np.ndarray] = {}
    if BASE in config.arms:
        outcomes[BASE] = [_evaluate(study, {}, run.path / "base")]
    for seed in range(config.seed, config.seed + config.seeds):
        for arm in (name for name in config.arms if name != BASE):
            detail, found = _run_arm(study, seed, arm, selected)
            outcomes.setdefault(arm, []).append(found)
            details.append(detail)
    results = _results(study, outcomes, details, selected) | {"wall_seconds": time.monotonic() - began}
    run.write_json("results.json", results)
    write_report(run, results)
    return Adaptation(results, outcomes, selected)


def _load(config: AdaptConfig, progress: bool) -> _Study:
    model = load_model(config.model, seed=config.seed)
    read = lambda paths: load_data(paths, model, config.data)
    pool = read(config.pool)
    check_used(config.select)
    check_size(config.n, len(pool))
    dev = read(config.dev) if config.dev else None
    domain, test = read(config.domain), read(config.test)
    inputs = inputs_of(model, config.model, domain=domain, pool=pool, test=test, dev=dev)
    RunDir.check(config.out, "adapt", config, inputs=inputs)  # before the search for duplicates, which takes time
    held_out = {"test": test.records} | ({} if dev is None else {"dev": dev.records})
    found = deduplicate(pool, domain.records, held_out, config.dedup, progress=progress)
    found.check_size(config.n)
    run = RunDir.create(config.out, "adapt", config, inputs=inputs)
    run.tell("results.json", progress)
    found.write(run)
    return _Study(config, run, model, domain, found.pool, test, dev, progress, totals(found.report))


def _run_arm(study: _Study, seed: int, arm: str, selected: dict[int, np.ndarray]) -> tuple[dict, list[Outcome]]:
    config, folder = study.config, study.folder(seed, arm)
    began = time.monotonic()
    auxiliary = _auxiliary(study, seed, arm, folder, selected)
    selecting = time.monotonic() - began
    train = config.train if arm == DOMAIN else dataclasses.replace(config.train, steps=study.equal_steps)
    result = train_on(
        study.model,
        study.start(seed),
        study.domain,
        auxiliary,
        train,
        seed=seed,
        dev=study.dev,
        out=folder / "training",
        progress=study.progress,
    )
    save_result(folder, study.model, result.params)
    found = _evaluate(study, result.params, folder)
    detail = {"arm": arm, "seed": seed, "selection_seconds": selecting, **training_summary(result)}
    curve = [[line["step"], line["loss"]] for line in result.history if "loss" in line]
    study.run.log(**detail, **means(found))
    return detail | {"curve": curve}, found


def _auxiliary(study: _Study, seed: int, arm: str, folder: Path, selected: dict[int, np.ndarray]) -> Loaded | None:
    config = study.config
    if arm == RANDOM:
        rows = random_rows(len(study.pool), config.n, seed)
    elif arm == NTK:
        rows = choose(
            study.model,
            study.start(seed),
            study.domain,
            study.pool,
            config.select,
            n=config.n,
            warmup=config.warmup,
            data=config.data,
            seed=seed,
            out=folder / "selection",
            progress=study.progress,
        ).selected
        selected[seed] = np.asarray(rows)
    else:
        return None
    return study.pool.subset(np.sort(rows))


def _evaluate(study: _Study, params: Params, folder: Path) -> list[Outcome]:
    folder.mkdir(parents=True, exist_ok=True)
    config = study.config
    result = evaluate_on(
        study.model,
        params,
        study.test,
        config.data,
        config.evaluation,
        path=folder / "outcomes.jsonl",
        seed=config.seed,
        progress=study.progress,
    )
    return result.outcomes


def _results(
    study: _Study, outcomes: dict[str, list[list[Outcome]]], details: list[dict], selected: dict[int, np.ndarray]
) -> dict[str, Any]:
    seed, one = study.config.seed, next(iter(outcomes.values()))[0]
    methods = {name: summarise_method(runs, seed=seed) for name, runs in outcomes.items()}
    return {
        "methods": methods,
        "comparisons": compare_methods(outcomes, PAIRS, seed=seed),
        "runs": details,
        "selections": {str(s): read_json(study.folder(s, NTK) / "selection" / "selection.json") for s in selected},
        "majority_accuracy": majority_accuracy([(str(o.gold), o.choices) for o in one if o.correct_raw is not None]),
        "examples": {"all": len(one), "with_choices": sum(o.correct_raw is not None for o in one)},
        "duplicates": study.duplicates,
        "data": {
            name: loaded.report()
            for name, loaded in (
                ("domain", study.domain),
                ("pool", study.pool),
                ("test", study.test),
                ("dev", study.dev),
            )
            if loaded is not None
        },
    }


def describe(config: Any, result: Any) -> str:
    """The table of methods, differences and the report's path."""
    results = result.results
    differences = difference_rows(results, [metric.name for metric in METRICS.values() if metric.headline])
    parts = [to_markdown(method_rows(results)), to_markdown(differences), *filter(None, [choices_line(results)])]
    parts += [summary(results["duplicates"]), reading(results["data"])]
    return "\n".join(parts) + f"\nreport: {Path(config.out) / 'report.html'}"


COMMAND = Command(AdaptConfig, adapt, describe)
