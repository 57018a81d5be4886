"""Rows that many methods ask for (embeddings, gradient features), kept where all of them find them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from ntkjax.files import write_bytes
from ntkjax.fingerprint import digest
from ntkjax.job import barrier, is_primary, process
from ntkjax.selection.base import SelectionProblem
from ntkjax.store import RowStore

NOT_SHARED = ("domain", "adapter")
"""Keys of a problem's manifest that rows of the pool do not depend on but through theta, which is named apart."""


def open_shared(
    problem: SelectionProblem, kind: str, depends: dict[str, Any], *, rows: int, width: int, dtype: Any = np.float32
) -> RowStore | None:
    """The store ``kind``-HASH [rows, width] under ``shared_dir``, or ``work_dir`` without one; None without either.

    HASH is of ``depends`` and of the problem's manifest (without `NOT_SHARED`): everything the rows depend on. Other
    settings have another folder, so nothing is ever refused or overwritten.
    """
    root = problem.work_dir if problem.shared_dir is None else problem.shared_dir
    if root is None:
        return None
    kept = {key: value for key, value in problem.manifest.items() if key not in NOT_SHARED}
    manifest = {**kept, **depends, "rows": kind}
    path = root / f"{kind}-{digest(manifest)[:16]}"
    options: dict[str, Any] = {"dtype": dtype, "manifest": manifest, "together": problem.together}
    return RowStore.open(path, rows=rows, width=width, **options)


def parts_to_do(store: RowStore, wanted: Int[np.ndarray, " c"]) -> Iterator[tuple[np.ndarray, Bool[np.ndarray, " N"]]]:
    """(rows int64 [p], missing bool [N]) of every part of the pool that must be gone through so that ``store`` holds
    the ``wanted`` rows.

    Requests may overlap: other methods keep other candidates. Each request adds one part, its rows that no part before
    it has, and says so on disk before a row is computed. Rows are put into batches part by part, so what is computed
    is never computed again, and a row always shares its batch with the same others: a request that was killed ends
    with the bits of one that was not, whoever goes on with it.
    """
    asked, known = np.zeros(store.shape[0], bool), np.zeros(store.shape[0], bool)
    asked[wanted] = True
    files = sorted(store.path.glob("part-*.bits"))
    parts = [np.unpackbits(np.frombuffer(file.read_bytes(), np.uint8), count=len(asked)) for file in files]
    for part in parts:
        known |= part.astype(bool)
    fresh = asked & ~known
    if process()[1] > 1:
        barrier(f"parts of {store.path.name}")  # all have looked before one adds to them
    if fresh.any():
        # On disk before its rows are: whoever goes on after a kill puts the same rows into the same batches.
        parts.append(fresh.astype(np.uint8))
        if is_primary():
            _write(store.path / f"part-{len(files):04d}.bits", fresh)
    for part in parts:
        missing = asked & part.astype(bool) & ~store.done()
        if missing.any():
            yield np.flatnonzero(part), missing


def _write(path: Path, rows: Bool[np.ndarray, " N"]) -> None:
    write_bytes(path, np.packbits(rows).tobytes())
