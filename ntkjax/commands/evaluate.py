"""``ntkjax evaluate``: accuracy, likelihood and generated answers on a test file, and against an earlier run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from ntkjax.commands.base import Command
from ntkjax.evaluation import Evaluation, compare, read_outcomes
from ntkjax.evaluation.summary import describe_choices
from ntkjax.pipeline.evaluate import evaluate_on
from ntkjax.pipeline.inputs import inputs_of
from ntkjax.pipeline.load import load_data, load_model
from ntkjax.pipeline.options import DataOptions, EvaluationOptions, ModelOptions
from ntkjax.pipeline.reading import reading_of_run
from ntkjax.pipeline.run_dir import RunDir
from ntkjax.report.tables import to_markdown

COMPARED = ("correct_raw", "correct_norm", "correct_generated", "nll")


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
    run = RunDir.create(config.out, "evaluate", config, inputs=inputs_of(model, config.model, test=test))
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
    if earlier is not None:
        content["against"] = {"run": config.against, "differences": differences(earlier, result.outcomes, config.seed)}
    run.write_json("evaluation.json", content)
    return result


def _outcomes_file(run: str) -> Path:
    path = Path(run)
    return path / "outcomes.jsonl" if path.is_dir() else path


def differences(first: list, second: list, seed: int) -> list[dict]:
    """``compare`` of two runs' outcomes for every quantity that both of them have."""
    shared = [key for key in COMPARED if _has(first, key) and _has(second, key)]
    return [compare(first, second, key, seed=seed) for key in shared]


def _has(outcomes: list, key: str) -> bool:
    return any(getattr(outcome, key) is not None for outcome in outcomes)


def describe(config: Any, result: Any) -> str:
    """The summary's headline numbers."""
    summary, rows = result.summary, []
    if summary["choices"] is not None:
        for kind in ("raw", "norm"):
            low, high = summary["choices"][f"accuracy_{kind}_interval"]
            value = summary["choices"][f"accuracy_{kind}"]
            rows.append(
                {
                    "measure": f"accuracy, {kind} likelihood",
                    "value": f"{100 * value:.1f}% [{100 * low:.1f}, {100 * high:.1f}]",
                }
            )
        rows.append({"measure": "commonest answer", "value": f"{100 * summary['choices']['majority_accuracy']:.1f}%"})
    if summary["likelihood"] is not None:
        rows.append(
            {"measure": "response NLL, nats per token", "value": f"{summary['likelihood']['nll_per_example']:.4f}"}
        )
    if summary["generation"] is not None and summary["generation"]["accuracy"] is not None:
        rows.append(
            {"measure": "accuracy, generated answers", "value": f"{100 * summary['generation']['accuracy']:.1f}%"}
        )
    unjudged = (summary["generation"] or {"without_gold": 0})["without_gold"]
    judged = f"generated answers: {unjudged} of {summary['n']} examples have no answer to judge them by" * bool(
        unjudged
    )
    asked = describe_choices((summary["choices"] or {"n": 0})["n"], summary["n"])
    found = f"{summary['n']} examples; all outcomes: {Path(config.out) / 'outcomes.jsonl'}"
    read = reading_of_run(config, "evaluation.json", "test")
    return "\n".join([to_markdown(rows), *filter(None, [asked, judged]), read, found])


COMMAND = Command(EvaluateConfig, evaluate, describe)
