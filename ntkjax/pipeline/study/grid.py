"""The grid of a comparison: arms x conditions x seeds, with the model and the data loaded once, and the folder of every
run, named by the hash of all that the run depends on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from ntkjax.assets import tiny_lm_path, write_planted_task
from ntkjax.data.buckets import bucket_lengths
from ntkjax.data.mapping import Source, prepare
from ntkjax.errors import ConfigError, UserError
from ntkjax.files import read_json
from ntkjax.fingerprint import digest
from ntkjax.job import barrier, is_primary
from ntkjax.models import LanguageModel
from ntkjax.models.lm import paths, unflatten
from ntkjax.pipeline.alike import SAME_FILES, check_alike
from ntkjax.pipeline.config_io import config_to_dict
from ntkjax.pipeline.deduplicate import deduplicate
from ntkjax.pipeline.evaluate import shot_records
from ntkjax.pipeline.inputs import adapter_digests, model_digests
from ntkjax.pipeline.load import Loaded, fresh_parameters, load_data, load_model, shared_cache
from ntkjax.pipeline.options import ModelOptions, SelectorOptions
from ntkjax.pipeline.select import method_options
from ntkjax.pipeline.study.arms import BASE, Arm
from ntkjax.pipeline.study.spec import EMBEDDED, WHOLE, DomainSpec, StudySpec
from ntkjax.pipeline.versions import package_version
from ntkjax.rng import numpy_rng
from ntkjax.selection.base import check_size
from ntkjax.training import NO_EFFECT, TrainConfig
from ntkjax.types import Params

Size = int | str
PLACEMENT = ("model", "adapter", "mesh", "weights", "remat", "packing")
"""Options of model and data that are no part of a run's name: the weights themselves are, and how they and the examples
lie changes no result but by rounding."""


@dataclasses.dataclass(frozen=True)
class Condition:
    """A domain, how many of its training examples (a number, or ``all``), and N."""

    domain: str
    size: Size
    budget: int


@dataclasses.dataclass(frozen=True)
class Task:
    """One run that is wanted: an arm under a condition with a seed; its learning rate is the tuned one."""

    condition: Condition
    arm: Arm
    seed: int


@dataclasses.dataclass(frozen=True)
class DomainData:
    """A domain's splits, the pool as this domain may use it, and what is known of both.

    ``useful``: bool [N], the pool rows that truly help, where that is known. ``buckets``: padded lengths that all of
    its runs share, so that they share compiled steps; None: each run has those of its own data. ``sizes``: of the
    training set.
    """

    name: str
    train: Loaded
    pool: Loaded
    dev: Loaded | None
    test: Loaded | None
    useful: Bool[np.ndarray, " N"] | None
    buckets: tuple[int, ...] | None
    sizes: tuple[Size, ...]

    def subset(self, size: Size, seed: int) -> Loaded:
        """``size`` training examples, drawn by the seed; a smaller set is part of every larger one."""
        if size == WHOLE:
            return self.train
        rows = numpy_rng(seed, "study", "domain size").permutation(len(self.train))[: int(size)]
        return self.train.subset(np.sort(rows))

    def examples(self, size: Size) -> int:
        """Training examples at a size."""
        return len(self.train) if size == WHOLE else int(size)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What is read before anything is computed.

    Attributes:
      options: of the model. model: with fresh LoRA factors of the first seed, or those of the adapter given.
      domains: as the specification has them; those of the embedded task where it names none.
      pool: as its files hold it, duplicates included.
      splits: domain -> split (``train``, ``dev``, ``test``) -> its data, for the splits that are given.
      reports: what reading found, by name of the data.
    """

    options: ModelOptions
    model: LanguageModel
    domains: dict[str, DomainSpec]
    pool: Loaded
    splits: dict[str, dict[str, Loaded]]
    reports: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Grid:
    """What every run shares.

    Attributes:
      spec, arms: what is compared, and how. focus: labels of the arms that are proposed.
      out: the run directory.
      options, model: see ``Inputs``. fingerprint: of the model, its tokenizer and the adapter given.
      domains: by name.
      reports: what reading and the search for duplicates found.
      evaluated: the splits on which every run is evaluated.
      shots: digest of the file that the shots of an evaluation are drawn from; None without shots.
    """

    spec: StudySpec
    arms: tuple[Arm, ...]
    focus: tuple[str, ...]
    out: Path
    options: ModelOptions
    model: LanguageModel
    fingerprint: str
    domains: dict[str, DomainData]
    reports: dict[str, Any]
    evaluated: tuple[str, ...] = ("dev", "test")
    shots: str | None = None

    @property
    def conditions(self) -> list[Condition]:
        """Every condition, in the order of the specification."""
        return [
            Condition(name, size, budget)
            for name, data in self.domains.items()
            for size in data.sizes
            for budget in self.spec.budgets
        ]

    def tasks(self) -> list[Task]:
        """Every run that is wanted, first seeds first (learning rates are tuned with them); the base model is run once
        for each condition."""
        first, conditions = self.spec.seeds[0], self.conditions
        rest = [(seed, condition, arm) for seed in self.spec.seeds for condition in conditions for arm in self.arms]
        return [Task(condition, arm, seed) for seed, condition, arm in rest if arm.kind != BASE or seed == first]

    def steps(self, task: Task) -> int:
        """Optimiser steps of a run."""
        return task.arm.steps(self.data(task).examples(task.condition.size), task.condition.budget)

    def data(self, task: Task) -> DomainData:
        """The data of a task's domain."""
        return self.domains[task.condition.domain]

    def training_set(self, task: Task) -> Loaded:
        """The domain's training examples that a task has."""
        return self.data(task).subset(task.condition.size, task.seed)

    def train_config(self, task: Task, rate: float) -> TrainConfig:
        """Settings of a run's fine-tuning."""
        config = task.arm.config(rate, self.steps(task))
        return dataclasses.replace(config, buckets=config.buckets or self.data(task).buckets)

    def model_of(self, arm: Arm) -> LanguageModel:
        """The model as an arm trains it: with its LoRA, or without."""
        return self.model if arm.parameters == self.options.parameters else _without_lora(self.model)

    def start(self, arm: Arm, seed: int) -> Params:
        """What an arm trains, before training: the same for every arm that trains the same parameters."""
        if arm.parameters == self.options.parameters:
            return fresh_parameters(self.model, self.options, seed)
        return self.model_of(arm).params

    def start_of_selection(self, seed: int) -> Params:
        """What is warmed up, before it is."""
        return fresh_parameters(self.model, self.options, seed)

    # -- names --

    def _common(self) -> dict[str, Any]:
        options = {k: v for k, v in config_to_dict(self.options).items() if k not in PLACEMENT}
        data = {k: v for k, v in config_to_dict(self.spec.data).items() if k not in PLACEMENT}
        return {"ntkjax": package_version(), "weights": self.fingerprint, "model": options, "data": data}

    def _evaluation(self) -> dict[str, Any]:
        """What is measured; the content of the file of the shots in place of its name, and nothing without shots."""
        measured = config_to_dict(self.spec.evaluation)
        del measured["shots_from"]
        if not self.spec.evaluation.shots:
            del measured["shots"]
        return measured | ({"shots_from": self.shots} if self.shots else {})

    def warmup_key(self, task: Task) -> dict[str, Any]:
        """What the warm-up before a task's selection depends on."""
        own = {"domain": self.training_set(task).tokens.fingerprint, "seed": task.seed}
        return self._common() | own | {"warmup": _train_dict(self.warmup_config(task))}

    def selection_key(self, task: Task) -> dict[str, Any] | None:
        """What a selection depends on; None where the arm chooses nothing."""
        arm = task.arm
        if arm.select is None:
            return None
        return self._common() | {
            "domain": self.training_set(task).tokens.fingerprint,
            "pool": self.data(task).pool.tokens.fingerprint,
            "n": task.condition.budget,
            "seed": task.seed,
            "method": arm.select.method,
            "options": choice_options(arm.select),
            "warmup": None if arm.warmup is None else self.warmup_key(task),
        }

    def run_key(self, task: Task, rate: float) -> dict[str, Any]:
        """What a run depends on."""
        arm, data = task.arm, self.data(task)
        splits = {"dev": data.dev, "test": data.test}
        key = self._common() | {
            **{name: None if split is None else split.tokens.fingerprint for name, split in splits.items()},
            "evaluation": self._evaluation(),
            "kind": arm.kind,
        }
        if arm.kind == BASE:
            return key
        if self.spec.select_only:
            return key | {"selection": self.selection_key(task), "select_only": True}
        domain = self.training_set(task).tokens.fingerprint
        train = _train_dict(self.train_config(task, rate))
        own = {"parameters": arm.parameters, "seed": task.seed, "domain": domain, "train": train}
        if arm.given is not None:
            rows = digest(list(arm.given.rows))[:16]
            own["given"] = {"pool": data.pool.tokens.fingerprint, "rows": rows, "domain": arm.given.domain}
        if arm.select is not None and data.useful is not None:  # precision at N is kept with the run
            own["truth"] = digest(np.flatnonzero(data.useful).tolist())[:16]
        # How many steps there are says what kind an arm without chosen data is.
        return key | own | {"kind": "trained", "selection": self.selection_key(task)}

    def warmup_config(self, task: Task) -> TrainConfig:
        """Settings of a task's warm-up."""
        config = task.arm.warmup
        assert config is not None
        return dataclasses.replace(config, buckets=config.buckets or self.data(task).buckets)

    def folder(self, kind: str, key: dict[str, Any]) -> Path:
        """OUT/kind/<hash of the key>."""
        return self.out / kind / digest(key)[:16]


def choice_options(select: SelectorOptions) -> dict[str, Any]:
    """The options that decide a selection: the method's own, or all with a pass for diversity, which reads them."""
    return config_to_dict(select) if select.diversity != "none" else method_options(select)


def _train_dict(config: TrainConfig) -> dict[str, Any]:
    return {name: value for name, value in config_to_dict(config).items() if name not in NO_EFFECT}


def _without_lora(model: LanguageModel) -> LanguageModel:
    """The same weights, shared, without adapters."""
    adapters = paths(model.lora)
    kept = unflatten({path: leaf for path, leaf in paths(model.params).items() if path not in adapters})
    return dataclasses.replace(model, spec=dataclasses.replace(model.spec, lora=None), params=kept)


def read_inputs(spec: StudySpec, out: Path, splits: tuple[str, ...] = ("train", "dev", "test")) -> Inputs:
    """Load the model, the pool and the splits of every domain, in the order of ``splits``.

    Raises:
      UserError: a model or data that cannot be used.
    """
    options, domains, sources = _embedded_or_given(spec, out)
    model = load_model(options, seed=spec.seeds[0])
    reports: dict[str, Any] = {}

    def read(name: str, sources: tuple[Source, ...]) -> Loaded:
        files, mapped = prepare(sources, out / "data", on_bad_record=spec.data.on_bad_record)
        loaded = load_data(files, model, spec.data, shared=shared_cache(out) if name == "pool" else None)
        reports[name] = loaded.report() | ({"mapped": mapped} if mapped else {})
        return loaded

    pool = read("pool", sources)
    read_splits = {
        name: {split: read(f"{name} {split}", given) for split in splits if (given := getattr(entry, split))}
        for name, entry in domains.items()
    }
    digests = {
        "model": {part: value for part, value in model_digests(model).items() if part != "weights"},
        "pool": pool.records.fingerprint,
        **{name: {split: data.records.fingerprint for split, data in of.items()} for name, of in read_splits.items()},
    }
    check_alike("inputs", digests, SAME_FILES)
    return Inputs(options, model, domains, pool, read_splits, reports)


def set_up(
    spec: StudySpec,
    arms: tuple[Arm, ...],
    inputs: Inputs,
    out: Path,
    *,
    focus: tuple[str, ...] = (),
    evaluated: tuple[str, ...] = ("dev", "test"),
    shared_lengths: bool = True,
    progress: bool = False,
) -> Grid:
    """The grid of what was read: duplicates searched, sizes and budgets checked.

    Args:
      evaluated: the splits on which every run is evaluated.
      shared_lengths: all runs of a domain pad to the same lengths, and so share compiled steps; False: each run pads to
        lengths chosen for its own data.
      progress: of the search for duplicates.

    Raises:
      ConfigError: a budget larger than the pool, a size larger than the domain. UserError: unusable truth.
    """
    domains, reports = {}, dict(inputs.reports)
    for name in inputs.domains:
        domains[name], reports[f"{name} duplicates"] = _domain_data(name, inputs, spec, out, shared_lengths, progress)
    options, model = inputs.options, inputs.model
    digests = [
        *model_digests(model).values(),
        *(adapter_digests(model, model.lora).values() if options.adapter else ()),
    ]
    shot_file = shot_records(spec.evaluation, spec.data)
    shots = None if shot_file is None else shot_file.fingerprint
    return Grid(spec, arms, focus, out, options, model, "/".join(digests), domains, reports, evaluated, shots)


def _embedded_or_given(spec: StudySpec, out: Path) -> tuple[ModelOptions, dict[str, DomainSpec], tuple[Source, ...]]:
    """(model options, domains, pool); the embedded task is written into OUT/data."""
    assert spec.model is not None
    options = spec.model
    if options.model == EMBEDDED:
        options = dataclasses.replace(options, model=str(tiny_lm_path()))
    if spec.embedded is None:
        return options, spec.domains, spec.pool
    sizes = dataclasses.asdict(spec.embedded)
    seed = sizes.pop("task_seed")
    folder = out / "data" / f"task-{digest(sizes, seed)[:8]}"
    # truth.json is the last file; another process may be reading what is there
    if is_primary() and not (folder / "truth.json").exists():
        write_planted_task(folder, seed, **sizes)
    barrier("embedded task")
    split = lambda name: (Source(str(folder / "domain" / f"{name}.jsonl")),)
    domain = DomainSpec(split("train"), split("dev"), split("test"), truth=str(folder / "truth.json"))
    return options, {"shop": domain}, (Source(str(folder / "pool.jsonl")),)


def _domain_data(
    name: str, inputs: Inputs, spec: StudySpec, out: Path, shared_lengths: bool, progress: bool
) -> tuple[DomainData, dict[str, Any] | None]:
    """The data of one domain, and duplicates.json of the pool as this domain may use it."""
    splits, entry = inputs.splits[name], inputs.domains[name]
    train, dev, sizes = splits["train"], splits.get("dev"), entry.sizes or spec.domain_sizes
    held_out = {key: split.records for key, split in splits.items() if key != "train"}
    shared = shared_cache(out)
    cleaned = deduplicate(inputs.pool, train.records, held_out, spec.dedup, shared=shared, progress=progress)
    pool = cleaned.pool
    for size in sizes:
        if size != WHOLE and int(size) > len(train):
            raise ConfigError(
                f"domain {name}: size {size}, but its training data hold {len(train)} examples; ask for less"
            )
    for budget in spec.budgets:
        cleaned.check_size(budget)
        check_size(budget, len(pool))
    buckets = None
    if shared_lengths:
        lengths = [np.asarray(data.tokens.lengths) for data in (train, pool, dev) if data is not None]
        buckets = tuple(int(b) for b in bucket_lengths(np.concatenate(lengths), spec.train.max_buckets))
    useful = None if entry.truth is None else _useful(entry.truth, pool)
    return DomainData(name, train, pool, dev, splits.get("test"), useful, buckets, tuple(sizes)), cleaned.report


def _useful(path: str, pool: Loaded) -> Bool[np.ndarray, " N"]:
    wanted = "expected JSON with useful_ids, a list of ids of the pool"
    try:
        listed = read_json(path, remedy=wanted)["useful_ids"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: {wanted} ({error!r})") from None
    if not isinstance(listed, list):
        raise UserError(f"{path}: {wanted}; useful_ids is {listed!r:.60}")
    useful = set(map(str, listed))
    of_pool = np.asarray([str(name) in useful for name in pool.records.ids])
    if not of_pool.any():
        raise UserError(f"{path}: none of its {len(useful)} useful_ids is in the pool; is it the truth of another one?")
    return of_pool
