"""``ntkjax evaluate``: accuracy, likelihood and generated answers on a test file, and against an earlier run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from ntkjax.commands.base import Command
from ntkjax.evaluation import METRICS, Evaluation, compare, read_outcomes, values
from ntkjax.evaluation.options import EvaluationOptions
from ntkjax.evaluation.shots import describe_shots, draw_shots
from ntkjax.evaluation.summary import describe_choices
from ntkjax.pipeline.evaluate import evaluate_on, settings_of, shot_records
from ntkjax.pipeline.inputs import inputs_of
from ntkjax.pipeline.load import load_data, load_model
from ntkjax.pipeline.options import DataOptions, ModelOptions
from ntkjax.pipeline.reading import reading_of_run
from ntkjax.pipeline.run_dir import RunDir
from ntkjax.report.tables import to_markdown


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate a model (and an adapter, or a merged checkpoint) on test files."""

    model: Annotated[ModelOptions, arg(name="")]
    test: tuple[str, ...]
    """Files with prompt and response: their likelihood; and accuracy of the records that have answer and choices."""
    out: str
    against: str | None = None
    """Run directory of an earlier evaluate on the same file: adds paired bootstrap intervals and McNemar's test."""
    seed: int = 0
    """Seed of the bootstrap."""
    data: Annotated[DataOptions, arg(name="")] = DataOptions()
    evaluation: Annotated[EvaluationOptions, arg(name="")] = EvaluationOptions()


def evaluate(config: EvaluateConfig, *, progress: bool = True) -> Evaluation:
    """Evaluate as ``config`` says; writes OUT/outcomes.jsonl (one line an example), OUT/evaluation.json.

    Raises:
      UserError: unusable model, data or options; an earlier run on other examples.
    """
    earlier = None if config.against is None else read_outcomes(_outcomes_file(config.against))
    RunDir.check(config.out, "evaluate", config)
    model = load_model(config.model, seed=config.seed)
    test = load_data(config.test, model, config.data)
    shots = shot_records(config.evaluation, config.data)
    draw_shots(settings_of(config.evaluation, config.data), test.records)  # refused, if so, before a directory is made
    inputs = inputs_of(model, config.model, test=test, shots=shots)
    run = RunDir.create(config.out, "evaluate", config, inputs=inputs)
    run.tell("evaluation.json", progress)
    result = evaluate_on(
        model,
        {},
        test,
        config.data,
        config.evaluation,
        path=run.path / "outcomes.jsonl",
        seed=config.seed,
        progress=progress,
    )
    content: dict[str, Any] = {"summary": result.summary, "data": test.report()}
    if result.shots is not None:
        content["shots"] = result.shots.report()
    if earlier is not None:
        content["against"] = {"run": config.against, "differences": differences(earlier, result.outcomes, config.seed)}
    run.write_json("evaluation.json", content)
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
    """Every metric with its interval, and what to know before reading them."""
    summary, rows = result.summary, []
    for name, entry in summary["metrics"].items():
        metric = METRICS[name]
        low, high = map(metric.text, entry["interval"])
        value = f"{metric.text(entry['mean'])}{'%' * metric.share} [{low}, {high}]"
        rows.append({"measure": metric.measure_label, "value": value})
    if summary["choices"] is not None:
        rows.append({"measure": "commonest answer", "value": f"{100 * summary['choices']['majority_accuracy']:.1f}%"})
    unjudged = (summary["generation"] or {"without_gold": 0})["without_gold"]
    judged = f"generated answers: {unjudged} of {summary['n']} examples have no answer to judge them by" * bool(
        unjudged
    )
    asked = describe_choices((summary["choices"] or {"n": 0})["n"], summary["n"])
    found = f"{summary['n']} examples; all outcomes: {Path(config.out) / 'outcomes.jsonl'}"
    read = reading_of_run(config, "evaluation.json", "test")
    shown = None if result.shots is None else describe_shots(result.shots)
    return "\n".join([to_markdown(rows), *filter(None, [asked, judged, shown]), read, found])


COMMAND = Command(EvaluateConfig, evaluate, describe)
