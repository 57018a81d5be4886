"""``ntkjax adapt``: fine-tuning with selected examples, against the domain alone and against random examples.

It is a study (`ntkjax.pipeline.study`) of one domain and one N, whose learning rates are not tuned. Arms, each from the
same fresh parameters with the same order of data for a given seed:

- ``base``: the model as it is.
- ``domain-only``: fine-tuned on the domain for ``train.epochs``.
- ``domain-only-equal-steps``: the domain alone for as many optimiser steps as the arms with auxiliary data.
- ``random``: domain + n pool examples drawn uniformly.
- ``ntk-selector``: domain + n pool examples chosen by the tangent kernel.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tyro.conf import arg

from ntkjax.commands.adapt.report import NTK, difference_rows, failure_rows, method_rows, write_adaptation
from ntkjax.commands.base import Command
from ntkjax.errors import ConfigError, UserError
from ntkjax.evaluation import METRICS, Outcome
from ntkjax.evaluation.options import EvaluationOptions
from ntkjax.evaluation.summary import majority_accuracy
from ntkjax.files import read_json
from ntkjax.job import is_primary
from ntkjax.pipeline.compare import compare_methods, paired_runs, summarise_method
from ntkjax.pipeline.cost import uses_model
from ntkjax.pipeline.deduplicate import FILE as DUPLICATES
from ntkjax.pipeline.deduplicate import summary, totals
from ntkjax.pipeline.evaluate import shot_records
from ntkjax.pipeline.inputs import Inputs, inputs_of
from ntkjax.pipeline.options import DataOptions, DedupOptions, ModelOptions, SelectorOptions, check_used
from ntkjax.pipeline.reading import reading
from ntkjax.pipeline.run_dir import RunDir
from ntkjax.pipeline.study.arms import BASE, DOMAIN, EQUAL, RANDOM, Arm, Kind
from ntkjax.pipeline.study.grid import Grid, read_inputs, set_up
from ntkjax.pipeline.study.runner import FAILURE, Runner
from ntkjax.pipeline.study.runs import Run, alone, collect, do_all, forget_failures, prepared
from ntkjax.pipeline.study.spec import DomainSpec, sources, study_of
from ntkjax.pipeline.study.tables import choices_line
from ntkjax.report.tables import to_markdown
from ntkjax.selection.base import check_size
from ntkjax.training import TrainConfig
from ntkjax.training.trackers import check_tracker

ARMS = (BASE, DOMAIN, EQUAL, RANDOM, NTK)
PAIRS = ((NTK, RANDOM), (NTK, EQUAL), (NTK, DOMAIN), (NTK, BASE), (RANDOM, EQUAL), (EQUAL, DOMAIN), (DOMAIN, BASE))
"""(method, reference): the differences that are reported."""
READ = {"domain": "domain train", "pool": "pool", "test": "domain test", "dev": "domain dev"}
"""Role of the data -> what the grid calls what reading found."""


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
    """The result of an adaptation; ``results`` is the content of results.json.

    Attributes:
      results: per-method summaries, comparisons, runs with their folders, selections, failures.
      outcomes: method -> one list of per-example outcomes for each seed whose run is done.
      selected: seed -> rows that NTK-Selector chose, best first, of the pool without its duplicates.
    """

    results: dict[str, Any]
    outcomes: Mapping[str, list[list[Outcome]]]
    selected: Mapping[int, np.ndarray]

    @property
    def exit_code(self) -> int:
        """1 where a run has failed, 0 otherwise."""
        return int(bool(self.results["failures"]))


def adapt(config: AdaptConfig, *, progress: bool = True) -> Adaptation:
    """Run every arm and seed of ``config``; writes results.json, results.md, tables/, plots/ and report.html into OUT.

    A run that is done is not done again: the same command goes on where it was stopped, and tries again what failed. A
    run that fails is written down and the others go on; see ``Adaptation.exit_code``.

    Raises:
      UserError: unusable model, data or options; the base model cannot be evaluated, or every run fails; a full disk.
    """
    began, progress = time.monotonic(), progress and is_primary()
    check_tracker(config.train.tracker, config.warmup.tracker)
    RunDir.check(config.out, "adapt", config)
    grid, run = _load(config, progress)
    runner, tasks = Runner(grid, progress), grid.tasks()
    with alone(run.path):
        forget_failures(run.path)
        base = [task for task in tasks if task.arm.kind == BASE]
        with prepared(runner, tasks):
            for part in (base, tasks):  # test data that cannot be evaluated are told before anything is trained
                do_all(runner, run, part, bar=False)
                runs = [made for made in collect(runner) if made.task in part]
                if part and all(made.status == "failed" for made in runs):
                    raise UserError(f"{runs[0].message} (recorded in {runs[0].path / FAILURE})")
        done = [made for made in runs if made.status == "done"]
        outcomes: dict[str, dict[int, list[Outcome]]] = {}
        for arm in grid.arms:
            of_arm = {made.task.seed: made.outcomes() for made in done if made.task.arm == arm}
            outcomes |= {arm.label: of_arm} if of_arm else {}
        results: dict[str, Any] = {**_results(grid, runs, outcomes), "wall_seconds": time.monotonic() - began}
        run.write_json("results.json", results)
        if is_primary():
            write_adaptation(run.path, results)
    selected = {int(seed): np.asarray(content["selected"]) for seed, content in results["selections"].items()}
    return Adaptation(results, {name: list(of_seed.values()) for name, of_seed in outcomes.items()}, selected)


def _load(config: AdaptConfig, progress: bool) -> tuple[Grid, RunDir]:
    grid, inputs = _read(config, progress)
    run = RunDir.create(Path(config.out), "adapt", config, inputs=inputs)
    run.tell("results.json", progress)
    if grid.reports["domain duplicates"] is not None:
        run.write_json(DUPLICATES, grid.reports["domain duplicates"])
    return grid, run


def grid_of(config: AdaptConfig) -> Grid:
    """The arms of an adaptation, with its model and data loaded and checked against those of OUT."""
    return _read(config, progress=False)[0]


def _read(config: AdaptConfig, progress: bool) -> tuple[Grid, Inputs]:
    check_used(config.select)
    out = Path(config.out)
    domain = DomainSpec(sources(config.domain), sources(config.dev), sources(config.test))
    seeds = tuple(range(config.seed, config.seed + config.seeds))
    spec = study_of(config, "domain", domain, budgets=(config.n,), seeds=seeds, keep_weights=True)
    read = read_inputs(spec, out, ("train", "test", "dev"))
    check_size(config.n, len(read.pool))
    splits = read.splits["domain"]
    data = {"domain": splits["train"], "pool": read.pool, "test": splits["test"], "dev": splits.get("dev")}
    data["shots"] = shot_records(config.evaluation, config.data)
    inputs = inputs_of(read.model, config.model, **data)
    RunDir.check(out, "adapt", config, inputs=inputs)  # before the search for duplicates, which takes time
    names = sorted(dict.fromkeys(config.arms), key=lambda name: name != BASE)  # the base model comes first
    arms = tuple(_arm(config, name) for name in names)
    options = {"focus": (NTK,), "evaluated": ("test",), "shared_lengths": False, "progress": progress}
    return set_up(spec, arms, read, out, **options), inputs


def _arm(config: AdaptConfig, name: str) -> Arm:
    select = {RANDOM: SelectorOptions(method=RANDOM), NTK: config.select}.get(name)
    kinds: dict[str, Kind] = {BASE: BASE, DOMAIN: DOMAIN, EQUAL: EQUAL}
    warmup = config.warmup if select is not None and uses_model(select) else None
    rates = (config.train.learning_rate,)
    return Arm(name, kinds.get(name, "selected"), select, config.train, warmup, config.model.parameters, rates)


def _results(grid: Grid, runs: Sequence[Run], outcomes: Mapping[str, Mapping[int, list[Outcome]]]) -> dict[str, Any]:
    """The content of results.json, but for the seconds."""
    seed, one = grid.spec.seeds[0], next(iter(next(iter(outcomes.values())).values()))
    done = [run for run in runs if run.status == "done"]
    trained = [run for run in done if run.task.arm.kind != BASE]
    return {
        "methods": {name: summarise_method(list(of_seed.values()), seed=seed) for name, of_seed in outcomes.items()},
        "comparisons": [row for pair in PAIRS for row in _compare(outcomes, pair, seed)],
        "runs": [_detail(run) for run in trained],
        "folders": {
            name: {str(r.task.seed): str(r.path.relative_to(grid.out)) for r in done if r.task.arm.label == name}
            for name in outcomes
        },
        "selections": {
            str(run.task.seed): read_json(run.path / "selection.json") for run in trained if run.task.arm.label == NTK
        },
        "failures": [run.failure() for run in runs if run.status == "failed"],
        "majority_accuracy": majority_accuracy([(str(o.gold), o.choices) for o in one if o.correct_raw is not None]),
        "examples": {"all": len(one), "with_choices": sum(o.correct_raw is not None for o in one)},
        "duplicates": totals(grid.reports["domain duplicates"]),
        "data": {name: grid.reports[read] for name, read in READ.items() if read in grid.reports},
    }


def _compare(
    outcomes: Mapping[str, Mapping[int, list[Outcome]]], pair: tuple[str, str], seed: int
) -> list[dict[str, Any]]:
    """The rows of one pair of methods, over the seeds that both have."""
    if not all(name in outcomes for name in pair):
        return []
    paired = dict(zip(pair, paired_runs(outcomes, pair)))
    return compare_methods(paired, [pair], seed=seed) if all(paired.values()) else []


def _detail(run: Run) -> dict[str, Any]:
    """A trained run in numbers: its seconds, its steps, its loss by step."""
    names = ("steps", "best_step", "stopped_early", "clipped_steps", "tokens_per_second", "mean_learning_rate", "curve")
    selecting = sum(run.result["seconds"].get(part, 0.0) for part in ("warmup", "selection"))
    head = {"arm": run.task.arm.label, "seed": run.task.seed, "selection_seconds": selecting}
    return head | {name: run.result[name] for name in names}


def describe(config: Any, result: Any) -> str:
    """The table of methods, differences, failures and the report's path."""
    results = result.results
    differences = difference_rows(results, [metric.name for metric in METRICS.values() if metric.headline])
    parts = [to_markdown(method_rows(results)), to_markdown(differences)]
    parts += filter(None, [choices_line(results["examples"])])
    if results["failures"]:
        parts.append("Failed (the same command tries again):\n" + to_markdown(failure_rows(results)))
    parts += [summary(results["duplicates"]), reading(results["data"])]
    return "\n".join(parts) + f"\nreport: {Path(config.out) / 'report.html'}"


COMMAND = Command(AdaptConfig, adapt, describe, spans=True, grid=grid_of)
