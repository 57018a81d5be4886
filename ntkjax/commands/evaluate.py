"""``ntkjax evaluate``: accuracy, likelihood and generated answers on a test file, tasks of lm-eval, an earlier run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from ntkjax.commands.base import Command
from ntkjax.errors import ConfigError
from ntkjax.evaluation import METRICS, Evaluation, compare, read_outcomes, values
from ntkjax.evaluation.lm_eval import (
    TaskResult,
    compare_tasks,
    load_tasks,
    read_results,
    run_tasks,
    task_digests,
    write_results,
)
from ntkjax.evaluation.options import Batching, EvaluationOptions, TaskOptions
from ntkjax.evaluation.shots import describe_shots, draw_shots
from ntkjax.evaluation.summary import describe_choices
from ntkjax.job import is_primary, process
from ntkjax.pipeline.evaluate import evaluate_on, settings_of, shot_records
from ntkjax.pipeline.inputs import inputs_of
from ntkjax.pipeline.load import load_data, load_model, longest, weights_read
from ntkjax.pipeline.options import DataOptions, ModelOptions
from ntkjax.pipeline.reading import reading_of_run
from ntkjax.pipeline.run_dir import RunDir
from ntkjax.report.tables import to_markdown


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate a model (and an adapter, or a merged checkpoint) on test files, and on tasks of lm-eval."""

    model: Annotated[ModelOptions, arg(name="")]
    out: str
    test: tuple[str, ...] = ()
    """Files with prompt and response: their likelihood; and accuracy of the records that have answer and choices."""
    against: str | None = None
    """Run directory of an earlier evaluate of the same files and tasks: adds paired intervals and McNemar's test."""
    seed: int = 0
    """Seed of the bootstrap."""
    data: Annotated[DataOptions, arg(name="")] = DataOptions()
    evaluation: Annotated[EvaluationOptions, arg(name="")] = EvaluationOptions()
    harness: Annotated[TaskOptions, arg(name="")] = TaskOptions()

    def __post_init__(self):
        if not (self.test or self.harness.names):
            raise ConfigError("found neither --test nor --tasks; expected one of them; name test files, or tasks")


@dataclasses.dataclass(frozen=True)
class Evaluated(Evaluation):
    """What `evaluate` found: of the test files (nothing without any), and of the tasks.

    Attributes:
      against: `differences` from the earlier run; None without one.
      tasks: `TaskResult` of each task and group. task_counts: ``cut``: contexts that lost tokens on the left.
      tasks_against: `compare_tasks` with the earlier run; None without one.
    """

    against: list[dict[str, Any]] | None = None
    tasks: tuple[TaskResult, ...] = ()
    task_counts: dict[str, int] = dataclasses.field(default_factory=dict)
    tasks_against: list[dict[str, Any]] | None = None


def evaluate(config: EvaluateConfig, *, progress: bool = True) -> Evaluated:
    """Evaluate as ``config`` says; writes OUT/outcomes.jsonl (one line an example), OUT/evaluation.json, and of tasks
    OUT/tasks/*.jsonl (one line a sample).

    Raises:
      UserError: unusable model, data or options; an earlier run on other examples; lm-eval is asked for and not there.
    """
    names, earlier, earlier_tasks = config.harness.names, None, None
    if names and process()[1] > 1:
        raise ConfigError(
            f"--tasks: lm-eval runs its tasks in one process, and this job has {process()[1]}; expected --test alone; "
            "run the tasks in one process"
        )
    if config.against is not None:
        earlier = read_outcomes(_outcomes_file(config.against)) if config.test else None
        earlier_tasks = read_results(Path(config.against) / "tasks")[0] if names else None
    RunDir.check(config.out, "evaluate", config)
    task_files = {"tasks": task_digests(names)} if names else {}
    stored = Path(config.out) / "tasks" / "results.json"
    tasks_to_run = load_tasks(config.harness) if names and not stored.exists() else None
    model = load_model(config.model, seed=config.seed)
    test = load_data(config.test, model, config.data) if config.test else None
    shots = None if test is None else draw_shots(settings_of(config.evaluation, config.data), test.records)
    inputs = inputs_of(model, config.model, test=test, shots=shot_records(config.evaluation, config.data))
    run = RunDir.create(config.out, "evaluate", config, inputs={**inputs, **task_files})
    run.tell("evaluation.json", progress)
    progress = progress and is_primary()
    result, content = Evaluated([], {}), {}
    if test is not None:
        evaluated = evaluate_on(
            model,
            {},
            test,
            config.data,
            config.evaluation,
            path=run.path / "outcomes.jsonl",
            shots=shots,
            seed=config.seed,
            progress=progress,
        )
        content |= {"summary": evaluated.summary, "data": test.report()}
        if evaluated.shots is not None:
            content["shots"] = evaluated.shots.report()
        against = None if earlier is None else differences(earlier, evaluated.outcomes, config.seed)
        result = Evaluated(evaluated.outcomes, evaluated.summary, evaluated.shots, against)
    if names:
        if tasks_to_run is not None:
            batching = Batching(longest(model, config.data), config.data.token_budget)
            done = run_tasks(
                model, {}, tasks_to_run, config.harness, batching=batching, seed=config.seed, progress=progress
            )
            write_results(stored.parent, *done)
        tasks, counts = read_results(stored.parent)
        compared = None if earlier_tasks is None else compare_tasks(earlier_tasks, tasks, seed=config.seed)
        result = dataclasses.replace(result, tasks=tuple(tasks), task_counts=counts, tasks_against=compared)
        summaries = {task.task: task.summary(seed=config.seed) for task in tasks}
        content["tasks"] = {**counts, "results": summaries}
    if config.against is not None:
        given = {"differences": result.against, "tasks": result.tasks_against}
        content["against"] = {"run": config.against} | {k: v for k, v in given.items() if v is not None}
    run.write_json("evaluation.json", content | weights_read(model))
    return result


def _outcomes_file(run: str) -> Path:
    path = Path(run)
    return path / "outcomes.jsonl" if path.is_dir() else path


def differences(first: list, second: list, seed: int) -> list[dict]:
    """``compare`` of two runs' outcomes for every metric that both of them have."""
    has = lambda outcomes, metric: values(outcomes, metric) is not None
    shared = [metric for metric in METRICS.values() if has(first, metric) and has(second, metric)]
    return [compare(first, second, metric, seed=seed) for metric in shared]


def describe(config: Any, result: Any) -> str:
    """Every metric of test files and tasks with its interval, and what to know before reading them."""
    rows = _test_rows(config, result) + _task_rows(config, result)
    parts = [to_markdown(rows)]
    if config.test:
        parts += _notes(config, result)
    if result.tasks:
        cut = result.task_counts["cut"]
        samples = sum(task.n for task in result.tasks)
        parts += [f"tasks: {cut} contexts cut from the left to --max-length {config.data.max_length}"] * bool(cut)
        parts.append(f"tasks: {samples} samples; each of them: {Path(config.out) / 'tasks'}")
    return "\n".join(parts)


def _test_rows(config: Any, result: Any) -> list[dict[str, str]]:
    """One for each metric of the test files, with the paired difference from the earlier run where there is one."""
    if not config.test:
        return []
    summary, rows = result.summary, []
    by_metric = {entry["key"]: entry["difference"] for entry in result.against or ()}
    for name, entry in summary["metrics"].items():
        metric = METRICS[name]
        low, high = map(metric.text, entry["interval"])
        value = f"{metric.text(entry['mean'])}{'%' * metric.share} [{low}, {high}]"
        rows.append({"measure": metric.measure_label, "value": value})
        if config.against is not None and metric.key in by_metric:
            at, low, high = (metric.text(by_metric[metric.key][k]) for k in ("estimate", "low", "high"))
            rows[-1][_difference_column(config)] = f"{at} [{low}, {high}]"
    if summary["choices"] is not None:
        rows.append({"measure": "commonest answer", "value": f"{100 * summary['choices']['majority_accuracy']:.1f}%"})
    return rows


def _task_rows(config: Any, result: Any) -> list[dict[str, str]]:
    """One for each metric of each task: lm-eval's number, as it gives it, with our intervals."""
    rows = []
    by_task = {(entry["task"], entry["metric"]): entry["difference"] for entry in result.tasks_against or ()}
    for task in result.tasks:
        for name, entry in task.summary(seed=config.seed)["metrics"].items():
            interval = "" if entry["interval"] is None else " [{:.4f}, {:.4f}]".format(*entry["interval"])
            measure = f"{task.task}, {name.removesuffix(',none').replace(',', ', filter ')}"
            rows.append({"measure": measure, "value": f"{entry['value']:.4f}{interval}"})
            difference = by_task.get((task.task, name))
            if difference is not None:
                at, low, high = (f"{difference[k]:.4f}" for k in ("estimate", "low", "high"))
                rows[-1][_difference_column(config)] = f"{at} [{low}, {high}]"
    return rows


def _difference_column(config: Any) -> str:
    return f"minus {config.against}"


def _notes(config: Any, result: Any) -> list[str]:
    """What to know of the test files' numbers: examples without choices or answer, shots, what reading lost."""
    summary = result.summary
    unjudged = (summary["generation"] or {"without_gold": 0})["without_gold"]
    judged = f"generated answers: {unjudged} of {summary['n']} examples have no answer to judge them by" * bool(
        unjudged
    )
    asked = describe_choices((summary["choices"] or {"n": 0})["n"], summary["n"])
    written = f"{summary['n']} examples; all outcomes: {Path(config.out) / 'outcomes.jsonl'}"
    read = reading_of_run(config, "evaluation.json", "test")
    shown = None if result.shots is None else describe_shots(result.shots)
    return [*filter(None, [asked, judged, shown]), read, written]


COMMAND = Command(EvaluateConfig, evaluate, describe, spans=True)
