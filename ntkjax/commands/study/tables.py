"""The tables of a study from its results.json: rows ready for Markdown and LaTeX, and in full numbers for CSV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ntkjax.evaluation import METRICS
from ntkjax.pipeline.study.tables import (
    Row,
    arm_row,
    choices_line,
    difference,
    difference_row,
    failure_row,
    mean_and_sd,
    metric_numbers,
    with_failures,
)

CONDITION = ("domain", "size", "budget")
"""The keys of a row that say which condition it is of."""
_READABLE = {"size": "examples of the domain", "budget": "N"}


def label_of(metric: str | None) -> str:
    """A metric with its unit, as axes and columns show it."""
    return METRICS[metric].column_label if metric in METRICS else str(metric)


def is_percent(metric: str | None) -> bool:
    """Whether a metric is a share, shown times 100."""
    return metric in METRICS and METRICS[metric].share


def choices_lines(results: Mapping[str, Any]) -> list[str]:
    """For each domain whose test examples have not all choices and an answer: how many have."""
    lines = {name: choices_line(counts) for name, counts in results.get("choices", {}).items()}
    return [f"{name}: {line}" for name, line in lines.items() if line]


def conditions(results: Mapping[str, Any]) -> list[Row]:
    """domain, size and budget of every cell, each once, in order."""
    known = dict.fromkeys(tuple(cell[key] for key in CONDITION) for cell in results["cells"])
    return [dict(zip(CONDITION, condition)) for condition in known]


def at(rows: Sequence[Mapping[str, Any]], condition: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows of one condition."""
    return [row for row in rows if all(row[key] == condition[key] for key in CONDITION)]


def main_table(results: Mapping[str, Any]) -> list[Row]:
    """One row for each size, budget and arm; one column for each domain with its headline metric, mean ± sd over seeds
    (and, where the truth is known, precision at N). An arm with failed runs says so."""
    rows: dict[tuple, Row] = {}
    several = {key: len({cell[key] for cell in results["cells"]}) > 1 for key in ("size", "budget")}
    for cell in results["cells"]:
        key = (str(cell["size"]), cell["budget"], cell["arm"])
        shown = {_READABLE[name]: cell[name] for name in ("size", "budget") if several[name]}
        row = rows.setdefault(key, shown | {"method": cell["arm"]})
        percent = is_percent(cell["metric"])
        if cell["metric"] is not None:
            value = mean_and_sd(cell.get("test", {}).get(cell["metric"]), percent)
            row[f"{cell['domain']}: {label_of(cell['metric'])}"] = with_failures(value, cell["runs"], cell["failed"])
        if "precision" in cell["means"]:
            row[f"{cell['domain']}: precision at N (%)"] = mean_and_sd(cell["means"]["precision"], True)
    return list(rows.values())


def condition_table(results: Mapping[str, Any], condition: Mapping[str, Any]) -> list[Row]:
    """One row for each arm of a condition: its metrics, differences from random and from the strongest baseline with
    their corrected p-values, precision at N."""
    compared = at(results["comparisons"], condition)
    rows = []
    for cell in at(results["cells"], condition):
        first, means = METRICS.get(cell["metric"]), cell["means"]
        row = arm_row(cell["arm"], cell.get("test", {}), first, done=cell["runs"], failed=cell["failed"])
        for entry in [entry for entry in compared if entry["arm"] == cell["arm"]]:
            against = entry["role"] if entry["role"] == "random" else f"strongest ({entry['reference']})"
            row[f"− {against}"] = difference(entry)
            row[f"p, {entry['role']}"] = entry["p_holm"]
        if "precision" in means:
            row["precision at N (%)"] = mean_and_sd(means["precision"], True)
        rows.append(row | {"runs": cell["runs"]})
    return rows


def source_table(results: Mapping[str, Any]) -> list[Row]:
    """The headline metric on each source of the test examples, mean ± sd over seeds, where a test set has several."""
    rows = []
    for cell in results["cells"]:
        sources = cell.get("by_source") or {}
        if sources:
            shown = {name: mean_and_sd(entry, is_percent(cell["metric"])) for name, entry in sources.items()}
            rows.append(_named(cell) | {"method": cell["arm"], "metric": label_of(cell["metric"])} | shown)
    return rows


def difference_table(results: Mapping[str, Any]) -> list[Row]:
    """Every comparison: condition, arm, reference, difference with interval, each seed, p and Holm's p."""
    role = {"random": "random", "strongest": "the strongest baseline"}
    return [
        _named(entry)
        | difference_row(entry["arm"], entry["reference"], entry)
        | {"reference is": role[entry["role"]], "p": entry["p"], "p, Holm": entry["p_holm"]}
        for entry in results["comparisons"]
    ]


def _named(entry: Mapping[str, Any]) -> Row:
    return {_READABLE.get(key, key): entry[key] for key in CONDITION}


def cost_table(results: Mapping[str, Any]) -> list[Row]:
    """What each arm took, mean over seeds: learning rate, steps, seconds, forward-equivalent tokens, FLOPs."""
    rows = []
    for cell in results["cells"]:
        means = {name: entry["mean"] for name, entry in cell["means"].items()}
        total = means.get("passes_total")
        rows.append(
            {
                **_named(cell),
                "method": cell["arm"],
                "learning rate": cell["learning_rate"],
                "steps": None if means.get("steps") is None else round(means["steps"]),
                "warm-up (s)": means.get("seconds_warmup"),
                "selection (s)": means.get("seconds_selection"),
                "training (s)": means.get("seconds_training"),
                "selection (tokens forward)": _sum(means, "passes_warmup", "passes_selection"),
                "training (tokens forward)": means.get("passes_training"),
                "total (tokens forward)": total,
                "FLOPs": means.get("flops"),
            }
        )
    return rows


def _sum(means: Mapping[str, Any], *names: str) -> float | None:
    known = [means[name] for name in names if means.get(name) is not None]
    return float(sum(known)) if known and means.get(names[-1]) is not None else None


def selection_table(results: Mapping[str, Any]) -> list[Row]:
    """What each arm chose, mean ± sd over seeds: precision, what the score follows, lengths, how alike its choices are
    with two seeds, and how alike they and random ones."""
    rows = []
    for overlap in results["overlaps"]:
        for cell in [cell for cell in at(results["cells"], overlap) if cell["arm"] in overlap["arms"]]:
            row_of, means = overlap["arms"].index(cell["arm"]), cell["means"]
            row = _named(cell) | {"method": cell["arm"]}
            if "precision" in means:
                row |= {
                    "precision at N (%)": mean_and_sd(means["precision"], True),
                    "chance (%)": 100 * means["chance"]["mean"],
                }
            row |= {
                "rank correlation with length": mean_and_sd(means.get("rank_correlation_with_length"), False, 2),
                "with the pool's mean": mean_and_sd(means.get("rank_correlation_with_pool_mean"), False, 2),
                "tokens chosen": (means.get("mean_response_tokens_chosen") or {}).get("mean"),
                "tokens offered": (means.get("mean_response_tokens_offered") or {}).get("mean"),
                "same rows in two seeds (Jaccard)": overlap["between_seeds"].get(cell["arm"]),
            }
            if "random" in overlap["arms"]:
                row["same rows as random"] = overlap["jaccard"][row_of][overlap["arms"].index("random")]
            rows.append(row)
    return rows


def rate_table(results: Mapping[str, Any]) -> list[Row]:
    """Every learning rate tried with the first seed, and what became of it."""
    return [
        {
            **_named(trial),
            "method": trial["arm"],
            "learning rate": trial["learning_rate"],
            "dev loss (nats/token)": trial["dev_loss"],
            "chosen": "yes" + (", at the edge of those tried" if trial["at_edge"] else "") if trial["chosen"] else None,
            "status": trial["status"] if trial["status"] != "failed" else f"failed: {trial['message']}",
        }
        for trial in results["trials"]
    ]


def failure_table(results: Mapping[str, Any]) -> list[Row]:
    """Runs that failed, with their messages."""
    return [_named(entry) | failure_row(entry) for entry in results["failures"]]


def numbers(results: Mapping[str, Any]) -> list[Row]:
    """The main table in full numbers, for CSV: one row for each cell and metric of the test examples."""
    rows = []
    for cell in results["cells"]:
        head = {key: cell[key] for key in (*CONDITION, "arm", "runs", "failed")}
        rows += metric_numbers(head, cell.get("test", {}))
        for name in ("precision", "dev_loss", f"dev_{cell['metric']}", "passes_total", "flops"):
            if name in cell["means"]:
                entry = cell["means"][name]
                rows.append(
                    head | {"metric": name, "mean": entry["mean"], "sd": entry["sd"], "low": None, "high": None}
                )
    return rows


def difference_numbers(results: Mapping[str, Any]) -> list[Row]:
    """Every comparison in full numbers, for CSV."""
    keys = (*CONDITION, "arm", "reference", "role", "metric", "difference", "low", "high", "p", "p_holm")
    return [{key: entry[key] for key in keys} for entry in results["comparisons"]]
