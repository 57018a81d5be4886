"""Where the numbers of a training run or of long passes are shown besides metrics.jsonl or passes.jsonl: the table of
trackers.

A tracker is one file in this folder and one line in `TRACKERS`. Each needs an extra of this package, which is imported
when a run that asks for it begins, and writes under the run's folder; none needs a network.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from ntkjax.errors import ConfigError, UserError
from ntkjax.training.trackers.base import Kind, Tracker
from ntkjax.training.trackers.tensorboard import TensorBoard
from ntkjax.training.trackers.weights_and_biases import Wandb

TRACKERS: dict[str, Kind] = {
    "none": Kind("metrics.jsonl (of passes: passes.jsonl) alone"),
    "jsonl": Kind("the same"),
    "tensorboard": Kind("event files in tensorboard/", TensorBoard, "tensorboardX"),
    "wandb": Kind("Weights & Biases in wandb/, offline unless WANDB_MODE says otherwise", Wandb, "wandb"),
}
"""Name -> what it is. metrics.jsonl and passes.jsonl are written by every run that has a folder."""

TrackerName = Annotated[
    str,
    arg(
        help="Where the numbers of training or of long passes go besides, in the run's folder. "
        + "; ".join(f"{name}: {kind.summary}" for name, kind in TRACKERS.items())
        + "."
    ),
]
"""A name of `TRACKERS`, with the table as its help on the command line."""


def check_tracker(*names: str) -> None:
    """Raise ConfigError for a name that is not in `TRACKERS`, and UserError, which names the extra, where the package
    of one of the trackers is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"tracker {name!r}: expected one of {', '.join(TRACKERS)}")
        package = TRACKERS[name].package
        if package is not None and importlib.util.find_spec(package) is None:
            raise UserError(
                f"tracker {name}: the package {package} is not installed; expected the extra {name}; install it: "
                f"pip install 'ntkjax[{name}]'"
            )


def open_tracker(name: str, folder: Path, settings: Mapping[str, Any], *, step: int) -> Tracker | None:
    """The tracker of a run in ``folder`` that goes on after ``step`` (0: begins); None where there is nothing to do.

    Raises:
      ConfigError: there is none of this name.
      UserError: its package is not installed.
    """
    check_tracker(name)
    opened = TRACKERS[name].open
    return None if opened is None else opened(folder, settings, step)


__all__ = ["TRACKERS", "Kind", "Tracker", "TrackerName", "check_tracker", "open_tracker"]
