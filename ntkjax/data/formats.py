"""The formats of data files: for each suffix its reader and its counter of records. Files may be compressed.

Readers yield ``(line, value)`` for every record of a file, in order; in Parquet ``line`` is the row, from 1. ``value``
is a :class:`RecordProblem` where that one record could not be decoded. What makes the rest of a file unreadable is a
:class:`DataError`. A reader may yield None for records whose place in the file, from 0, is not in ``wanted``, which
ascends; a range is never written out as a list.
"""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import io
import json
import lzma
import re
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ntkjax.data.problems import RecordProblem
from ntkjax.data.schema import KNOWN_FIELDS
from ntkjax.errors import DataError

Item = tuple[int, Any]
Wanted = Sequence[int] | None

_JSON_CHUNK = 2**20
_PARQUET_ROWS = 1000
_PARQUET_BUFFER = 2**20
_ENTRY = re.compile(r'\s*("(?:[^"\\]|\\.)*")\s*:\s*', re.DOTALL)
_COMMA = re.compile(r"\s*,")


@dataclasses.dataclass(frozen=True)
class Format:
    """How files of one suffix are read and counted.

    Attributes:
      read: ``(path, wanted)`` -> the records.
      count: path -> how many records it holds, without decoding them; None where that cannot be told.
      by_range: whether a range of its records is read at a fraction of the cost of the whole file.
    """

    read: Callable[[str, Wanted], Iterator[Item]]
    count: Callable[[str], int | None]
    by_range: bool = False


def suffix_of(path: str | Path) -> str:
    """The suffix that decides the format, in lower case: ``.jsonl``, ``.jsonl.gz``, ..."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    return "".join(suffixes[-2:] if suffixes and suffixes[-1] in _OPENERS else suffixes[-1:])


def stem_of(path: str | Path) -> str:
    """The name of a file without the suffix that decides its format."""
    name = Path(path).name
    return name[: len(name) - len(suffix_of(path))] or name


def unpacked_bytes(path: str) -> int:
    """Size of the file's content, decompressed."""
    if Path(path).suffix.lower() not in _OPENERS:
        return Path(path).stat().st_size
    with _opened(path) as file:
        return sum(len(piece) for piece in iter(lambda: file.read(_JSON_CHUNK), b""))


# -- bytes --


def _open_zstd(path: str) -> io.BufferedIOBase:
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(path, "rb"), "zstd"))  # type: ignore[arg-type]


class _Streams(io.RawIOBase):
    """The content of a file of compressed streams, one behind the other; ``make`` gives a decompressor for one.

    bz2 and lzma of the standard library end in silence at bytes behind a stream that begin no other.
    """

    def __init__(self, path: str, make: Callable[[], Any]):
        self._file = Path(path).open("rb")  # noqa: SIM115 closed by close()
        self._make, self._one = make, make()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._one.eof:
                # xz files may be padded with zeros (the format's specification, 2.2).
                rest = (self._one.unused_data or self._file.read(_JSON_CHUNK)).lstrip(b"\0")
                if not rest:
                    return 0
                self._one = self._make()
            else:
                rest = self._file.read(_JSON_CHUNK) if self._one.needs_input else b""
                if self._one.needs_input and not rest:
                    raise EOFError("the compressed data ends too early")
            if data := self._one.decompress(rest, len(buffer)):
                buffer[: len(data)] = data
                return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


_OPENERS: dict[str, Callable[[str], Any]] = {
    ".gz": gzip.GzipFile,
    ".bz2": lambda path: io.BufferedReader(_Streams(path, bz2.BZ2Decompressor)),
    ".xz": lambda path: io.BufferedReader(_Streams(path, lzma.LZMADecompressor)),
    ".zst": _open_zstd,
}


def _opened(path: str) -> io.BufferedIOBase:
    """The decompressed bytes of a file."""
    opener = _OPENERS.get(Path(path).suffix.lower())
    return Path(path).open("rb") if opener is None else opener(path)


def _checked(read: Callable[[str, Wanted], Iterator[Item]]) -> Callable[[str, Wanted], Iterator[Item]]:
    """``read`` with a DataError where the compressed bytes are damaged."""

    def checked(path: str, wanted: Wanted = None) -> Iterator[Item]:
        line = 0
        try:
            for line, value in read(path, wanted):  # the last good line is told below
                yield line, value
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            suffix = Path(path).suffix.lower()
            if suffix not in _OPENERS:
                raise
            raise DataError(
                f"{path}:{line + 1}: not a readable {suffix} file ({str(error).strip() or type(error).__name__}); "
                "expected a complete compressed file; it may be cut off: copy or download it again"
            ) from error

    return checked


# -- JSON --


def _integer(digits: str) -> int | str:
    """An integer, or its digits as text where Python refuses to convert so many of them."""
    try:
        return int(digits)
    except ValueError:
        return digits


_DECODER, _LONG_DECODER = json.JSONDecoder(), json.JSONDecoder(parse_int=_integer)


def loads(text: str) -> Any:
    """``json.loads``; integers of thousands of digits, which it refuses, become the text of their digits.

    Raises:
      json.JSONDecodeError: not JSON. RecursionError: nested too deeply.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:
        return json.loads(text, parse_int=_integer)


def _raw_decode(text: str, position: int) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, position)
    except json.JSONDecodeError:
        raise
    except ValueError:
        return _LONG_DECODER.raw_decode(text, position)


def _iter_jsonl(source: str, wanted: Wanted = None) -> Iterator[Item]:
    chosen, number = wanted if wanted is None or isinstance(wanted, range) else frozenset(wanted), -1
    with _opened(source) as file:
        for line, raw in enumerate(file, 1):
            if line == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if raw.isspace() or not raw:
                continue
            number += 1
            if chosen is not None and number not in chosen:
                yield line, None
                continue
            try:
                yield line, loads(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield line, _not_utf8(error)
            except (json.JSONDecodeError, RecursionError) as error:
                yield line, _not_json(error)


def _count_lines(source: str) -> int:
    with _opened(source) as file:
        return sum(1 for line in file if line.strip())


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


def _iter_json(source: str, wanted: Wanted = None) -> Iterator[Item]:
    """An array of records or an object of them, ``{"a": {...}, "b": {...}}`` (both read piece by piece), a single
    object over several lines, or JSON lines all the same.
    """
    open_text = lambda: io.TextIOWrapper(_opened(source), encoding="utf-8-sig")  # pyright: ignore[reportArgumentType]
    try:
        with open_text() as file:
            head = file.read(_JSON_CHUNK)
            keyed = _holds_records_by_key(head, whole=len(head) < _JSON_CHUNK)
        if keyed or head.lstrip().startswith("["):
            with open_text() as file:
                yield from _JsonArray(source, file, keyed)
            return
        with open_text() as file:
            first = next((line for line in file if not line.isspace()), "")
        if not _is_json(first):
            with open_text() as file:
                yield 1, loads(file.read())
            return
    except UnicodeDecodeError as error:
        raise _not_utf8(error).at(source) from error
    except json.JSONDecodeError as error:
        raise _not_json(error).at(f"{source}:{error.lineno}") from error
    except RecursionError as error:
        raise _not_json(error).at(f"{source}:1") from error
    yield from _iter_jsonl(source, wanted)


def _is_json(text: str) -> bool:
    try:
        loads(text)
    except json.JSONDecodeError:
        return False
    return True


def _holds_records_by_key(head: str, *, whole: bool) -> bool:
    """Whether the file that starts with ``head`` is one object all of whose values are objects: records by key.

    ``whole``: nothing follows ``head``. What ``head`` does not show is taken to be like what it shows.
    """
    position, values = len(head) - len(head.lstrip()), 0
    if not head.startswith("{", position):
        return False
    position += 1
    while True:
        entry = _ENTRY.match(head, position)
        if entry is None:
            if head[position:].lstrip().startswith("}") and values:
                return not head[position:].lstrip()[1:].strip()  # else JSON lines
            return values > 0 and not whole
        key = entry[1][1:-1]
        if key in KNOWN_FIELDS or not head.startswith("{", entry.end()):
            return False
        try:
            _, position = _raw_decode(head, entry.end())
        except (json.JSONDecodeError, RecursionError):
            return values > 0 or key.isdecimal()
        values += 1
        comma = _COMMA.match(head, position)
        position = comma.end() if comma else position


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
        character = self._next()
        if character != expected:
            what = "no comma or closing bracket after a record" if character else "the file ends"
            raise _broken_array(self.source, self.line, what)
        self.position += 1

    def _value(self) -> Any:
        while True:
            try:
                value, end = _raw_decode(self.buffer, self.position)
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


def _broken_array(source: str, line: int, fault: str) -> DataError:
    return DataError(
        f"{source}:{line}: not valid JSON ({fault}) in or after the record that starts here; expected an "
        "array of objects; mend the file (nothing behind a broken record can be read), or use JSON lines"
    )


# -- tables --


def iter_batches(batches: Any, wanted: Wanted = None, row: int = 0) -> Iterator[Item]:
    """Rows of Arrow batches that follow ``row`` others, those alone that are wanted decoded."""
    for batch in batches:
        if wanted is not None and bisect_left(wanted, row) == bisect_left(wanted, row + len(batch)):
            values: Sequence[Any] = [None] * len(batch)
        else:
            values = batch.to_pylist()
        for value in values:
            row += 1
            yield row, value


def _iter_parquet(source: str, wanted: Wanted = None) -> Iterator[Item]:
    """Row groups without a wanted row are not read; of the others a buffer of each column is held, however large they
    are (pre-buffering would hold them whole)."""
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(source, buffer_size=_PARQUET_BUFFER, pre_buffer=False) as file:
            for group in range(file.num_row_groups):
                first, end = row, row + file.metadata.row_group(group).num_rows
                here = None if wanted is None else wanted[bisect_left(wanted, first) : bisect_left(wanted, end)]
                if here is not None and not len(here):
                    yield from ((row, None) for row in range(first + 1, end + 1))
                    row = end
                    continue
                batches = file.iter_batches(_PARQUET_ROWS, row_groups=[group], use_threads=False)
                for row, value in iter_batches(batches, here, first):
                    yield row, value
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).split(". ")[0].strip().rstrip(".")
        raise DataError(
            f"{source}:{row + 1}: not a readable Parquet file ({reason}); expected a complete Parquet file; "
            "it may be cut off: copy or download it again"
        ) from error


def _count_parquet(source: str) -> int:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(source).metadata.num_rows


_TEXT = {
    ".jsonl": Format(_checked(_iter_jsonl), _count_lines, by_range=True),
    ".ndjson": Format(_checked(_iter_jsonl), _count_lines, by_range=True),
    ".json": Format(_checked(_iter_json), lambda source: None),
}

FORMATS: dict[str, Format] = {
    **_TEXT,
    **{
        suffix + packed: dataclasses.replace(text_format, by_range=False)
        for suffix, text_format in _TEXT.items()
        for packed in _OPENERS
    },
    ".parquet": Format(_iter_parquet, _count_parquet, by_range=True),
}
"""Suffix -> how such files are read: the one list of formats."""


def suffixes() -> str:
    """The suffixes for a message: ``.jsonl, .ndjson, .json (also with .gz, ...), .parquet``."""
    packed = tuple(_OPENERS)
    plain = [suffix for suffix in FORMATS if not suffix.endswith(packed)]
    text = [suffix for suffix in plain if f"{suffix}{packed[0]}" in FORMATS]
    others = [suffix for suffix in plain if suffix not in text]
    return ", ".join([f"{', '.join(text)} (also with {', '.join(packed)} behind it)", *others])
