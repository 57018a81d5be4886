"""``ntkjax replay RUN``: repeat a run from its config.yaml."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from ntkjax.commands import COMMANDS, load_command
from ntkjax.commands.base import Command
from ntkjax.errors import ConfigError
from ntkjax.pipeline.config_io import config_from_dict
from ntkjax.pipeline.run_dir import load_run

NOT_REPEATED = ("show", "replay", "launch")
"""Commands that leave no run directory of their own."""


@dataclasses.dataclass(frozen=True)
class ReplayConfig:
    """Repeat a run from its config.yaml, into a directory of its own."""

    run: Positional[str]
    """A run directory, or a config.yaml."""
    out: str | None = None
    """Where the repetition goes; RUN-replay by default."""


def replay(config: ReplayConfig, *, progress: bool = True) -> Any:
    """Run the command that ``config.run`` records, with its config but for ``out``; gives what the command gives.

    Raises:
      UserError: the run directory or its config.yaml cannot be used; the output directory is the run itself.
    """
    name, content = load_run(config.run)
    repeatable = [command for command in COMMANDS if command not in NOT_REPEATED]
    if name not in repeatable:
        raise ConfigError(f"{config.run}: command {name!r} is not known; expected one of {', '.join(repeatable)}")
    folder = Path(config.run)
    folder = folder if folder.is_dir() else folder.parent
    out = Path(config.out) if config.out is not None else folder.with_name(folder.name + "-replay")
    if out.resolve() == folder.resolve():
        raise ConfigError(f"{out}: is the run itself; give --out another directory, so that the first results stay")
    command = load_command(name)
    if name == "study":  # its file lies in the run, which may have been moved
        content = {**content, "study": [str(folder / "study.yaml")]}
    built = config_from_dict(command.config, {**content, "out": str(out)}, where=str(folder / "config.yaml"))
    return command.start(built, progress=progress)


def describe(config: Any, result: Any) -> str:
    """Where the repetition went."""
    return f"replayed {config.run} into {config.out or str(Path(config.run)) + '-replay'}"


COMMAND = Command(ReplayConfig, replay, describe)
