"""Examples with a wrong answer: a copy of a data set in which a share of the answers is flipped."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from ntkjax.data import Example, Records
from ntkjax.errors import ConfigError
from ntkjax.files import write_jsonl
from ntkjax.rng import numpy_rng


@dataclasses.dataclass(frozen=True)
class Flipped:
    """Which examples of the copy are flipped.

    Attributes:
      flipped: bool [N]. able: bool [N], those that could have been, of which ``flipped`` is a part: a flipped example
        is compared with these alone, since examples without an answer may score differently for that reason.
    """

    flipped: Bool[np.ndarray, " N"]
    able: Bool[np.ndarray, " N"]


def flip(records: Records, share: float, template: str, *, seed: int, path: Path) -> Flipped:
    """Write a copy of ``records`` to ``path``, in which the answers of round(share x N) of them are other ones.

    An answer becomes one of the record's other choices, or, in a record without choices, another answer of the same
    source, drawn uniformly; the last ``template.format(answer)`` in the response changes with it, and the reasoning
    before it stays. The copy depends on the arguments alone.

    Raises:
      ConfigError: fewer records than that have an answer which their response gives, and another one to take.
    """
    examples = list(records)
    others, wanted = other_answers(examples, share, template)
    able = np.asarray([bool(answers) for answers in others])
    rng = numpy_rng(seed, "validate", "flip")
    chosen = np.zeros(len(examples), bool)
    chosen[rng.permutation(np.flatnonzero(able))[:wanted]] = True
    for row in np.flatnonzero(chosen).tolist():
        example, new = examples[row], others[row][int(rng.integers(len(others[row])))]
        before, _, after = example.response.rpartition(template.format(example.answer))
        response = before + template.format(new) + after
        examples[row] = dataclasses.replace(example, response=response, answer=new)
    write_jsonl(path, (example.to_json() for example in examples))
    return Flipped(chosen, able)


def other_answers(examples: Iterable[Example], share: float, template: str) -> tuple[list[list[str]], int]:
    """(the answers that each example could get in the place of its own, how many are flipped). Raises as `flip`."""
    examples = list(examples)
    of_source: dict[str, set[str]] = {}
    for example in examples:
        if example.answer is not None:
            of_source.setdefault(example.source, set()).add(example.answer)
    others = [
        sorted(set(example.choices or of_source.get(example.source, ())) - {example.answer})
        if example.answer is not None and template.format(example.answer) in example.response
        else []
        for example in examples
    ]
    able, wanted = sum(map(bool, others)), round(share * len(examples))
    if not 1 <= wanted < able:
        raise ConfigError(
            f"--flip {share:g} asks for {wanted} of {len(examples)} answers, and {able} examples have an "
            f"answer that their response gives as {template.format('ANSWER')!r} and another one to take; expected "
            "from 1 to one fewer than these. Give another share, --answer-template, or data with the field answer"
        )
    return others, wanted
