"""What a tracker is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol


class Tracker(Protocol):
    """Takes the numbers of one run as they come.

    It is opened as ``Kind.open(folder, settings, step)``: the run's folder, its settings as plain values, and the step
    after which the run goes on (0 where it begins). Numbers of later steps that it was given before, by a run that was
    killed, are to be taken back.
    """

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name, such as ``train/loss``, after so many optimiser steps; steps never go down."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


@dataclasses.dataclass(frozen=True)
class Kind:
    """An entry of `ntkjax.training.trackers.TRACKERS`.

    Attributes:
      summary: what it writes, for the help.
      open: how it is opened; None: it is nothing beyond metrics.jsonl.
      package: the package that it needs; None: none.
    """

    summary: str
    open: Callable[[Path, Mapping[str, Any], int], Tracker] | None = None
    package: str | None = None


def numbers(entry: Mapping[str, Any]) -> tuple[int, dict[str, float]]:
    """A line of metrics.jsonl as a tracker takes it: ``{"kind": "train", "step": 3, "loss": 0.5}`` is step 3 with
    ``{"train/loss": 0.5}``. What is no number is left to metrics.jsonl."""
    own = {name: value for name, value in entry.items() if name not in ("kind", "step")}
    return entry["step"], {
        f"{entry['kind']}/{name}": float(value) for name, value in own.items() if isinstance(value, int | float)
    }
