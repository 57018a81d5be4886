"""metrics.jsonl: one JSON object per line, appended as training goes, cut back on resume."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ntkjax.errors import CheckpointError


class MetricsLog:
    """The history of a run in memory, and on disk where a path is given.

    Every line is written to the operating system at once, so a killed process loses none; :meth:`sync` puts
    them on the disk, and its byte count in a checkpoint says which of them belong to that checkpoint.
    """

    def __init__(self, path: Path | None, keep_bytes: int = 0, *, writes: bool = True):
        """Open ``path``, keep its first ``keep_bytes`` bytes and drop the rest (steps to be run again). ``writes``
        False: only read them, where another process of the job writes.

        Raises:
          CheckpointError: the file holds fewer bytes than the checkpoint wrote, or a kept line is not JSON.
        """
        self.path = path
        self.history: list[dict[str, Any]] = []
        self._file = None
        if path is None:
            return
        self.history = _kept_lines(path, keep_bytes)
        if not writes:
            return
        self._file = path.open("ab", buffering=0)
        self._file.truncate(keep_bytes)

    def append(self, entry: dict[str, Any]) -> None:
        """Add one line. Raises OSError when the disk is full."""
        self.history.append(entry)
        if self._file is not None:
            line = memoryview((json.dumps(entry) + "\n").encode())
            while line:  # a nearly full disk takes a part of the line before it refuses
                line = line[self._file.write(line) :]

    def sync(self) -> int:
        """Put the lines on the disk and return their size in bytes (0 without a file)."""
        if self._file is None:
            return 0
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _kept_lines(path: Path, keep_bytes: int) -> list[dict[str, Any]]:
    data = path.read_bytes()[:keep_bytes] if path.exists() else b""
    remedy = "Use another output folder, or remove this one to start over"
    if len(data) < keep_bytes:
        raise CheckpointError(
            f"{path}: the checkpoint was saved with {keep_bytes} bytes, only {len(data)} are left. {remedy}"
        )
    lines = []
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise CheckpointError(f"{path}:{number}: not a line of metrics ({error}). {remedy}") from error
    return lines
