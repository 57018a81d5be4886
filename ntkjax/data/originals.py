"""Records as their files hold them: read again from the places that they came from, in flat memory."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ntkjax.data.sources import is_hub_id, iter_source, source_signature
from ntkjax.errors import DataError


class Originals:
    """Records at given places, in the order given, each as its file holds it; may be iterated more than once.

    The files are read once, in one stream, into a temporary file; in memory are 8 bytes a record.

    Attributes:
      names: the fields of all of them, in the order in which they occur first.

    Raises:
      DataError: a file has changed since the records were read, or is gone.
    """

    def __init__(self, sources: Sequence[str], signatures: Sequence[list[Any]], files: np.ndarray, items: np.ndarray):
        """``files`` [N]: positions in ``sources``; ``items`` [N]: places among the records of the file, from 0."""
        self.names: dict[str, None] = {}
        self._offsets = np.zeros(len(files), np.int64)
        self._spool = tempfile.TemporaryFile(prefix="ntkjax-")  # noqa: SIM115  # lives as long as this object
        for number in map(int, np.unique(files)):
            rows = np.flatnonzero(files == number)
            _check(sources[number], signatures[number])
            self._read(sources[number], signatures[number], rows[np.argsort(items[rows], kind="stable")], items)

    def _read(self, source: str, signature: list[Any], rows: np.ndarray, items: np.ndarray) -> None:
        split = signature[1] if is_hub_id(source) else ""
        wanted, position = items[rows].tolist(), 0
        for item, (_, value) in enumerate(iter_source(source, split, wanted=sorted(set(wanted)))):
            if item != wanted[position]:
                continue
            offset = self._spool.tell()
            self.names.update(dict.fromkeys(value))
            pickle.dump(dict(value), self._spool, protocol=pickle.HIGHEST_PROTOCOL)
            while position < len(rows) and wanted[position] == item:
                self._offsets[rows[position]] = offset
                position += 1
            if position == len(rows):
                return
        raise _changed(source)

    def __len__(self) -> int:
        return len(self._offsets)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for offset in self._offsets.tolist():
            self._spool.seek(offset)
            yield pickle.load(self._spool)  # written above, by this process


def _check(source: str, signature: list[Any]) -> None:
    try:
        same = source_signature(source, signature[1] if is_hub_id(source) else "") == signature
    except (OSError, DataError):
        same = False
    if not same:
        raise _changed(source)


def _changed(source: str) -> DataError:
    return DataError(
        f"{source}: the file is gone or has changed since it was read; expected the records as they were, to write the "
        "selected ones; restore it and run again, or choose --selected-format ntkjax, which needs no file"
    )
