"""results.md, tables, plots and report.html of an adaptation, from results.json and the files of its selections."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from ntkjax.evaluation import METRICS, Metric
from ntkjax.evaluation import metrics as metric_table
from ntkjax.evaluation.summary import describe_choices
from ntkjax.files import read_json
from ntkjax.pipeline.deduplicate import summary
from ntkjax.report import plots, sections
from ntkjax.report.files import NamedTable, Report, write_report
from ntkjax.report.page import Figure, Heading, Page, Section, Table, Text
from ntkjax.report.tables import format_estimate, format_spread, to_markdown

TITLE = "Does selected data help?"
LEAD = "Fine-tuning on the domain alone, with random pool data, and with what the tangent kernel chose."
CAPTION = "Mean over seeds with its 95 % interval; the best mean in bold."
NTK = "ntk-selector"


def write_adaptation(out: Path, results: Mapping[str, Any], *, extra: Mapping[str, NamedTable] | None = None) -> None:
    """Write results.md, tables/, plots/ and report.html into the run directory.

    Args:
      results: the content of results.json.
      extra: further tables, by the names of their files.
    """
    tables = {
        "main": NamedTable("Mean and standard deviation over seeds.", method_rows(results)),
        "differences": NamedTable("Paired differences", difference_rows(results)),
        "failures": NamedTable("What failed", failure_rows(results)),
        **(extra or {}),
    }
    figures = all_figures(out, results)
    page = Page(TITLE, LEAD, page_sections(out, results, tables, figures))
    write_report(out, Report(page, markdown(results, extra), tables, {name: f.png for name, f in figures.items()}))


def headline(results: Mapping[str, Any]) -> Metric | None:
    """The metric that stands first; None where the methods share none."""
    return metric_table.headline(lambda name: all(name in entry for entry in results["methods"].values()))


def choices_line(results: Mapping[str, Any]) -> str:
    """How many test examples accuracy over choices is about, where it is not all; "" else."""
    found = results.get("examples")
    return "" if found is None else describe_choices(found["with_choices"], found["all"])


def method_rows(results: Mapping[str, Any]) -> list[dict]:
    """One row a method: every metric as mean ± sd over seeds, and the headline's 95% interval."""
    rows, first = [], headline(results)
    for method, entry in results["methods"].items():
        row: dict[str, Any] = {"method": method}
        for name, metric in METRICS.items():
            if name in entry:
                row[metric.adapt_column] = format_spread(entry[name]["mean"], entry[name]["sd"], percent=metric.share)
        if first is not None:
            row["95% interval"] = f"{first.text(entry[first.name]['low'])} to {first.text(entry[first.name]['high'])}"
        steps = [r["steps"] for r in results["runs"] if r["arm"] == method]
        row["steps"] = steps[0] if steps else 0
        row["seeds"] = entry["seeds"]
        rows.append(row)
    return rows


def difference_rows(results: Mapping[str, Any], names: Collection[str] = METRICS) -> list[dict]:
    """Paired differences between methods in the metrics of these ``names``, with their intervals and tests, ready for a
    table."""
    rows = []
    for entry in [entry for entry in results["comparisons"] if entry["metric"] in names]:
        metric = METRICS[entry["metric"]]
        rows.append(
            {
                "comparison": f"{entry['method']} − {entry['reference']}",
                "metric": entry["metric"].replace("_", " "),
                "difference [95% interval]": format_estimate(
                    entry["difference"], entry["low"], entry["high"], percent=metric.share, digits=metric.digits
                ),
                "each seed": ", ".join(f"{metric.scale * x:+.{metric.digits}f}" for x in entry["per_seed"]),
                "McNemar p, each seed": None
                if entry["p_mcnemar"] is None
                else ", ".join(f"{p:.3g}" for p in entry["p_mcnemar"]),
            }
        )
    return rows


def failure_rows(results: Mapping[str, Any]) -> list[dict]:
    """Runs that failed, with their messages."""
    names = {"arm": "method", "seed": "seed", "run": "run", "message": "message"}
    return [{shown: entry[key] for key, shown in names.items()} for entry in results.get("failures", [])]


def markdown(results: Mapping[str, Any], extra: Mapping[str, NamedTable] | None = None) -> str:
    """results.md: the tables of the report as text."""
    majority = results.get("majority_accuracy")
    parts = ["# Results", to_markdown(method_rows(results))]
    if majority is not None:
        parts.append(f"Always giving the commonest answer: {100 * majority:.1f}% accuracy.")
    parts += [_sentence(line) for line in filter(None, [choices_line(results)])]
    if failed := failure_rows(results):
        parts += ["## What failed", to_markdown(failed)]
    parts += ["## Paired differences", to_markdown(difference_rows(results))]
    for seed, selection in results["selections"].items():
        parts += [f"## Selection of seed {seed}", to_markdown(sections.Choice.of(selection).rows())]
    for table in (extra or {}).values():
        parts += [f"## {table.heading}", *filter(None, [table.text]), to_markdown(table.rows)]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _sentence(line: str) -> str:
    return f"{line[0].upper()}{line[1:]}."


def all_figures(out: Path, results: Mapping[str, Any]) -> dict[str, Figure]:
    """Every plot, by the name of its file: means, training, and what the first seed's selection scored and chose."""
    first = headline(results)
    assert first is not None  # every method was evaluated on the same examples with the same options
    methods = sections.methods_figure(
        {name: entry[first.name] for name, entry in results["methods"].items()},
        first.axis_label,
        percent=first.share,
        highlight=[NTK],
        chance=results.get("majority_accuracy") if first.chance else None,
    )
    seed = min((run["seed"] for run in results["runs"]), default=None)
    curves = {run["arm"]: run["curve"] for run in results["runs"] if run["seed"] == seed}
    figures = {"methods": methods}
    if curves:
        figures["training"] = Figure(plots.training_curves(curves), "Training loss of each arm", "Training loss.")
    for content in list(results["selections"].values())[:1]:
        figures |= _scored(out, content).figures()
    return figures


def _scored(out: Path, selection: Mapping[str, Any]) -> sections.Scored:
    """What a selection of results.json scored, from its scores.parquet."""
    table = pq.read_table(out / selection["folder"] / "scores.parquet").to_pydict()
    scores = np.asarray([np.nan if s is None else s for s in table["score"]], np.float64)
    scored, diagnostics = np.isfinite(scores), selection["diagnostics"]
    lengths, selected = np.asarray(table["response_tokens"])[scored], np.asarray(table["selected"])[scored]
    offered, chosen = diagnostics["sources_offered"], diagnostics["sources_chosen"]
    return sections.Scored(scores[scored], lengths, selected, offered, chosen)


def page_sections(
    out: Path, results: Mapping[str, Any], tables: Mapping[str, NamedTable], figures: Mapping[str, Figure]
) -> list[Section]:
    """The page, chapter by chapter."""
    first = headline(results)
    assert first is not None
    entries = results["methods"].values()
    best = max(range(len(entries)), key=lambda i: first.better(list(entries)[i][first.name]["mean"]))
    others = {name: table for name, table in tables.items() if name not in ("main", "failures")}
    settings = (out / "config.yaml").read_text(encoding="utf-8")
    return [
        *sections.asked(f"ntkjax replay {out.name}", settings),
        *sections.failed(tables["failures"].rows, "The same command tries them again."),
        Heading("Results"),
        Table(_headline_rows(results, first), caption=CAPTION, best=(best,)),
        figures["methods"],
        *(s for t in others.values() for s in sections.named_table(t.heading, t.rows, text=t.text, level=3)),
        *_selection(results, figures),
        *([Heading("Training"), figures["training"]] if "training" in figures else []),
        *sections.made_with(
            read_json(out / "versions.json"),
            seeds=sorted({run["seed"] for run in results["runs"]}),
            seconds={"whole run": results["wall_seconds"]} if "wall_seconds" in results else None,
        ),
        *sections.caveats(_caveats(results)),
    ]


def _headline_rows(results: Mapping[str, Any], first: Metric) -> list[dict[str, Any]]:
    """One row a method: the headline with its interval, each seed, the metrics shown beside it."""
    entries = results["methods"]
    beside = [m for m in METRICS.values() if m.beside and m is not first and any(m.name in e for e in entries.values())]
    rows = []
    for method, entry in entries.items():
        head = entry[first.name]
        shown = format_estimate(head["mean"], head["low"], head["high"], percent=first.share)
        row: dict[str, Any] = {"method": method, first.axis_label: shown}
        if entry["seeds"] > 1:
            row["each seed"] = ", ".join(format_estimate(value, percent=first.share) for value in head["per_seed"])
        row |= {m.axis_label: m.text(entry[m.name]["mean"]) if m.name in entry else None for m in beside}
        rows.append(row)
    return rows


def _selection(results: Mapping[str, Any], figures: Mapping[str, Figure]) -> list[Section]:
    """What the first seed's selection chose."""
    for seed, content in results["selections"].items():
        scored, pool = content["diagnostics"]["scored"], content["diagnostics"]["pool"]
        text = f"{scored:,} of {pool:,} pool examples were scored; the others fell to stage 1."
        drawn = [figures[name] for name in ("scores", "score-against-length", "sources")]
        return [
            Heading(f"What NTK-Selector (seed {seed}) chose, and is it about the domain?"),
            Text(text if scored < pool else "Every pool example was scored."),
            *sections.Choice.of(content).sections(drawn),
        ]
    return []


def _caveats(results: Mapping[str, Any]) -> list[str]:
    seeds = max((entry["seeds"] for entry in results["methods"].values()), default=0)
    notes = [
        f"Intervals resample test examples and seeds together; with {seeds} seeds the part of the seeds is understated."
    ]
    if results.get("duplicates") is not None:
        notes += [_sentence(line) for line in summary(results["duplicates"]).splitlines()]
    notes += [_sentence(line) for line in filter(None, [choices_line(results)])]
    if results.get("majority_accuracy") is not None:
        notes.append(f"Always giving the commonest answer would score {100 * results['majority_accuracy']:.1f}%.")
    return notes
