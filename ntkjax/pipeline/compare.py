"""Methods by seeds to one table: means, spread, intervals and paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ntkjax.evaluation import Outcome, compare_seeds, hierarchical_bootstrap, holm, mcnemar

Runs = Mapping[str, Sequence[Sequence[Outcome]]]
"""method -> one list of outcomes for each seed; a method without randomness has one list."""

METRICS = {
    "accuracy": "correct_raw",
    "accuracy_norm": "correct_norm",
    "accuracy_generated": "correct_generated",
    "nll": "nll",
}
"""Name in results.json -> field of an outcome. nll is the mean over examples of nats per response token."""


def values(outcomes: Sequence[Outcome], field: str) -> np.ndarray | None:
    """The field of every example that has it, float64 [n]; None where no example has."""
    found = [getattr(outcome, field) for outcome in outcomes if getattr(outcome, field) is not None]
    return np.asarray(found, np.float64) if found else None


def summarise_method(runs: Sequence[Sequence[Outcome]], *, seed: int) -> dict:
    """For each metric the per-seed means, their mean and standard deviation, and a 95% interval.

    The interval resamples examples and seeds together (``hierarchical_bootstrap``); sd is over seeds (n - 1), None
    for a single run.
    """
    row: dict = {"seeds": len(runs), "examples": len(runs[0])}
    for name, field in METRICS.items():
        tables = [values(run, field) for run in runs]
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
        for name, field in METRICS.items():
            if any(values(run, field) is None for run in [*runs[method], *runs[reference]]):
                continue
            result = compare_seeds(runs[reference], runs[method], field, seed=seed)
            tested = None if field == "nll" else _mcnemar_by_seed(runs[reference], runs[method], field)
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


def _mcnemar_by_seed(
    first: Sequence[Sequence[Outcome]], second: Sequence[Sequence[Outcome]], field: str
) -> list[float]:
    count = max(len(first), len(second))
    first = list(first) * (count if len(first) == 1 else 1)
    second = list(second) * (count if len(second) == 1 else 1)
    right = lambda run: np.asarray([bool(getattr(o, field)) for o in run if getattr(o, field) is not None])
    return [mcnemar(right(a), right(b)).p_exact for a, b in zip(first, second)]
