"""Event files for TensorBoard in FOLDER/tensorboard; given a folder above, it shows all runs there side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

FLUSH_SECONDS = 10
"""Numbers reach the disk this often, so that a killed run loses no more."""


class TensorBoard:
    """Written by tensorboardX, which needs neither TensorFlow nor torch."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], step: int):
        """A run that goes on begins a file of its own; TensorBoard drops what earlier ones hold after ``step``."""
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]

        purge = step + 1 if step else None
        suffix = f".from-{step}"  # names hold the second, which a run that dies early shares with its resumption
        self._writer = SummaryWriter(
            str(folder / "tensorboard"), purge_step=purge, flush_secs=FLUSH_SECONDS, filename_suffix=suffix
        )
        if not step:
            self._writer.add_text("settings", "\n".join(f"    {name}: {settings[name]}" for name in settings), 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `ntkjax.training.trackers.base.Tracker`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
