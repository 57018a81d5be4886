"""Raw records to validated Arrow files: one pass in flat memory, then ids are made unique.

In a job the processes divide the pass, each a range of the records and a file of its own; ids are compared over all.
"""

from __future__ import annotations

import dataclasses
import json
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from ntkjax.data.crew import Crew
from ntkjax.data.problems import RecordProblem
from ntkjax.data.schema import Row, parse_record
from ntkjax.data.sources import divide, fills_nulls, iter_source, source_name
from ntkjax.data.table import Table, TableWriter
from ntkjax.errors import DataError
from ntkjax.files import write_npz

VERSION = 4  # part of the cache key: raise it when what is stored, or what is accepted, changes
TABLE, REPORT = "records-{:05}.arrow", "report.json"
_FIRST_PASS, _KEYS = "first-pass-{:05}.arrow", "keys-{:05}.npz"
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


def ingest(sources: Sequence[str], signatures: Sequence[list[Any]], options: Options, crew: Crew) -> None:
    """Validate every record of ``sources`` into the crew's folder: a table of each process (`tables`) and
    ``report.json``.

    ``signatures`` of the sources go into the report.

    Memory does not depend on the number of records but for 13 bytes each of all of them: a 64-bit hash of the id,
    whether the id was given, and the file.

    Raises:
      DataError: the first bad record, unless ``options.skip_bad``; an unreadable file; no usable record at all.
    """
    readers = crew.count if options.limit is None else 1
    shares = [*divide(sources, options.split, readers), *([] for _ in range(readers, crew.count))]
    given = crew.each("read", lambda: _read_part(sources, options, crew, shares[crew.index]))
    read = _FirstPass.joined(sources, options, crew, given)
    skips = read.skips
    if not len(read.keys):
        why = f"; the first of {skips.count} bad records is {skips.lines[0]}" if skips.count else ""
        raise DataError(f"{sources[0]}: no usable record{why}; check that this is the right file")
    repeated, qualified, kept = _make_unique(read, crew)
    if crew.index > 0:
        return
    unlisted = skips.count - len(skips.lines)
    report = {
        "records": kept,
        "files": list(sources),
        "signatures": list(signatures),
        "skipped": skips.count,
        "skipped_lines": skips.lines + ([f"and {unlisted} more, not listed"] if unlisted else []),
        "duplicate_contents": repeated,
        "made_ids": len(read.given) - int(np.sum(read.given)),
        "renamed_ids": qualified,
        "ignored_fields": dict(sorted(read.unused.items())),
    }
    (crew.folder / REPORT).write_text(json.dumps(report, ensure_ascii=False), encoding="utf-8")


def tables(folder: Path) -> tuple[Table, ...]:
    """The tables that ``ingest`` wrote, one behind another in the order of the sources."""
    return tuple(Table(file) for file in sorted(folder.glob(TABLE.replace("{:05}", "*"))))


def _read_part(
    sources: Sequence[str], options: Options, crew: Crew, share: Sequence[tuple[int, range | None]]
) -> dict[str, Any]:
    """Read this process's share of the sources (see `divide`) into its table of the first pass; gives its counts."""
    pass_ = _FirstPass(sources, options, _Skips(options.skip_bad))
    with TableWriter(crew.folder / _FIRST_PASS.format(crew.index)) as writer:
        for number, places in share:
            if options.limit is not None and len(pass_.keys) >= options.limit:
                break
            pass_.read(number, writer, places)
    columns = {name: np.frombuffer(getattr(pass_, name), kind) for name, kind in _COLUMNS.items()}
    write_npz(crew.folder / _KEYS.format(crew.index), columns)
    return {"skipped": pass_.skips.count, "lines": pass_.skips.lines, "unused": pass_.unused}


_COLUMNS = {"keys": np.uint64, "given": np.int8, "files": np.int32}


class _FirstPass:
    """Records to a table as they come, and what is needed to make their ids unique.

    Attributes:
      keys, given, files: of every good record the hash of its id, whether it was given, and the number of its file.
      unused: how many records have each field that is not used.
    """

    def __init__(self, sources: Sequence[str], options: Options, skips: _Skips):
        self.sources, self.options, self.skips = sources, options, skips
        self.keys: Any = array("Q")
        self.given: Any = array("b")
        self.files: Any = array("i")
        self.unused: Counter[str] = Counter()

    @classmethod
    def joined(
        cls, sources: Sequence[str], options: Options, crew: Crew, given: Sequence[dict[str, Any]]
    ) -> _FirstPass:
        """The first passes of all processes as one over all records, from what each gave (`_read_part`)."""
        read = cls(sources, options, _Skips(options.skip_bad))
        parts = [np.load(crew.folder / _KEYS.format(k)) for k in range(crew.count)]
        for name in _COLUMNS:
            setattr(read, name, np.concatenate([part[name] for part in parts]))
        for part in given:
            read.skips.count += part["skipped"]
            read.skips.lines = (read.skips.lines + part["lines"])[:LISTED_SKIPS]
            read.unused.update(part["unused"])
        return read

    def read(self, number: int, writer: TableWriter, places: range | None) -> None:
        """Add the records of one source, or those at ``places`` among them."""
        source, options, skips = self.sources[number], self.options, self.skips
        default, before = source_name(source), len(self.keys) + skips.count
        optional, filled = options.allow_missing_response, fills_nulls(source)
        for item, (line, value) in enumerate(iter_source(source, options.split, wanted=places)):
            if places is not None and item not in places:
                if item >= places.stop:
                    break
                continue
            try:
                if isinstance(value, RecordProblem):
                    raise value
                row = parse_record(value, allow_missing_response=optional, filled=filled)
                made_id = row.id if row.id is not None else content_id(row.prompt, row.response)
                writer.add(_stored(row, made_id, row.source or default, number, line, item))
            except UnicodeEncodeError:
                lone = RecordProblem("a text holds half a surrogate pair", "text in UTF-8", "mend the escape in it")
                skips.note(f"{source}:{line}", lone)
            except RecordProblem as problem:
                skips.note(f"{source}:{line}", problem)
            else:
                self.keys.append(_hash64(made_id))
                self.given.append(row.id is not None)
                self.files.append(number)
                if row.unused:
                    self.unused.update(dict.fromkeys(row.unused, 1))
                if len(self.keys) == options.limit:
                    return
        if places is None and len(self.keys) + skips.count == before:
            raise DataError(f"{source}: the file holds no records; expected at least one; check how it was written")


def content_id(prompt: str, response: str) -> str:
    """Id of a record that has none: 16 hex digits of BLAKE2b over prompt, NUL, response."""
    return blake2b(f"{prompt}\0{response}".encode(), digest_size=8).hexdigest()


def _hash64(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def _stored(row: Row, name: str, source: str, number: int, line: int, item: int) -> tuple[Any, ...]:
    as_json = lambda value: None if value is None else json.dumps(value, ensure_ascii=False)
    fields = (name, source, row.prompt, as_json(row.messages), row.response, row.answer, row.choices)
    more = (as_json(row.response_fields), as_json(row.tools))
    # repr separates the fields without ambiguity and is faster than JSON; where there is no more, it is left out.
    content = fields if more == (None, None) else (*fields, *more)
    return (*fields, *more, number, line, item, _hash64(_encodable(repr(content), content)))


def _encodable(text: str, fields: tuple[Any, ...]) -> str:
    # repr escapes lone surrogates, which Arrow cannot store: let them fail here, where the line is known.
    if "\\ud" in text:
        for field in fields:
            for part in field if isinstance(field, list) else [field]:
                (part or "").encode()
    return text


class _Tables:
    """The tables of the first pass, their rows numbered one after another."""

    def __init__(self, crew: Crew):
        self.parts = [Table(crew.folder / _FIRST_PASS.format(k)) for k in range(crew.count)]
        self.starts = np.concatenate([[0], np.cumsum([len(part) for part in self.parts])])

    def value(self, name: str, i: int) -> Any:
        part = int(np.searchsorted(self.starts, i, side="right")) - 1
        return self.parts[part].value(name, i - int(self.starts[part]))


def _make_unique(read: _FirstPass, crew: Crew) -> tuple[int, int, int]:
    """Write the final tables, in which every id occurs once.

    An id that a file gives twice is a bad record. One that two files give stays as it is in the first, and the others
    put the name of the file in front of it.

    Returns:
      (how many records repeat the content of an earlier one, both without id; how many ids were renamed; how many
      records are left).
    """
    table, plans = _Tables(crew), []

    def plan() -> None:  # the same on every process
        plans.append(_plan(table, read))

    crew.each("ids", plan)
    drop, new_names, qualify, repeated = plans[0]
    mine = range(int(table.starts[crew.index]), int(table.starts[crew.index + 1]))
    own = [i - mine.start for i in drop if i in mine]
    first, final = (crew.folder / name.format(crew.index) for name in (_FIRST_PASS, TABLE))
    changed = own or any(i in mine for i in new_names) or qualify[mine.start : mine.stop].any()
    rename = _renaming(read, new_names, qualify)

    def write() -> None:
        if not changed:
            first.rename(final)
            return
        for i in np.flatnonzero(qualify[: mine.start]).tolist():  # the names that are taken when this part begins
            rename(i, table.value("id", i))
        table.parts[crew.index].rewrite(final, np.asarray(own, np.int64), lambda i, name: rename(i + mine.start, name))

    crew.each("write", write)
    if changed:
        first.unlink()
    (crew.folder / _KEYS.format(crew.index)).unlink()
    return repeated, int(qualify.sum()), len(read.keys) - len(drop)


def _plan(table: _Tables, read: _FirstPass) -> tuple[list[int], dict[int, str], np.ndarray, int]:
    """(rows to leave out, new names of rows, rows whose ids the name of their file goes in front of, how many records
    repeat the content of an earlier one)."""
    keys, given = read.keys, read.given.astype(bool)
    again, first_of, elsewhere = _given_twice(keys, given, _distinct(read)[read.files])
    drop = []
    for i, first in sorted(zip(again.tolist(), first_of.tolist())):
        name = table.value("id", i)
        if name == table.value("id", first):  # else two hashes coincide
            read.skips.note(_place(table, read.sources, i), _duplicate(name, _place(table, read.sources, first)))
            drop.append(i)
    new_names, repeated = _numbered(table, keys, given)
    qualify = np.zeros(len(keys), bool)
    qualify[elsewhere] = True
    qualify[drop] = False
    return drop, new_names, qualify, repeated


def _renaming(read: _FirstPass, new_names: dict[int, str], qualify: np.ndarray) -> Callable[[int, str], str]:
    """``(row, id) -> new id``, to be asked of the rows that ``qualify`` in order."""
    names, taken = _file_names(read.sources), _Taken(read.keys)

    def rename(i: int, name: str) -> str:
        if not qualify[i]:
            return new_names.get(i, name)
        qualified = f"{names[read.files[i]]}:{name}"
        return taken.free(qualified) if qualified in taken else qualified

    return rename


def _distinct(read: _FirstPass) -> np.ndarray:
    """For every source the number of the first that is the same file."""
    places: dict[str, int] = {}
    return np.asarray([places.setdefault(str(Path(s).resolve()), k) for k, s in enumerate(read.sources)], np.int64)


def _given_twice(keys: np.ndarray, given: np.ndarray, files: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows whose id its own file gave before, the rows where it did, and rows whose id another file gave before."""
    rows = np.flatnonzero(given)
    rows = rows[np.lexsort((rows, files[rows], keys[rows]))]
    same_id, same_file = np.zeros(len(rows), bool), np.zeros(len(rows), bool)
    same_id[1:], same_file[1:] = np.diff(keys[rows]) == 0, np.diff(files[rows]) == 0
    same = same_id & same_file
    first = np.maximum.accumulate(np.where(same, 0, np.arange(len(rows))))
    return rows[same], rows[first[same]], rows[_after_first_file(same_id, same)]


def _after_first_file(same_id: np.ndarray, same: np.ndarray) -> np.ndarray:
    """Of rows sorted by id and file: those that lie in another file than the first row with their id."""
    run = np.cumsum(~same_id)
    changes = np.cumsum(same_id & ~same)
    starts = np.flatnonzero(~same_id)
    return changes > changes[starts][run - 1]


class _Taken:
    """Names that are in use, by their hashes."""

    def __init__(self, keys: np.ndarray):
        self.sorted, self.new = np.sort(keys), set[int]()

    def __contains__(self, name: str) -> bool:
        key = _hash64(name)
        index = int(np.searchsorted(self.sorted, np.uint64(key)))
        return key in self.new or (index < len(self.sorted) and int(self.sorted[index]) == key)

    def free(self, name: str, suffix: int = 2) -> str:
        """The first of ``name-2``, ``name-3``, ... that is not in use; now it is."""
        while f"{name}-{suffix}" in self:
            suffix += 1
        self.new.add(_hash64(f"{name}-{suffix}"))
        return f"{name}-{suffix}"


def _numbered(table: _Tables, keys: np.ndarray, given: np.ndarray) -> tuple[dict[int, str], int]:
    """New names for made ids that are in use already, and how many records repeat an earlier one's content."""
    renamed, repeated, taken = {}, 0, _Taken(keys)
    for rows in _equal_runs(keys, given):
        by_id: dict[str, list[int]] = {}
        for i in rows:
            by_id.setdefault(table.value("id", i), []).append(i)
        for name, same in by_id.items():
            made = [i for i in same if not given[i]]
            repeated += max(0, len(made) - 1)
            suffix = 2
            for i in made if len(made) < len(same) else made[1:]:
                renamed[i] = taken.free(name, suffix)
                suffix = int(renamed[i].rpartition("-")[2]) + 1
    return renamed, repeated


def _equal_runs(keys: np.ndarray, given: np.ndarray) -> list[list[int]]:
    """Rows that share a key, for every key that occurs more than once and has a made id; by first occurrence."""
    _, start, inverse, counts = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
    if len(start) == len(keys) or given.all():
        return []
    wanted = (counts > 1) & (np.bincount(inverse[~given], minlength=len(counts)) > 0)
    order = np.argsort(keys, kind="stable")
    ends = np.cumsum(counts)
    return sorted(order[end - count : end].tolist() for end, count in zip(ends[wanted], counts[wanted]))


def _file_names(sources: Sequence[str]) -> list[str]:
    """A name for every source, different for different ones: what its records' source defaults to, without colons."""
    names: dict[str, str] = {}
    for source in sources:
        name = base = source_name(source).replace(":", "_")
        suffix = 2
        while source not in names and name in names.values():
            name, suffix = f"{base}-{suffix}", suffix + 1
        names.setdefault(source, name)
    return [names[source] for source in sources]


def _place(table: _Tables, sources: Sequence[str], i: int) -> str:
    return f"{sources[table.value('file', i)]}:{table.value('line', i)}"


def _duplicate(name: str, earlier: str) -> RecordProblem:
    return RecordProblem(
        f"the id {name!r} was already used at {earlier}",
        "a different id for every record",
        "rename or remove one",
    )
