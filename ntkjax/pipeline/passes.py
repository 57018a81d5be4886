"""The long passes of a selection (embeddings, features, gradients, scores) written down and tracked as they go."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from ntkjax.errors import UserError
from ntkjax.files import ANEW, append_json_line, read_json_lines
from ntkjax.training.trackers import open_tracker
from ntkjax.training.trackers.base import numbers

PASSES = "passes.jsonl"


class Passes:
    """FOLDER/passes.jsonl, and the tracker beside it, as long as the ``with`` block lasts.

    A line is ``{"kind": "score-pool", "step": 5120, "examples": 4096, "seconds": 81.2, "tokens_per_second": 6312.0}``
    (`ntkjax.ntk.rows.Bar` says what the numbers are): step counts the examples of all passes in the folder, those of a
    run that was stopped included, so that their curves stand one behind another.
    """

    def __init__(self, folder: Path, tracker: str, settings: Mapping[str, Any]):
        """``settings``: shown by trackers that show settings.

        Raises:
          UserError: a line of passes.jsonl is damaged.
        """
        self.path, self.step, self.name, self.settings = folder / PASSES, _last_step(folder / PASSES), tracker, settings
        self.tracker = None

    def __enter__(self) -> Self:
        self.tracker = open_tracker(self.name, self.path.parent, self.settings, step=self.step)
        return self

    def __exit__(self, *error: object) -> None:
        if self.tracker is not None:
            self.tracker.close()

    def told(self, title: str, new: int, values: Mapping[str, float]) -> None:
        """Take the numbers of the pass ``title`` (`ntkjax.ntk.rows.Told`)."""
        self.step += new
        entry = {"kind": title.replace(" ", "-"), "step": self.step, **values}
        append_json_line(self.path, entry)
        if self.tracker is not None:
            self.tracker.log(*numbers(entry))


def _last_step(path: Path) -> int:
    lines = read_json_lines(path)
    if lines and not isinstance(lines[-1].get("step"), int):
        raise UserError(f"{path}:{len(lines)}: no line of a pass, which has a step; {ANEW}")
    return lines[-1]["step"] if lines else 0
