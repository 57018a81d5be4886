"""Methods by seeds to one table: means, spread, intervals and paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ntkjax.evaluation import METRICS, Metric, Outcome, compare_seeds, hierarchical_bootstrap, holm, mcnemar, values
from ntkjax.evaluation.metrics import right_or_wrong
from ntkjax.pipeline.study.arms import BASE

Runs = Mapping[str, Sequence[Sequence[Outcome]]]
"""method -> one list of outcomes for each seed; a method without randomness has one list."""


def summarise_method(runs: Sequence[Sequence[Outcome]], *, seed: int) -> dict:
    """For each metric the per-seed means, their mean and standard deviation, and a 95% interval.

    The interval resamples examples and seeds together (``hierarchical_bootstrap``); sd is over seeds (n - 1), None
    for a single run.
    """
    row: dict = {"seeds": len(runs), "examples": len(runs[0])}
    for name, metric in METRICS.items():
        tables = [values(run, metric) for run in runs]
        if any(table is None for table in tables):
            continue
        table = np.stack([t for t in tables if t is not None])
        interval = hierarchical_bootstrap(table, seed=seed)
        means = table.mean(axis=1)
        row[name] = {
            "mean": float(means.mean()),
            "sd": float(means.std(ddof=1)) if len(means) > 1 else None,
            "low": interval.low,
            "high": interval.high,
            "per_seed": means.tolist(),
        }
    return row


def compare_methods(runs: Runs, pairs: Sequence[tuple[str, str]], *, seed: int) -> list[dict]:
    """Each (method, reference) pair, metric by metric, on the same examples and seeds; pairs not run are left out.

    Returns:
      Rows ``{"method", "reference", "metric", "difference", "low", "high", "per_seed", "p_mcnemar", "p_holm"}``:
      difference is method minus reference with its interval over seeds and examples; ``p_mcnemar`` the exact test of
      each seed's pair of runs, ``p_holm`` the smallest of them after Holm's correction over the seeds (None where the
      metric is not right-or-wrong).
    """
    rows = []
    for method, reference in pairs:
        if method not in runs or reference not in runs:
            continue
        for name, metric in METRICS.items():
            if any(values(run, metric) is None for run in [*runs[method], *runs[reference]]):
                continue
            result = compare_seeds(runs[reference], runs[method], metric, seed=seed)
            tested = _mcnemar_by_seed(runs[reference], runs[method], metric)
            rows.append(
                {
                    "method": method,
                    "reference": reference,
                    "metric": name,
                    "difference": result["difference"]["estimate"],
                    "low": result["difference"]["low"],
                    "high": result["difference"]["high"],
                    "per_seed": result["per_seed"],
                    "p_mcnemar": tested,
                    "p_holm": None if tested is None else float(holm(tested).min()),
                }
            )
    return rows


def paired_runs(
    runs: Mapping[str, Mapping[int, Sequence[Outcome]]], pair: tuple[str, str]
) -> list[list[Sequence[Outcome]]]:
    """The runs of two methods, each given by seed, with the seeds that both have; the base model has one run, which is
    paired with every run of the other."""
    own = [runs[name] for name in pair if name != BASE]
    seeds = [seed for seed in own[0] if seed in own[-1]]
    whole = lambda name: list(runs[name].values()) * len(seeds)
    return [whole(name) if name == BASE else [runs[name][seed] for seed in seeds] for name in pair]


def _mcnemar_by_seed(
    first: Sequence[Sequence[Outcome]], second: Sequence[Sequence[Outcome]], metric: Metric
) -> list[float] | None:
    """The exact p-value of each seed's pair of runs; None where the metric is not right-or-wrong."""
    count = max(len(first), len(second))
    first = list(first) * (count if len(first) == 1 else 1)
    second = list(second) * (count if len(second) == 1 else 1)
    pairs = [(values(a, metric), values(b, metric)) for a, b in zip(first, second)]
    if not (metric.share and all(right_or_wrong(table) for pair in pairs for table in pair if table is not None)):
        return None
    return [mcnemar(a, b).p_exact for a, b in pairs if a is not None and b is not None]


def spread(numbers: Sequence[float | int | np.floating]) -> dict:
    """``mean`` (None for no numbers), ``sd`` (n - 1; None for fewer than two) and the numbers, ``values``."""
    table = [float(number) for number in numbers]
    return {
        "mean": float(np.mean(table)) if table else None,
        "sd": float(np.std(table, ddof=1)) if len(table) > 1 else None,
        "values": table,
    }
