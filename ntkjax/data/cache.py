"""The cache of prepared data: directories named by a digest of their inputs, which appear whole or not at all.

In a job of several processes a `Shared` cache, in a directory that all of them see, is filled by all: each prepares its
own part of every entry, and all read what all have made. What comes out does not depend on how many they are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ntkjax.data.crew import Build, Crew, build_with_workers, workers_for
from ntkjax.errors import DataError
from ntkjax.job import barrier, everyone, process

# Below this size a file is recognised by its content, above it by path, size, inode and times.
HASHED_FILE_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Shared:
    """A cache directory that every process of a job sees, for entries that they make together."""

    path: Path


CacheDir = str | Path | Shared | None
"""A cache directory of this process, or one that a job shares; None: `default_cache_dir`."""


def default_cache_dir() -> Path:
    """``$NTKJAX_CACHE``, else ``$XDG_CACHE_HOME/ntkjax``, else ``~/.cache/ntkjax``. Safe to delete at any time."""
    given = os.environ.get("NTKJAX_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ntkjax"


def file_signature(path: Path) -> list[Any]:
    """What changes when the file does: its content's hash, or (large files) path, size, inode, and the times of its
    last modification and last change in nanoseconds. The last one is set by the system alone: a file that is written in
    place, or put in the place of another with its old time, has a new one.
    """
    stat = path.stat()
    if stat.st_size > HASHED_FILE_BYTES:
        return [str(path.resolve()), stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
    with path.open("rb") as file:
        return [hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()]


def build_once(kind: str, key: str, cache_dir: CacheDir, build: Build, *, rows: int = 0) -> Path:
    """The directory ``kind/key`` of the cache, made by ``build(crew)`` if it is not there; outside a job by as many
    processes of this machine as so many ``rows`` are worth (`ntkjax.data.crew.workers_for`).

    ``build`` fills the temporary directory ``crew.folder``, which is then renamed, so a killed process leaves no
    half-made entry and two processes that build the same entry do not disturb one another. Of a `Shared` cache all
    processes of the job build the entry together, one after another entry.

    Raises:
      DataError: the cache directory cannot be written; a shared one that a process does not see; processes of a job
        that ask for different entries.
    """
    if isinstance(cache_dir, Shared) and process()[1] > 1:
        return _build_together(cache_dir.path / kind, key, build)
    given = cache_dir.path if isinstance(cache_dir, Shared) else cache_dir
    root = (Path(given) if given is not None else default_cache_dir()) / kind
    final = root / key
    if final.is_dir():
        return final
    try:
        root.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{key[:8]}-", dir=root))
    except OSError as error:
        raise DataError(
            f"{root}: the cache directory cannot be written ({error.strerror}); set NTKJAX_CACHE to a "
            "directory that can, with room for about twice the data"
        ) from error
    try:
        build_with_workers(build, work, workers_for(rows))
        # Losing this race means that another process has published the same content.
        with contextlib.suppress(OSError):
            work.rename(final)
    except OSError as error:
        raise DataError(
            f"{root}: preparing the data failed ({error}); expected room for about twice the data; free some "
            "space, or set NTKJAX_CACHE to another directory"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return final


def _build_together(root: Path, key: str, build: Build) -> Path:
    """`build_once` by all processes of a job, which ask for the same entries in the same order."""
    index, count = process()
    final, work = root / key, root / f".{key}.work"
    asked = everyone(int(key[:15], 16))
    other = next((k for k, number in enumerate(asked) if number != asked[0]), None)
    if other is not None:
        raise DataError(
            f"{root}: process {other} of {count} reads other {root.name} than process 0 (other files, times, sizes or "
            "settings); expected the same on all of them; give files that all processes see by the same path, and "
            "start all with the same command"
        )
    if everyone(int(final.is_dir()))[0]:
        return final
    try:
        if index == 0:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
        barrier(f"begin {root.name}")
        blind = [k for k, seen in enumerate(everyone(int(work.is_dir()))) if not seen]
        if blind:
            raise DataError(
                f"{root}: process {blind[0]} of {count} does not see this directory; expected one that all processes "
                "of the job see; choose an --out on a file system that they share"
            )
        build(Crew(work, index, count, barrier))
        barrier(f"made {root.name}")
        if index == 0:
            work.rename(final)
        barrier(f"end {root.name}")
    except OSError as error:
        raise DataError(
            f"{root}: preparing the data failed ({error}); expected room for about twice the data; free some "
            "space, or choose another --out"
        ) from error
    finally:
        if index == 0:
            shutil.rmtree(work, ignore_errors=True)
    return final
