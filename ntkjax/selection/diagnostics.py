"""What is reported of every selection: whether its scores follow length or the pool's mean, and its sources."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
from jaxtyping import Int

from ntkjax.ntk.metrics import spearman
from ntkjax.selection.base import Dataset, Selection

SHOWN = 5


def described(selection: Selection, pool: Dataset) -> Selection:
    """The selection with `describe` before what the method reports of its own in ``diagnostics``."""
    return dataclasses.replace(selection, diagnostics=describe(selection, pool) | selection.diagnostics)


def describe(selection: Selection, pool: Dataset) -> dict[str, Any]:
    """Plain JSON values over the rows that were scored.

    Returns:
      ``rank_correlation_with_length`` (Spearman of score and response tokens), ``rank_correlation_with_pool_mean``
      (where there are ``pool_mean_scores``), ``negative_share`` (of scored rows), ``scored``, ``pool``,
      ``mean_response_tokens_chosen`` / ``_offered``, ``sources_offered`` / ``sources_chosen`` (counts). A correlation
      is None where it is undefined (a constant side).
    """
    scored = selection.scored
    scores, lengths = selection.scores[scored], np.asarray(pool.response_lengths)
    sources = pool.sources  # a name for each row: counted as it is read, never held for all of them
    report: dict[str, Any] = {
        "pool": len(scored),
        "scored": int(scored.sum()),
        "rank_correlation_with_length": _spearman(scores, lengths[scored]),
        "negative_share": float(np.mean(scores < 0)),
        "mean_response_tokens_offered": float(lengths.mean()),
        "mean_response_tokens_chosen": float(lengths[selection.selected].mean()),
        "sources_offered": dict(sorted(Counter(sources).items())),
        "sources_chosen": dict(sorted(Counter(sources[int(row)] for row in selection.selected).items())),
    }
    if selection.pool_mean_scores is not None:
        report["rank_correlation_with_pool_mean"] = _spearman(scores, selection.pool_mean_scores[scored])
    return report


def _spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    value = spearman(a, b) if len(a) > 1 else float("nan")
    return None if np.isnan(value) else value


def examples(selection: Selection, shown: int = SHOWN) -> dict[str, Int[np.ndarray, " s"]]:
    """Rows to look at: the best chosen, those just below the cut, and the lowest scores."""
    order = np.argsort(np.where(selection.ranks > 0, selection.ranks, np.iinfo(np.int64).max), kind="stable")
    order = order[: int(selection.scored.sum())]
    rejected = order[~np.isin(order, selection.selected)]
    return {
        "chosen": selection.selected[:shown],
        "just_missed": rejected[:shown],
        "lowest": rejected[shown:][::-1][:shown],
    }
