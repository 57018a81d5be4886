"""Evaluate on loaded data under a command's options: the step that commands share."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from ntkjax.data import Records, read_records
from ntkjax.data.rows import packs
from ntkjax.evaluation import Evaluation, evaluate_model
from ntkjax.evaluation.options import Batching, EvaluationOptions, EvaluationSettings
from ntkjax.evaluation.shots import Shots
from ntkjax.models import LanguageModel
from ntkjax.pipeline.load import Loaded, longest, within_positions
from ntkjax.pipeline.options import DataOptions
from ntkjax.types import Params


def shot_records(options: EvaluationOptions, data: DataOptions) -> Records | None:
    """The file that shots are drawn from, as data are read; None without shots."""
    return read_records(options.shots_from, on_bad_record=data.on_bad_record) if options.shots_from else None


def settings_of(options: EvaluationOptions, data: DataOptions) -> EvaluationSettings:
    """What ``evaluate_model`` is told, of a command's options."""
    return EvaluationSettings(
        **dataclasses.asdict(options), loss_turns=data.loss_turns, on_bad_record=data.on_bad_record
    )


def evaluate_on(
    model: LanguageModel,
    params: Params,
    test: Loaded,
    data: DataOptions,
    options: EvaluationOptions,
    *,
    path: Path | None,
    shots: Shots | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """``evaluate_model`` with a command's options: accuracy of the examples that have choices and an answer, and the
    likelihood of all; with ``shots`` that are drawn already, or drawn here."""
    length = longest(model, data)
    packing = packs(data.packing) and within_positions(np.asarray([length]), model)
    batching, settings = Batching(length, data.token_budget, packing), settings_of(options, data)
    measured = {"batching": batching, "path": path, "shots": shots, "seed": seed, "progress": progress}
    return evaluate_model(model, params, test.records, settings, **measured)
