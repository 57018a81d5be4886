"""The help text of commands that select: options of methods in groups, or those of one method alone.

Configs are flat (`ntkjax.pipeline.options.SelectorOptions`). For ``--help``, and for nothing else, the parser is built
from a config whose selection options are one nested dataclass for each class that declares some. tyro then prints a
group for each, with the names of the methods that have it.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, Suppress, arg

from ntkjax.pipeline.options import MethodOption, SelectorOptions, part_of
from ntkjax.selection import METHODS
from ntkjax.selection.diversity import DiversityOptions


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether the command line asks for a help text."""
    return "-h" in arguments or "--help" in arguments


def help_config(config: type, arguments: Sequence[str]) -> type:
    """The config whose help is shown for these arguments: ``config`` itself where it holds no selection options;
    otherwise with these in groups, only those of the method that ``arguments`` name with ``--method``, if they do."""
    hints = typing.get_type_hints(config, include_extras=True)
    changed = {}
    for field in dataclasses.fields(config):
        if _plain(hints[field.name]) is SelectorOptions:
            default = SelectorOptions() if field.default is dataclasses.MISSING else field.default
            view = _grouped(_named_method(arguments), default)
            changed[field.name] = (field.name, Annotated[view, arg(name="")], view())
    return _derived(config, list(changed.values()), config.__doc__) if changed else config


def option_owners(method: str | None) -> Iterator[tuple[type, list[str]]]:
    """(class that declares options of ``method``, or of any; the methods that have them), in the order of the flags."""
    for owner in reversed(SelectorOptions.__mro__[1:]):
        having = [name for name, selector in METHODS.items() if issubclass(selector, owner)]
        common = issubclass(DiversityOptions, owner)
        if vars(owner).get("__annotations__") and owner is not MethodOption and (
            method is None or method in having or common
        ):  # fmt: skip
            yield owner, having


def _named_method(arguments: Sequence[str]) -> str | None:
    """The method after ``--method``, or None where none is named or there is no such method."""
    for given, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name = following if given == "--method" else given.removeprefix("--method=")
        if given.startswith("--method") and name in METHODS:
            return name
    return None


def _grouped(method: str | None, default: Any) -> type:
    groups: list[Any] = []
    for owner, having in option_owners(method):
        of = [*having, "the pass for diversity"] if issubclass(DiversityOptions, owner) else having
        hints = typing.get_type_hints(owner, include_extras=True)
        others = [field for field in dataclasses.fields(owner) if field.name not in owner.__annotations__]
        hidden = [(field.name, Suppress[hints[field.name]], field.default) for field in others]
        lines = (owner.__doc__ or "").split("\n\n")[0]
        group = _derived(owner, hidden, f"{lines} Of {', '.join(of)}." if len(of) > 1 else lines)
        name = owner.__name__.removesuffix("Options").lower()
        groups.append((name, OmitArgPrefixes[group], part_of(default, group)))
    return _derived(MethodOption, groups, SelectorOptions.__doc__)


def _derived(base: type, fields: list[Any], doc: str | None) -> type:
    """A dataclass with other fields than ``base``, or the same ones of other types; the helps are those of ``base``."""
    made = dataclasses.make_dataclass(base.__name__, fields, bases=(base,), frozen=True)
    made.__doc__ = doc
    return made


def _plain(hint: Any) -> Any:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
