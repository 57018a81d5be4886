"""The rows that `adapt` and `study` both show: arms, differences, failures; and what to know before reading them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ntkjax.evaluation import METRICS, Metric
from ntkjax.evaluation.summary import describe_choices
from ntkjax.report.tables import format_estimate, format_spread

Row = dict[str, Any]


def mean_and_sd(entry: Mapping[str, Any] | None, percent: bool, digits: int | None = None) -> str | None:
    """``mean ± sd`` of an entry with both, or None."""
    if entry is None or entry.get("mean") is None:
        return None
    return format_spread(entry["mean"], entry.get("sd"), percent=percent, digits=digits)


def with_failures(value: str | None, done: int, failed: int) -> str | None:
    """A cell, with how many of its runs failed where some did."""
    return f"{value or ''} ({failed} of {failed + done} failed)".strip() if failed else value


def arm_row(arm: str, test: Mapping[str, Any], first: Metric | None, *, done: int, failed: int) -> Row:
    """One arm: the metric that stands first as mean ± sd over its runs and with its 95% interval, then every other one.

    Args:
      test: metric -> ``mean``, ``sd``, ``low`` and ``high``; those that the arm does not have are left out.
      done, failed: its runs.
    """
    row: Row = {"method": arm}
    if first is not None:
        head = test.get(first.name)
        row[first.column_label] = with_failures(mean_and_sd(head, first.share), done, failed)
        row["95% interval"] = None if head is None else f"{first.text(head['low'])} to {first.text(head['high'])}"
    others = [metric for name, metric in METRICS.items() if name in test and metric is not first]
    return row | {metric.column_label: mean_and_sd(test[metric.name], metric.share) for metric in others}


def best_row(arms: Sequence[Mapping[str, Any]], first: Metric | None) -> list[int]:
    """The place of the arm with the best mean in the metric that stands first, of those that have it.

    Args:
      arms: as ``test`` of `arm_row`, one for each row of the table.
    """
    if first is None:
        return []
    values = {number: first.better(test[first.name]["mean"]) for number, test in enumerate(arms) if first.name in test}
    return [max(values, key=values.__getitem__)] if values else []


def difference(entry: Mapping[str, Any]) -> str:
    """``+1.2 [0.3, 2.1]``, in points where the metric is a share."""
    metric = METRICS[entry["metric"]]
    text = format_estimate(entry["difference"], entry["low"], entry["high"], percent=metric.share, digits=metric.digits)
    return text if text.startswith("-") else f"+{text}"


def difference_row(arm: str, reference: str, entry: Mapping[str, Any]) -> Row:
    """One comparison: which arms, the metric with the unit of a difference, the difference with its
    95% interval, each seed's."""
    metric = METRICS[entry["metric"]]
    return {
        "comparison": f"{arm} − {reference}",
        "metric": metric.difference_label,
        "difference [95% interval]": difference(entry),
        "each seed": ", ".join(f"{metric.scale * x:+.{metric.digits}f}" for x in entry["per_seed"]),
    }


def failure_row(entry: Mapping[str, Any]) -> Row:
    """A run that failed, with its message."""
    return {"method": entry["arm"], **{key: entry[key] for key in ("seed", "run", "message")}}


def metric_numbers(head: Mapping[str, Any], test: Mapping[str, Any]) -> list[Row]:
    """An arm in full numbers, for CSV: ``head`` and one row for each metric."""
    keys = ("mean", "sd", "low", "high")
    entries = {name: entry for name, entry in test.items() if isinstance(entry, Mapping)}
    return [{**head, "metric": name, **{key: entry[key] for key in keys}} for name, entry in entries.items()]


def choices_line(counts: Mapping[str, int] | None) -> str:
    """How many test examples accuracy over choices is about, where it is not all; "" else.

    Args:
      counts: ``all`` test examples, and those ``with_choices``.
    """
    return "" if counts is None else describe_choices(counts["with_choices"], counts["all"])


def seeds_note(seeds: int) -> str:
    """What the intervals cannot tell."""
    understated = f"with {seeds} seed(s) the part of the seeds is understated"
    return f"Intervals resample test examples and seeds together; {understated}"


def majority_note(share: float | None) -> list[str]:
    """The accuracy of always giving the commonest answer; nothing where it is unknown."""
    return [] if share is None else [f"always giving the commonest answer would score {100 * share:.1f}%"]
