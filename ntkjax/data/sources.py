"""Raw records from files and the hub, one at a time, each with its line (Parquet and hub: its row, from 1).

Readers yield ``(line, value)``; ``value`` is a :class:`RecordProblem` where that one record could not be
decoded. What makes the rest of a file unreadable is a :class:`DataError`.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ntkjax.data.schema import RecordProblem
from ntkjax.errors import DataError

Item = tuple[int, Any]

_FORMATS = (".jsonl", ".ndjson", ".json", ".parquet")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")
_JSON_CHUNK = 2**20
_NUMBERED = re.compile(r'\{\s*"\d+"\s*:\s*\{')


def list_sources(paths: str | Path | Sequence[str | Path]) -> list[str]:
    """Files (directories expanded, sorted by name) and hub ids, in the order given.

    Raises:
      DataError: a path is missing, has an unknown extension, is empty, or a directory holds no data.
    """
    given = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not given:
        raise DataError("no data was given; name at least one JSONL, JSON or Parquet file, directory or hub id")
    return [source for path in given for source in _expand(str(path))]


def is_hub_id(source: str) -> bool:
    """True for ``owner/name`` or ``owner/name:config`` where no such path exists here."""
    return (
        _HUB_ID.fullmatch(source) is not None
        and Path(source).suffix.lower() not in _FORMATS
        and not Path(source).exists()
    )


def _expand(source: str) -> list[str]:
    path = Path(source)
    if is_hub_id(source):
        return [source]
    if path.is_dir():
        files = (p for p in path.rglob("*") if p.suffix.lower() in _FORMATS and p.is_file())
        found = sorted(str(p) for p in files if not re.search(r"(^|/)\.", p.relative_to(path).as_posix()))
        if not found:
            raise DataError(f"{source}: no data in this directory; expected files ending in {', '.join(_FORMATS)}")
        return [name for file in found for name in _expand(file)]
    if not path.is_file():
        raise DataError(f"{source}: no such file or directory; check the spelling, or give a hub id like owner/name")
    if path.suffix.lower() not in _FORMATS:
        raise DataError(
            f"{source}: unknown extension {path.suffix!r}; expected one of {', '.join(_FORMATS)}; convert or rename it"
        )
    try:
        path.open("rb").close()
    except OSError as error:
        raise DataError(
            f"{source}: cannot be read ({error.strerror}); expected a readable file; check its permissions"
        ) from error
    if path.stat().st_size == 0:
        raise DataError(f"{source}: the file is empty; expected at least one record; check how it was written")
    return [source]


def source_name(source: str) -> str:
    """What ``source`` of a record defaults to: the stem of the file, or the name of the hub data set."""
    return source.split("/")[1].split(":")[0] if is_hub_id(source) else Path(source).stem


def iter_source(source: str, split: str, revision: str | None = None) -> Iterator[Item]:
    """The records of one file or hub id (of that split and revision) in order."""
    suffix = Path(source).suffix.lower()
    if is_hub_id(source):
        return _iter_hub(source, split, revision)
    if suffix == ".parquet":
        return _iter_parquet(source)
    return _iter_json(source) if suffix == ".json" else _iter_jsonl(source)


def _iter_jsonl(source: str) -> Iterator[Item]:
    with Path(source).open("rb") as file:
        for line, raw in enumerate(file, 1):
            if line == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if raw.isspace() or not raw:
                continue
            try:
                yield line, json.loads(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield line, _not_utf8(error)
            except (json.JSONDecodeError, RecursionError) as error:
                yield line, _not_json(error)


def _not_utf8(error: UnicodeDecodeError) -> RecordProblem:
    return RecordProblem(
        f"byte {error.object[error.start]:#04x} at position {error.start + 1} is not UTF-8",
        "text in UTF-8",
        "convert the file, for example with iconv",
    )


def _not_json(error: json.JSONDecodeError | RecursionError) -> RecordProblem:
    if isinstance(error, RecursionError):
        return RecordProblem("the JSON is nested too deeply", "one flat object", "mend or remove the record")
    return RecordProblem(
        f"not valid JSON ({error.msg} at column {error.colno})",
        "one complete JSON object on the line",
        "mend or remove the line; if it is the last one, the file may be cut off",
    )


def _iter_json(source: str) -> Iterator[Item]:
    """An array of records or an object of numbered ones, ``{"0": {...}, "1": {...}}`` (both read piece by piece), a
    single object over several lines, or JSON lines all the same.
    """
    try:
        with Path(source).open(encoding="utf-8-sig") as file:
            head = file.read(_JSON_CHUNK).lstrip()
            file.seek(0)
            keyed = _NUMBERED.match(head) is not None
            if keyed or head.startswith("["):
                yield from _JsonArray(source, file, keyed)
                return
            first = next((line for line in file if not line.isspace()), "")
            if not _is_json(first):
                file.seek(0)
                yield 1, json.loads(file.read())
                return
    except UnicodeDecodeError as error:
        raise _not_utf8(error).at(source) from error
    except json.JSONDecodeError as error:
        raise _not_json(error).at(f"{source}:{error.lineno}") from error
    yield from _iter_jsonl(source)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


class _JsonArray:
    """Elements of a top-level array, or with ``keyed`` values of a top-level object, without holding the file: the
    buffer grows only to fit one element."""

    def __init__(self, source: str, file: io.TextIOBase, keyed: bool = False):
        self.source, self.file, self.keyed, self.line = source, file, keyed, 1
        self.buffer, self.position, self.ended = "", 0, False

    def __iter__(self) -> Iterator[Item]:
        opening, closing = "{}" if self.keyed else "[]"
        self._pass(opening)
        empty = self._next() == closing
        while not empty:
            self._next()
            line = self.line
            if self.keyed:
                self._value()
                self._pass(":")
                self._next()
            yield line, self._value()
            if self._next() == closing:
                break
            self._pass(",")
        self._pass(closing)
        if self._next():
            raise _broken_array(self.source, self.line, "text after the closing bracket")

    def _more(self) -> None:
        piece = self.file.read(max(_JSON_CHUNK, len(self.buffer) - self.position))
        self.ended = not piece
        self.buffer, self.position = self.buffer[self.position :] + piece, 0

    def _next(self) -> str:
        """The next character that is no white space, left where it is; empty at the end of the file."""
        while True:
            while self.position < len(self.buffer) and self.buffer[self.position] in " \t\r\n":
                self.line += self.buffer[self.position] == "\n"
                self.position += 1
            if self.position < len(self.buffer) or self.ended:
                return self.buffer[self.position : self.position + 1]
            self._more()

    def _pass(self, expected: str) -> None:
        found = self._next()
        if found != expected:
            what = "no comma or closing bracket after a record" if found else "the file ends"
            raise _broken_array(self.source, self.line, what)
        self.position += 1

    def _value(self) -> Any:
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self.buffer, self.position)
            except json.JSONDecodeError as error:
                # Only a failure at the very end of what has been read can mend itself with more text.
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.buffer) - 16
                if self.ended or not cut:
                    raise _broken_array(self.source, self.line, error.msg) from error
                self._more()
            except RecursionError as error:
                raise _broken_array(self.source, self.line, "nested too deeply") from error
            else:
                self.line += self.buffer.count("\n", self.position, end)
                self.position = end
                return value


def _broken_array(source: str, line: int, found: str) -> DataError:
    return DataError(
        f"{source}:{line}: not valid JSON ({found}) in or after the record that starts here; expected an "
        "array of objects; mend the file (nothing behind a broken record can be read), or use JSON lines"
    )


def _iter_parquet(source: str) -> Iterator[Item]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(source) as file:
            for batch in file.iter_batches(batch_size=1000):
                for value in batch.to_pylist():
                    row += 1
                    yield row, value
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).split(". ")[0].strip().rstrip(".")
        raise DataError(
            f"{source}:{row + 1}: not a readable Parquet file ({reason}); expected a complete Parquet file; "
            "it may be cut off: copy or download it again"
        ) from error


def _iter_hub(source: str, split: str, revision: str | None = None) -> Iterator[Item]:
    yield from enumerate(_load_hub(source, split, revision), 1)


def hub_signature(source: str, split: str) -> list[Any]:
    """What changes when the data set does: the prepared files, whose paths hold its revision."""
    return [split, *(file["filename"] for file in _load_hub(source, split).cache_files)]


def _load_hub(source: str, split: str, revision: str | None = None) -> Any:
    import datasets

    name, _, config = source.partition(":")
    try:
        options: dict[str, Any] = {} if revision is None else {"revision": revision}
        return datasets.load_dataset(name, config or None, split=split, **options)
    except Exception as error:  # the hub client raises a dozen unrelated types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{source}: no such file here, and the hub did not give its split {split!r} ({reason}); check "
            "the spelling, the split and the connection, or download the data and give the path of the files"
        ) from error
