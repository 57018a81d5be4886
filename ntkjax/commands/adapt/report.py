"""results.md, tables, plots and report.html of an adaptation, from results.json and the files of its selections."""

from __future__ import annotations

import collections
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from ntkjax.evaluation import METRICS, Metric
from ntkjax.evaluation import metrics as metric_table
from ntkjax.files import read_json
from ntkjax.pipeline.deduplicate import summary
from ntkjax.pipeline.study.tables import (
    Row,
    arm_row,
    best_row,
    choices_line,
    difference_row,
    failure_row,
    majority_note,
    metric_numbers,
    seeds_note,
)
from ntkjax.report import plots, sections
from ntkjax.report.files import NamedTable, Report, write_report
from ntkjax.report.page import Figure, Heading, Page, Section, Table, Text
from ntkjax.report.tables import to_markdown

TITLE = "Does selected data help?"
LEAD = "Fine-tuning on the domain alone, with random pool data, and with what the tangent kernel chose."
CAPTION = "Mean ± standard deviation over seeds; the best mean in bold."
NTK = "ntk-selector"


def write_adaptation(out: Path, results: Mapping[str, Any], *, extra: Mapping[str, NamedTable] | None = None) -> None:
    """Write results.md, tables/, plots/ and report.html into the run directory.

    Args:
      results: the content of results.json.
      extra: further tables, by the names of their files.
    """
    tables = {
        "main": NamedTable("Mean and standard deviation over seeds.", method_rows(results), _numbers(results)),
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


def method_rows(results: Mapping[str, Any]) -> list[Row]:
    """One row a method: its metrics over seeds, its optimiser steps, how many runs it has."""
    first, failed = headline(results), collections.Counter(entry["arm"] for entry in results.get("failures", []))
    steps = {run["arm"]: run["steps"] for run in results["runs"]}
    return [
        arm_row(method, entry, first, done=entry["seeds"], failed=failed[method])
        | {"steps": steps.get(method, 0), "runs": entry["seeds"]}
        for method, entry in results["methods"].items()
    ]


def difference_rows(results: Mapping[str, Any], names: Collection[str] = METRICS) -> list[Row]:
    """Paired differences between methods in the metrics of these ``names``, with their intervals and tests."""
    return [
        difference_row(entry["method"], entry["reference"], entry)
        | {"McNemar p, each seed": entry["p_mcnemar"] and ", ".join(f"{p:.3g}" for p in entry["p_mcnemar"])}
        for entry in results["comparisons"]
        if entry["metric"] in names
    ]


def _numbers(results: Mapping[str, Any]) -> list[Row]:
    """The table of methods in full numbers, for CSV: one row for each method and metric."""
    heads = {name: {"arm": name, "runs": entry["seeds"]} for name, entry in results["methods"].items()}
    return [row for name, entry in results["methods"].items() for row in metric_numbers(heads[name], entry)]


def failure_rows(results: Mapping[str, Any]) -> list[Row]:
    """Runs that failed, with their messages."""
    return [failure_row(entry) for entry in results.get("failures", [])]


def markdown(results: Mapping[str, Any], extra: Mapping[str, NamedTable] | None = None) -> str:
    """results.md: the tables of the report as text."""
    about = [*majority_note(results.get("majority_accuracy")), choices_line(results.get("examples"))]
    parts = ["# Results", to_markdown(method_rows(results)), *map(_sentence, filter(None, about))]
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
    others = {name: table for name, table in tables.items() if name not in ("main", "failures")}
    settings = (out / "config.yaml").read_text(encoding="utf-8")
    return [
        *sections.asked(f"ntkjax replay {out.name}", settings),
        *sections.failed(tables["failures"].rows, "The same command tries them again."),
        Heading("Results"),
        Table(tables["main"].rows, caption=CAPTION, best=best_row(list(results["methods"].values()), first)),
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
    notes = [seeds_note(seeds)]
    if results.get("duplicates") is not None:
        notes += summary(results["duplicates"]).splitlines()
    notes += [choices_line(results.get("examples")), *majority_note(results.get("majority_accuracy"))]
    return [_sentence(note) for note in notes if note]
