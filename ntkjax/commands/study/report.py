"""results.parquet, tables, plots and report.html of a study, from its results.json and the folders of its runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ntkjax.commands.study import tables
from ntkjax.evaluation import METRICS
from ntkjax.files import read_json, written_file
from ntkjax.pipeline.study.runs import condition_name
from ntkjax.pipeline.study.tables import best_row, majority_note, seeds_note
from ntkjax.report import sections
from ntkjax.report import study as study_plots
from ntkjax.report.files import NamedTable, Report, write_report
from ntkjax.report.page import Bullets, Details, Figure, Heading, Page, Section, Table, Text
from ntkjax.report.tables import to_markdown

LEAD = "Every method on the same data and steps, compared with chance and with the best of the rest."
CAPTION = (
    "Mean ± standard deviation over seeds; differences with 95 % intervals; p after Holm's correction; the best mean "
    "in bold."
)
COST = "cost of choosing and training (tokens sent forward)"
FAIRNESS = (
    "Every arm that trains takes the same number of optimiser steps of the same batch size, but for domain-only, which "
    "has the domain's own epochs; early stopping is refused.",
    "All methods look at the same warm-up of the same parameters (one for each domain, size and seed), and fine-tuning "
    "starts afresh from the same parameters, with the data of a seed in the same order.",
    "Where several learning rates are given each arm gets its own: the one of lowest dev loss with the first seed, for "
    "every domain, size and N; all seeds then use it. Weights are those of the step with the lowest dev loss.",
    "The strongest baseline is picked on dev, never on test: the arm that is not proposed with the best dev metric.",
    "Cost is counted in model passes, which do not depend on the machine's load, as if each method stood alone; "
    "seconds are those that were spent, and a method that finds another one's features there spends fewer.",
)
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("run", "role", "domain", "size")),
        ("budget", pa.int64()),
        *((name, pa.string()) for name in ("arm", "method", "kernel")),
        ("seed", pa.int64()),
        ("learning_rate", pa.float64()),
        *((name, pa.string()) for name in ("status", "message", "metric")),
        ("value", pa.float64()),
    ]
)
"""results.parquet: one row for each run and metric; ``role`` is ``run`` or, for a learning rate tried, ``trial``."""


def write_study(
    out: Path, results: Mapping[str, Any], long_rows: Sequence[Mapping[str, Any]], *, title: str, settings: str
) -> None:
    """Write results.parquet, tables/, results.md, plots/ and report.html into the run directory.

    Args:
      results: the content of results.json.
      long_rows: one for each run and metric.
      settings: the study file, as text.
    """
    table = pa.Table.from_pylist([{name: row.get(name) for name in SCHEMA.names} for row in long_rows], schema=SCHEMA)
    with written_file(out / "results.parquet") as work:
        pq.write_table(table, work)
    made, drawn = all_tables(results), list(all_plots(results))
    page = Page(title, LEAD, page_sections(out, results, made, drawn, settings))
    write_report(
        out, Report(page, markdown(title, results, made), made, {plot.name: plot.figure.png for plot in drawn})
    )


def all_tables(results: Mapping[str, Any]) -> dict[str, NamedTable]:
    """Every table, by the name of its file."""
    return {
        "main": NamedTable(
            "Results: mean and standard deviation over seeds", tables.main_table(results), tables.numbers(results)
        ),
        "sources": NamedTable("Results on each source of the test examples", tables.source_table(results)),
        "differences": NamedTable("Differences", tables.difference_table(results), tables.difference_numbers(results)),
        "selections": NamedTable("What was chosen", tables.selection_table(results)),
        "cost": NamedTable("What each arm cost", tables.cost_table(results)),
        "learning-rates": NamedTable("Learning rates tried", tables.rate_table(results)),
        "failures": NamedTable("What failed", tables.failure_table(results)),
    }


def markdown(title: str, results: Mapping[str, Any], made: Mapping[str, NamedTable]) -> str:
    """results.md: every table of the report as text, and what to know before reading it."""
    parts = [f"# {title}", *asked(results)]
    for table in made.values():
        if table.rows:
            parts += [f"## {table.heading}", to_markdown(table.rows).rstrip("\n")]
    parts += ["## How to read this", "\n".join(f"- {note}" for note in [*FAIRNESS, *caveats(results)])]
    return "\n\n".join(parts) + "\n"


def asked(results: Mapping[str, Any]) -> list[str]:
    """What was run, in sentences."""
    counts, arms = results["counts"], dict.fromkeys(cell["arm"] for cell in results["cells"])
    conditions = tables.conditions(results)
    sentences = [
        f"{len(arms)} arms under {len(conditions)} condition(s) (domain, size, N) with {len(results['seeds'])} "
        f"seed(s): {counts['done']} runs done, {counts['failed']} failed, {counts['left']} left."
    ]
    if results["focus"]:
        sentences.append(f"Proposed: {', '.join(results['focus'])}. The other arms are baselines and controls.")
    for row in results["strongest"]:
        if row["arm"] is not None:
            sentences.append(f"Strongest baseline on dev of {condition_name(row)}: {row['arm']}.")
    return sentences


def caveats(results: Mapping[str, Any]) -> list[str]:
    """What the numbers cannot tell."""
    seeds = len(results["seeds"])
    notes = ["Nothing was trained."]
    if results["comparisons"]:
        notes = [
            f"{seeds_note(seeds)}, and p-values, which are from the same resamples, are too small.",
            "p is two-sided, from the bootstrap; Holm's correction runs over the arms that choose data, for each "
            "condition and reference.",
        ]
    edge = sorted({trial["arm"] for trial in results["trials"] if trial["at_edge"]})
    if edge:
        notes.append(f"The chosen learning rate lies at the edge of those tried for {', '.join(edge)}: try more.")
    for name, value in results["majority"].items():
        notes += [f"{name}: {note}." for note in majority_note(value)]
    notes += [f"{line}." for line in tables.choices_lines(results)]
    for name, text in results.get("duplicates", {}).items():
        notes.append(f"{name}: {text}.")
    return notes


def _slug(condition: Mapping[str, Any], keys: Sequence[str] = tables.CONDITION) -> str:
    return "-".join("".join(c if c.isalnum() else "-" for c in str(condition[key])) for key in keys)


# -- plots --


@dataclasses.dataclass(frozen=True)
class Plot:
    """A plot of the study: the name of its file, the figure, and the chapter of the page that shows it, or the
    condition whose table it stands below."""

    name: str
    figure: Figure
    heading: str = ""
    condition: str = ""


def all_plots(results: Mapping[str, Any]) -> Iterator[Plot]:
    """Every plot, in the order of the page."""
    for condition in tables.conditions(results):
        cells = [c for c in tables.at(results["cells"], condition) if c["metric"] in c.get("test", {})]
        if cells:
            yield Plot(f"methods-{_slug(condition)}", _methods(cells, results), condition=condition_name(condition))
    for axis, label in (("budget", "examples chosen (N)"), ("size", "examples of the domain")):
        yield from _over(results, axis, label)
    yield from _cost(results)
    for overlap in results["overlaps"]:
        if len(overlap["arms"]) > 1:
            name = condition_name(overlap)
            png = study_plots.heat_map(overlap["arms"], overlap["jaccard"], label="Jaccard similarity (1)")
            caption = f"{name}: mean Jaccard similarity of two choices with the same seed."
            figure = Figure(png, f"Overlap of the selections, {name}", caption)
            yield Plot(f"overlap-{_slug(overlap)}", figure, "Do methods choose alike?")


def _methods(cells: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> Figure:
    metric = METRICS[cells[0]["metric"]]
    chance = results["majority"].get(cells[0]["domain"]) if metric.chance else None
    return sections.methods_figure(
        {cell["arm"]: cell["test"][metric.name] for cell in cells},
        metric.column_label,
        percent=metric.share,
        highlight=results["focus"],
        chance=chance,
    )


def _highlight(results: Mapping[str, Any]) -> list[str]:
    """The proposed arms, random, and the strongest baselines, in colour."""
    strongest = [row["arm"] for row in results["strongest"] if row["arm"] is not None]
    return list(dict.fromkeys([*results["focus"][:4], "random", *strongest]))[:7]


def _over(results: Mapping[str, Any], axis: str, label: str) -> Iterator[Plot]:
    """The headline metric over budgets or domain sizes, one plot for each value of the other two."""
    if len({condition[axis] for condition in tables.conditions(results)}) < 2:
        return
    rest = [key for key in tables.CONDITION if key != axis]
    groups: dict[tuple, dict[str, list]] = {}
    metrics: dict[tuple, str] = {}
    for cell in results["cells"]:
        size = cell["domain_examples"] if axis == "size" else cell[axis]
        if cell["metric"] not in cell.get("test", {}):
            continue
        key = tuple(cell[name] for name in rest)
        entry = cell["test"][cell["metric"]]
        groups.setdefault(key, {}).setdefault(cell["arm"], []).append((size, entry["mean"], entry["sd"]))
        metrics[key] = cell["metric"]
    for key, curves in groups.items():
        percent, ylabel = tables.is_percent(metrics[key]), tables.label_of(metrics[key])
        curves = {arm: sorted(points) for arm, points in curves.items()}
        png = study_plots.over_sizes(
            curves, xlabel=label, ylabel=ylabel, percent=percent, highlight=_highlight(results)
        )
        what = "More data chosen" if axis == "budget" else "More data of the domain"
        domain, other = key
        at = f"N = {other:,}" if axis == "size" else "all examples" if other == "all" else f"{other} examples"
        caption = f"{domain}, {at}: mean over seeds; bands are one standard deviation."
        name = f"by-{axis}-{_slug(dict(zip(rest, key)), rest)}"
        yield Plot(name, Figure(png, f"{ylabel} over {label}", caption), what)


def _cost(results: Mapping[str, Any]) -> Iterator[Plot]:
    for condition in tables.conditions(results):
        points = []
        for cell in tables.at(results["cells"], condition):
            cost, entry = cell["means"].get("passes_total"), cell.get("test", {}).get(cell["metric"])
            if cost is not None and entry is not None and cost["mean"]:
                points.append({"arm": cell["arm"], "cost": cost["mean"], "mean": entry["mean"], "sd": entry["sd"]})
        if len(points) > 1:
            metric = tables.at(results["cells"], condition)[0]["metric"]
            percent, ylabel = tables.is_percent(metric), tables.label_of(metric)
            png = study_plots.against_cost(
                points, xlabel=COST, ylabel=ylabel, percent=percent, highlight=_highlight(results)
            )
            name = condition_name(condition)
            caption = f"{name}: mean and standard deviation over seeds against model passes."
            figure = Figure(png, f"{ylabel} against cost, {name}", caption)
            yield Plot(f"cost-{_slug(condition)}", figure, "Against what it costs")


# -- the page --


def page_sections(
    out: Path,
    results: Mapping[str, Any],
    made: Mapping[str, NamedTable],
    drawn: Sequence[Plot],
    settings: str,
) -> list[Section]:
    """The page, chapter by chapter."""
    others = {name: table for name, table in made.items() if name not in ("main", "failures")}
    return [
        *sections.asked(f"ntkjax replay {out.name}", settings, points=asked(results)),
        Heading("How the arms are kept comparable", 3),
        Bullets(FAIRNESS),
        *sections.failed(made["failures"].rows, "`--retry-failed` tries them again."),
        *_conditions(results, drawn),
        *_other_plots(drawn),
        *_selections(out, results),
        *(part for table in others.values() for part in sections.named_table(table.heading, table.rows)),
        *sections.made_with(read_json(out / "versions.json")),
        *sections.caveats(caveats(results)),
    ]


def _conditions(results: Mapping[str, Any], drawn: Sequence[Plot]) -> Iterator[Section]:
    """A table and a plot for each condition."""
    figures = {plot.condition: plot.figure for plot in drawn if plot.condition}
    for number, condition in enumerate(tables.conditions(results)):
        if number == 0:
            yield Heading("Results")
        name, cells = condition_name(condition), tables.at(results["cells"], condition)
        best = best_row([cell.get("test", {}) for cell in cells], METRICS.get(cells[0]["metric"]))
        yield Heading(name, 3)
        yield Table(tables.condition_table(results, condition), caption=CAPTION, best=best)
        if name in figures:
            yield figures[name]


def _other_plots(drawn: Sequence[Plot]) -> Iterator[Section]:
    heading = ""
    for plot in drawn:
        if plot.heading:
            if plot.heading != heading:
                yield Heading(plot.heading)
            heading = plot.heading
            yield plot.figure


def _selections(out: Path, results: Mapping[str, Any]) -> list[Section]:
    """What each method chose and rejected: of every domain the first condition, of that the first seed."""
    made: list[Section] = []
    first = {condition["domain"]: condition for condition in reversed(tables.conditions(results))}
    for name in dict.fromkeys(condition["domain"] for condition in tables.conditions(results)):
        cells = tables.at(results["cells"], first[name])
        runs = {cell["arm"]: cell["example_run"] for cell in cells if cell.get("example_run") is not None}
        choices = {arm: read_json(out / "runs" / run / "selection.json") for arm, run in runs.items()}
        if choices:
            made.append(Heading(condition_name(first[name]), 3))
            made += [Details(arm, sections.Choice.of(content).sections()) for arm, content in choices.items()]
    if made:
        text = "Of the first seed: the best chosen, what was just missed, and the lowest scores."
        made = [Heading("What each method chose"), Text(text), *made]
    return made
