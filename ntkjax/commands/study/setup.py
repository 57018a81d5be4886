"""The model and the data of a study, loaded once, and the names of what it computes: hashes of all it depends on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from ntkjax.assets import tiny_lm_path, write_planted_task
from ntkjax.commands.study.arms import Arm, arms_of, focus_of
from ntkjax.commands.study.spec import EMBEDDED, WHOLE, DomainSpec, StudySpec
from ntkjax.data.buckets import bucket_lengths
from ntkjax.data.mapping import Source, prepare
from ntkjax.errors import ConfigError, UserError
from ntkjax.files import read_json
from ntkjax.fingerprint import digest
from ntkjax.models import LanguageModel
from ntkjax.models.lm import paths, unflatten
from ntkjax.pipeline.arms import BASE
from ntkjax.pipeline.config_io import config_to_dict
from ntkjax.pipeline.deduplicate import deduplicate
from ntkjax.pipeline.inputs import adapter_digests, model_digests
from ntkjax.pipeline.load import Loaded, fresh_parameters, load_data, load_model
from ntkjax.pipeline.options import ModelOptions, SelectorOptions
from ntkjax.pipeline.run_dir import package_version
from ntkjax.pipeline.select import method_options
from ntkjax.rng import numpy_rng
from ntkjax.selection.base import check_size
from ntkjax.training import TrainConfig
from ntkjax.types import Params

Size = int | str
HOUSEKEEPING = ("save_every", "keep_checkpoints")
"""Training options that change no result, so that runs which differ in them alone are one."""
PLACEMENT = ("model", "adapter", "mesh", "weights", "remat")
"""Model options that are no part of a run's name: the weights themselves are, and how they lie changes no result."""


@dataclasses.dataclass(frozen=True)
class Place:
    """One cell of the study: a domain, how much of its training file, and N."""

    domain: str
    size: Size
    budget: int


@dataclasses.dataclass(frozen=True)
class Task:
    """One run that is wanted: an arm at a place with a seed; its learning rate is the tuned one."""

    place: Place
    arm: Arm
    seed: int


@dataclasses.dataclass(frozen=True)
class DomainData:
    """A domain's splits, the pool as this domain may use it, and what is known of both.

    ``useful``: bool [N], the pool rows that truly help, where that is known. ``buckets``: padded lengths that all of
    its runs share, so that they share compiled steps. ``sizes``: of the training set.
    """

    name: str
    train: Loaded
    pool: Loaded
    dev: Loaded | None
    test: Loaded | None
    useful: Bool[np.ndarray, " N"] | None
    buckets: tuple[int, ...]
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
class Bench:
    """What every run of a study shares. ``fingerprint``: of the model, its tokenizer and the adapter given;
    ``reports``: what reading found."""

    spec: StudySpec
    arms: tuple[Arm, ...]
    focus: tuple[str, ...]
    out: Path
    options: ModelOptions
    model: LanguageModel
    fingerprint: str
    domains: dict[str, DomainData]
    reports: dict[str, Any]

    @property
    def places(self) -> list[Place]:
        """Every cell, in the order of the file."""
        return [
            Place(name, size, budget)
            for name, data in self.domains.items()
            for size in data.sizes
            for budget in self.spec.budgets
        ]

    def tasks(self) -> list[Task]:
        """Every run that is wanted, first seeds first (learning rates are tuned with them); the base model is run once
        for each place."""
        first, places = self.spec.seeds[0], self.places
        rest = [(seed, place, arm) for seed in self.spec.seeds for place in places for arm in self.arms]
        return [Task(place, arm, seed) for seed, place, arm in rest if arm.kind != BASE or seed == first]

    def steps(self, task: Task) -> int:
        """Optimiser steps of a run."""
        return task.arm.steps(self.domains[task.place.domain].examples(task.place.size), task.place.budget)

    def train_config(self, task: Task, rate: float) -> TrainConfig:
        """Settings of a run's fine-tuning."""
        config = task.arm.config(rate, self.steps(task))
        return dataclasses.replace(config, buckets=config.buckets or self.domains[task.place.domain].buckets)

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
        data = config_to_dict(self.spec.data)
        return {"ntkjax": package_version(), "weights": self.fingerprint, "model": options, "data": data}

    def warmup_key(self, place: Place, seed: int, config: TrainConfig) -> dict[str, Any]:
        """What a warm-up depends on."""
        domain = self.domains[place.domain].subset(place.size, seed)
        return self._common() | {"domain": domain.tokens.fingerprint, "seed": seed, "warmup": _train_dict(config)}

    def selection_key(self, task: Task) -> dict[str, Any] | None:
        """What a selection depends on; None where the arm chooses nothing."""
        arm, data = task.arm, self.domains[task.place.domain]
        if arm.select is None:
            return None
        warmup = None if arm.warmup is None else self.warmup_key(task.place, task.seed, self.warmup_config(task))
        return self._common() | {
            "domain": data.subset(task.place.size, task.seed).tokens.fingerprint,
            "pool": data.pool.tokens.fingerprint,
            "n": task.place.budget,
            "seed": task.seed,
            "method": arm.select.method,
            "options": choice_options(arm.select),
            "warmup": warmup,
        }

    def run_key(self, task: Task, rate: float) -> dict[str, Any]:
        """What a run depends on."""
        arm, data = task.arm, self.domains[task.place.domain]
        splits = {"dev": data.dev, "test": data.test}
        key = self._common() | {
            **{name: None if split is None else split.tokens.fingerprint for name, split in splits.items()},
            "evaluation": config_to_dict(self.spec.evaluation),
            "kind": arm.kind,
        }
        if arm.kind == BASE:
            return key
        if self.spec.select_only:
            return key | {"selection": self.selection_key(task), "select_only": True}
        domain = data.subset(task.place.size, task.seed).tokens.fingerprint
        train = _train_dict(self.train_config(task, rate))
        own = {"parameters": arm.parameters, "seed": task.seed, "domain": domain, "train": train}
        if arm.select is not None and data.useful is not None:  # precision at N is kept with the run
            own["truth"] = digest(np.flatnonzero(data.useful).tolist())[:16]
        # How many steps there are says what kind an arm without chosen data is.
        return key | own | {"kind": "trained", "selection": self.selection_key(task)}

    def warmup_config(self, task: Task) -> TrainConfig:
        """Settings of a task's warm-up."""
        config = task.arm.warmup
        assert config is not None
        return dataclasses.replace(config, buckets=config.buckets or self.domains[task.place.domain].buckets)

    def folder(self, kind: str, key: dict[str, Any]) -> Path:
        """OUT/kind/<hash of the key>."""
        return self.out / kind / digest(key)[:16]


def choice_options(select: SelectorOptions) -> dict[str, Any]:
    """The options that decide a selection: the method's own, and with a pass for diversity, which takes any of them,
    all."""
    return config_to_dict(select) if select.diversity != "none" else method_options(select)


def _train_dict(config: TrainConfig) -> dict[str, Any]:
    return {name: value for name, value in config_to_dict(config).items() if name not in HOUSEKEEPING}


def _without_lora(model: LanguageModel) -> LanguageModel:
    """The same weights, shared, without adapters."""
    adapters = paths(model.lora)
    kept = unflatten({path: leaf for path, leaf in paths(model.params).items() if path not in adapters})
    return dataclasses.replace(model, spec=dataclasses.replace(model.spec, lora=None), params=kept)


def set_up(spec: StudySpec, out: Path, where: str) -> Bench:
    """Load model and data, and check that they can serve what is asked.

    Raises:
      UserError: an unusable model or data, a budget larger than the pool, a size larger than the domain.
    """
    arms = arms_of(spec, where)
    options, domains, pool = _inputs(spec, out)
    for arm in arms:
        if arm.parameters == "lora" and options.parameters == "all":
            raise ConfigError(f"{where}: arm {arm.label} trains LoRA, but model.parameters is all; leave that out")
    model = load_model(options, seed=spec.seeds[0])
    reports: dict[str, Any] = {}

    def read(sources: tuple[Source, ...], name: str) -> Loaded:
        files, mapped = prepare(sources, out / "data", on_bad_record=spec.data.on_bad_record)
        loaded = load_data(files, model, spec.data)
        reports[name] = loaded.report() | ({"mapped": mapped} if mapped else {})
        return loaded

    whole = read(pool, "pool")
    made = {}
    for name, entry in domains.items():
        splits = {key: read(getattr(entry, key), f"{name} {key}") if getattr(entry, key) else None
                  for key in ("train", "dev", "test")}  # fmt: skip
        sizes = entry.sizes or spec.domain_sizes
        made[name], reports[f"{name} duplicates"] = _domain_data(name, splits, whole, entry.truth, sizes, spec)
    given = model_digests(model).values(), adapter_digests(model, model.lora).values() if options.adapter else ()
    fingerprint = "/".join([*given[0], *given[1]])
    return Bench(spec, arms, focus_of(spec, arms), out, options, model, fingerprint, made, reports)


def _inputs(spec: StudySpec, out: Path) -> tuple[ModelOptions, dict[str, Any], tuple[Source, ...]]:
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
    if not (folder / "truth.json").exists():  # the last file; another process may be reading what is there
        write_planted_task(folder, seed, **sizes)
    split = lambda name: (Source(str(folder / "domain" / f"{name}.jsonl")),)
    domain = DomainSpec(split("train"), split("dev"), split("test"), truth=str(folder / "truth.json"))
    return options, {"shop": domain}, (Source(str(folder / "pool.jsonl")),)


def _domain_data(
    name: str, splits: dict[str, Loaded | None], pool: Loaded, truth: str | None, sizes: tuple, spec: StudySpec
) -> tuple[DomainData, dict[str, Any] | None]:
    train = splits["train"]
    assert train is not None
    held_out = {key: split.records for key, split in splits.items() if split is not None and key != "train"}
    cleaned = deduplicate(pool, train.records, held_out, spec.dedup, progress=False)
    pool = cleaned.pool
    for size in sizes:
        if size != WHOLE and int(size) > len(train):
            raise ConfigError(
                f"domain {name}: size {size}, but its training data hold {len(train)} examples; ask for less"
            )
    for budget in spec.budgets:
        cleaned.check_size(budget)
        check_size(budget, len(pool))
    lengths = [np.asarray(split.tokens.lengths) for split in (train, pool, splits["dev"]) if split is not None]
    buckets = tuple(int(b) for b in bucket_lengths(np.concatenate(lengths), spec.train.max_buckets))
    useful = None if truth is None else _useful(truth, pool)
    data = DomainData(name, train, pool, splits["dev"], splits["test"], useful, buckets, tuple(sizes))
    return data, cleaned.report


def _useful(path: str, pool: Loaded) -> Bool[np.ndarray, " N"]:
    wanted = "expected JSON with useful_ids, a list of ids of the pool"
    try:
        useful = set(map(str, read_json(path, remedy=wanted)["useful_ids"]))
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: {wanted} ({error!r})") from None
    found = np.asarray([str(name) in useful for name in pool.records.ids])
    if not found.any():
        raise UserError(f"{path}: none of its {len(useful)} useful_ids is in the pool; is it the truth of another one?")
    return found
