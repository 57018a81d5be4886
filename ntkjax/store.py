"""Arrays on disk, filled row by row, that survive a kill: TensorStore zarr3, done marks, a manifest.

A store is a directory::

    manifest.json   what the rows mean: shape, dtype and whatever the caller says they depend on
    values/         zarr3 array [rows, width], uncompressed, readable by any zarr library
    done.bits       one bit per row (little end first): set only after that row's values are on disk
    done.P.bits     the same for the rows that process P >= 1 of a job of several wrote

Scoring a pool of a million examples takes hours; after a kill the same command goes on with the rows that
are missing, and the finished array is bit for bit the one an uninterrupted run writes. One job writes at
a time. Its processes own every so many chunks each, so that no two ever write to one file; the marks of all of them
are merged on reading, whatever the number of processes was when they were made. Either a process computes the rows that
it owns (``mine``), or, on a mesh over all of them, they compute every row together and each keeps those it owns.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from ntkjax.errors import ConfigError, UserError
from ntkjax.files import write_bytes, write_json
from ntkjax.job import barrier, process

FORMAT = 1
# Rows arrive by length, not in order, so a flush touches many chunks: small ones keep rewriting cheap.
_CHUNK_BYTES = 256 * 1024
_BUFFER_BYTES = 64 * 1024 * 1024
_FLUSH_SECONDS = 30.0  # what a kill can cost at most
_CHUNKS_PER_PROCESS = 16  # at least, where several share a store: rows differ in length, and many parts even that out
_ANEW = "Use a new output directory, or remove this one to compute the rows again."


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one level with dotted keys; lists are leaves. ``{"a": {"b": 1}} -> {"a.b": 1}``."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def differences(old: dict, new: dict) -> list[str]:
    """One line ``key: was OLD, is now NEW`` for every dotted key in which two nested dicts differ, sorted."""
    absent = object()
    before, after = flatten(old), flatten(new)
    shown = lambda value: "absent" if value is absent else json.dumps(value, ensure_ascii=False)
    lines = []
    for key in sorted(before.keys() | after.keys()):
        was, now = before.get(key, absent), after.get(key, absent)
        if was is absent or now is absent or json.dumps(was) != json.dumps(now):
            lines.append(f"{key}: was {shown(was)}, is now {shown(now)}")
    return lines


class RowStore:
    """A resumable array ``[rows, width]``. Use as a context manager; leaving it flushes.

    Example::

        with RowStore.open(out / "scores", rows=n, width=2, dtype="float32", manifest={"seed": 0}) as store:
            todo = np.flatnonzero(~store.done())
            for batch in batches(todo):
                store.write(batch.index, score(batch))
            scores = store.read()
    """

    def __init__(
        self,
        path: Path,
        array: ts.TensorStore,
        dtype: np.dtype,
        part: tuple[int, int] = (0, 1),
        together: bool = False,
    ):
        self.path = path
        self.part = part
        self.together = together
        self._array = array
        self._marks = _done_file(path, part[0])
        # The marks that this process writes are its own rows' alone, in a file of its own: no two processes of a job
        # ever write to one file.
        self._own = _read_marks(self._marks, array.shape[0])
        self._done = self._own | _read_done(path, array.shape[0])
        self._dtype = dtype
        grid: Any = array.chunk_layout.write_chunk.shape
        # By whole chunks, since a chunk is a file, and by turns: rows differ in length from one end of a data set to
        # the other, and turns give every process some of each.
        self._owned = None if part[1] == 1 else np.arange(array.shape[0]) // grid[0] % part[1] == part[0]
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []
        self._pending_bytes = 0
        self._flushed_at = time.monotonic()

    @classmethod
    def open(
        cls,
        path: str | os.PathLike,
        *,
        rows: int,
        width: int,
        dtype: Any,
        manifest: dict,
        overwrite: bool = False,
        together: bool = False,
    ) -> RowStore:
        """Create the store, or reopen it where ``manifest`` and shape are those it was made with.

        In a job of several processes all of them open it, in the same order of stores.

        Args:
          manifest: JSON-like dict (str keys): everything the values depend on (model, data, seed, method).
          overwrite: drop an existing store at ``path`` first.
          together: all processes of the job compute every row (on a mesh over their devices) and write the same; each
            puts the part that it owns on the disk. Otherwise they divide the rows, see ``mine``.

        Raises:
          ConfigError: the store holds rows made under another manifest or shape (each changed key is named),
            or ``path`` holds something that is not a store.
          UserError: the store is damaged, or the directory cannot be written.
        """
        path, dtype = Path(path), np.dtype(dtype)
        if rows < 0 or width < 1:
            raise ValueError(f"a row store needs rows >= 0 and width >= 1, got [{rows}, {width}]")
        shape = {"rows": int(rows), "width": int(width), "dtype": dtype.name}
        wanted = json.loads(json.dumps({"format": FORMAT, "shape": shape, "manifest": manifest}))
        index, count = process()
        try:
            if index > 0:  # process 0 makes what all of them open
                barrier(f"open {path.name}")
            try:
                if overwrite and index == 0:
                    _remove_store(path)
                _prepare(path, wanted)
                array = _open_array(path, rows, width, dtype, count)
            finally:  # where it cannot, the others find out for themselves
                if index == 0:
                    barrier(f"open {path.name}")
            return cls(path, array, dtype, (index, count), together)
        except OSError as error:
            raise UserError(f"{path}: cannot open the row store ({error.strerror or error})") from error

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, width)."""
        return tuple(self._array.shape)  # pyright: ignore[reportReturnType]

    def done(self) -> np.ndarray:
        """bool [rows]: rows whose values are durable. Rows that are only buffered count as not done, and those that
        other processes are writing only after ``gather``."""
        return self._done.copy()

    def mine(self) -> np.ndarray | None:
        """bool [rows]: rows that this process computes and writes, no other does; None where it computes all."""
        return None if self.together else self._owned

    def gather(self) -> None:
        """Flush, wait until every process of the job has, and see the rows of all."""
        self.flush()
        if self.part[1] > 1:
            barrier(f"gather {self.path.name}")
            self._done |= _read_done(self.path, self.shape[0])

    def write(self, index: Any, values: Any) -> None:
        """Buffer rows; they reach the disk when the buffer is full, after 30 s, at ``flush`` and on leaving.

        Args:
          index: int [b], rows of the store; -1 marks a filler row, which is dropped. Of equal indices the
            last one counts.
          values: [b, width], or [b] where width is 1; any dtype that the store's holds without loss. NaN and
            infinities are kept as they are.

        Raises:
          ValueError: shapes, dtype or an index do not fit the store.
          UserError: the disk is full or not writable; says how many rows are kept.
        """
        index, values = np.asarray(index), np.asarray(values)
        rows, width = self.shape
        if values.ndim == 1 and width == 1:
            values = values[:, None]
        if index.ndim != 1 or index.dtype.kind not in "iu" or values.shape != (len(index), width):
            got = f"{index.dtype} {index.shape} and {values.shape}"
            raise ValueError(f"index must be int [b] and values [b, {width}], got {got}")
        if not np.can_cast(values.dtype, self._dtype, "safe"):
            raise ValueError(f"{values.dtype} values do not fit a {self._dtype} store without loss: cast first")
        if len(index) and (index.min() < -1 or index.max() >= rows):
            raise ValueError(f"index {int(index.min())}..{int(index.max())} is outside -1..{rows - 1}")
        real = index >= 0
        if self.together and self._owned is not None:
            real &= self._owned[index]
        elif self._owned is not None and not self._owned[index[real]].all():
            raise ValueError(
                f"process {self.part[0]} of {self.part[1]} may not write rows of another: see RowStore.mine"
            )
        # Never a write of no rows: where a chunk is one row, tensorstore 0.1.86 then puts foreign memory into row 0.
        if real.any():
            self._pending.append((index[real].astype(np.int64), values[real].astype(self._dtype)))
        self._pending_bytes += int(real.sum()) * width * self._dtype.itemsize
        if self._pending_bytes >= _BUFFER_BYTES or time.monotonic() - self._flushed_at >= _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Make the buffered rows durable: first the values, then their done marks.

        Raises:
          UserError: the disk is full or not writable; says how many rows are kept. The buffer stays.
        """
        if self._pending:
            index, values = self._merged_buffer()
            marked = self._own.copy()
            marked[index] = True
            try:
                # The future resolves once every chunk is on disk (TensorStore fsyncs its files).
                # Values before marks: a kill in between costs the rows computed since the last flush, while marks
                # before values would name rows that are not there.
                self._array[index].write(values).result()
                write_bytes(self._marks, np.packbits(marked, bitorder="little").tobytes())
            except (UserError, OSError, ValueError, RuntimeError) as error:
                kept = f"{int(self._done.sum())} of {len(self._done)} rows"
                raise UserError(
                    f"{self.path}: cannot write to the row store ({_reason(error)}). Kept: {kept}. Free some "
                    "space or mend the directory, then run the same command again: it goes on from there."
                ) from error
            self._own, self._done = marked, self._done | marked
        self._pending, self._pending_bytes = [], 0
        self._flushed_at = time.monotonic()

    def _merged_buffer(self) -> tuple[np.ndarray, np.ndarray]:
        """Buffered rows as (index [b], values [b, width]), sorted, the last of equal indices kept."""
        index = np.concatenate([i for i, _ in self._pending])
        values = np.concatenate([v for _, v in self._pending])
        # unique gives the first of equal indices, which in reverse is the one written last.
        kept, last = np.unique(index[::-1], return_index=True)
        return kept, values[::-1][last]

    def read(self, index: Any = None) -> np.ndarray:
        """All rows [rows, width], or those of ``index`` int [b] as [b, width]; flushes first.

        Raises:
          UserError: a row asked for was never written.
        """
        self.flush()
        wanted = np.arange(self.shape[0]) if index is None else np.asarray(index, dtype=np.int64)
        missing = wanted[~self._done[wanted]]
        if len(missing):
            raise UserError(
                f"{self.path}: {len(missing)} of {len(wanted)} rows are not computed yet (first: row "
                f"{int(missing[0])}). Run the command that fills this store again: it goes on from there."
            )
        source = self._array if index is None else self._array[wanted]
        try:
            return np.asarray(source.read().result())
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{self.path}: cannot read the row store ({_reason(error)}). {_ANEW}") from error

    def __enter__(self) -> RowStore:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self.flush()
        else:  # keep finished work, but let the first error be the one that is seen
            with contextlib.suppress(UserError):
                self.flush()


def _reason(error: Exception) -> str:
    """The cause in a few words: TensorStore's messages carry a long trail of source locations."""
    text = getattr(error, "strerror", None) or str(error)
    for cause in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        if os.strerror(cause) in text:
            return os.strerror(cause)
    return text.split(" [source locations")[0].strip()


def _remove_store(path: Path) -> None:
    if not path.is_dir():
        return
    if not (path / "manifest.json").exists() and any(path.iterdir()):
        raise ConfigError(
            f"{path}: is not a row store (no manifest.json in it), so overwrite leaves it alone. "
            "Choose another directory."
        )
    shutil.rmtree(path)


def _prepare(path: Path, wanted: dict) -> None:
    """Make the directory and its manifest, or check the manifest that is there against ``wanted``."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file; the row store is a directory. Choose another path.")
    file = path / "manifest.json"
    if file.exists():
        changed = differences(_read_manifest(file), wanted)
        if changed:
            raise ConfigError(
                f"{path}: holds rows computed with other settings:\n  " + "\n  ".join(changed) + "\n" + _ANEW
            )
        return
    # A kill during creation leaves at most the temporary manifest.
    if path.exists() and any(entry.suffix != ".tmp" for entry in path.iterdir()):
        raise ConfigError(
            f"{path}: is not empty and not a row store (no manifest.json in it). Choose another directory."
        )
    path.mkdir(parents=True, exist_ok=True)
    write_json(file, wanted)


def _read_manifest(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not {"format", "shape", "manifest"} <= content.keys():
            raise ValueError("the keys format, shape and manifest were expected")
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise UserError(f"{file}: the manifest of this row store is damaged ({error}). {_ANEW}") from error
    return content


def _open_array(path: Path, rows: int, width: int, dtype: np.dtype, processes: int = 1) -> ts.TensorStore:
    spec: dict = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{path.resolve() / 'values'}/"},
        # Otherwise a chunk that equals the fill value is left out, and -0.0 or a NaN payload could change.
        "store_data_equal_to_fill_value": True,
    }
    exists = (path / "values" / "zarr.json").exists()
    if not exists:
        # Marks without an array: whoever removed values/ would get zeros that count as done.
        if (path / "done.bits").exists():
            raise UserError(f"{path}: damaged: done.bits is there, values/zarr.json is not. {_ANEW}")
        # Fixed when the store is made: with other numbers of processes later the chunks stay, and are divided anew.
        most = rows if processes == 1 else -(-rows // (processes * _CHUNKS_PER_PROCESS))
        chunk = min(max(1, _CHUNK_BYTES // (width * dtype.itemsize)), max(1, most))
        grid = {"name": "regular", "configuration": {"chunk_shape": [chunk, width]}}
        spec["metadata"] = {"shape": [rows, width], "data_type": dtype.name, "chunk_grid": grid}
    try:
        array: Any = ts.open(spec, open=exists, create=not exists).result()
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{path}: cannot open the row store ({_reason(error)}). {_ANEW}") from error
    if tuple(array.shape) != (rows, width) or array.dtype.numpy_dtype != dtype:
        held = f"{array.dtype.name} {tuple(array.shape)}"
        raise UserError(
            f"{path}: damaged: values/ holds {held}, the manifest says {dtype.name} {(rows, width)}. {_ANEW}"
        )
    return array


def _done_file(path: Path, index: int) -> Path:
    return path / (f"done.{index}.bits" if index else "done.bits")


def _read_done(path: Path, rows: int) -> np.ndarray:
    """The marks of every process that ever wrote here, merged."""
    done = np.zeros(rows, dtype=bool)
    for file in path.glob("done*.bits"):
        done |= _read_marks(file, rows)
    return done


def _read_marks(file: Path, rows: int) -> np.ndarray:
    if not file.exists():
        return np.zeros(rows, dtype=bool)
    packed = np.frombuffer(file.read_bytes(), dtype=np.uint8)
    if len(packed) != (rows + 7) // 8:
        expected = f"{(rows + 7) // 8} expected for {rows} rows"
        raise UserError(f"{file}: damaged: {len(packed)} bytes, {expected}. {_ANEW}")
    return np.unpackbits(packed, count=rows, bitorder="little").astype(bool)
