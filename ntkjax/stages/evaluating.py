"""``ntkjax evaluate``: accuracy, likelihood and generated answers on a test file, and against an earlier run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from ntkjax.evaluation import Evaluation, compare, evaluate_model, read_outcomes
from ntkjax.models import LanguageModel
from ntkjax.stages.inputs import inputs_of
from ntkjax.stages.loading import Loaded, load_data, load_model, longest
from ntkjax.stages.options import DataOptions, EvaluationOptions, ModelOptions
from ntkjax.stages.rundir import RunDir
from ntkjax.types import Params

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


def evaluate_on(
    model: LanguageModel,
    params: Params,
    test: Loaded,
    data: DataOptions,
    options: EvaluationOptions,
    *,
    path: Path | None,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """``evaluate_model`` with a stage's options: accuracy of the examples that have choices and an answer, and the
    likelihood of all."""
    return evaluate_model(
        model,
        params,
        test.records,
        max_length=longest(model, data),
        token_budget=data.token_budget,
        answer_template=options.answer_template,
        generation=options.generation,
        max_new_tokens=options.max_new_tokens,
        loss_turns=data.loss_turns,
        path=path,
        seed=seed,
        progress=progress,
    )


def differences(first: list, second: list, seed: int) -> list[dict]:
    """``compare`` of two runs' outcomes for every quantity that both of them have."""
    shared = [key for key in COMPARED if _has(first, key) and _has(second, key)]
    return [compare(first, second, key, seed=seed) for key in shared]


def _has(outcomes: list, key: str) -> bool:
    return any(getattr(outcome, key) is not None for outcome in outcomes)
