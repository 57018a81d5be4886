"""Validated records as an Arrow file: written in blocks, memory-mapped when read, so that they cost no RAM."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

BLOCK_ROWS = 1024

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("prompt", pa.string()),
        ("messages", pa.string()),  # JSON of the context before the response, null for one user message
        ("response", pa.string()),
        ("answer", pa.string()),
        ("choices", pa.list_(pa.string())),
        ("response_fields", pa.string()),  # JSON of the fields of the last message, null where it has none
        ("tools", pa.string()),  # JSON of a list
        ("file", pa.int32()),  # position in the report's list of files
        ("line", pa.int64()),
        ("item", pa.int64()),  # place among all the records of its file, from 0: many may start on one line of JSON
        ("digest", pa.uint64()),  # of everything above but file, line and item
    ]
)


class TableWriter:
    """Rows (tuples in the order of ``SCHEMA``) to an Arrow file, ``BLOCK_ROWS`` at a time."""

    def __init__(self, path: Path):
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._file, SCHEMA)
        self._rows: list[tuple[Any, ...]] = []

    def add(self, row: tuple[Any, ...]) -> None:
        self._rows.append(row)
        if len(self._rows) == BLOCK_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            columns = [pa.array(column, field.type) for column, field in zip(zip(*self._rows), SCHEMA)]
            self._writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
            self._rows = []

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._writer.close()
        self._file.close()


class Table:
    """A memory-mapped Arrow file with access by row and by column. Pickled it is its path."""

    def __init__(self, path: Path):
        self._path = path
        self._table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        self._blocks = self._table.to_batches()

    def __reduce__(self) -> tuple[type[Table], tuple[Path]]:
        return Table, (self._path,)

    def __len__(self) -> int:
        return self._table.num_rows

    def rows(self, rows: np.ndarray, names: Sequence[str]) -> list[tuple[Any, ...]]:
        """The values of the columns ``names`` at ``rows``; neighbouring rows are read together."""
        if _consecutive(rows):
            part = self._table.select(names).slice(int(rows[0]), len(rows))
            return list(zip(*(column.to_pylist() for column in part.columns)))
        return [tuple(self.value(name, int(i)) for name in names) for i in rows]

    def value(self, name: str, i: int) -> Any:
        """One value; every block but the last is full, so its place is a division away."""
        return self._blocks[i // BLOCK_ROWS].column(name)[i % BLOCK_ROWS].as_py()

    def take(self, name: str, rows: np.ndarray) -> list[Any]:
        """The values of one column at ``rows``, in that order."""
        column = self._table.column(name)
        if _consecutive(rows):
            return column.slice(int(rows[0]), len(rows)).to_pylist()
        return column.take(pa.array(rows)).to_pylist()

    def numbers(self, name: str) -> np.ndarray:
        """A whole column of numbers."""
        return self._table.column(name).to_numpy()

    def rewrite(self, path: Path, drop: np.ndarray, rename: Callable[[int, str], str]) -> None:
        """A copy without the rows in ``drop`` and with the id ``rename(row, id)`` in every row, block by block."""
        dropped = set(drop.tolist())
        with TableWriter(path) as writer:
            for start in range(0, len(self), BLOCK_ROWS):
                columns = self._table.slice(start, BLOCK_ROWS).to_pydict().values()
                for i, row in enumerate(zip(*columns), start):
                    if i not in dropped:
                        writer.add((rename(i, row[0]), *row[1:]))


def _consecutive(rows: np.ndarray) -> bool:
    return len(rows) > 0 and bool(np.all(np.diff(rows) == 1))


class TextColumn(Sequence[str]):
    """A column of text that is read when asked for: ``column[i]``, ``column[indices]``, iteration, ``np.asarray``.

    ``gather(indices)`` gives the values at an int64 array of positions.
    """

    def __init__(self, size: int, gather: Callable[[np.ndarray], list[str]]):
        self._size, self._gather = size, gather

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, (int, np.integer)):
            if not -self._size <= i < self._size:
                raise IndexError(f"row {i} of {self._size}")
            return self._gather(np.asarray([int(i) % self._size]))[0]
        return np.asarray(self._gather(np.arange(self._size)[i]), dtype=object)

    def __iter__(self) -> Iterator[str]:
        for start in range(0, self._size, 8192):
            yield from self._gather(np.arange(start, min(start + 8192, self._size)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(list(self), dtype=object if dtype is None else dtype)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (Sequence, np.ndarray)) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = ", ".join(repr(self[i]) for i in range(min(3, self._size)))
        return f"TextColumn([{shown}{', ...' if self._size > 3 else ''}], {self._size} rows)"
