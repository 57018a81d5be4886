"""What the model did on every example, on disk and in sum.

While an evaluation runs, finished pieces go to ``PATH.part`` batch by batch, one JSON object a line; a run
that is killed goes on from there. At the end ``PATH`` appears whole, one line for each example in the order
of the records.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ntkjax.errors import ConfigError, DataError
from ntkjax.files import write_json, write_jsonl
from ntkjax.job import barrier, is_primary


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One example's outcome. Fields that were not evaluated are None.

    Attributes:
      id, source: of the record.
      gold: the right answer, as in the record. choices: as in the record.
      logprobs: [C] log p(response_c | prompt), nats, summed. logprob_tokens: [C] tokens in each sum.
      predicted_raw, predicted_norm: the choice with the highest sum, and with the highest sum per token.
      correct_raw, correct_norm: whether that is the gold answer.
      tie_raw, tie_norm: whether another choice scored as high (the first listed was taken).
      nll: mean NLL of the record's own response, nats per token; nll_tokens: response tokens.
      generated: generated text; predicted_generated: the answer read from it; generated_how: ``parsed``,
        ``forced`` or ``unmatched``; correct_generated; generated_tokens.
      dropped_choices, dropped_generated: prompt tokens cut from the left before scoring choices and before
        generating.
    """

    id: str
    source: str
    gold: str | None = None
    choices: list[str] | None = None
    logprobs: list[float] | None = None
    logprob_tokens: list[int] | None = None
    predicted_raw: str | None = None
    predicted_norm: str | None = None
    correct_raw: bool | None = None
    correct_norm: bool | None = None
    tie_raw: bool | None = None
    tie_norm: bool | None = None
    nll: float | None = None
    nll_tokens: int | None = None
    generated: str | None = None
    predicted_generated: str | None = None
    generated_how: str | None = None
    correct_generated: bool | None = None
    generated_tokens: int | None = None
    dropped_choices: int | None = None
    dropped_generated: int | None = None

    def to_json(self) -> dict[str, Any]:
        """All fields, those that were not evaluated as null."""
        return dataclasses.asdict(self)


_FIELDS = frozenset(f.name for f in dataclasses.fields(Outcome))


def write_outcomes(path: str | Path, outcomes: Iterable[Outcome]) -> None:
    """Write one JSON object a line; the file appears whole or not at all."""
    write_jsonl(path, (outcome.to_json() for outcome in outcomes), allow_nan=False)


def read_outcomes(path: str | Path) -> list[Outcome]:
    """Read what `write_outcomes` wrote.

    Raises:
      DataError: ``FILE:LINE:`` of a line that is no outcome; or a file that is not there.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected the outcomes.jsonl of an evaluation")
    outcomes = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                if unknown := set(record) - _FIELDS:
                    raise ValueError(f"unknown fields {sorted(unknown)}")
                outcomes.append(Outcome(**record))
            except (ValueError, TypeError) as error:
                raise DataError(f"{path}:{number}: not an outcome ({error}); evaluate again") from None
    return outcomes


class OutcomeLog:
    """Pieces of outcomes as they come: in memory, and in ``PATH.part`` where a path is given. Of several processes that
    evaluate together all make the same calls, and the first writes.

    Args:
      path: where the outcomes go in the end; None keeps all in memory.
      settings: what decides the outcomes, as plain JSON values; kept in the first line of ``PATH.part`` and,
        beside the finished file, in ``PATH.settings.json``.

    Raises:
      ConfigError: the path holds the outcomes of other settings; the message names the first that changed.
    """

    def __init__(self, path: str | Path | None, settings: Mapping[str, Any]):
        self.pieces: dict[str, dict[int, dict]] = {}
        self.settings = json.loads(json.dumps(dict(settings)))
        self.path = None if path is None else Path(path)
        self.finished: list[Outcome] | None = None
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._check(self._read_settings())
            self.finished = read_outcomes(self.path)
        elif self._part.exists():
            self._resume()
        barrier("outcomes")  # all have read what there is before the first adds to it

    @property
    def _part(self) -> Path:
        assert self.path is not None
        return self.path.with_name(self.path.name + ".part")

    @property
    def _settings_path(self) -> Path:
        assert self.path is not None
        return self.path.with_name(self.path.name + ".settings.json")

    def _read_settings(self) -> dict:
        try:
            return json.loads(self._settings_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise ConfigError(
                f"{self.path} exists, but {self._settings_path.name} beside it cannot be read, so it is unknown what "
                "it holds; delete it or choose another path"
            ) from None

    def _check(self, stored: Mapping[str, Any]) -> None:
        for key in sorted({*stored, *self.settings}):
            if stored.get(key) != self.settings.get(key):
                raise ConfigError(
                    f"{self.path} holds an evaluation with another {key}: {stored.get(key)!r} there, "
                    f"{self.settings.get(key)!r} now; delete it or choose another path"
                )

    def _resume(self) -> None:
        good = []
        for number, line in enumerate(self._part.read_bytes().splitlines(keepends=True)):
            # A run killed while writing leaves a last line without its end: that piece is done again.
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
                if number == 0:
                    self._check(record)
                else:
                    self.pieces.setdefault(record.pop("kind"), {})[record.pop("row")] = record
            except (ValueError, TypeError, AttributeError, KeyError) as error:
                raise DataError(
                    f"{self._part}:{number + 1}: not a piece of an evaluation ({error}); "
                    "remove the file to evaluate anew"
                ) from None
            good.append(line)
        if not is_primary():
            return
        whole = sum(map(len, good))
        with self._part.open("r+b") as file:
            file.truncate(whole)

    def done(self, kind: str) -> set[int]:
        """Rows that have their piece of this kind."""
        return set(self.pieces.get(kind, {}))

    def add(self, kind: str, rows: Mapping[int, dict]) -> None:
        """Keep pieces, and write them out before returning."""
        self.pieces.setdefault(kind, {}).update(rows)
        if self.path is None or not is_primary():
            return
        new = not self._part.exists() or self._part.stat().st_size == 0
        with self._part.open("a", encoding="utf-8") as file:
            if new:
                file.write(json.dumps(self.settings) + "\n")
            for row, piece in rows.items():
                file.write(json.dumps({"kind": kind, "row": row, **piece}, ensure_ascii=False, allow_nan=False) + "\n")

    def finish(self, bases: Sequence[Outcome]) -> list[Outcome]:
        """Join the pieces onto ``bases`` (one for each row), write ``PATH`` and remove ``PATH.part``."""
        outcomes = []
        for row, base in enumerate(bases):
            fields: dict[str, Any] = {}
            for rows in self.pieces.values():
                fields.update(rows.get(row, {}))
            outcomes.append(dataclasses.replace(base, **fields))
        if self.path is not None and is_primary():
            # Settings first: outcomes without them are refused, settings without outcomes are nothing.
            write_json(self._settings_path, self.settings, indent=1)
            write_outcomes(self.path, outcomes)
            self._part.unlink(missing_ok=True)
        return outcomes
