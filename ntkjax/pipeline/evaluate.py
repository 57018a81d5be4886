"""Evaluate on loaded data under a command's options: the step that commands share."""

from __future__ import annotations

from pathlib import Path

from ntkjax.evaluation import Evaluation, evaluate_model
from ntkjax.models import LanguageModel
from ntkjax.pipeline.load import Loaded, longest
from ntkjax.pipeline.options import DataOptions, EvaluationOptions
from ntkjax.types import Params


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
