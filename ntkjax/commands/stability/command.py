"""``ntkjax stability``: how far the tangent kernel moves in fine-tuning, and how good the linearised model is.

For LoRA at several ranks and learning rates and for full fine-tuning, with several seeds: fine-tune, and at some epochs
compute kernels of fixed examples, scores of a pool, and the linearised model. With test questions also the accuracy of
the fine-tuned model, of the linearised one at the same parameters, and of kernel regression with the kernel before
training.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ntkjax.commands.base import Command
from ntkjax.commands.stability.config import (
    NO_EFFECT,
    StabilityConfig,
    _first_of_its_kind,
    _rank,
    arms_of,
    model_options,
)
from ntkjax.commands.stability.follow import follow, regress
from ntkjax.commands.stability.inputs import _load
from ntkjax.commands.stability.report import accuracy_rows, kernel_rows, linear_rows, summarise, write_report
from ntkjax.pipeline.load import load_model
from ntkjax.pipeline.reading import reading
from ntkjax.pipeline.run_dir import RunDir
from ntkjax.report.tables import to_markdown
from ntkjax.training.trackers import check_tracker


@dataclasses.dataclass(frozen=True)
class Stability:
    """The result of a stability run.

    Attributes:
      rows: the long table: arm, seed, epoch, step, kernel, metric, value.
      results: the content of results.json: summaries over seeds.
    """

    rows: list[dict[str, Any]]
    results: Mapping[str, Any]


def stability(config: StabilityConfig, *, progress: bool = True) -> Stability:
    """Run every arm and seed; writes stability.csv, tables, plots, results.json and report.html into OUT.

    A run that has finished is not run again: the same command goes on where it was stopped.

    Raises:
      UserError: unusable model, data or options; a loss or a kernel that is not finite; a full disk.
    """

    began = time.monotonic()
    check_tracker(config.train.tracker)
    RunDir.check(config.out, "stability", config, ignore=NO_EFFECT)
    model, study = _load(config, progress)
    runs, regressions = [], []
    for arm in arms_of(config):
        if arm.rank != _rank(model):
            model = load_model(model_options(config, arm.rank), seed=config.seed)
        for seed in range(config.seed, config.seed + config.seeds):
            runs.append(follow(study, model, arm, seed))
            if study.test is not None and config.formulas and _first_of_its_kind(config, arm):
                regressions.append(regress(study, model, arm, seed))
    rows, results = summarise(study, runs, regressions)
    results |= {"wall_seconds": time.monotonic() - began}
    study.run.write_json("results.json", results)
    write_report(study.run, rows, results)
    return Stability(rows, results)


def describe(config: Any, result: Any) -> str:
    """The kernels, the linearised model and the accuracies after the last epoch, and the report's path."""
    tables = [rows(result.results) for rows in (kernel_rows, linear_rows, accuracy_rows)]
    parts = [*map(to_markdown, filter(None, tables)), reading(result.results["data"])]
    return "\n".join(parts) + f"\nreport: {Path(config.out) / 'report.html'}"


COMMAND = Command(StabilityConfig, stability, describe)
