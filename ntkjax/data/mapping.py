"""Records of any schema to prompt, response, answer and choices: a recipe's templates instead of a script.

A `Source` names data (files or a hub id), the split, which rows of it, and how its fields become a record::

    path: owner/name:config
    split: train
    rows: [0, 1000]
    shuffle: 0
    mapping:
      prompt: "{question}\\nOptions:\\n{options}"
      choices: ["{opa}", "{opb}", "{opc}", "{opd}"]
      answer: "{cop}"
      answer_is: index

Templates name fields in braces, ``{context.contexts}`` those inside a field; a list of texts becomes its lines; ``{{``
is a brace. Two names are ours: ``{options}``, the choices as lines "- X", and ``{answer}``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ntkjax.data.messages import is_absent
from ntkjax.data.problems import RecordProblem
from ntkjax.data.sources import is_hub_id, iter_source, list_sources, source_name, source_signature
from ntkjax.errors import ConfigError, DataError
from ntkjax.files import read_json, write_json, write_jsonl
from ntkjax.fingerprint import digest
from ntkjax.rng import numpy_rng

VERSION = 2
"""Part of the name of a prepared file: raise it when what is written changes."""
HUB_FILE = "hf://datasets/"
_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_OPTIONS, _ANSWER = "options", "answer"


@dataclasses.dataclass(frozen=True)
class FieldMapping:
    """How a record of another schema becomes one of ours.

    Attributes:
      prompt, response: templates.
      choices: templates of the answers to choose from; one that names a field with a list stands for all of it.
      answer: template of the right answer; None where there is none.
      answer_is: ``text``: it is one of the choices, after ``labels``; ``index``: its place among them, from 0.
      labels: what the data calls an answer -> what we call it.
      id: template; None: the name of the file, or of data set, configuration and split, and the record's number.
      source: template; None: the name of the data.
      where: field -> values; records that have another value there are left out, and are no bad records.
    """

    prompt: str
    response: str = "So the answer is {answer}."
    choices: tuple[str, ...] = ()
    answer: str | None = None
    answer_is: Literal["text", "index"] = "text"
    labels: dict[str, str] = dataclasses.field(default_factory=dict)
    id: str | None = None
    source: str | None = None
    where: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        given = {_OPTIONS: bool(self.choices), _ANSWER: self.answer is not None}
        texts = [getattr(self, name) for name in ("prompt", "response", "answer", "id", "source")]
        for text in [text for text in (*texts, *self.choices) if text is not None]:
            for name in [name for name in fields_of(text) if not given.get(name, True)]:
                what = "choices" if name == _OPTIONS else "answer"
                raise ConfigError(f"template {text!r} uses {{{name}}}, but the mapping has no {what}; give one")
        if self.answer_is == "index" and not (self.choices and self.answer is not None):
            raise ConfigError("answer_is index needs choices, and an answer that is a place among them")

    def keeps(self, record: Mapping[str, Any]) -> bool:
        """Whether the record has the values that ``where`` asks for."""
        return all(_text(value_at(record, field), field) in wanted for field, wanted in self.where.items())

    def apply(self, record: Mapping[str, Any], *, name: str, id: str) -> dict[str, Any]:
        """The record in our schema.

        Args:
          name, id: its source and its id where there is no template for them.

        Raises:
          RecordProblem: a field is missing or of the wrong kind, or the answer is none of the choices.
        """
        choices = [label for text in self.choices for label in self._choices(text, record)]
        answer = None if self.answer is None else self._answer(record, choices)
        known = {_OPTIONS: "\n".join(f"- {choice}" for choice in choices), _ANSWER: answer}
        known = {key: value for key, value in known.items() if value}
        made = {
            "id": id if self.id is None else fill(self.id, record),
            "source": name if self.source is None else fill(self.source, record),
            "prompt": fill(self.prompt, record, known),
            "response": fill(self.response, record, known),
        }
        return made | ({} if answer is None else {"answer": answer}) | ({"choices": choices} if choices else {})

    def _choices(self, template: str, record: Mapping[str, Any]) -> list[str]:
        whole = _PIECE.fullmatch(template)
        value = value_at(record, whole[1]) if whole and whole[1] else None
        texts = [_text(item, template) for item in value] if isinstance(value, list | tuple) else None
        return [self._label(text) for text in (texts or [fill(template, record)])]

    def _label(self, text: str) -> str:
        return self.labels.get(text.strip(), text.strip())

    def _answer(self, record: Mapping[str, Any], choices: Sequence[str]) -> str:
        text = fill(self.answer or "", record).strip()
        if self.answer_is == "text":
            return self._label(text)
        text = text.removesuffix(".0")  # of a column of numbers with gaps
        if not text.isdecimal() or int(text) >= len(choices):
            raise RecordProblem(
                f"the answer's place is {text!r}", f"a whole number from 0 to {len(choices) - 1}",
                "check the answer's template, or leave the record out with where",
            )  # fmt: skip
        return choices[int(text)]


@dataclasses.dataclass(frozen=True)
class Source:
    """Data as a recipe names it.

    Attributes:
      path: a file, a directory, a hub id ``owner/name`` or ``owner/name:config``, or one file of a data set on the hub,
        ``hf://datasets/owner/name/folder/file.json``.
      split, revision: of a hub data set.
      mapping: how fields become records; None: they are in one of our formats.
      shuffle: seed of a shuffle of the records; None: as they come.
      group: template; records for which it says the same stay together: ``shuffle`` and ``rows`` then speak of groups
        (answers to one question, so that none of it is in two splits).
      rows: [first, last) of the records (or groups) that are good and kept, after the shuffle; None: all.
    """

    path: str
    split: str = "train"
    revision: str | None = None
    mapping: FieldMapping | None = None
    shuffle: int | None = None
    group: str | None = None
    rows: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.group is not None:
            fields_of(self.group)
        if self.rows is not None and not 0 <= self.rows[0] < self.rows[1]:
            raise ConfigError(f"rows {list(self.rows)}: expected [first, last) with 0 <= first < last")

    @property
    def plain(self) -> bool:
        """Whether ``read_records`` reads it as it is."""
        return dataclasses.replace(self, path="") == Source("") and not self.path.startswith(HUB_FILE)


def prepare(
    sources: Sequence[Source], folder: str | Path, *, on_bad_record: Literal["raise", "skip"] = "raise"
) -> tuple[list[str], list[dict[str, Any]]]:
    """Paths that ``read_records`` reads for ``sources``: their own where they are plain, else JSONL files in
    ``folder``, named by what they depend on and made once (a hub data set is then not asked for again).

    Returns:
      (paths, one report for each file made: path, records, left_out, skipped and skipped_lines).

    Raises:
      DataError: ``FILE:LINE:`` of the first record that does not fit (unless skipped), a source without any.
    """
    paths, reports, skip = [], [], on_bad_record == "skip"
    for source in sources:
        if source.plain:
            paths.append(source.path)
            continue
        made = (
            Path(folder) / f"{re.sub(r'[^A-Za-z0-9]+', '-', source.path).strip('-')[-40:]}-{_key(source, skip)}.jsonl"
        )
        report = made.with_suffix(".json")
        if not (made.exists() and report.exists()):
            written = _write(source, made, skip)
            write_json(report, written, indent=None)
        paths.append(str(made))
        reports.append({"path": source.path, "file": str(made), **read_json(report, error=DataError)})
    return paths, reports


def _key(source: Source, skip: bool) -> str:
    remote = is_hub_id(source.path) or source.path.startswith(HUB_FILE)
    files = [] if remote else [source_signature(name, source.split) for name in list_sources(source.path, source.split)]
    return digest(VERSION, dataclasses.asdict(source), files, skip)[:16]


def _write(source: Source, path: Path, skip: bool) -> dict[str, Any]:
    """Map, choose and write the records; the file appears whole or not at all."""
    counts: dict[str, Any] = {"records": 0, "left_out": 0, "skipped": 0, "skipped_lines": []}
    records = _arranged(source, _mapped(source, counts, skip))
    first, last = source.rows or (0, None)

    def kept() -> Iterator[dict[str, Any]]:
        for position, record in records:
            if last is not None and position >= last:
                break
            if position >= first:
                yield record
                counts["records"] += 1
        if not counts["records"]:
            raise DataError(
                f"{source.path}: no record is left (rows {source.rows}, {counts['left_out']} left out by where, "
                f"{counts['skipped']} bad); check split, where and rows"
            )

    write_jsonl(path, kept())
    return counts


def _arranged(source: Source, records: Iterator[tuple[str, dict]]) -> Iterator[tuple[int, dict]]:
    """(place that ``rows`` counts, record) in the order wanted."""
    if source.shuffle is None and source.group is None:
        yield from enumerate(record for _, record in records)
        return
    groups: dict[str | int, list[dict]] = {}
    for i, (group, record) in enumerate(records):  # a shuffle, and a group, must see all of them
        groups.setdefault(i if source.group is None else group, []).append(record)
    order: list[int] = list(range(len(groups)))
    if source.shuffle is not None:
        order = numpy_rng(source.shuffle, "recipe", "shuffle").permutation(len(groups)).tolist()
    names = list(groups)
    for position, i in enumerate(order):
        for record in groups[names[i]]:
            yield position, record


def _mapped(source: Source, counts: dict[str, Any], skip: bool) -> Iterator[tuple[str, dict]]:
    """(group, record) of every record that is good and kept."""
    for number, ((name, part), row, value) in enumerate(_raw(source), 1):  # on one line there may be many records
        try:
            if isinstance(value, RecordProblem):
                raise value
            if not isinstance(value, Mapping):
                raise RecordProblem("the record is no object", "an object with named fields", "check the source")
            group = "" if source.group is None else fill(source.group, value)
            if source.mapping is None:
                yield group, dict(value)
            elif source.mapping.keeps(value):
                yield group, source.mapping.apply(value, name=name, id=f"{part}-{number}")
            else:
                counts["left_out"] += 1
        except RecordProblem as problem:
            if not skip:
                raise problem.at(f"{source.path}:{row}") from None
            counts["skipped"] += 1
            if len(counts["skipped_lines"]) < 100:
                counts["skipped_lines"].append(f"{source.path}:{row}: {problem}")


def _raw(source: Source) -> Iterator[tuple[tuple[str, str], int, Any]]:
    """((name of the data, name that no other part of it has), line or row from 1, record) of every record."""
    if source.path.startswith(HUB_FILE):
        inside = Path(source.path).with_suffix("").parts[-3:]
        files = [(str(_hub_file(source)), inside[-1], "-".join(inside))]
    elif is_hub_id(source.path):
        name, _, config = source_name(source.path), *source.path.partition(":")[1:]
        files = [(source.path, name, "-".join(filter(None, (name, config, source.split))))]
    else:
        files = [(path, source_name(path), source_name(path)) for path in list_sources(source.path, source.split)]
    for path, name, part in files:
        for row, value in iter_source(path, source.split, source.revision):
            yield (name, part), row, value


def _hub_file(source: Source) -> Path:
    """A file of a data set on the hub, downloaded once into the hub client's cache."""
    from huggingface_hub import hf_hub_download

    owner, name, *inside = source.path.removeprefix(HUB_FILE).split("/")
    try:
        cached = hf_hub_download(f"{owner}/{name}", "/".join(inside), repo_type="dataset", revision=source.revision)
    except Exception as error:  # the hub client raises a dozen unrelated types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{source.path}: the hub did not give this file ({reason}); check the path, the revision and the "
            "connection, or download it and give the path of the file"
        ) from error
    return Path(cached)


def fill(template: str, record: Mapping[str, Any], known: Mapping[str, str] | None = None) -> str:
    """The template with the record's fields put in; ``known`` names come first.

    Raises:
      RecordProblem: a field that the record lacks, or that is no text, number or list of texts.
    """

    def piece(match: re.Match) -> str:
        if match[0] in ("{{", "}}"):
            return match[0][0]
        name = match[1]
        return known[name] if known and name in known else _text(value_at(record, name), name)

    return _PIECE.sub(piece, template)


def fields_of(template: str) -> list[str]:
    """The names in a template's braces.

    Raises:
      ConfigError: a brace without its partner, or with nothing in it.
    """
    fields = []
    for match in _PIECE.finditer(template):
        if match[0] in ("{", "}") or (match[1] is not None and not match[1].strip()):
            raise ConfigError(
                f"template {template!r}: expected field names in braces, like {{question}}; {{{{ is a brace"
            )
        if match[1] is not None:
            fields.append(match[1])
    return fields


def value_at(record: Mapping[str, Any], name: str) -> Any:
    """The value at a dotted name, ``context.contexts``; RecordProblem where there is none."""
    value: Any = record
    for key in [name] if name in record else name.split("."):
        if not isinstance(value, Mapping) or is_absent(value.get(key)):
            seen = ", ".join(sorted(map(str, value))) if isinstance(value, Mapping) else "none"
            raise RecordProblem(
                f"the field {name!r} is missing (fields seen: {seen})", "the fields that the mapping names",
                "mend the mapping, or skip such records",
            )  # fmt: skip
        value = value[key]
    return value


def _text(value: Any, name: str) -> str:
    if isinstance(value, list | tuple):
        return "\n".join(_text(item, name) for item in value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int | float):
        return str(value)
    kind = type(value).__name__
    raise RecordProblem(f"the field {name!r} is a {kind}", "text, a number or a list of texts", "mend the mapping")
