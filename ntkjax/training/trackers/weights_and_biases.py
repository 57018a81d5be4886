"""Weights & Biases in FOLDER/wandb, offline: `wandb sync FOLDER/wandb/offline-run-*` uploads it when you want.

WANDB_MODE=online uploads as the run goes; WANDB_PROJECT names the project.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

PROJECT = "ntkjax"


class Wandb:
    """One run of wandb for one run of training, named by its folder."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], step: int):
        """The id follows from the folder, so that what a killed run and its resumption wrote becomes one run."""
        import wandb  # pyright: ignore[reportMissingImports]

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name="/".join(folder.resolve().parts[-2:]),
            id=blake2b(str(folder.resolve()).encode(), digest_size=8).hexdigest(),
            resume="allow",
            reinit="create_new",
            dir=str(folder),
            mode=os.environ.get("WANDB_MODE", "offline"),  # pyright: ignore[reportArgumentType]
            config=dict(settings),
            settings=wandb.Settings(silent=True),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `ntkjax.training.trackers.base.Tracker`."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Write what is left."""
        self._run.finish()
