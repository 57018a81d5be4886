"""A run directory: what was asked (config.yaml, replayable), of what (inputs.json), with what (versions.json), and what
came of it.

::

    config.yaml     ntkjax version, command, config: `ntkjax replay RUN` repeats the run from this file alone
    inputs.json     digests of the data, the weights, the tokenizer and the adapter that all results here come from
    versions.json   library versions, platform, devices, git commit, every seed of the config
    metrics.jsonl   one JSON object a line, flushed as it is written
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ntkjax.errors import ConfigError, UserError
from ntkjax.files import append_json_line, plain, read_json_lines, write_bytes, write_text
from ntkjax.job import is_primary
from ntkjax.pipeline.alike import SAME_FILES, check_alike
from ntkjax.pipeline.config_io import config_from_dict, config_to_dict, read_yaml
from ntkjax.pipeline.inputs import INPUTS, Inputs, check_inputs
from ntkjax.pipeline.versions import package_version, versions
from ntkjax.store import differences, flatten

LAYOUT = ("packing", "tracker", "mesh", "weights")
"""Options of any group that change no result, or by rounding alone, so that a run goes on under others."""


class RunDir:
    """The directory of one run. Make it with ``RunDir.create``; ``run.path / "name"`` names a file in it.
    In a job of several processes only the first one writes.

    Attributes:
      path: where it lies.
      held: whether it held this run before.
    """

    def __init__(self, path: Path, held: bool = False):
        self.path, self.held = path, held

    @classmethod
    def create(
        cls,
        path: str | os.PathLike,
        command: str,
        config: Any,
        *,
        inputs: Inputs | None = None,
        resume: bool = True,
        ignore: Sequence[str] = (),
        rewrite: bool = False,
    ) -> RunDir:
        """Make the directory, or go on with one that holds the same command, config and inputs.

        Args:
          command: the command's name, e.g. ``"adapt"``.
          config: its config dataclass.
          inputs: digests of all that the results depend on besides the config; kept in inputs.json. None: they depend
            on nothing else, or lie in folders named from what they depend on.
          resume: False refuses a directory that already holds a run.
          ignore: dotted keys that may differ from an earlier run, since they change no result, such as
            ``("progress",)``.
          rewrite: write config.yaml anew where options of ``ignore`` say how much is asked for, so that it says what
            the results are of.

        Raises:
          ConfigError: the directory holds another run (each differing key is named), or one of other inputs (each
            differing file, weights, ... is named), or any run where ``resume`` is False; a process of a job has other
            inputs than the first.
          UserError: ``path`` is a file or cannot be written; config.yaml there is damaged.
        """
        path = Path(path)
        wanted = {"command": command, "config": config_to_dict(config)}
        check_alike("inputs", inputs or {}, SAME_FILES)
        cls.check(path, command, config, inputs=inputs, resume=resume, ignore=ignore)
        run = cls(path, (path / "config.yaml").exists())
        if not is_primary():
            return run
        try:
            path.mkdir(parents=True, exist_ok=True)
            if inputs is not None and not (path / INPUTS).exists():  # before config.yaml, which no run has without it
                run.write_json(INPUTS, inputs)
            if rewrite or not (path / "config.yaml").exists():
                content = {"ntkjax": package_version(), **wanted}
                run.write_text("config.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
            run.write_json("versions.json", versions() | {"seeds": _seeds(wanted["config"])})
        except OSError as error:
            raise UserError(f"{path}: cannot write the run directory ({error.strerror or error}). "
                            "Choose another --out or mend its permissions.") from error  # fmt: skip
        return run

    @staticmethod
    def check(
        path: str | os.PathLike,
        command: str,
        config: Any,
        *,
        inputs: Inputs | None = None,
        resume: bool = True,
        ignore: Sequence[str] = (),
    ) -> None:
        """Raise what ``create`` would for a path that holds something else; writes nothing.

        For the start of a command, before its inputs are read (without ``inputs``) and when they are: a mistake in them
        then leaves no run directory behind.
        """
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise UserError(f"{path}: is a file; the output of a run is a directory. Choose another path.")
        if (path / "config.yaml").exists():
            _check_same(path, command, config, resume, ignore)
        if inputs is not None:
            check_inputs(path, inputs)

    def tell(self, result: str, progress: bool) -> None:
        """Say on stderr, before the work, that the directory holds this run and whether it was finished: ``result`` is
        the file that a finished run has."""
        if self.held and progress and is_primary():
            if (self.path / result).exists():
                what = "holds the results of this command, of the same inputs: what is finished is read back"
            else:
                what = "holds the beginning of this run, of the same inputs: it goes on"
            print(f"{self.path}: {what}", file=sys.stderr)

    def log(self, **fields: Any) -> None:
        """Append one line to metrics.jsonl and flush it. NaN and infinities are written as strings.

        Raises ``UserError`` where it cannot be written (disk full).
        """
        if not is_primary():
            return
        append_json_line(self.path / "metrics.jsonl", plain(fields))

    def metrics(self) -> list[dict]:
        """The lines of metrics.jsonl, in order; [] where there is none yet."""
        return read_json_lines(self.path / "metrics.jsonl")

    def write_json(self, name: str, content: Any) -> Path:
        """Write ``content`` (see ``plain``) to the file ``name``, whole or not at all; gives its path."""
        return self.write_text(name, json.dumps(plain(content), indent=2, ensure_ascii=False) + "\n")

    def write_text(self, name: str, text: str) -> Path:
        """Write ``text`` to the file ``name`` (folders are made), whole or not at all; gives its path.

        Raises ``UserError`` where it cannot be written (disk full, no permission).
        """
        file = self.path / name
        if not is_primary():
            return file
        return write_text(file, text)

    def write_bytes(self, name: str, data: bytes) -> Path:
        """Write ``data``, such as a plot, to the file ``name`` as `write_text` does; gives its path."""
        file = self.path / name
        return write_bytes(file, data) if is_primary() else file


def load_run(path: str | os.PathLike) -> tuple[str, dict]:
    """(command, config dict) of a run directory, or of a config.yaml named directly, for replay.

    Raises:
      UserError: there is no config.yaml, or it is not readable YAML (``FILE:LINE:``).
      ConfigError: the keys ``command`` and ``config`` are missing or of the wrong kind.
    """
    file = Path(path)
    file = file / "config.yaml" if file.is_dir() else file
    content = read_yaml(file, missing="Name a run directory (one with config.yaml).")
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: expected the keys command and config, got {content!r}")
    for key, kind in (("command", str), ("config", dict)):
        if not isinstance(content.get(key), kind):
            wanted = "a string" if kind is str else "a mapping"
            raise ConfigError(f"{file}: key {key}: expected {wanted}, got {content.get(key)!r}")
    return content["command"], content["config"]


def _check_same(path: Path, command: str, config: Any, resume: bool, ignore: Sequence[str]) -> None:
    if not resume:
        raise ConfigError(f"{path}: already holds a run. Use a new --out directory.")
    earlier, stored = load_run(path)
    old = flatten({"command": earlier, "config": stored})
    new = flatten({"command": command, "config": config_to_dict(config)})
    if earlier == command:
        old = _defaults_of(config, stored) | old
    for key in {*old, *new}:
        if key == "config.out":  # the directory itself, which may have been moved
            old.pop(key, None)
            new.pop(key, None)
        if key.removeprefix("config.") in ignore or key.rsplit(".", 1)[-1] in LAYOUT:
            old.pop(key, None)
            new.pop(key, None)
    changed = [line.removeprefix("config.") for line in differences(old, new)]
    if changed:
        raise ConfigError(
            f"{path}: holds a run with other settings:\n  "
            + "\n  ".join(changed)
            + f"\nUse a new --out directory, give the settings of that run to go on with it, or remove {path}."
        )


def _defaults_of(config: Any, stored: dict) -> dict[str, Any]:
    """The stored config read as one of ``config``'s class, flat: options that are newer than it at their defaults; {}
    where it cannot be read so."""
    try:
        return flatten({"config": config_to_dict(config_from_dict(type(config), stored))})
    except ConfigError:
        return {}


def _seeds(config: dict) -> dict:
    is_seed = lambda key: key.rsplit(".", 1)[-1] in ("seed", "seeds") or key.endswith("_seed")
    return {key: value for key, value in flatten(config).items() if is_seed(key)}
