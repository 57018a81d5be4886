"""An evaluation in a few numbers, each with its interval and beside the number that needs no model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ntkjax.evaluation.answers import count_answers
from ntkjax.evaluation.likelihood import summarise_nll
from ntkjax.evaluation.metrics import METRICS, Metric, right_or_wrong, values
from ntkjax.evaluation.outcomes import Outcome
from ntkjax.evaluation.significance import bootstrap_mean, wilson_interval


def summarise(outcomes: Sequence[Outcome], *, level: float = 0.95, seed: int = 0) -> dict[str, Any]:
    """Plain JSON values that sum the outcomes up.

    Returns:
      ``n``; ``accuracy`` with ``accuracy_interval`` (Wilson) and ``accuracy_kind``: ``raw`` (choices by
      summed likelihood, what a model trained on such responses maximises) where there are choices, else
      ``generated``, else all None; ``choices`` (see `summarise_choices`), ``likelihood``, ``generation``:
      dicts, None where not evaluated; ``metrics``: of every metric of `METRICS` that an example has, by name, as in
      `summarise_metric`.
    """
    choices = summarise_choices(outcomes, level=level)
    generation = summarise_generation(outcomes, level=level)
    head: dict[str, Any] = {"accuracy": None, "accuracy_interval": None, "accuracy_kind": None}
    if choices is not None:
        head = {
            "accuracy": choices["accuracy_raw"],
            "accuracy_interval": choices["accuracy_raw_interval"],
            "accuracy_kind": "raw",
        }
    elif generation is not None and generation["n"]:
        head = {
            "accuracy": generation["accuracy"],
            "accuracy_interval": generation["accuracy_interval"],
            "accuracy_kind": "generated",
        }
    metrics = {name: summarise_metric(outcomes, metric, level=level, seed=seed) for name, metric in METRICS.items()}
    return {
        "n": len(outcomes),
        **head,
        "level": level,
        "metrics": {name: entry for name, entry in metrics.items() if entry is not None},
        "choices": choices,
        "likelihood": summarise_likelihood(outcomes, level=level, seed=seed),
        "generation": generation,
    }


def summarise_metric(
    outcomes: Sequence[Outcome], metric: Metric, *, level: float = 0.95, seed: int = 0
) -> dict[str, Any] | None:
    """``n`` examples that have the metric, their ``mean`` and its ``interval`` [low, high]: Wilson's where values are
    right or wrong, else BCa over examples; None where no example has it."""
    table = values(outcomes, metric)
    if table is None:
        return None
    if metric.share and right_or_wrong(table):
        interval = wilson_interval(int(table.sum()), table.size, level=level)
    else:
        interval = bootstrap_mean(table, level=level, seed=seed)
    return {"n": int(table.size), "mean": interval.estimate, "interval": [interval.low, interval.high]}


def _accuracy(name: str, correct: Sequence[bool | None], level: float) -> dict[str, Any]:
    right, n = sum(bool(c) for c in correct), len(correct)
    interval = wilson_interval(right, n, level=level)
    return {name: interval.estimate, f"{name}_interval": [interval.low, interval.high]}


def _shares(answers: Sequence[tuple[str | None, Sequence[str] | None]]) -> dict[str, float]:
    """answer -> share, of (answer, choices of its question); an answer that could not be read counts as ""."""
    counts = count_answers((answer or "", choices) for answer, choices in answers)
    return {answer: count / len(answers) for answer, count in counts.items()}


def describe_choices(with_choices: int, n: int) -> str:
    """How many of ``n`` examples accuracy over choices is about, in one line; "" where it is about all."""
    if with_choices == n:
        return ""
    if not with_choices:
        return "no example has choices and an answer: there is no accuracy over choices"
    return f"{with_choices} of {n} examples have choices and an answer: accuracy over choices is about them"


def majority(outcomes: Iterable[Outcome]) -> tuple[str, int]:
    """The commonest gold answer of the outcomes and how often it is right (ties: the first by text)."""
    return _commonest((str(o.gold), o.choices) for o in outcomes)


def _commonest(asked: Iterable[tuple[str, Sequence[str] | None]]) -> tuple[str, int]:
    return next(iter(count_answers(asked).items()))


def majority_accuracy(asked: Sequence[tuple[str, Sequence[str] | None]]) -> float | None:
    """The share of questions, given as (gold answer, choices), that the commonest gold answer is right for; None where
    there are none."""
    return _commonest(asked)[1] / len(asked) if asked else None


def _by_source(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.source, []).append(outcome)
    return dict(sorted(groups.items()))


def summarise_choices(outcomes: Sequence[Outcome], *, level: float = 0.95) -> dict[str, Any] | None:
    """Accuracy over choices, raw and length-normalised, beside what answering without reading would give.

    ``majority_accuracy``: the commonest gold answer for every example; ``majority_accuracy_by_source``: the
    commonest of its source; ``chance``: mean of 1/C. ``without_choices`` examples count in nothing here. Ties
    went to the first choice.
    """
    scored = [o for o in outcomes if o.correct_raw is not None]
    if not scored:
        return None
    n = len(scored)
    sources = _by_source(scored)
    answer, count = majority(scored)
    return {
        "n": n,
        "without_choices": len(outcomes) - n,
        **_accuracy("accuracy_raw", [o.correct_raw for o in scored], level),
        **_accuracy("accuracy_norm", [o.correct_norm for o in scored], level),
        "ties_raw": sum(bool(o.tie_raw) for o in scored),
        "ties_norm": sum(bool(o.tie_norm) for o in scored),
        "majority_answer": answer,
        "majority_accuracy": count / n,
        "majority_accuracy_by_source": sum(majority(group)[1] for group in sources.values()) / n,
        "chance": float(np.mean([1 / len(o.choices or [""]) for o in scored])),
        "gold_shares": _shares([(o.gold, o.choices) for o in scored]),
        "predicted_raw_shares": _shares([(o.predicted_raw, o.choices) for o in scored]),
        "predicted_norm_shares": _shares([(o.predicted_norm, o.choices) for o in scored]),
        "truncated_prompts": sum(bool(o.dropped_choices) for o in scored),
        "by_source": {
            name: {
                "n": len(group),
                "accuracy_raw": sum(bool(o.correct_raw) for o in group) / len(group),
                "accuracy_norm": sum(bool(o.correct_norm) for o in group) / len(group),
            }
            for name, group in sources.items()
        },
    }


def summarise_likelihood(outcomes: Sequence[Outcome], *, level: float = 0.95, seed: int = 0) -> dict[str, Any] | None:
    """`summarise_nll` with a BCa interval of the mean over examples; None where no response was scored."""
    scored = [(o.nll, o.nll_tokens) for o in outcomes if o.nll is not None and o.nll_tokens]
    if not scored:
        return None
    nll, tokens = np.asarray(scored, dtype=np.float64).T
    interval = bootstrap_mean(nll, level=level, seed=seed)
    return {
        **summarise_nll(nll, tokens),
        "nll_per_example_interval": [interval.low, interval.high],
        "without_tokens": len(outcomes) - len(scored),
    }


def summarise_generation(outcomes: Sequence[Outcome], *, level: float = 0.95) -> dict[str, Any] | None:
    """Accuracy of generated answers and how they came about; None where nothing was generated.

    ``accuracy_parsed`` is the accuracy among the answers the model gave unasked (parsed or unmatched).
    """
    generated = [o for o in outcomes if o.generated_how is not None]
    if not generated:
        return None
    judged = [o for o in generated if o.correct_generated is not None]
    unasked = [o for o in judged if o.generated_how != "forced"]
    how = Counter(o.generated_how for o in generated)
    return {
        "n": len(judged),
        "without_gold": len(generated) - len(judged),
        **(
            _accuracy("accuracy", [o.correct_generated for o in judged], level)
            if judged
            else {"accuracy": None, "accuracy_interval": None}
        ),
        "accuracy_parsed": sum(bool(o.correct_generated) for o in unasked) / len(unasked) if unasked else None,
        "parsed": how["parsed"],
        "unmatched": how["unmatched"],
        "forced": how["forced"],
        "unreadable": sum(o.predicted_generated is None for o in generated),
        "tokens_per_answer": float(np.mean([o.generated_tokens or 0 for o in generated])),
        "truncated_prompts": sum(bool(o.dropped_generated) for o in generated),
        "predicted_shares": _shares([(o.predicted_generated, o.choices) for o in generated])
        if any(o.choices for o in generated)
        else None,
    }
