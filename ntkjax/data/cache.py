"""The cache of prepared data: directories named by a digest of their inputs, which appear whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ntkjax.errors import DataError

# Below this size a file is recognised by its content, above it by path, size, inode and times.
HASHED_FILE_BYTES = 64 * 2**20


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


def build_once(kind: str, key: str, cache_dir: str | Path | None, build: Callable[[Path], None]) -> Path:
    """The directory ``kind/key`` of the cache, made by ``build(directory)`` if it is not there.

    ``build`` fills a temporary directory that is then renamed, so a killed process leaves no half-made
    entry and two processes that build the same entry do not disturb one another.

    Raises:
      DataError: the cache directory cannot be written.
    """
    root = (Path(cache_dir) if cache_dir is not None else default_cache_dir()) / kind
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
        build(work)
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
