"""Files written whole or not at all, and JSON read with an error that names the file and the remedy.

Everything is first written to a temporary file ``.NAME.HEX.tmp`` in the same folder, put on the disk (fsync) and then
renamed to its name. After a full disk, a crash or a kill, the file holds its old content or the new, never a part of
it. A kill leaves at most the temporary file behind; errors remove it. New files have the mode 0o644 less the umask.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from ntkjax.errors import UserError

ANEW = "remove it, or use a new output directory, and run the command again that writes it"
"""Remedy for a damaged file that a command wrote."""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def written_file(path: str | os.PathLike, *, error: type[UserError] = UserError) -> Iterator[Path]:
    """A temporary path, for a library to write to, that becomes the file ``path`` when the block ends without an error.

    Folders are made. Of several writers of one path the last one counts, and no reader sees a mixture.

    Args:
      error: the class of error that says that the file cannot be written.

    Raises:
      UserError: the file cannot be written (disk full, no permission); its cause is the ``OSError``.
    """
    path = Path(path)
    work = _beside(path)
    try:
        with _explained(path, work, error):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(work, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)  # the system takes the umask off
            mode = os.fstat(handle).st_mode & 0o777
            os.close(handle)
            yield work
            work.chmod(mode)  # a library may have put a file of its own in the place of this one
            now = time.time_ns()  # the system's own times are some milliseconds coarse: files are told apart by order
            os.utime(work, ns=(now, now))
            _sync(work)
            work.replace(path)
            _sync(path.parent)
    finally:
        with contextlib.suppress(OSError):  # where the folder cannot be written, the error above has said so
            work.unlink(missing_ok=True)


@contextlib.contextmanager
def written_folder(
    path: str | os.PathLike, *, keep: bool = False, stale: Iterable[str] = (), error: type[UserError] = UserError
) -> Iterator[Path]:
    """A temporary folder that becomes the folder ``path`` when the block ends without an error.

    A new folder appears in one rename. One that exists is put aside, replaced and removed, in two renames: a kill
    between them leaves it under a hidden name beside.

    Args:
      keep: files of an existing folder that were not written again stay; each other file is replaced in one rename.
      stale: with ``keep``, patterns of files that go unless they were written again, such as shards of an earlier save.
      error: the class of error that says that a file cannot be written.

    Raises:
      UserError: a file cannot be written (disk full, no permission); its cause is the ``OSError``.
    """
    path = Path(path)
    work, old = _beside(path), _beside(path)
    try:
        with _explained(path, work, error):
            path.parent.mkdir(parents=True, exist_ok=True)
            work.mkdir()
            yield work
            for entry in [*work.rglob("*"), work]:
                _sync(entry)
            if keep and path.exists():
                _merge(work, path, stale)
            else:
                if path.is_dir():
                    path.rename(old)
                work.rename(path)
            _sync(path.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        elif old.exists():  # the second rename failed
            old.rename(path)


def write_bytes(path: str | os.PathLike, data: bytes) -> Path:
    """Write ``data`` to the file ``path``, whole or not at all; gives the path. Raises as `written_file`."""
    return _write(path, lambda file: file.write(data))


def write_text(path: str | os.PathLike, text: str) -> Path:
    """Write ``text`` in UTF-8, whole or not at all; gives the path. Raises as `written_file`."""
    return write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike, content: Any, *, indent: int | None = 2) -> Path:
    """Write ``content`` as JSON (see `plain` for arrays and NaN), whole or not at all; gives the
    path. Raises as `written_file`.
    """
    return write_text(path, json.dumps(content, indent=indent, ensure_ascii=False) + "\n")


def write_lines(path: str | os.PathLike, lines: Iterable[str]) -> Path:
    """Write one line in UTF-8 for each text, whole or not at all; gives the path.

    An error of the iterator leaves the old file as it is. Raises as `written_file`.
    """

    def fill(file: IO[bytes]) -> None:
        for line in lines:
            file.write(line.encode("utf-8") + b"\n")

    return _write(path, fill)


def write_jsonl(path: str | os.PathLike, records: Iterable[Any], *, allow_nan: bool = True) -> Path:
    """Write one JSON value a line, whole or not at all; gives the path.

    Raises:
      ValueError: a value is NaN or infinite and ``allow_nan`` is False.
      UserError: as `written_file`.
    """
    return write_lines(path, (json.dumps(record, ensure_ascii=False, allow_nan=allow_nan) for record in records))


def write_npz(path: str | os.PathLike, arrays: Mapping[str, Any], *, compressed: bool = False) -> Path:
    """Write a NumPy archive, whole or not at all; gives the path. Keys with a slash are folders in it.

    Raises:
      ValueError: an array holds Python objects.
      UserError: as `written_file`.
    """
    save = np.savez_compressed if compressed else np.savez
    return _write(path, lambda file: save(file, allow_pickle=False, **arrays))


def append_json_line(path: str | os.PathLike, record: Any) -> None:
    """Add one JSON value as a line to a log, after removing a last line that a kill cut.

    Raises:
      UserError: the file cannot be written.
    """
    path = Path(path)
    with _explained(path, path, UserError):
        drop_partial_line(path)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def drop_partial_line(path: str | os.PathLike) -> None:
    """Remove a last line without its newline, if the file exists: a kill cut it while it was written."""
    path = Path(path)
    if not path.exists():
        return
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        if size == 0:
            return
        file.seek(size - 1)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def read_json(path: str | os.PathLike, *, remedy: str = ANEW, error: type[UserError] = UserError) -> Any:
    """The content of a JSON file.

    Args:
      remedy: what to do where it is missing or damaged, as the end of the message.
      error: the class of that error.

    Raises:
      UserError: there is no such file, or it cannot be read, or it is not JSON (``FILE:LINE:``).
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path}: not found; {remedy}") from None
    except OSError as reason:
        raise error(f"{path}: cannot be read ({reason.strerror or reason}); {remedy}") from reason
    except json.JSONDecodeError as reason:
        raise error(f"{path}:{reason.lineno}: not valid JSON ({reason.msg}); {remedy}") from reason
    except UnicodeDecodeError as reason:
        raise error(f"{path}: not text in UTF-8 ({reason.reason}); {remedy}") from reason


def read_json_lines(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The objects of a log that `append_json_line` wrote, in order; [] where there is no such file yet. A last line
    that a kill cut is removed.

    Raises:
      UserError: a line is not a JSON object (``FILE:LINE:``).
    """
    path = Path(path)
    drop_partial_line(path)
    objects = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], start=1):
        try:
            objects.append(json.loads(line))
        except ValueError as reason:
            raise UserError(f"{path}:{number}: not valid JSON ({reason}); {ANEW}") from reason
        if not isinstance(objects[-1], dict):
            raise UserError(f"{path}:{number}: expected a JSON object, found {type(objects[-1]).__name__}; {ANEW}")
    return objects


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it: arrays and tuples as lists, paths and dataclasses as strings and dicts.

    JSON has no NaN and no infinity: they become the strings "NaN", "Infinity", "-Infinity", which ``float``
    reads back, so nothing is lost and every JSON reader accepts the file.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(entry) for entry in value]
    if isinstance(value, Path):
        return str(value)
    if callable(getattr(value, "tolist", None)):  # NumPy and JAX arrays and scalars
        return plain(value.tolist())  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(value, float) and not np.isfinite(value):
        return "NaN" if np.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _write(path: str | os.PathLike, fill: Callable[[IO[bytes]], Any]) -> Path:
    with written_file(path) as work, work.open("wb") as file:
        fill(file)
    return Path(path)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.tmp")


def _sync(path: Path) -> None:
    """Put the file, or the names in the folder, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that sync no folders
            raise
    finally:
        os.close(handle)


def _merge(work: Path, path: Path, stale: Iterable[str]) -> None:
    written = [file.relative_to(work) for file in sorted(work.rglob("*")) if file.is_file()]
    for name in written:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).replace(path / name)
    for pattern in stale:
        for file in path.glob(pattern):
            if file.relative_to(path) not in written:
                file.unlink()
    _sync(path)


@contextlib.contextmanager
def _explained(path: Path, work: Path, kind: type[UserError]) -> Iterator[None]:
    """``OSError`` as an error of ``kind`` that names the file by its own name, what is wrong, and the remedy.

    An error about another file, such as one that the block reads, is raised as it is.
    """
    try:
        yield
    except OSError as error:
        failed = Path(str(error.filename or path))
        if not (failed.is_relative_to(work) or path.is_relative_to(failed)):
            raise
        file = str(failed).replace(str(work), str(path))
        remedy = "Free some space" if error.errno in _NO_ROOM else "Check the path and its permissions"
        raise kind(
            f"{file}: cannot be written ({error.strerror or error}). What was written before is kept. {remedy}, or "
            "choose another directory, then run the same command again."
        ) from error
