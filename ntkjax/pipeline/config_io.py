"""Frozen config dataclasses to plain dicts and back, with strict keys and types, and YAML files read strictly: what
replay stands on.

Understood field types: bool, int, float, str, None, Path, Any, Literal, Optional and unions, list, tuple,
dict with string keys, and nested dataclasses.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from ntkjax.errors import ConfigError, UserError

T = TypeVar("T")


def config_to_dict(config: Any) -> Any:
    """A config dataclass as nested dicts, lists and scalars that YAML and JSON can hold.

    Paths become strings and tuples lists; ``config_from_dict`` turns them back. Raises ``TypeError`` for a
    value that could not be read back (a function, an array).
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: config_to_dict(getattr(config, f.name)) for f in dataclasses.fields(config) if f.init}
    if isinstance(config, dict):
        return {str(key): config_to_dict(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [config_to_dict(value) for value in config]
    if isinstance(config, Path):
        return str(config)
    if config is None or isinstance(config, bool | int | float | str):
        return config
    raise TypeError(f"a config holds plain values only, not {type(config).__name__}: {config!r}")


def config_from_dict(cls: type[T], data: Any, *, where: str = "config") -> T:
    """Build the dataclass ``cls`` from what ``config_to_dict`` gave (or a person wrote).

    Args:
      where: name of the source, which starts every message, e.g. ``"runs/a/config.yaml"``.

    Raises:
      ConfigError: unknown key (the valid ones are listed), missing key, or a value of the wrong type.
    """
    return _dataclass(cls, data, where, "")


def _dataclass(cls: Any, data: Any, where: str, key: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    valid = ", ".join(fields) or "none"
    at = f"{where}: {key}" if key else where
    if not isinstance(data, dict):
        raise ConfigError(f"{at}: expected a mapping with keys among {valid}; got {data!r}")
    unknown = [str(name) for name in data if name not in fields]
    if unknown:
        dotted = ", ".join(_join(key, name) for name in unknown)
        raise ConfigError(f"{where}: unknown key {dotted}. Valid keys: {valid}")
    required = [
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and name not in data
    ]
    if required:
        raise ConfigError(f"{where}: missing key {', '.join(_join(key, name) for name in required)}")
    hints = typing.get_type_hints(cls)
    values = {name: _value(hints[name], value, where, _join(key, name)) for name, value in data.items()}
    try:
        return cls(**values)
    except (ValueError, TypeError, ConfigError) as error:  # raised by the class's own checks in __post_init__
        raise ConfigError(f"{at}: {error}") from error


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _value(hint: Any, value: Any, where: str, key: str) -> Any:
    """``value`` as the type ``hint`` asks for."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    wrong = ConfigError(f"{where}: {key}: expected {_name(hint)}, got {value!r}")
    if hint is Any:
        return value
    if origin is typing.Annotated:
        return _value(args[0], value, where, key)
    if origin is Literal:
        # True == 1 in Python; a choice is met only by a value of its own type.
        if not any(value == choice and type(value) is type(choice) for choice in args):
            raise wrong
        return value
    if origin in (Union, types.UnionType):
        return _union(args, value, where, key, wrong)
    if dataclasses.is_dataclass(hint):
        return _dataclass(hint, value, where, key)
    if (origin or hint) in (list, tuple) or getattr(origin, "__name__", "") == "Sequence":
        return _sequence(origin or hint, args, value, where, key, wrong)
    if (origin or hint) is dict:
        if not isinstance(value, dict):
            raise wrong
        item = args[1] if args else Any
        return {str(name): _value(item, entry, where, _join(key, str(name))) for name, entry in value.items()}
    return _scalar(hint, value, wrong)


def _union(args: tuple, value: Any, where: str, key: str, wrong: ConfigError) -> Any:
    if value is None and type(None) in args:
        return None
    members = [member for member in args if member is not type(None)]
    # A value keeps its own type where it can: `int | str` must not turn "3" into 3 or 3 into "3".
    members.sort(key=lambda member: type(value) is not member)
    errors = []
    for member in members:
        try:
            return _value(member, value, where, key)
        except ConfigError as error:
            errors.append(error)
    # With one candidate (Optional) its own message says more, such as the key inside a nested config.
    raise errors[0] if len(members) == 1 else wrong


def _sequence(kind: Any, args: tuple, value: Any, where: str, key: str, wrong: ConfigError) -> Any:
    if not isinstance(value, list | tuple):
        raise wrong
    if kind is tuple and args and args[-1] is not Ellipsis:
        if len(args) != len(value):
            raise wrong
        return tuple(_value(a, v, where, f"{key}[{i}]") for i, (a, v) in enumerate(zip(args, value)))
    item = args[0] if args else Any
    values = [_value(item, entry, where, f"{key}[{i}]") for i, entry in enumerate(value)]
    return values if kind is list else tuple(values)


def _scalar(hint: Any, value: Any, wrong: ConfigError) -> Any:
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):
        # YAML 1.1 reads 2e-5 (no point) as text; a person who writes that means the number.
        try:
            return float(value)
        except ValueError:
            raise wrong from None
    if hint is int and isinstance(value, bool):
        raise wrong
    if hint is type(None) and value is None:
        return None
    if hint in (bool, int, str) and isinstance(value, hint):
        return value
    raise wrong


def _name(hint: Any) -> str:
    """A type as a person would write it: ``int``, ``one of 'a', 'b'``, ``list[str]``."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin in (Union, types.UnionType):
        return " or ".join("null" if a is type(None) else _name(a) for a in args)
    if args:
        inner = ", ".join("..." if a is ... else _name(a) for a in args)
        return f"{getattr(origin, '__name__', origin)}[{inner}]"
    return getattr(hint, "__name__", str(hint))


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key stands once: of two equal ones PyYAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is there twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(file: Path, *, missing: str) -> Any:
    """The content of a YAML file.

    Args:
      missing: what to do where there is no such file.

    Raises:
      UserError: there is none, or it is not readable YAML (``FILE:LINE:``), or has a key twice.
    """
    try:
        return yaml.load(file.read_text(encoding="utf-8"), _StrictLoader)  # a SafeLoader
    except FileNotFoundError as error:
        raise UserError(f"{file}: not found. {missing}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error}).") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(f"{file}{line}: not valid YAML: {problem}. Mend this line and run again.") from error
