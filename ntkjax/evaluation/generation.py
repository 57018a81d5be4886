"""Accuracy of generated answers.

Greedy generation; the answer is what follows the last "So the answer is" (the words of ``answer_template``
before its ``{}``, or a regular expression of your own). Where that marker is absent the answer is forced: the
marker is appended to what was generated, and the choice with the highest likelihood after it is taken, or,
where there are no choices, a few more tokens are generated and read. How many answers were parsed and how
many forced is reported: an accuracy made mostly of forced answers is a likelihood accuracy in disguise.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

from ntkjax.data.prompts import render_beginning, render_prompt
from ntkjax.errors import ConfigError
from ntkjax.evaluation.answers import (
    answer_marker,
    compile_pattern,
    default_pattern,
    last_answer,
    match_choice,
    normalise_answer,
    read_choice,
    same_answer,
)
from ntkjax.evaluation.choices import check_template, pack_choices, pick, score_packed
from ntkjax.evaluation.options import Batching, EvaluationSettings
from ntkjax.evaluation.packing import cut_prompt
from ntkjax.evaluation.shots import BLANK_LINE
from ntkjax.models.generate import SHORTEST_BUCKET, generate
from ntkjax.types import Params

FORCED_TOKENS = 16
"""Tokens generated after a forced marker where there are no choices."""


@dataclasses.dataclass(frozen=True)
class GeneratedAnswer:
    """The generated answer to one example.

    Attributes:
      row: row of the example.
      text: what was generated, special tokens removed (without a forced marker).
      predicted: the answer read off; a choice as written where it equals one; None where nothing could be
        read.
      how: ``"parsed"`` (marker found, and one of the choices where there are choices), ``"unmatched"``
        (marker found, but what follows is not a choice: counts as wrong) or ``"forced"``.
      correct: whether it equals the gold answer; None where the example has none.
      tokens: generated tokens, end-of-turn token excluded.
      dropped: prompt tokens cut from the left.
    """

    row: int
    text: str
    predicted: str | None
    how: str
    correct: bool | None
    tokens: int
    dropped: int


def gold_answer(example: Any, pattern: re.Pattern[str]) -> str | None:
    """The example's answer, or, where the field is empty, the one its response ends on (a choice as written where it
    is one); None where neither is there.
    """
    if example.answer is not None and example.answer.strip():
        return example.answer
    return _read(example, example.response or "", pattern)[0]


def _reserve(tokenizer: Any, examples: Sequence[Any], answer_template: str) -> int:
    """Tokens kept free behind the generated ones, so that a forced answer never costs more of the prompt."""
    choices = {choice for example in examples for choice in example.choices or ()}
    longest = max(
        (len(tokenizer.encode(answer_template.format(c), add_special_tokens=False)) for c in choices),
        default=0,
    )
    marker = len(tokenizer.encode(answer_marker(answer_template), add_special_tokens=False))
    free = marker + FORCED_TOKENS if any(not example.choices for example in examples) else 0
    return max(longest, free) + 4  # the blank before the marker, the end of the turn


def _prompts(tokenizer: Any, examples: Sequence[Any], room: int) -> tuple[list[list[int]], list[int]]:
    prompts = [render_prompt(tokenizer, example) for example in examples]
    return [cut_prompt(p, room, tokenizer.bos_token_id) for p in prompts], [max(0, len(p) - room) for p in prompts]


def _plan(lengths: Sequence[int], new_tokens: int, token_budget: int) -> list[tuple[list[int], int]]:
    """Batches of prompts that ``generate`` pads alike, longest first: ``(places, rows of the batch)``."""
    groups: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        groups.setdefault(max(SHORTEST_BUCKET, 1 << (length - 1).bit_length()), []).append(i)
    plan = []
    for padded, members in sorted(groups.items(), reverse=True):
        # A row costs its prompt and what is generated. The batches are evened out.
        most = max(1, token_budget // (padded + new_tokens))
        n_rows = -(-len(members) // -(-len(members) // most))
        plan += [(members[s : s + n_rows], n_rows) for s in range(0, len(members), n_rows)]
    return plan


def _generate_batch(
    model: Any, params: Params, prompts: list[list[int]], n_rows: int, new_tokens: int
) -> list[list[int]]:
    # Filler prompts keep the number of rows, and with it the compiled shape, fixed; what they give goes.
    filled = prompts + [prompts[-1]] * (n_rows - len(prompts))
    new = generate(model, params, filled, max_new_tokens=new_tokens, batch_size=n_rows)
    return new[: len(prompts)]


def _decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    return tokenizer.decode(list(tokens), skip_special_tokens=True).strip()


def _own_answer(example: Any, text: str) -> str:
    """The text up to the blank line that ends an answer among plain shots: what follows is a question made up."""
    return text.partition(BLANK_LINE)[0].rstrip() if example.before else text


def _content_length(model: Any, tokens: Sequence[int]) -> int:
    return len(tokens) - (len(tokens) > 0 and tokens[-1] in model.stop_tokens)


def _read(example: Any, text: str, pattern: re.Pattern[str]) -> tuple[str | None, str]:
    """(the answer in the text, how it came about); a choice as written where it is one."""
    if example.choices:
        choice = read_choice(text, pattern, example.choices)
        if choice is not None:
            return example.choices[choice], "parsed"
    answer = last_answer(text, pattern)
    if answer is None:
        return None, "forced"
    return answer, "unmatched" if example.choices else "parsed"


def forced_text(text: str, answer_template: str, choice: str | None = None) -> str:
    """The generated text with the marker (choice None) or the whole answer sentence appended."""
    tail = answer_marker(answer_template) if choice is None else answer_template.format(choice)
    return f"{text} {tail}" if text else tail


@dataclasses.dataclass(frozen=True)
class _Generation:
    """How answers are generated, read and, where the marker is absent, forced."""

    model: Any
    params: Params
    template: str
    pattern: re.Pattern[str]
    batching: Batching

    def force(
        self, examples: Sequence[Any], texts: Sequence[str], read: Sequence[tuple], rows: int
    ) -> list[str | None]:
        """The answers read, with the missing ones forced; ``rows``: of a batch of prompts."""
        answers = [answer for answer, _ in read]
        absent = [r for r, (_, how) in enumerate(read) if how == "forced"]
        fixed = [r for r in absent if examples[r].choices]
        free = [r for r in absent if not examples[r].choices]
        if fixed:
            for r, answer in zip(fixed, self.force_choices([(examples[r], texts[r]) for r in fixed])):
                answers[r] = answer
        if free:
            for r, answer in zip(free, self.force_free([(examples[r], texts[r]) for r in free], rows)):
                answers[r] = answer
        return answers

    def force_choices(self, todo: list[tuple[Any, str]]) -> list[str]:
        """The likeliest choice after generated text and marker, for each (example, text)."""
        packed = pack_choices(
            self.model.tokenizer,
            [example for example, _ in todo],
            [[forced_text(text, self.template, choice) for choice in example.choices] for example, text in todo],
            max_length=self.batching.max_length,
            score_shared=False,
        )
        answers = [""] * len(todo)
        # One bucket: forced answers are few in a batch, and a bucket for each would compile more than it saves.
        scored = score_packed(self.model, self.params, packed, token_budget=self.batching.token_budget, max_buckets=1)
        for done in scored:
            for i, sums in done:
                answers[i] = todo[i][0].choices[pick(sums)[0]]
        return answers

    def force_free(self, todo: list[tuple[Any, str]], rows: int) -> list[str | None]:
        """Generate a few tokens after the marker and read them, for each (example, text) without choices."""
        tokenizer, room = self.model.tokenizer, self.batching.max_length - FORCED_TOKENS
        marker = answer_marker(self.template)
        answers: list[str | None] = []
        for start in range(0, len(todo), rows):
            part = todo[start : start + rows]
            prompts = []
            for example, text in part:
                prompt = render_beginning(tokenizer, example, forced_text(text, self.template))
                prompts.append(cut_prompt(prompt, room, tokenizer.bos_token_id))
            new = _generate_batch(self.model, self.params, prompts, rows, FORCED_TOKENS)
            answers += [last_answer(f"{marker} {_decode(tokenizer, tokens)}", self.pattern) for tokens in new]
        return answers


def generate_answers(
    model: Any,
    params: Params,
    records: Any,
    settings: EvaluationSettings = EvaluationSettings(),
    *,
    batching: Batching,
    rows: Sequence[int] | None = None,
) -> Iterator[list[GeneratedAnswer]]:
    """Generate and read an answer for every example, one list for each batch.

    Args:
      model: a `LanguageModel`. params: the trained parameters, any subset of its tree.
      settings: the template of an answer, the pattern that reads it where that is another than the template's marker,
        and the longest answer; nothing else of them is looked at.
      batching: its ``max_length`` holds prompt, continuation and forced answer together; prompts are cut from the left
        to fit, and how much was cut is kept in ``dropped``.
      rows: which rows of the records; None for all.

    Raises:
      ConfigError: a template, pattern or number of new tokens that cannot work.
    """
    template, new_tokens = settings.answer_template, settings.max_new_tokens
    check_template(template)
    pattern = compile_pattern(settings.answer_pattern or default_pattern(template))
    rows = list(range(len(records)) if rows is None else rows)
    if not rows:
        return
    how, everything = _Generation(model, params, template, pattern, batching), [records[row] for row in rows]
    room = batching.max_length - new_tokens - _reserve(model.tokenizer, everything, template)
    if new_tokens < 1 or room < 1:
        raise ConfigError(
            f"max_new_tokens: {new_tokens} new tokens and a forced answer leave {room} of max_length "
            f"{batching.max_length} tokens for the prompt; expected at least one of each: raise max_length or generate "
            "fewer tokens"
        )
    prompts, dropped = _prompts(model.tokenizer, everything, room)
    for places, n_rows in _plan([len(p) for p in prompts], new_tokens, batching.token_budget):
        examples = [everything[i] for i in places]
        new = _generate_batch(model, params, [prompts[i] for i in places], n_rows, new_tokens)
        texts = [_own_answer(e, _decode(model.tokenizer, tokens)) for e, tokens in zip(examples, new)]
        read = [_read(example, text, pattern) for example, text in zip(examples, texts)]
        forced = how.force(examples, texts, read, n_rows)
        yield [
            GeneratedAnswer(
                row=rows[i],
                text=texts[r],
                predicted=forced[r],
                how=read[r][1],
                correct=_is_correct(examples[r], forced[r], pattern),
                tokens=_content_length(model, new[r]),
                dropped=dropped[i],
            )
            for r, i in enumerate(places)
        ]


def _is_correct(example: Any, predicted: str | None, pattern: re.Pattern[str]) -> bool | None:
    """Whether the answer is the gold one: the same choice where the gold answer is a choice, else an equal text; None
    where there is no gold answer."""
    gold = gold_answer(example, pattern)
    if gold is None or not normalise_answer(gold):
        return None
    if predicted is None:
        return False
    right = match_choice(gold, example.choices or ())
    return same_answer(predicted, gold) if right is None else match_choice(predicted, example.choices) == right
