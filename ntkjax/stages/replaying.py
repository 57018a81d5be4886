"""``ntkjax replay RUN``: repeat a run from its config.yaml."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from ntkjax.errors import ConfigError
from ntkjax.stages.config import config_from_dict
from ntkjax.stages.rundir import load_run


@dataclasses.dataclass(frozen=True)
class ReplayConfig:
    """Repeat a run from its config.yaml, into a directory of its own."""

    run: Positional[str]
    """A run directory, or a config.yaml."""
    out: str | None = None
    """Where the repetition goes; RUN-replay by default."""


def replay(config: ReplayConfig, stages: Mapping[str, tuple[type, Callable]], *, progress: bool = True) -> Any:
    """Run the stage that ``config.run`` records, with its config but for ``out``; gives what the stage gives.

    Args:
      stages: name -> (config class, function), as the command line has them.

    Raises:
      UserError: the run directory or its config.yaml cannot be used; the output directory is the run itself.
    """
    command, content = load_run(config.run)
    if command not in stages:
        raise ConfigError(f"{config.run}: command {command!r} is not known; expected one of {', '.join(stages)}")
    folder = Path(config.run)
    folder = folder if folder.is_dir() else folder.parent
    out = Path(config.out) if config.out is not None else folder.with_name(folder.name + "-replay")
    if out.resolve() == folder.resolve():
        raise ConfigError(f"{out}: is the run itself; give --out another directory, so that the first results stay")
    cls, function = stages[command]
    if command == "study":  # its file lies in the run, which may have been moved
        content = {**content, "study": [str(folder / "study.yaml")]}
    built = config_from_dict(cls, {**content, "out": str(out)}, where=str(folder / "config.yaml"))
    return function(built, progress=progress)
