"""The trainings of a validation as runs of the study's engine: random subsets, tenths of scores, the domain alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from ntkjax.commands.validate.config import ValidateConfig, scores_of
from ntkjax.commands.validate.flip import other_answers
from ntkjax.errors import ConfigError
from ntkjax.pipeline.evaluate import shot_records
from ntkjax.pipeline.inputs import Inputs, inputs_of
from ntkjax.pipeline.load import Loaded
from ntkjax.pipeline.study.arms import EQUAL, Arm, Given
from ntkjax.pipeline.study.grid import Condition, Grid, Task, read_inputs, set_up
from ntkjax.pipeline.study.spec import WHOLE, DomainSpec, sources, study_of
from ntkjax.rng import numpy_rng

DOMAIN = "domain"
"""What the grid calls the domain."""
READ = {"domain": "domain train", "pool": "pool", "test": "domain test"}
"""Role of the data -> what the grid calls what reading found."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is validated: model and data loaded and checked.

    Attributes:
      grid: its arms are the scores. inputs: digests of all data and weights.
      n: what the methods are told. size: pool rows of a subset.
    """

    config: ValidateConfig
    grid: Grid
    inputs: Inputs
    n: int
    size: int

    @property
    def pool(self) -> Loaded:
        """The pool without duplicates."""
        return self.grid.domains[DOMAIN].pool

    @property
    def tenth(self) -> int:
        """Pool rows of a tenth."""
        return len(self.pool) // 10

    def members(self) -> Bool[np.ndarray, "m N"]:
        """Which pool rows each subset holds. Subset k follows from the seed and k, not from how many there are."""
        table = np.zeros((self.config.subsets, len(self.pool)), bool)
        for k, row in enumerate(table):
            rng = numpy_rng(self.config.seed, "validate", "subset", k)
            row[rng.permutation(len(self.pool))[: self.size]] = True
        return table

    def score_tasks(self) -> list[Task]:
        """One task for each score; what it chooses is not asked for."""
        return [Task(Condition(DOMAIN, WHOLE, self.n), arm, self.config.seed) for arm in self.grid.arms]

    def subset_tasks(self) -> list[Task]:
        """Every subset with the first seed, then all of them with the next."""
        arms = [
            self._given(f"subset {k}", np.flatnonzero(row).tolist(), self.config.with_domain == "on")
            for k, row in enumerate(self.members())
        ]
        return [Task(Condition(DOMAIN, WHOLE, self.size), arm, seed) for seed in self.config.seeds for arm in arms]

    def tenth_tasks(self, label: str, rows: Sequence[int]) -> list[Task]:
        """The domain with these rows, for every seed."""
        arm = self._given(label, rows, True)
        return [Task(Condition(DOMAIN, WHOLE, len(rows)), arm, seed) for seed in self.config.leave_in_seeds]

    def alone_tasks(self) -> list[Task]:
        """The domain alone for as many steps as it is trained with a tenth of the pool, for every seed."""
        train, model = self.config.train, self.config.model
        arm = Arm("domain alone", EQUAL, None, train, None, model.parameters, (train.learning_rate,))
        return [Task(Condition(DOMAIN, WHOLE, self.tenth), arm, seed) for seed in self.config.leave_in_seeds]

    def _given(self, label: str, rows: Sequence[int], domain: bool) -> Arm:
        train, given = self.config.train, Given(tuple(rows), domain)
        return Arm(label, "given", None, train, None, self.config.model.parameters, (train.learning_rate,), given)


def load(config: ValidateConfig, *, progress: bool) -> Setting:
    """Read model and data, look for duplicates, check sizes.

    Raises:
      UserError: unusable model or data. ConfigError: a test set that is part of the domain; a pool too small;
        fewer answers than are to be flipped.
    """
    out = Path(config.out)
    files = DomainSpec(sources(config.domain), (), sources(config.test), truth=config.truth)
    spec = study_of(config, DOMAIN, files, budgets=(config.n or 1,), seeds=(config.seed,))
    read = read_inputs(spec, out, ("train", "test"))
    domain, test = read.splits[DOMAIN]["train"], read.splits[DOMAIN]["test"]
    _check_test(domain, test)
    shots = shot_records(config.evaluation, config.data)
    inputs = inputs_of(read.model, config.model, domain=domain, pool=read.pool, test=test, shots=shots)
    grid = set_up(spec, scores_of(config), read, out, evaluated=("test",), progress=progress)
    rows = len(grid.domains[DOMAIN].pool)
    size = round(config.alpha * rows)
    if not 1 <= size < rows or rows < 10:
        raise ConfigError(
            f"the pool has {rows} examples without duplicates, of which a subset takes {size} (--alpha "
            f"{config.alpha:g}); expected at least 10, and subsets that are neither empty nor the pool; give more pool "
            "files, or another --alpha"
        )
    if config.flip:  # scores take long, and what can be flipped is known before
        flipped = grid.domains[DOMAIN].pool if config.flip_in == "pool" else grid.domains[DOMAIN].train
        other_answers(flipped.records, config.flip, config.evaluation.answer_template)
    return Setting(config, grid, inputs, config.n or max(1, rows // 10), size)


def _check_test(domain: Loaded, test: Loaded) -> None:
    known = set(domain.records.texts)
    if all(text in known for text in test.records.texts):
        raise ConfigError(
            f"--test: each of its {len(test)} examples stands in --domain, from which the scores are computed; "
            "expected held-out examples of the domain; give another file"
        )
