"""Stages as Python functions: a config object, or the command line's flags as keywords."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from ntkjax.errors import ConfigError

R = TypeVar("R")


def takes_keywords(cls: type) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Let ``stage(config, progress=...)`` also be called as ``stage(model=..., n=..., out=..., progress=...)``.

    The keywords are the flags: options of unprefixed groups by their own names (``lora_rank=8``), prefixed groups as
    objects or dicts (``train=TrainConfig(...)`` or ``train={"epochs": 2}``), and one string where several are allowed.

    Raises (when called):
      ConfigError: an unknown or missing option (named), or both a config and options.
    """

    def wrap(stage: Callable[..., R]) -> Callable[..., R]:
        @functools.wraps(stage)
        def call(config: Any = None, *, progress: bool = True, **options: Any) -> R:
            if config is not None and options:
                raise ConfigError(f"give either a {cls.__name__} or options, not both (got {', '.join(options)})")
            return stage(build_config(cls, options) if config is None else config, progress=progress)

        return call

    return wrap


def build_config(cls: type, options: dict[str, Any]) -> Any:
    """``cls`` from flat options, routing those of unprefixed groups to their group."""
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    groups = {name: group for name in fields if (group := _group(hints[name])) is not None}
    values: dict[str, Any] = {}
    left = dict(options)
    for name, (group, flat) in groups.items():
        if dataclasses.is_dataclass(left.get(name)):
            values[name] = left.pop(name)
        elif flat:
            inner = {f.name: left.pop(f.name) for f in dataclasses.fields(group) if f.name in left}
            if inner or fields[name].default is dataclasses.MISSING:
                values[name] = _make(group, inner)
        elif isinstance(left.get(name), dict):
            values[name] = _make(group, left.pop(name), fields[name].default)
    return _make(cls, {**left, **values})


def _group(hint: Any) -> tuple[type, bool] | None:
    """(dataclass, whether its flags have no prefix) where the field is a group of options."""
    base = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
    if not (isinstance(base, type) and dataclasses.is_dataclass(base)):
        return None
    return base, typing.get_origin(hint) is typing.Annotated


def _make(cls: type, values: dict[str, Any], base: Any = dataclasses.MISSING) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = [name for name in values if name not in fields]
    if unknown:
        raise ConfigError(f"unknown option {', '.join(unknown)}; {cls.__name__} has {', '.join(fields)}")
    if base is not dataclasses.MISSING and base is not None:
        return dataclasses.replace(base, **values)
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"missing option {', '.join(missing)} of {cls.__name__}")
    hints = typing.get_type_hints(cls)
    return cls(**{name: _sequence(hints[name], value) for name, value in values.items()})


def _sequence(hint: Any, value: Any) -> Any:
    """One string for a tuple of strings, and lists for tuples; paths become text."""
    if typing.get_origin(hint) is not tuple:
        return str(value) if hint is str else value
    items = [value] if isinstance(value, str) or not isinstance(value, list | tuple) else value
    return tuple(str(item) if typing.get_args(hint)[0] is str else item for item in items)
