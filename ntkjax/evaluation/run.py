"""One call that evaluates a model on records: choices, likelihood and, on request, generated answers."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ntkjax.data.encode import tokenise, tokenizer_digest
from ntkjax.errors import UserError
from ntkjax.evaluation.answers import compile_pattern, default_pattern
from ntkjax.evaluation.choices import ChoiceScores, check_template, gold_choice, pick, score_choices
from ntkjax.evaluation.generation import GeneratedAnswer, generate_answers, gold_answer
from ntkjax.evaluation.likelihood import ResponseNLL, response_nll
from ntkjax.evaluation.options import Batching, EvaluationSettings
from ntkjax.evaluation.outcomes import Outcome, OutcomeLog
from ntkjax.evaluation.shots import ShotRecords, Shots, check_separable, draw_shots
from ntkjax.evaluation.summary import summarise
from ntkjax.fingerprint import weights_fingerprint
from ntkjax.types import Params


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Outcomes in the order of the records, their summary (see `summarise`), and the shots before every question."""

    outcomes: list[Outcome]
    summary: dict[str, Any]
    shots: Shots | None = None


def evaluate_model(
    model: Any,
    params: Params,
    records: Any,
    settings: EvaluationSettings = EvaluationSettings(),
    *,
    batching: Batching,
    path: str | Path | None = None,
    shots: Shots | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Evaluate ``model`` with trained parameters ``params`` on ``records``.

    Args:
      model: a `LanguageModel`. params: any subset of its parameter tree, overlaid on its weights.
      records: `Records`. settings: what is measured.
      batching: how they are put into batches.
      path: outcomes as JSON lines; written as the run goes, and a run that was cut off goes on where it
        stopped. A path that holds finished outcomes of the same settings and weights is read back instead.
      shots: what `draw_shots` drew for these settings and records; None: it is drawn here.
      seed: of the bootstrap intervals; nothing else is random.

    Raises:
      UserError: nothing to evaluate, or a score that is not finite. ConfigError: settings that cannot work, or a path
        that holds other outcomes (the changed setting is named).
    """
    if len(records) == 0:
        raise UserError("there are no examples to evaluate; check the test file and the limit")
    check_template(settings.answer_template)
    pattern = (settings.answer_pattern or default_pattern(settings.answer_template)) if settings.generation else None
    shots, asked = shots or draw_shots(settings, records), records
    if shots is not None:
        if settings.generation:
            check_separable(shots, model.tokenizer)
        records = ShotRecords(records, shots.examples, model.tokenizer)
    # All that the outcomes depend on: a file that holds others is refused by the name of the setting. The token budget
    # is not in it: it moves results by rounding alone, and differs from machine to machine.
    decides = dataclasses.asdict(settings) | {"max_length": batching.max_length, "answer_pattern": pattern}
    # What was drawn decides, not how; an evaluation without shots is the same as before there were any.
    decides |= {"shots": None if shots is None else {"ids": shots.report()["ids"], "content": shots.fingerprint}}
    del decides["shots_from"], decides["on_bad_record"]
    if not settings.generation:
        decides["max_new_tokens"] = None
    if path is not None:
        decides["examples"] = _records_fingerprint(asked)
        decides["weights"] = weights_fingerprint(getattr(model, "params", {}), params)
        tokenizer = getattr(model, "tokenizer", None)  # its template decides what is read and where answers end
        decides["tokenizer"] = None if tokenizer is None else tokenizer_digest(tokenizer)[:16]
    log = OutcomeLog(path, decides)
    outcomes = log.finished
    if outcomes is None:
        bases, choice_rows, response_rows = _bases(records, pattern)
        job = _Job(model, params, records, bases, log, settings, batching, progress)
        _check_any(settings, choice_rows, response_rows, len(records))
        if settings.choices is not False:
            job.choices(choice_rows)
        if settings.likelihood:
            job.likelihood(response_rows)
        if settings.generation:
            job.generation(list(range(len(records))))
        outcomes = log.finish(bases)
    return Evaluation(outcomes, summarise(outcomes, seed=seed), shots)


@dataclasses.dataclass(frozen=True)
class _Job:
    """One evaluation under way: what is evaluated, and where the pieces go."""

    model: Any
    params: Params
    records: Any
    bases: list[Outcome]
    log: OutcomeLog
    settings: EvaluationSettings
    batching: Batching
    progress: bool

    def choices(self, rows: list[int]) -> None:
        def run(todo: list[int]) -> Iterator[list[ChoiceScores]]:
            return score_choices(
                self.model,
                self.params,
                self.records,
                batching=self.batching,
                answer_template=self.settings.answer_template,
                rows=todo,
            )

        self._run("choices", rows, run, lambda scores, base: _choice_piece(scores, base, self.records[scores.row]))

    def likelihood(self, rows: list[int]) -> None:
        self._likelihood_from_choices(rows)

        def run(todo: list[int]) -> Iterator[list[ResponseNLL]]:
            longest, turns = self.batching.max_length, self.settings.loss_turns
            dataset = tokenise(self.records, self.model.tokenizer, max_length=longest, loss_turns=turns)
            return response_nll(
                self.model,
                self.params,
                dataset.packed(self.batching.packing),
                token_budget=self.batching.token_budget,
                indices=np.asarray(todo, dtype=np.int64),
            )

        self._run("likelihood", rows, run, _nll_piece)

    def _likelihood_from_choices(self, rows: list[int]) -> None:
        """A response that is word for word one of the choices' has been scored already: no second pass for it.

        Not where the prompt was cut, since choices are cut to fit the longest of them, nor where earlier turns count.
        """
        scored, known = self.log.pieces.get("choices", {}), self.log.done("likelihood")
        known_nll = {}
        for row in rows:
            piece, base = scored.get(row), self.bases[row]
            if piece is None or row in known or piece["dropped_choices"]:
                continue
            example, template = self.records[row], self.settings.answer_template
            texts = [template.format(choice) for choice in base.choices or []]
            earlier = any(message["role"] == "assistant" for message in example.messages or ())
            if example.response in texts and not (earlier and self.settings.loss_turns == "all"):
                c = texts.index(example.response)
                tokens = piece["logprob_tokens"][c]
                known_nll[row] = {"nll": -piece["logprobs"][c] / tokens, "nll_tokens": tokens}
        if known_nll:
            self.log.add("likelihood", known_nll)

    def generation(self, rows: list[int]) -> None:
        def run(todo: list[int]) -> Iterator[list[GeneratedAnswer]]:
            return generate_answers(
                self.model, self.params, self.records, self.settings, batching=self.batching, rows=todo
            )

        self._run("generation", rows, run, _generated_piece)

    def _run(self, kind: str, rows: list[int], run: Callable, piece: Callable) -> None:
        """Do the rows that the log does not hold yet, and log them batch by batch."""
        done = self.log.done(kind)
        todo = [row for row in rows if row not in done]
        if not todo:
            return
        with tqdm(total=len(todo), desc=kind, unit="ex", disable=not self.progress) as bar:
            for batch in run(todo):
                self.log.add(kind, {item.row: piece(item, self.bases[item.row]) for item in batch})
                bar.update(len(batch))


def _bases(records: Any, pattern: str | None) -> tuple[list[Outcome], list[int], list[int]]:
    """An empty outcome for each record, the rows with choices and answer, and the rows with a response."""
    compiled = None if pattern is None else compile_pattern(pattern)
    bases, choice_rows, response_rows = [], [], []
    for row in range(len(records)):
        example = records[row]
        gold = example.answer if compiled is None else gold_answer(example, compiled)
        bases.append(Outcome(example.id, example.source, gold, list(example.choices) if example.choices else None))
        if gold_choice(example) is not None:
            choice_rows.append(row)
        if (example.response or "").strip():
            response_rows.append(row)
    return bases, choice_rows, response_rows


def _check_any(settings: EvaluationSettings, choice_rows: list[int], response_rows: list[int], n: int) -> None:
    if settings.choices and not choice_rows:
        raise UserError(
            f"none of the {n} examples has choices and an answer, so there is no accuracy over choices; expected "
            "records with the fields 'choices' and 'answer'; add them to the records"
        )
    measurable = (settings.likelihood and response_rows) or (settings.choices is not False and choice_rows)
    if not (settings.generation or measurable):
        raise UserError(
            f"there is nothing to evaluate: of {n} examples {len(response_rows)} have a response, and "
            f"{len(choice_rows)} have choices and an answer; expected one or the other; fill in the field "
            "'response', or 'choices' and 'answer'"
        )


def _records_fingerprint(records: Any) -> str:
    fingerprint = getattr(records, "fingerprint", None)
    if fingerprint is not None:
        return str(fingerprint)
    hasher = hashlib.blake2b(digest_size=16)
    for row in range(len(records)):
        example = records[row]
        hasher.update(repr((example.id, example.prompt, example.response, example.answer, example.choices)).encode())
    return hasher.hexdigest()


def _finite(values: Any, what: str, base: Outcome) -> None:
    if not np.all(np.isfinite(values)):
        raise UserError(
            f"example {base.id!r}: {what} is {values}, not finite; the weights or the number format are broken "
            "(did training diverge? try a lower learning rate, or float32)"
        )


def _choice_piece(scores: ChoiceScores, base: Outcome, example: Any) -> dict[str, Any]:
    assert base.choices is not None
    gold = gold_choice(example)
    _finite(scores.raw, "the log-probability of its choices", base)
    piece: dict[str, Any] = {
        "logprobs": [float(x) for x in scores.raw],
        "logprob_tokens": [int(x) for x in scores.tokens],
        "dropped_choices": scores.dropped,
    }
    for kind, values in (("raw", scores.raw), ("norm", scores.norm)):
        best, tie = pick(values)
        piece |= {f"predicted_{kind}": base.choices[best], f"tie_{kind}": tie, f"correct_{kind}": best == gold}
    return piece


def _nll_piece(scored: ResponseNLL, base: Outcome) -> dict[str, Any]:
    _finite(scored.nll, "the likelihood of its response", base)
    return {"nll": scored.nll, "nll_tokens": scored.tokens}


def _generated_piece(answer: GeneratedAnswer, base: Outcome) -> dict[str, Any]:
    return {
        "generated": answer.text,
        "predicted_generated": answer.predicted,
        "generated_how": answer.how,
        "correct_generated": answer.correct,
        "generated_tokens": answer.tokens,
        "dropped_generated": answer.dropped,
    }
