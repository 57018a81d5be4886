"""Results of the runs of a study: one row for each run and metric, and means, intervals and tests over them.

How a difference is judged. Every arm is compared with ``random`` and with the strongest baseline of its condition, on
the same test examples and seeds. The strongest baseline is the arm that is not proposed (``focus``) with the best mean
headline metric on dev, never on test, so that picking it does not favour anybody (ties: lower dev loss). Intervals
resample seeds and examples; p-values come from the same replicates, and are corrected by Holm's method over all arms
that choose data, within one condition and one reference.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ntkjax.commands.study.arms import has_kernel
from ntkjax.evaluation import Metric, Outcome, hierarchical_bootstrap, hierarchical_p, holm, paired_values, values
from ntkjax.evaluation.choices import gold_choice
from ntkjax.evaluation.metrics import headline
from ntkjax.evaluation.summary import majority_accuracy
from ntkjax.files import read_json
from ntkjax.pipeline.compare import paired_runs, spread, summarise_method
from ntkjax.pipeline.cost import multiplied_weights
from ntkjax.pipeline.study.arms import BASE, RANDOM, Arm
from ntkjax.pipeline.study.grid import Condition, Grid
from ntkjax.pipeline.study.runner import FAILURE, TRAINED, Runner
from ntkjax.pipeline.study.runs import Run

MOST_SOURCES = 12
"""Sources of a test set that get a column of their own."""


def trial_rows(runner: Runner) -> list[dict[str, Any]]:
    """Every learning rate that was tried: condition, arm, rate, dev loss, whether it was chosen;
    failures with their message."""
    rows, first = [], runner.grid.spec.seeds[0]
    for task in runner.grid.tasks():
        if task.seed != first or len(task.arm.rates) < 2 or task.arm.kind == BASE:
            continue
        best, lowest, highest = runner.known_rate(task), min(task.arm.rates), max(task.arm.rates)
        for rate, folder in runner.trials(task).items():
            row = dataclasses.asdict(task.condition) | {"arm": task.arm.label, "learning_rate": rate, "dev_loss": None}
            if (folder / TRAINED).exists():
                row |= {"status": "done", "dev_loss": read_json(folder / TRAINED)["dev_loss"], "chosen": rate == best}
            elif (folder / FAILURE).exists():
                row |= {"status": "failed", "chosen": False, "message": read_json(folder / FAILURE)["message"]}
            else:
                row |= {"status": "left", "chosen": False}
            rows.append(row | {"run": folder.name, "at_edge": row["chosen"] and rate in (lowest, highest)})
    return rows


# -- one row for each run and metric --


def long_rows(runner: Runner, runs: Iterable[Run]) -> list[dict[str, Any]]:
    """results.parquet: the runs' metrics, and the trials' dev losses, one a row; a failure is a row too."""
    weights = multiplied_weights(runner.grid.model.params, runner.grid.model.config)
    rows = []
    for run in runs:
        task, select = run.task, run.task.arm.select
        head = {
            "run": run.folder.name if run.folder is not None else None,
            **dataclasses.asdict(task.condition) | {"size": str(task.condition.size)},
            "arm": task.arm.label,
            "method": None if select is None else select.method,
            "kernel": kernel_of(task.arm),
            "seed": task.seed,
            "learning_rate": None if task.arm.kind == BASE else run.rate,
            "role": "run",
            "status": run.status,
            "message": run.message or None,
        }
        metrics = run_metrics(run.result, weights) if run.status == "done" else {run.status: None}
        rows += [head | {"metric": name, "value": value} for name, value in metrics.items()]
    keep = ("run", "domain", "size", "budget", "arm", "learning_rate", "status", "message")
    for trial in trial_rows(runner):
        row = {key: trial.get(key) for key in keep} | {"size": str(trial["size"]), "seed": runner.grid.spec.seeds[0]}
        rows.append(row | {"role": "trial", "metric": "dev_loss", "value": trial["dev_loss"]})
    return rows


def kernel_of(arm: Arm) -> str | None:
    """The kernel of an arm whose method has one."""
    return arm.select.kernel if arm.select is not None and has_kernel(arm.select) else None


def run_metrics(result: Mapping[str, Any], weights: int) -> dict[str, float | int | None]:
    """The numbers of a result.json by name; ``weights``: P, for FLOPs."""
    metrics: dict[str, Any] = {}
    for split in ("test", "dev"):
        metrics |= {f"{split}_{name}": value for name, value in result.get(split, {}).items()}
    names = ("dev_loss", "steps", "best_step", "clipped_steps", "mean_learning_rate")
    metrics |= {name: result[name] for name in names if name in result}
    metrics |= {f"seconds_{name}": value for name, value in result.get("seconds", {}).items()}
    passes = result.get("passes", {})
    metrics |= {f"passes_{name}": value for name, value in passes.items()}
    if passes and ("selection" in passes or "selection" not in result):
        total = sum(passes.values())
        metrics |= {"passes_total": total, "flops": 2 * weights * total}
    chosen = result.get("selection", {})
    metrics |= {name: chosen[name] for name in ("precision", "chance") if name in chosen}
    numbers = {k: v for k, v in chosen.get("diagnostics", {}).items() if isinstance(v, int | float)}
    return metrics | {name: float(value) for name, value in numbers.items() if name not in metrics}


# -- what they say together --


def analyse(runner: Runner, runs: Sequence[Run]) -> dict[str, Any]:
    """results.json: cells (condition x arm), comparisons, overlaps, trials, failures."""
    grid = runner.grid
    results = [ConditionResults(grid, one, [r for r in runs if r.task.condition == one]) for one in grid.conditions]
    trained = not grid.spec.select_only
    return {
        "focus": list(grid.focus),
        "cells": [row for condition in results for row in condition.rows()],
        "comparisons": [row for condition in results for row in condition.comparisons()] if trained else [],
        "strongest": [condition.strongest_row() for condition in results] if trained else [],
        "overlaps": [condition.overlap() for condition in results],
        "trials": trial_rows(runner),
        "failures": [run.failure() for run in runs if run.status == "failed"],
        "counts": {status: sum(run.status == status for run in runs) for status in ("done", "failed", "left")},
        "majority": {name: _majority(data.test) for name, data in grid.domains.items()} if trained else {},
        "choices": {name: _with_choices(data.test) for name, data in grid.domains.items()} if trained else {},
        "seeds": list(grid.spec.seeds),
    }


def _majority(test: Any) -> float | None:
    asked = [(example.answer, example.choices) for example in test.records if gold_choice(example) is not None]
    return majority_accuracy(asked)


def _with_choices(test: Any) -> dict[str, int]:
    """How many test examples there are, and how many of them have choices and an answer."""
    return {"all": len(test.records), "with_choices": sum(gold_choice(e) is not None for e in test.records)}


class ConditionResults:
    """The results of every arm under one condition."""

    def __init__(self, grid: Grid, condition: Condition, runs: Sequence[Run]):
        self.grid, self.condition = grid, condition
        self.head = dataclasses.asdict(condition)
        self.runs = {arm.label: [run for run in runs if run.task.arm.label == arm.label] for arm in grid.arms}
        self.done = {label: [run for run in of_arm if run.status == "done"] for label, of_arm in self.runs.items()}
        self.kinds = {arm.label: arm.kind for arm in grid.arms}
        self.outcomes: dict[str, dict[int, list[Outcome]]] = {}
        if not grid.spec.select_only:
            for label, done in self.done.items():
                self.outcomes[label] = {run.task.seed: run.outcomes() for run in done}
        self.metric = self._headline()

    def _headline(self) -> Metric | None:
        done = itertools.chain.from_iterable(self.done.values())
        measured = {name for run in done for name, value in run.result.get("test", {}).items() if value is not None}
        return headline(lambda name: name in measured)

    @property
    def _metric_name(self) -> str | None:
        return None if self.metric is None else self.metric.name

    def rows(self) -> list[dict[str, Any]]:
        """One row for each arm: its metrics over seeds and examples, what it took, what it chose."""
        weights = multiplied_weights(self.grid.model.params, self.grid.model.config)
        rows = []
        for arm in self.grid.arms:
            done = self.done[arm.label]
            failed = sum(run.status == "failed" for run in self.runs[arm.label])
            row = self.head | {"arm": arm.label, "kind": arm.kind, "focus": arm.label in self.grid.focus}
            row |= {"runs": len(done), "failed": failed, "metric": self._metric_name}
            if done and self.outcomes:
                row["test"] = summarise_method(list(self.outcomes[arm.label].values()), seed=0)
                row["by_source"] = self._by_source(arm.label)
            numbers = [run_metrics(run.result, weights) for run in done]
            names = dict.fromkeys(name for number in numbers for name in number)
            row["means"] = {name: spread([x for n in numbers if (x := n.get(name)) is not None]) for name in names}
            row["learning_rate"] = done[0].rate if done and arm.kind != BASE else None
            row["example_run"] = done[0].path.name if done and arm.select is not None else None
            row["domain_examples"] = self.grid.domains[self.condition.domain].examples(self.condition.size)
            rows.append(row)
        return rows

    def _by_source(self, label: str) -> dict[str, Any]:
        """The headline metric over the examples of each source of a test set that has several (and not many)."""
        runs = list(self.outcomes[label].values())
        sources = list(dict.fromkeys(o.source for o in runs[0]))
        if self.metric is None or not 1 < len(sources) <= MOST_SOURCES:
            return {}
        metric = self.metric
        of = lambda run, source: values([o for o in run if o.source == source], metric)
        by_source = {source: [of(run, source) for run in runs] for source in sources}
        return {
            source: spread([table.mean() for table in tables if table is not None]) | {"examples": len(tables[0])}
            for source, tables in by_source.items()
            if tables[0] is not None
        }

    def strongest(self) -> str | None:
        """The baseline with the best mean headline metric on dev, of those whose runs are all done; by dev loss where
        dev has no such metric."""
        whole = {label: runs for label, runs in self.done.items() if runs and len(runs) == len(self.runs[label])}
        baselines = {label: runs for label, runs in whole.items() if label not in self.grid.focus}
        metric = self.metric
        name = None if metric is None else metric.name
        on_dev = lambda run: run.result["dev"].get(name)
        judged = all(on_dev(run) is not None for runs in baselines.values() for run in runs)
        rank = lambda runs: (
            -metric.better(float(np.mean([on_dev(run) for run in runs]))) if judged and metric is not None else 0.0,
            float(np.mean([run.result["dev_loss"] for run in runs])),
        )
        return min(baselines, key=lambda label: rank(baselines[label])) if baselines else None

    def strongest_row(self) -> dict[str, Any]:
        """Which baseline it is."""
        return self.head | {"arm": self.strongest(), "metric": self._metric_name}

    def comparisons(self) -> list[dict[str, Any]]:
        """Every arm against random and against the strongest baseline (once where that is random),
        in the headline metric."""
        rows, strongest = [], self.strongest()
        for role, reference in (("random", RANDOM), ("strongest", None if strongest == RANDOM else strongest)):
            if reference is None or not self.outcomes.get(reference) or self.metric is None:
                continue
            made = [self._compare(label, reference) for label in self.outcomes if label != reference]
            made = [row | {"role": role} for row in made if row is not None]
            family = [row for row in made if self.kinds[row["arm"]] == "selected"]
            for row, adjusted in zip(family, holm([row["p"] for row in family])):
                row["p_holm"] = float(adjusted)
            rows += made
        return rows

    def _compare(self, label: str, reference: str) -> dict[str, Any] | None:
        assert self.metric is not None
        ours, theirs = paired_runs(self.outcomes, (label, reference))
        if not ours:
            return None
        tables = [paired_values(first, second, self.metric) for first, second in zip(theirs, ours)]
        table = np.stack([second - first for first, second in tables])
        interval = hierarchical_bootstrap(table)
        return self.head | {
            "arm": label,
            "reference": reference,
            "metric": self.metric.name,
            "difference": interval.estimate,
            "low": interval.low,
            "high": interval.high,
            "per_seed": table.mean(axis=1).tolist(),
            "p": hierarchical_p(table),
            "p_holm": None,
        }

    def overlap(self) -> dict[str, Any]:
        """Mean Jaccard similarity |A n B| / |A u B| of what two arms chose with the same seed, and of one
        arm with two seeds."""
        chosen: dict[str, dict[int, set[int]]] = {}
        for label, runs in self.done.items():
            if runs and self.kinds[label] == "selected":
                files = {run.task.seed: run.path / "selection.json" for run in runs}
                chosen[label] = {seed: set(read_json(file)["selected"]) for seed, file in files.items()}
        names = list(chosen)
        matrix = [[_mean_jaccard(chosen[a], chosen[b]) for b in names] for a in names]
        seeds = {
            name: _mean([jaccard(a, b) for a, b in itertools.combinations(of.values(), 2)])
            for name, of in chosen.items()
        }
        return self.head | {"arms": names, "jaccard": matrix, "between_seeds": seeds}


def jaccard(a: set[int], b: set[int]) -> float:
    """|A n B| / |A u B|; 1 for two empty sets."""
    return len(a & b) / len(a | b) if a | b else 1.0


def _mean_jaccard(first: Mapping[int, set[int]], second: Mapping[int, set[int]]) -> float | None:
    return _mean([jaccard(first[seed], second[seed]) for seed in first if seed in second])


def _mean(numbers: Sequence[float]) -> float | None:
    return float(np.mean(numbers)) if numbers else None
