"""The arms of a study: those that are always there, and one for each method and kernel."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from ntkjax.commands.study.spec import entry_name
from ntkjax.errors import ConfigError
from ntkjax.pipeline.config_io import config_from_dict, config_to_dict
from ntkjax.pipeline.cost import uses_model
from ntkjax.pipeline.options import SelectorOptions
from ntkjax.pipeline.select import make_selector
from ntkjax.pipeline.study.arms import BASE, DOMAIN, EQUAL, RANDOM, Arm, Kind
from ntkjax.pipeline.study.spec import ALL, MethodSpec, StudySpec
from ntkjax.selection import METHODS
from ntkjax.training import TrainConfig

TRAINING: dict[str, dict[str, Any]] = {
    "loss-reweighting": {"train": {"loss_reweighting": "linupper"}},
    "lift": {"train": {"lift_rank": 16}, "parameters": "all"},
}
"""Training-time methods: what they change in an arm whose data are chosen at random."""
FIXED = ("epochs", "steps", "batch_size", "patience")
"""Training options that no arm may have for itself: they decide how many steps are taken, and of what size."""


def arms_of(spec: StudySpec, where: str = "study") -> tuple[Arm, ...]:
    """Every arm of the study in the order of its tables.

    Raises:
      ConfigError: an unknown method, two arms of one name, an option that does not fit; the entry is named.
    """
    entries = [
        (entry_name(where, i, each.label), each) for i, entry in enumerate(spec.methods) for each in _written_out(entry)
    ]
    if not any(entry.label == RANDOM for _, entry in entries):
        entries.insert(0, (where, MethodSpec(RANDOM, RANDOM)))
    chosen = [arm for at, entry in entries for arm in _arms(spec, entry, at)]
    always: list[Kind] = [] if spec.select_only else [BASE, DOMAIN, EQUAL]
    arms = [_plain(spec, kind) for kind in always] + chosen
    labels = [arm.label for arm in arms]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ConfigError(f"{where}: methods: two arms are called {', '.join(twice)}; give each its own label")
    for arm in arms:
        if arm.parameters == "lora" and spec.model is not None and spec.model.parameters == "all":
            raise ConfigError(f"{where}: arm {arm.label} trains LoRA, but model.parameters is all; leave that out")
    unknown = [name for name in spec.focus if name not in labels]
    if unknown:
        raise ConfigError(f"{where}: focus: no arm is called {', '.join(unknown)}; there are {', '.join(labels)}")
    return tuple(arms)


def focus_of(spec: StudySpec, arms: tuple[Arm, ...]) -> tuple[str, ...]:
    """Labels of the arms that are proposed; the others are baselines."""
    if spec.focus:
        return spec.focus
    return tuple(arm.label for arm in arms if arm.select is not None and arm.select.method == "ntk")


def _written_out(entry: MethodSpec) -> list[MethodSpec]:
    """The entry, or one for each method that ``all`` stands for, or one for each pair of its representations and
    algorithms, labelled LABEL (PAIR)."""
    if entry.method == ALL:
        return [dataclasses.replace(entry, method=name, label=name) for name in METHODS]
    lists = {"representation": entry.representations, "algorithm": entry.algorithms}
    crossed = {option: values for option, values in lists.items() if values}
    if not crossed:
        return [entry]
    return [
        dataclasses.replace(
            entry,
            label=f"{entry.label} ({', '.join(pair)})",
            options=entry.options | dict(zip(crossed, pair)),
            representations=(),
            algorithms=(),
        )
        for pair in itertools.product(*crossed.values())
    ]


def _arms(spec: StudySpec, entry: MethodSpec, where: str) -> list[Arm]:
    changed = TRAINING.get(entry.method, {})
    method = RANDOM if entry.method in TRAINING else entry.method
    if method not in METHODS:
        names = ", ".join([ALL, *METHODS, *TRAINING])
        raise ConfigError(f"{where}: unknown method {entry.method!r}; expected one of {names}")
    options = config_to_dict(spec.select) | entry.options | {"method": method}
    train = _train(spec, {**changed.get("train", {}), **entry.train}, where)
    rates = entry.learning_rates or ((train.learning_rate,) if "learning_rate" in entry.train else spec.learning_rates)
    rates = rates or (train.learning_rate,)
    own = spec.model.parameters if spec.model is not None else "lora"
    select = config_from_dict(SelectorOptions, options, where=where)
    arm = Arm(
        label=entry.label,
        kind="selected",
        select=select,
        train=dataclasses.replace(train, learning_rate=rates[0]),
        warmup=spec.warmup if entry.warmup == "shared" and uses_model(select) else None,
        parameters=entry.parameters or changed.get("parameters") or own,
        rates=rates,
    )
    kernels = spec.kernels if has_kernel(select) and "kernel" not in entry.options else ()
    return _crossed(arm, kernels, where) if kernels else [arm]


def _crossed(arm: Arm, kernels: tuple[str, ...], where: str) -> list[Arm]:
    made = []
    for kernel in kernels:
        options = config_to_dict(arm.select) | {"kernel": kernel}
        label = f"{arm.label} ({kernel})" if len(kernels) > 1 else arm.label
        select = config_from_dict(SelectorOptions, options, where=where)
        made.append(dataclasses.replace(arm, label=label, select=select))
    return made


def has_kernel(options: SelectorOptions) -> bool:
    """Whether the method, with its options, has a use for ``kernel``."""
    return "kernel" in make_selector(options).used_options()


def _train(spec: StudySpec, changed: dict[str, Any], where: str) -> TrainConfig:
    fixed = [name for name in FIXED if name in changed]
    if fixed:
        raise ConfigError(
            f"{where}: train.{fixed[0]}: every arm takes the same steps; set it in the study's train, not in one arm"
        )
    return config_from_dict(TrainConfig, config_to_dict(spec.train) | changed, where=f"{where}: train")


def _plain(spec: StudySpec, kind: Kind) -> Arm:
    rates = spec.learning_rates or (spec.train.learning_rate,)
    own = spec.model.parameters if spec.model is not None else "lora"
    return Arm(kind, kind, None, dataclasses.replace(spec.train, learning_rate=rates[0]), None, own, rates)
