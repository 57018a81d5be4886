"""Prompt/response records: read from anywhere, validated line by line, memory-mapped."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ntkjax.data import ingest
from ntkjax.data.cache import CacheDir, build_once
from ntkjax.data.indices import Positions, as_indices
from ntkjax.data.messages import Message
from ntkjax.data.originals import Originals
from ntkjax.data.sources import list_sources, source_signature
from ntkjax.data.table import Table, TextColumn
from ntkjax.errors import ConfigError
from ntkjax.files import write_jsonl
from ntkjax.fingerprint import digest

_FIELDS = ("id", "source", "prompt", "messages", "response", "answer", "choices", "response_fields", "tools")
_BLOCK = 512


@dataclasses.dataclass(frozen=True)
class Example:
    """One record.

    Attributes:
      messages: the chat before the response, each message with ``role``, ``content`` and whatever other fields it
        came with (``reasoning_content``, ``tool_calls``, ``weight``, ...); None where it is one user message, the
        text ``prompt`` and no other field.
      response: the text of the last assistant message; empty where the data was read with
        ``allow_missing_response`` and has none.
      response_fields: fields of the last assistant message besides role and content; None where it has none.
      tools: the tools that a chat template is told of; None where the record names none.
      before: text in front of the prompt where there is no chat template (shots of an evaluation); no file has it.
    """

    id: str
    source: str
    prompt: str
    messages: tuple[Message, ...] | None
    response: str
    answer: str | None = None
    choices: tuple[str, ...] | None = None
    response_fields: Mapping[str, Any] | None = None
    tools: tuple[Any, ...] | None = None
    before: str = ""

    def conversation(self, response: str | None = None) -> list[Message]:
        """Every message, the assistant's last (``response``, the example's own by default) included."""
        text = self.response if response is None else response
        context = [{"role": "user", "content": self.prompt}] if self.messages is None else list(self.messages)
        # Fields such as reasoning_content belong to the example's own response alone.
        fields = self.response_fields or {} if response is None else {}
        return [*context, {"role": "assistant", "content": text, **fields}]

    def to_json(self) -> dict[str, Any]:
        """The record as ``read_records`` reads it: fields that are absent are left out."""
        text: dict[str, Any] = {"prompt": self.prompt, "response": self.response}
        if self.messages is not None or self.response_fields is not None:
            text = {"messages": self.conversation()}
        record = {"id": self.id, "source": self.source, **text}
        if self.tools is not None:
            record["tools"] = list(self.tools)
        if self.answer is not None:
            record["answer"] = self.answer
        if self.choices is not None:
            record["choices"] = list(self.choices)
        return record


def read_records(
    paths: str | Path | Sequence[str | Path],
    *,
    split: str = "train",
    on_bad_record: Literal["raise", "skip"] = "raise",
    limit: int | None = None,
    allow_missing_response: bool = False,
    cache_dir: CacheDir = None,
) -> Records:
    """Read JSONL, JSON, Parquet, directories of those, or hub ids (``owner/name`` or ``owner/name:config``).

    Several paths are concatenated. Records are validated one at a time and written to a memory-mapped Arrow
    file in ``cache_dir`` (default: see ``default_cache_dir``), which is reused while the files stay as they are.

    Args:
      split: which split of a hub data set.
      on_bad_record: ``raise`` at the first bad record, or ``skip`` it, counted and listed in ``.report``.
      limit: stop after this many good records.
      allow_missing_response: accept prompts without a response (data to generate answers for).
      cache_dir: a directory that all processes of a job share (`ntkjax.data.cache.Shared`) is filled by all of them,
        and each reads its own part of the files; all must then make the same calls in the same order.

    Returns:
      Records. An id that is missing becomes the first 16 hex digits of BLAKE2b(prompt, response), with
      ``-2``, ``-3`` where the content repeats; a missing source becomes the stem of the file.

    Raises:
      DataError: ``FILE:LINE: what is wrong; expected ...; what to do``. Line is the row, from 1, in Parquet
        and hub data, and the line on which the record starts in JSON.
    """
    _check_options(on_bad_record, limit)
    sources = list_sources(paths, split)
    options = ingest.Options(split, on_bad_record == "skip", limit, allow_missing_response)
    signatures = [source_signature(source, split) for source in sources]
    key = digest(ingest.VERSION, dataclasses.astuple(options), signatures)
    made = build_once("records", key, cache_dir, lambda crew: ingest.ingest(sources, signatures, options, crew))
    tables = ingest.tables(made)
    report = json.loads((made / ingest.REPORT).read_text(encoding="utf-8"))
    sizes = [len(table) for table in tables]
    rows = np.concatenate([np.arange(size, dtype=np.int64) for size in sizes])
    return Records(tables, np.repeat(np.arange(len(tables), dtype=np.int16), sizes), rows, report)


def _check_options(on_bad_record: str, limit: int | None) -> None:
    if on_bad_record not in ("raise", "skip"):
        raise ConfigError(f"on_bad_record is {on_bad_record!r}; expected 'raise' or 'skip'")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}; expected at least 1, or None for all records")


@dataclasses.dataclass(frozen=True, eq=False)
class Records:
    """A view of memory-mapped records: ``len``, ``[i] -> Example``, iteration, ``subset``, ``concat``, columns.

    Attributes:
      tables: the Arrow files behind the view.
      part: int16 [N], which of ``tables`` a row lies in.
      row: int64 [N], where in it.
      report: what reading found: records, files, signatures (of the files), skipped (count), skipped_lines
        (``FILE:LINE: why``), duplicate_contents, made_ids, renamed_ids (given by two files), ignored_fields (name of a
        column or of a field of messages: in how many records).
    """

    tables: tuple[Table, ...]
    part: np.ndarray
    row: np.ndarray
    report: dict[str, Any]

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, i: int | np.integer) -> Example:
        if not -len(self) <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        rows = np.asarray([self.row[i]])
        return _example(*self.tables[self.part[i]].rows(rows, _FIELDS)[0])

    def __iter__(self) -> Iterator[Example]:
        for start in range(0, len(self), _BLOCK):
            part, row = self.part[start : start + _BLOCK], self.row[start : start + _BLOCK]
            for number, k in zip(*_runs(part)):
                for values in self.tables[number].rows(row[k], _FIELDS):
                    yield _example(*values)

    def subset(self, indices: Positions) -> Records:
        """The records at ``indices`` (positions in this view), in that order. Copies no text."""
        chosen = as_indices(indices, len(self))
        return dataclasses.replace(self, part=self.part[chosen], row=self.row[chosen])

    @property
    def ids(self) -> TextColumn:
        """Id of every record, read when asked for."""
        return self._column("id")

    @property
    def sources(self) -> TextColumn:
        """Source of every record, read when asked for."""
        return self._column("source")

    @property
    def prompts(self) -> TextColumn:
        """Prompt of every record, read when asked for."""
        return self._column("prompt")

    @property
    def responses(self) -> TextColumn:
        """Response of every record, read when asked for."""
        return self._column("response")

    @property
    def texts(self) -> TextColumn:
        """Prompt, newline, response of every record, read when asked for."""
        prompts, responses = self.prompts, self.responses
        gather = lambda indices: [f"{p}\n{r}" for p, r in zip(prompts[indices], responses[indices])]
        return TextColumn(len(self), gather)

    def location(self, i: int) -> str:
        """``FILE:LINE`` that record ``i`` was read from."""
        (file,), (line,) = self.locations([range(len(self))[i]])
        return f"{file}:{line}"

    def locations(self, indices: Positions) -> tuple[list[str], np.ndarray]:
        """The file of each record at ``indices``, and the line [n] on which it starts (in tables its row, from 1)."""
        files, lines = self._places(as_indices(indices, len(self)), "line")
        return [self.report["files"][number] for number in files.tolist()], lines

    def originals(self, indices: Positions) -> Originals:
        """The records at ``indices`` as their files hold them, with all fields; read again in one pass, flat in memory.

        Raises:
          DataError: a file has changed since it was read, or is gone.
        """
        files, items = self._places(as_indices(indices, len(self)), "item")
        return Originals(self.report["files"], self.report["signatures"], files, items)

    def _places(self, chosen: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
        """For rows of this view the position of their file in the report's list, and the column ``name``."""
        part, row = self.part[chosen], self.row[chosen]
        files, places = np.zeros(len(chosen), np.int64), np.zeros(len(chosen), np.int64)
        offsets = self.file_offsets
        for number in np.unique(part).tolist():
            here, table = part == number, self.tables[number]
            files[here] = np.asarray(table.take("file", row[here]), np.int64) + offsets[number]
            places[here] = table.take(name, row[here])
        return files, places

    @property
    def file_offsets(self) -> list[int]:
        """For each of ``tables`` where the files that its rows name begin in the report's list."""
        return self.report.get("file_offsets", [0] * len(self.tables))

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits that depend on the content and order of the records and on nothing else."""
        digests = np.zeros(len(self), np.uint64)
        for part, table in enumerate(self.tables):
            here = self.part == part
            digests[here] = table.numbers("digest")[self.row[here]]
        return blake2b(digests.astype("<u8").tobytes(), digest_size=16).hexdigest()

    def write_jsonl(
        self,
        path: str | Path,
        indices: Positions | None = None,
        extra: Mapping[str, Sequence[Any] | np.ndarray] | None = None,
    ) -> None:
        """Write the records at ``indices`` (all by default) as JSON lines; the file appears whole or not at all.

        ``extra[name][k]`` is added to the k-th record written.
        """
        chosen = np.arange(len(self)) if indices is None else as_indices(indices, len(self))
        for name, values in (extra or {}).items():
            if len(values) != len(chosen):
                raise ValueError(f"extra[{name!r}] has {len(values)} values for {len(chosen)} records")
        more = lambda k: {name: _plain(values[k]) for name, values in (extra or {}).items()}
        write_jsonl(path, (self[i].to_json() | more(k) for k, i in enumerate(chosen)))

    def _column(self, name: str) -> TextColumn:
        def gather(indices: np.ndarray) -> list[str]:
            part, row = self.part[indices], self.row[indices]
            if len(self.tables) == 1:
                return self.tables[0].take(name, row)
            column = np.empty(len(indices), dtype=object)
            for number, table in enumerate(self.tables):
                here = part == number
                if here.any():
                    column[here] = table.take(name, row[here])
            return column.tolist()

        return TextColumn(len(self), gather)


def _example(
    name: str,
    source: str,
    prompt: str,
    messages: str | None,
    response: str,
    answer: str | None,
    choices: Any,
    fields: str | None,
    tools: str | None,
) -> Example:
    chat = tuple(json.loads(messages)) if messages is not None else None
    options = tuple(choices) if choices is not None else None
    if fields is None and tools is None:
        return Example(name, source, prompt, chat, response, answer, options)
    own = json.loads(fields) if fields is not None else None
    known = tuple(json.loads(tools)) if tools is not None else None
    return Example(name, source, prompt, chat, response, answer, options, own, known)


def _runs(part: np.ndarray) -> tuple[list[int], list[slice]]:
    """Stretches of equal values: the value and the slice of each."""
    edges = [0, *(np.flatnonzero(np.diff(part)) + 1).tolist(), len(part)]
    slices = [slice(a, b) for a, b in pairwise(edges)]
    return [int(part[s.start]) for s in slices], slices


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def concat_records(first: Records, second: Records) -> Records:
    """The records of ``first``, then those of ``second``. Ids are kept as they are, also where they coincide."""
    a, b = first.report, second.report
    report = {
        "records": len(first) + len(second),
        "files": a["files"] + b["files"],
        "signatures": a["signatures"] + b["signatures"],
        "file_offsets": first.file_offsets + [len(a["files"]) + k for k in second.file_offsets],
        "skipped": a["skipped"] + b["skipped"],
        "skipped_lines": a["skipped_lines"] + b["skipped_lines"],
        "duplicate_contents": a["duplicate_contents"] + b["duplicate_contents"],
        "made_ids": a["made_ids"] + b["made_ids"],
        "renamed_ids": a["renamed_ids"] + b["renamed_ids"],
        "ignored_fields": _add_counts(a["ignored_fields"], b["ignored_fields"]),
    }
    return Records(
        tables=first.tables + second.tables,
        part=np.concatenate([first.part, second.part + np.int16(len(first.tables))]),
        row=np.concatenate([first.row, second.row]),
        report=report,
    )


def _add_counts(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    return {name: a.get(name, 0) + b.get(name, 0) for name in sorted({*a, *b})}
