"""The data and the run directory of ``ntkjax stability``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from ntkjax.commands.stability.config import NO_EFFECT, Arm, StabilityConfig, arms_of, model_options
from ntkjax.commands.stability.outputs import Questions, questions
from ntkjax.data.buckets import round_up
from ntkjax.errors import ConfigError
from ntkjax.models import LanguageModel
from ntkjax.pipeline.inputs import inputs_of
from ntkjax.pipeline.load import Loaded, load_data, load_model, longest
from ntkjax.pipeline.run_dir import RunDir
from ntkjax.rng import numpy_rng


@dataclasses.dataclass(frozen=True)
class Study:
    """What every run shares."""

    config: StabilityConfig
    run: RunDir
    data: Loaded
    pool: Loaded | None
    test: Questions | None
    progress: bool
    test_report: dict[str, Any] | None = None

    def training_rows(self, seed: int) -> np.ndarray:
        """The rows of the training files that a seed trains on, in random order."""
        return numpy_rng(seed, "stability", "training").permutation(len(self.data))[: self.config.n]

    def probe_length(self) -> int:
        """The padded length of the probe examples, one for all seeds so that they share compiled programs."""
        seeds = range(self.config.seed, self.config.seed + self.config.seeds)
        rows = np.concatenate([self.training_rows(seed)[: self.config.probe] for seed in seeds])
        return round_up(int(self.data.tokens.lengths[rows].max()), 8)

    @property
    def memory_budget(self) -> int:
        """Bytes of gradients held at a time."""
        return int(self.config.memory_gib * (1 << 30))


def _load(config: StabilityConfig, progress: bool) -> tuple[LanguageModel, Study]:
    own = model_options(config, arms_of(config)[0].rank)
    model = load_model(own, seed=config.seed)
    data = load_data(config.data, model, config.reading)
    pool = load_data(config.pool, model, config.reading) if config.pool else None
    asked = load_data(config.test, model, config.reading) if config.test else None
    inputs = inputs_of(model, own, data=data, pool=pool, test=asked)
    if len(data) < config.n:
        raise ConfigError(f"n = {config.n} training examples, but the files hold {len(data)}; lower --n or add files")
    if pool is not None:
        drawn = numpy_rng(config.seed, "stability", "pool").permutation(len(pool))[: config.pool_n]
        pool = pool.subset(np.sort(drawn))
    test = _test_questions(config, model, asked) if asked else None
    scored = config.probe if pool is None else len(pool)
    if config.top is not None and not 1 <= config.top <= scored:
        raise ConfigError(f"top must be from 1 to the {scored} examples that are scored, got {config.top}")
    run = RunDir.create(config.out, "stability", config, inputs=inputs, ignore=NO_EFFECT)
    run.tell("results.json", progress)
    return model, Study(config, run, data, pool, test, progress, None if asked is None else asked.report())


def _test_questions(config: StabilityConfig, model: LanguageModel, asked: Loaded) -> Questions:
    records = asked.records.subset(np.arange(min(len(asked), config.test_n)))
    questions = as_questions(config, model, records)
    if questions is None:
        raise ConfigError(f"{', '.join(config.test)}: no example has choices and an answer, so there is no accuracy")
    return questions


def as_questions(config: StabilityConfig, model: LanguageModel, records: Any) -> Questions | None:
    """The records with choices as questions, under the options of ``config``."""
    return questions(
        model,
        records,
        kind=config.outputs,
        max_length=longest(model, config.reading),
        answer_template=config.answer_template,
    )


def folder(study: Study, arm: Arm, seed: int) -> Path:
    """Where a run keeps its files."""
    return study.run.path / arm.name / f"seed-{seed}"
