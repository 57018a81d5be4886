"""Two runs, or two methods with several seeds each, compared on the same examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ntkjax.errors import UserError
from ntkjax.evaluation.metrics import Metric, right_or_wrong
from ntkjax.evaluation.significance import hierarchical_bootstrap, mcnemar, paired_bootstrap


def check_same_examples(first_ids: Sequence[str], second_ids: Sequence[str]) -> None:
    """Refuse two runs that did not answer the same examples in the same order.

    Raises:
      UserError: naming the first position at which the ids differ.
    """
    for position, (a, b) in enumerate(zip(first_ids, second_ids)):
        if a != b:
            raise UserError(
                f"the runs cannot be paired: example {position} is {a!r} in the first and {b!r} in the "
                f"second; "
                "evaluate both on the same file"
            )
    if len(first_ids) != len(second_ids):
        shared = min(len(first_ids), len(second_ids))
        longer = first_ids if len(first_ids) > len(second_ids) else second_ids
        which = "second" if len(first_ids) > len(second_ids) else "first"
        raise UserError(
            f"the runs cannot be paired: {len(first_ids)} examples against {len(second_ids)}; "
            f"{longer[shared]!r} at position {shared} is missing from the {which}; evaluate both on the "
            f"same file"
        )


def _as_metric(key: str | Metric) -> Metric:
    return key if isinstance(key, Metric) else Metric(key, key, key)


def _id(outcome) -> str:
    return str(outcome["id"] if isinstance(outcome, Mapping) else outcome.id)


def paired_values(first: Sequence, second: Sequence, key: str | Metric) -> tuple[np.ndarray, np.ndarray]:
    """Per-example values of ``key`` (a field of `Outcome`, or a `Metric`) from two runs' outcomes (``Outcome`` objects
    or dicts), as float64 [n] each.

    Examples for which *neither* run has a value (no choices, say) are left out; one that only one run has is
    an error.

    Raises:
      UserError: ids that differ, a value that only one run has, or no values at all.
    """
    check_same_examples([_id(o) for o in first], [_id(o) for o in second])
    metric = _as_metric(key)
    pairs = [(_id(a), metric.value(a), metric.value(b)) for a, b in zip(first, second)]
    for name, a, b in pairs:
        if (a is None) != (b is None):
            raise UserError(
                f"example {name!r}: only the {'second' if a is None else 'first'} run has a value of {metric.key!r}"
            )
    kept = [(a, b) for _, a, b in pairs if a is not None]
    if not kept:
        raise UserError(f"no example has a value of {metric.key!r} to compare")
    table = np.asarray(kept, dtype=np.float64)
    return table[:, 0], table[:, 1]


def compare(
    first: Sequence,
    second: Sequence,
    key: str | Metric = "correct_norm",
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> dict:
    """Two runs on the same examples: both means, the BCa interval of (second - first), and McNemar where right/wrong.

    Returns:
      ``{"key", "n", "first", "second", "difference": interval dict, "percentile": interval dict, "mcnemar":
      dict | None}``. McNemar is None where the values are not all 0 or 1 (a likelihood, say).
    """
    a, b = paired_values(first, second, key)
    settings = {"level": level, "resamples": resamples, "seed": seed}
    binary = right_or_wrong(a) and right_or_wrong(b)
    return {
        "key": _as_metric(key).key,
        "n": int(a.size),
        "first": float(a.mean()),
        "second": float(b.mean()),
        "difference": paired_bootstrap(a, b, method="bca", **settings).as_dict(),
        "percentile": paired_bootstrap(a, b, method="percentile", **settings).as_dict(),
        "mcnemar": mcnemar(a, b).as_dict() if binary else None,
    }


def compare_seeds(
    first: Sequence[Sequence],
    second: Sequence[Sequence],
    key: str | Metric = "correct_norm",
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> dict:
    """Two methods, each run with several seeds, on the same examples.

    Runs are paired by their place in the lists (the same seed on both sides); a method with a single run,
    such as the untouched base model, is paired with every run of the other.

    Returns:
      ``{"key", "seeds", "n", "first": [S], "second": [S], "per_seed": [S] mean differences, "difference":
      examples and seeds resampled, "examples_only": examples resampled}``.
    """
    runs = max(len(first), len(second))
    if runs == 0 or {len(first), len(second)} - {1, runs}:
        raise UserError(f"runs cannot be paired by seed: {len(first)} against {len(second)}")
    first = list(first) * (runs if len(first) == 1 else 1)
    second = list(second) * (runs if len(second) == 1 else 1)
    pairs = [paired_values(a, b, key) for a, b in zip(first, second)]
    for other in first[1:]:
        check_same_examples([_id(o) for o in first[0]], [_id(o) for o in other])
    if len({a.size for a, _ in pairs}) != 1:
        sizes = [a.size for a, _ in pairs]
        raise UserError(f"the seeds have values of {_as_metric(key).key!r} for different numbers of examples: {sizes}")
    table = np.stack([b - a for a, b in pairs])
    settings = {"level": level, "resamples": resamples, "seed": seed}
    return {
        "key": _as_metric(key).key,
        "seeds": runs,
        "n": int(table.shape[1]),
        "first": [float(a.mean()) for a, _ in pairs],
        "second": [float(b.mean()) for _, b in pairs],
        "per_seed": [float(d.mean()) for d in table],
        "difference": hierarchical_bootstrap(table, **settings).as_dict(),
        "examples_only": hierarchical_bootstrap(table, resample_seeds=False, **settings).as_dict(),
    }
