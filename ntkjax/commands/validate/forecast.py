"""``ntkjax validate --dry-run``: how many trainings there are, and the tokens of all passes, counted and not timed."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from ntkjax.commands.validate.config import ValidateConfig, impossible
from ntkjax.commands.validate.trainings import DOMAIN, Setting, load
from ntkjax.pipeline.cost import forward_tokens
from ntkjax.pipeline.load import Loaded
from ntkjax.pipeline.select import make_selector
from ntkjax.pipeline.study.grid import Task
from ntkjax.report.tables import to_markdown
from ntkjax.selection.cost import FORWARD, TRAIN, Sizes


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the work: how many times it is done, and the tokens of all of them, sent forward once each.

    Attributes:
      steps: optimiser steps of one of them; None where nothing is trained.
      tokens: forward-equivalent (a step counts 3 for each of its tokens); None where a score does not say.
    """

    name: str
    count: int
    steps: int | None
    tokens: float | None


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What a validation would take, as an upper bound: tenths that two scores share are trained once."""

    parts: tuple[Part, ...]

    @property
    def trainings(self) -> int:
        """Trainings, warm-ups left out."""
        return sum(part.count for part in self.parts if part.steps is not None)

    @property
    def tokens(self) -> float:
        """Forward-equivalent tokens of all parts that say."""
        return sum(part.tokens or 0.0 for part in self.parts)

    def rows(self) -> list[dict[str, Any]]:
        """One row a part."""
        return [
            {"part": p.name, "count": p.count, "steps of each": p.steps,
             "tokens sent forward": None if p.tokens is None else round(p.tokens)}
            for p in self.parts
        ]  # fmt: skip

    def text(self) -> str:
        """The table and the totals."""
        return (
            f"{to_markdown(self.rows())}\n{self.trainings} trainings at most, {self.tokens:,.0f} tokens sent forward "
            "(a token that is trained counts 3).\nNothing was trained and nothing was written but the cache of the "
            "records."
        )


def forecast(config: ValidateConfig, *, progress: bool = True) -> Forecast:
    """What ``config`` would take if nothing of it were done; makes no run directory.

    Raises:
      UserError: unusable model, data or options.
    """
    with tempfile.TemporaryDirectory() as folder:
        setting = load(dataclasses.replace(config, out=folder), progress=progress)
        return Forecast((*_scores(setting), *_trainings(setting)))


def _scores(setting: Setting) -> list[Part]:
    data, config = setting.grid.domains[DOMAIN], setting.config
    tasks = [task for task in setting.score_tasks() if impossible(config, task.arm) is None]
    warmed = next((task for task in tasks if task.arm.warmup is not None), None)
    epochs = 0.0 if warmed is None else config.warmup.epochs_over(len(data.train))
    copies = 2 if config.flip else 1
    warmups = 0 if warmed is None else copies if config.flip_in == "domain" else 1
    parts = []
    if warmups:
        parts.append(Part("warm-up", warmups, None, TRAIN * warmups * epochs * _tokens(data.train)))
    sets = [(data.train, data.pool)]
    if config.flip:  # the copy is as long as what it is a copy of
        sets.append((data.train, data.pool if config.flip_in == "pool" else data.train))
    for task in tasks:
        assert task.arm.select is not None
        selector = make_selector(task.arm.select)
        passes = []
        for domain, pool in sets:
            scored = np.ones(len(pool), bool)
            width, checkpoints = setting.grid.model.config.hidden_size, max(1, math.ceil(epochs))
            sizes = Sizes.of(scored, domain.tokens, pool.tokens, width=width, checkpoints=checkpoints)
            passes.append(forward_tokens(selector, task.arm.select, sizes, min(setting.n, len(pool))))
        known = [tokens for tokens in passes if tokens is not None]
        total = sum(known) if len(known) == len(passes) else None
        parts.append(Part(f"score: {task.arm.label}", len(sets), None, total))
    return parts


def _trainings(setting: Setting) -> list[Part]:
    data, config = setting.grid.domains[DOMAIN], setting.config
    subsets, test = setting.subset_tasks(), data.test
    parts = [
        _part("random subsets", setting, subsets, [data.pool, *([data.train] if config.with_domain == "on" else [])])
    ]
    if config.leave_in:
        alone = setting.alone_tasks()
        scores = [task for task in setting.score_tasks() if impossible(config, task.arm) is None]
        parts.append(_part("domain alone, equal steps", setting, alone, [data.train]))
        tenths = [task for task in alone for _ in range(3 * len(scores))]
        parts.append(_part("domain with a tenth", setting, tenths, [data.pool, data.train]))
    assert test is not None
    trainings = sum(part.count for part in parts)
    choices = sum(len(example.choices or ()) for example in test.records) / len(test)
    tokens = FORWARD * trainings * (1 + choices) * _tokens(test)
    return [*parts, Part("test set, its choices one by one", trainings, None, tokens)]


def _part(name: str, setting: Setting, tasks: Sequence[Task], data: Sequence[Loaded]) -> Part:
    """Steps of ``batch_size`` examples that are as long as those of ``data`` are on average."""
    steps = setting.grid.steps(tasks[0])
    length = sum(map(_tokens, data)) / sum(map(len, data))
    tokens = TRAIN * len(tasks) * steps * setting.config.train.batch_size * length
    return Part(name, len(tasks), steps, tokens)


def _tokens(data: Loaded) -> float:
    return float(np.sum(np.asarray(data.tokens.lengths, np.int64)))
