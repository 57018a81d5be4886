"""Raw records to a validated Arrow file: one pass in flat memory, then ids are made unique."""

from __future__ import annotations

import dataclasses
import json
from array import array
from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from ntkjax.data.schema import KNOWN_FIELDS, RecordProblem, Row, parse_record
from ntkjax.data.sources import iter_source, source_name
from ntkjax.data.table import Table, TableWriter
from ntkjax.errors import DataError

VERSION = 1  # part of the cache key: raise it when what is stored, or what is accepted, changes
TABLE, REPORT = "records.arrow", "report.json"
LISTED_SKIPS = 10_000


@dataclasses.dataclass(frozen=True)
class Options:
    """How ``read_records`` was asked to read; part of the cache key."""

    split: str
    skip_bad: bool
    limit: int | None
    allow_missing_response: bool


class _Skips:
    """Counts bad records and lists them (the first ``LISTED_SKIPS`` of them), or raises at the first."""

    def __init__(self, skip: bool):
        self.skip, self.count, self.lines = skip, 0, []

    def note(self, place: str, problem: RecordProblem) -> None:
        if not self.skip:
            raise problem.at(place)
        self.count += 1
        if len(self.lines) < LISTED_SKIPS:
            self.lines.append(f"{place}: {problem}")


def ingest(sources: Sequence[str], options: Options, folder: Path) -> None:
    """Validate every record of ``sources`` into ``folder``: ``records.arrow`` and ``report.json``.

    Memory does not depend on the number of records but for 9 bytes each: a 64-bit hash of the id and
    whether the id was given.

    Raises:
      DataError: the first bad record, unless ``options.skip_bad``; an unreadable file; no usable record at
        all.
    """
    skips, ignored, keys, given = _Skips(options.skip_bad), Counter(), array("Q"), array("b")
    first = folder / "first-pass.arrow"
    with TableWriter(first) as writer:
        for number, source in enumerate(sources):
            if options.limit is not None and len(keys) >= options.limit:
                break
            _ingest_source(number, source, options, writer, skips, ignored, keys, given)
    if not keys:
        why = f"; the first of {skips.count} bad records is {skips.lines[0]}" if skips.count else ""
        raise DataError(f"{sources[0]}: no usable record{why}; check that this is the right file")
    flags = np.frombuffer(given, np.int8).astype(bool)
    repeated = _make_unique(Table(first), sources, np.frombuffer(keys, np.uint64), flags, skips, folder)
    kept = len(Table(folder / TABLE))
    unlisted = skips.count - len(skips.lines)
    report = {
        "records": kept,
        "files": list(sources),
        "skipped": skips.count,
        "skipped_lines": skips.lines + ([f"and {unlisted} more, not listed"] if unlisted else []),
        "duplicate_contents": repeated,
        "made_ids": int((~flags).sum()),
        "ignored_fields": dict(sorted(ignored.items())),
    }
    (folder / REPORT).write_text(json.dumps(report, ensure_ascii=False), encoding="utf-8")


def _ingest_source(
    number: int,
    source: str,
    options: Options,
    writer: TableWriter,
    skips: _Skips,
    ignored: Counter[str],
    keys: array[int],
    given: array[int],
) -> None:
    default, before = source_name(source), len(keys) + skips.count
    for line, value in iter_source(source, options.split):
        try:
            if isinstance(value, RecordProblem):
                raise value
            row = parse_record(value, allow_missing_response=options.allow_missing_response)
            made_id = row.id if row.id is not None else content_id(row.prompt, row.response)
            writer.add(_stored(row, made_id, row.source or default, number, line))
        except UnicodeEncodeError:
            lone = RecordProblem("a text holds half a surrogate pair", "text in UTF-8", "mend the escape in it")
            skips.note(f"{source}:{line}", lone)
        except RecordProblem as problem:
            skips.note(f"{source}:{line}", problem)
        else:
            keys.append(_hash64(made_id))
            given.append(row.id is not None)
            ignored.update(str(name) for name in value if name not in KNOWN_FIELDS)
            if len(keys) == options.limit:
                return
    if len(keys) + skips.count == before:
        raise DataError(f"{source}: the file holds no records; expected at least one; check how it was written")


def content_id(prompt: str, response: str) -> str:
    """Id of a record that has none: 16 hex digits of BLAKE2b over prompt, NUL, response."""
    return blake2b(f"{prompt}\0{response}".encode(), digest_size=8).hexdigest()


def _hash64(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def _stored(row: Row, name: str, source: str, number: int, line: int) -> tuple[Any, ...]:
    messages = json.dumps(row.messages, ensure_ascii=False) if row.messages is not None else None
    fields = (name, source, row.prompt, messages, row.response, row.answer, row.choices)
    # repr separates the fields without ambiguity and is faster than JSON.
    return (*fields, number, line, _hash64(_encodable(repr(fields), fields)))


def _encodable(text: str, fields: tuple[Any, ...]) -> str:
    # repr escapes lone surrogates, which Arrow cannot store: let them fail here, where the line is known.
    if "\\ud" in text:
        for field in fields:
            for part in field if isinstance(field, list) else [field]:
                (part or "").encode()
    return text


def _make_unique(
    table: Table, sources: Sequence[str], keys: np.ndarray, given: np.ndarray, skips: _Skips, folder: Path
) -> int:
    """Write the final table; returns how many records repeat the content of an earlier one (both without
    id).
    """
    drop, renamed, repeated = [], {}, 0
    taken = np.sort(keys)
    new: set[int] = set()

    def is_taken(name: str) -> bool:
        key = _hash64(name)
        place = int(np.searchsorted(taken, np.uint64(key)))
        return key in new or (place < len(taken) and int(taken[place]) == key)

    for rows in _equal_runs(keys):
        by_id: dict[str, list[int]] = {}
        for i in rows:
            by_id.setdefault(table.value("id", i), []).append(i)
        for name, same in by_id.items():
            explicit = [i for i in same if given[i]]
            for i in explicit[1:]:
                skips.note(_place(table, sources, i), _duplicate(name, _place(table, sources, explicit[0])))
                drop.append(i)
            made = [i for i in same if not given[i]]
            repeated += max(0, len(made) - 1)
            suffix = 2
            for i in made if explicit else made[1:]:
                while is_taken(f"{name}-{suffix}"):
                    suffix += 1
                renamed[i] = f"{name}-{suffix}"
                new.add(_hash64(renamed[i]))
    first, final = folder / "first-pass.arrow", folder / TABLE
    if drop or renamed:
        table.rewrite(final, np.asarray(drop, np.int64), renamed)
        first.unlink()
    else:
        first.rename(final)
    return repeated


def _equal_runs(keys: np.ndarray) -> list[list[int]]:
    """Rows that share a key, for every key that occurs more than once, in order of first occurrence."""
    _, start, counts = np.unique(keys, return_index=True, return_counts=True)
    if len(start) == len(keys):
        return []
    order = np.argsort(keys, kind="stable")
    ends = np.cumsum(counts)
    runs = [order[end - count : end].tolist() for end, count in zip(ends, counts) if count > 1]
    return sorted(runs)


def _place(table: Table, sources: Sequence[str], i: int) -> str:
    return f"{sources[table.value('file', i)]}:{table.value('line', i)}"


def _duplicate(name: str, earlier: str) -> RecordProblem:
    return RecordProblem(
        f"the id {name!r} was already used at {earlier}",
        "a different id for every record",
        "rename or remove one",
    )
