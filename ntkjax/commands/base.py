"""What a command is, and how it is called from Python: with a config object, or with the flags as keywords."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Iterator
from typing import Any

from ntkjax.data.cache import default_cache_dir
from ntkjax.errors import ConfigError
from ntkjax.job import process
from ntkjax.remote import is_url, mirrored


@dataclasses.dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
      config: a frozen dataclass; its fields are the flags, and its docstring the help text.
      run: ``run(config, progress=...) -> result``: the work.
      describe: ``describe(config, result) -> str``: what the command line prints at the end.
      divides: whether the processes of one job (jax.distributed), each with the whole model, divide its work.
      spans: whether it runs on a mesh over the devices of all processes of a job.
      dry_run: ``dry_run(config, progress=...) -> result``: what runs instead where the config has ``dry_run`` True;
        None for a command without it.
      grid: ``grid(config) -> Grid``: of a command that compares arms, its grid (`ntkjax.pipeline.study.grid`) with
        model and data loaded and nothing computed; None for the others.
    """

    config: type
    run: Callable[..., Any]
    describe: Callable[[Any, Any], str]
    divides: bool = False
    spans: bool = False
    dry_run: Callable[..., Any] | None = None
    grid: Callable[[Any], Any] | None = None

    def start(self, config: Any, *, progress: bool = True) -> Any:
        """Do the work, or the dry run where the config asks for it."""
        work = self.dry_run if self.dry_run is not None and config.dry_run else self.run
        return work(config, progress=progress)

    @functools.cached_property
    def function(self) -> Callable[..., Any]:
        """``run`` as users call it: ``f(config)`` or ``f(model=..., n=..., out=...)``.

        The keywords are the flags: options of unprefixed groups by their own names (``lora_rank=8``), prefixed groups
        as objects or dicts (``train=TrainConfig(...)`` or ``train={"epochs": 2}``), and one string where several are
        allowed. Raises ConfigError for an unknown or missing option (named), or both a config and options.
        """
        cls, run = self.config, self.run

        @functools.wraps(run)
        def call(config: Any = None, *, progress: bool = True, **options: Any) -> Any:
            if config is not None and options:
                raise ConfigError(f"give either a {cls.__name__} or options, not both (got {', '.join(options)})")
            with local_out(build_config(cls, options) if config is None else config) as (own, _):
                return self.start(own, progress=progress)

        call.__signature__ = _signature(cls)  # type: ignore[attr-defined]
        return call

    def from_command_line(self, config: Any) -> tuple[str, int]:
        """Run; the text to print, and the exit code: 0 unless the result has one of its own."""
        with local_out(config) as (own, named):
            result = self.start(own)
            return named(self.describe(own, result)), getattr(result, "exit_code", 0)


@contextlib.contextmanager
def local_out(config: Any) -> Iterator[tuple[Any, Callable[[str], str]]]:
    """(``config``, whose ``out`` is a directory of this machine; a function that names it in a text as the user did).

    Where ``out`` is a URL the directory mirrors it (`ntkjax.remote`).

    Raises:
      ConfigError: a URL in a job of several processes.
    """
    out = getattr(config, "out", None)
    if not isinstance(out, str) or not is_url(out):
        yield config, str
        return
    if process()[1] > 1:
        raise ConfigError(
            f"--out {out}: the processes of a job share files while they work, which an object store cannot do; give "
            "a directory that all of them see, and copy it when the job has ended"
        )
    with mirrored(out, default_cache_dir() / "runs") as mirror:
        yield dataclasses.replace(config, out=str(mirror.local)), mirror.named


def _signature(cls: type) -> inspect.Signature:
    """config, progress, and every flag as a keyword, for completion and ``help``."""
    keyword, empty = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.empty
    parameters = [
        inspect.Parameter("config", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=cls.__name__),
        inspect.Parameter("progress", keyword, default=True, annotation="bool"),
    ]
    hints, names = typing.get_type_hints(cls, include_extras=True), {"config", "progress"}
    for field in dataclasses.fields(cls):
        group = _group(hints[field.name])
        for option in dataclasses.fields(group[0]) if group is not None and group[1] else [field]:
            default = empty if option.default is dataclasses.MISSING else option.default
            if option.name not in names:
                parameters.append(inspect.Parameter(option.name, keyword, default=default, annotation=option.type))
            names.add(option.name)
    return inspect.Signature(parameters)


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
