"""``ntkjax show``: the tokens of a record as the model gets them, with S(x) marked. Reads a tokenizer, no weights."""

from __future__ import annotations

import dataclasses
from itertools import groupby
from typing import Annotated

import numpy as np
import tyro

from ntkjax.commands.base import Command
from ntkjax.data import read_records, tokenise
from ntkjax.data.prompts import stop_tokens
from ntkjax.errors import ConfigError
from ntkjax.models.load import find_directory, load_tokenizer, read_config
from ntkjax.pipeline.options import DataOptions
from ntkjax.pipeline.reading import reading


@dataclasses.dataclass(frozen=True)
class ShowConfig:
    """Show the tokens of records and which of them are learned: S(x), the positions that loss and
    scores are taken over."""

    model: str
    """Hugging Face directory, hub id or `real`; only its tokenizer and config.json are read."""
    data: tuple[str, ...]
    """JSONL, JSON, Parquet, directory or hub id."""
    row: tuple[int, ...] = (0,)
    """Which records, counted from 0 in the order of reading."""
    tokens: bool = True
    """List every token. Off: the text alone, part by part."""
    reading: Annotated[DataOptions, tyro.conf.arg(name="")] = DataOptions()


@dataclasses.dataclass(frozen=True)
class ShownRecord:
    """One record as tokens.

    Attributes:
      row: its position among the records read; place: ``FILE:LINE``; name: its id.
      tokens: int32 [T]. texts: the T tokens as text. trained: bool [T], True at tokens that are learned.
    """

    row: int
    place: str
    name: str
    tokens: np.ndarray
    texts: list[str]
    trained: np.ndarray

    def parts(self) -> list[tuple[bool, range]]:
        """(whether they are learned, positions) of each stretch of tokens."""
        runs = [
            (mark, list(group)) for mark, group in groupby(range(len(self.tokens)), lambda t: bool(self.trained[t]))
        ]
        return [(mark, range(run[0], run[-1] + 1)) for mark, run in runs]


@dataclasses.dataclass(frozen=True)
class Shown:
    """The records asked for, the tokens at which generation stops (as text), and the counts of tokenising."""

    records: list[ShownRecord]
    decoded: list[list[str]]
    stops: list[str]
    report: dict


def show(config: ShowConfig, *, progress: bool = True) -> Shown:
    """Read, tokenise and mark the records ``config.row`` of ``config.data``.

    Raises:
      DataError: an unusable record, by FILE:LINE. CheckpointError: no usable tokenizer. ConfigError: no such row.
    """
    directory = find_directory(config.model)
    model_config = read_config(directory)
    tokenizer = load_tokenizer(directory, model_config)
    if tokenizer is None:
        raise ConfigError(f"{config.model}: no tokenizer files (tokenizer.json); add them to the directory")
    reading = config.reading
    records = read_records(list(config.data), on_bad_record=reading.on_bad_record)
    data = tokenise(
        records,
        tokenizer,
        max_length=reading.max_length,
        loss_turns=reading.loss_turns,
        on_bad_record=reading.on_bad_record,
    )
    if not config.row:
        raise ConfigError("--row names no record; expected one or more numbers, counted from 0, such as --row 0 3")
    for row in config.row:
        if not 0 <= row < len(data):
            raise ConfigError(f"--row {row}: there are {len(data)} records; expected 0 to {len(data) - 1}")
    shown = [_record(data, tokenizer, row) for row in config.row]
    decoded = [[tokenizer.decode(item.tokens[list(part)]) for _, part in item.parts()] for item in shown]
    ends = sorted(stop_tokens(tokenizer, model_config.eos_token_ids))
    stops = [tokenizer.convert_ids_to_tokens(end) or f"{end} (no token of the tokenizer)" for end in ends]
    return Shown(shown, decoded, stops, {"records": records.report, "tokens": data.report})


def _record(data, tokenizer, row: int) -> ShownRecord:
    tokens = np.array(data.tokens(row)[0])
    texts = tokenizer.convert_ids_to_tokens(tokens.tolist())
    return ShownRecord(
        row, data.records.location(row), data.records.ids[row], tokens, texts, np.array(data.trained(row))
    )


def describe(config: ShowConfig, result: Shown) -> str:
    """Each record: where it stands, its parts as text, and its tokens."""
    lines = []
    for item, texts in zip(result.records, result.decoded):
        learned = int(item.trained.sum())
        lines.append(f"{item.place}, id {item.name}: {len(item.tokens)} tokens, {learned} of them learned")
        for (mark, part), text in zip(item.parts(), texts):
            lines.append(f"  {'learned' if mark else 'given  '} [{part.start}, {part.stop}) {text!r}")
        if config.tokens:
            marks = zip(item.tokens.tolist(), item.texts, item.trained)
            lines += [
                f"  {t:6d} {token:8d} {'x' if mark else ' '} {text}" for t, (token, text, mark) in enumerate(marks)
            ]
    lines.append(f"generation stops at: {', '.join(result.stops)}")
    return "\n".join([*lines, reading({"data": result.report})])


COMMAND = Command(ShowConfig, show, describe)
