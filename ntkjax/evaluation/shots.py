"""Few-shot prompts: examples of a file, solved, in front of every question.

Under a chat template a shot is a turn of the user and one of the assistant before the question's own turns; without one
it is ``prompt``, line break, ``response`` and a blank line before the question's text. No shot is in S(x): the
likelihood is that of the question's own response. Examples that grow longer than ``max_length`` are cut from the left
and counted like all others, so the first shots go first.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

from ntkjax.data import read_records
from ntkjax.data.indices import Positions
from ntkjax.data.prompts import render_text
from ntkjax.data.records import Example, Records
from ntkjax.data.turns import has_template
from ntkjax.errors import ConfigError, DataError
from ntkjax.evaluation.options import EvaluationSettings
from ntkjax.fingerprint import digest
from ntkjax.rng import numpy_rng

BLANK_LINE = "\n\n"
"""Stands between a shot and what follows it where there is no chat template."""


@dataclasses.dataclass(frozen=True)
class Shots:
    """The examples in front of every question, in the order in which they stand there.

    Attributes:
      path: the file they were drawn from.
      examples: what was drawn.
      left_out: examples of the file whose question is also asked in the test data, which are not drawn.
    """

    path: str
    examples: tuple[Example, ...]
    left_out: int

    @property
    def fingerprint(self) -> str:
        """16 hex digits of the content and order of what was drawn."""
        return digest([example.conversation() for example in self.examples])[:16]

    def report(self) -> dict[str, Any]:
        """Number of shots, file, ids and sources of the examples, and how many of the file were left out."""
        ids = [example.id for example in self.examples]
        return {"shots": len(ids), "from": self.path, "ids": ids, "left_out": self.left_out}


def draw_shots(settings: EvaluationSettings, test: Any) -> Shots | None:
    """``settings.shots`` examples of the file ``settings.shots_from``; None for 0 shots.

    Drawn with a fixed seed: the first ``shots`` of one permutation of the file whose question (every message before the
    response) is not asked in ``test``, so that fewer shots are the first of more.

    Raises:
      ConfigError: the file holds fewer such examples. DataError: a file that cannot be read.
    """
    if settings.shots == 0:
        return None
    assert settings.shots_from is not None
    records = read_records(settings.shots_from, on_bad_record=settings.on_bad_record)
    asked = {_question(test[row]) for row in range(len(test))}
    examples = [records[int(row)] for row in numpy_rng(0, "evaluation", "shots").permutation(len(records))]
    usable = [example for example in examples if _question(example) not in asked]
    left_out = len(examples) - len(usable)
    if len(usable) < settings.shots:
        raise ConfigError(
            f"{settings.shots_from}: {settings.shots} shots were asked for, and of its {len(examples)} examples "
            f"{left_out} ask what the test data ask; expected at least {settings.shots} others; lower --shots, or give "
            "a larger file with --shots-from"
        )
    return Shots(settings.shots_from, tuple(usable[: settings.shots]), left_out)


def describe_shots(shots: Shots) -> str:
    """How many shots there are, of which file, and how many of it were left out, in one line."""
    left = f"; {shots.left_out} of its examples ask what the test data ask and were left out" * bool(shots.left_out)
    return f"{len(shots.examples)} shots from {shots.path} before every question{left}"


def _question(example: Example) -> str:
    context = [(message["role"], message["content"]) for message in example.conversation()[:-1]]
    return json.dumps(context, ensure_ascii=False)


def with_shots(example: Example, shots: Sequence[Example], tokenizer: Any) -> Example:
    """``example`` with ``shots`` in front of its question.

    Raises:
      DataError: under a chat template, a shot that has another system message, or other tools, than the question has.
    """
    if not has_template(tokenizer):
        before = "".join(render_text(tokenizer, shot).text + BLANK_LINE for shot in shots)
        return dataclasses.replace(example, before=before)
    own = example.conversation()[:-1]
    system = _leading_system(own)
    turns: list[dict[str, Any]] = []
    for shot in shots:
        messages = shot.conversation()
        leading = _leading_system(messages)
        if leading and [m["content"] for m in leading] != [m["content"] for m in system]:
            raise DataError(
                f"shot {shot.id!r}: its system message {leading[0]['content']!r} is not that of the question "
                f"{example.id!r}; expected the same or none; remove it from the file of --shots-from, or add it to the "
                "test data"
            )
        if shot.tools is not None and shot.tools != example.tools:
            raise DataError(
                f"shot {shot.id!r}: its tools are not those of the question {example.id!r}; expected the same or none; "
                "remove the field 'tools' from the file of --shots-from, or add it to the test data"
            )
        turns += [
            {**message, "weight": 0} if message["role"] == "assistant" else message
            for message in messages[len(leading) :]
        ]
    return dataclasses.replace(example, messages=(*system, *turns, *own[len(system) :]))


def _leading_system(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    first = next((k for k, message in enumerate(messages) if message["role"] != "system"), len(messages))
    return list(messages[:first])


def check_separable(shots: Shots, tokenizer: Any) -> None:
    """Raise DataError where a generated answer could not be told from a further example that the model makes up.

    Without a chat template an answer ends at a blank line, so no response among the shots may hold one.
    """
    for shot in shots.examples:
        if not has_template(tokenizer) and BLANK_LINE in shot.response:
            raise DataError(
                f"{shots.path}: the response of the shot {shot.id!r} holds a blank line, which without a chat template "
                "ends a generated answer; expected none; remove it from the record, or evaluate without --generation"
            )


@dataclasses.dataclass(frozen=True)
class ShotRecords:
    """``records`` with ``shots`` in front of every question: rows, ids and places are those of ``records``."""

    records: Records
    shots: tuple[Example, ...]
    tokenizer: Any

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, row: int) -> Example:
        return with_shots(self.records[row], self.shots, self.tokenizer)

    def __iter__(self) -> Iterator[Example]:
        return (with_shots(example, self.shots, self.tokenizer) for example in self.records)

    def subset(self, indices: Positions) -> ShotRecords:
        """The records at ``indices``, in that order, with the same shots."""
        return dataclasses.replace(self, records=self.records.subset(indices))

    def location(self, row: int) -> str:
        """``FILE:LINE`` of the question."""
        return self.records.location(row)

    @property
    def fingerprint(self) -> str:
        """32 hex digits of the content and order of questions and shots."""
        shots = [example.to_json() for example in self.shots]
        return digest(self.records.fingerprint, shots)[:32]
