"""results.parquet, tables, plots and report.html of a study, from its results.json and the folders of its runs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ntkjax.commands.study import tables
from ntkjax.evaluation import METRICS
from ntkjax.files import read_json, written_file
from ntkjax.pipeline.run_dir import RunDir
from ntkjax.report import plots
from ntkjax.report import study as study_plots
from ntkjax.report.page import write_page
from ntkjax.report.sections import flat_diagnostics
from ntkjax.report.study_page import study_page
from ntkjax.report.tables import to_csv, to_latex, to_markdown

COST = "cost of choosing and training (tokens sent forward)"
FAIRNESS = (
    "Every arm that trains takes the same number of optimiser steps of the same batch size, but for domain-only, which "
    "has the domain's own epochs; early stopping is refused.",
    "All methods look at the same warm-up of the same parameters (one for each domain, size and seed), and fine-tuning "
    "starts afresh from the same parameters, with the data of a seed in the same order.",
    "Where several learning rates are given each arm gets its own: the one of lowest dev loss with the first seed, at "
    "every place; all seeds then use it. Weights are those of the step with the lowest dev loss.",
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


def write_report(
    run: RunDir, results: Mapping[str, Any], long_rows: Sequence[Mapping[str, Any]], *, title: str, settings: str
) -> None:
    """Write results.parquet, tables/, results.md, plots/ and report.html into the run directory.

    Tables and plots of an earlier report go: the study may have been about other places then.

    Args:
      results: the content of results.json.
      long_rows: one for each run and metric.
      settings: the study file, as text.
    """
    table = pa.Table.from_pylist([{name: row.get(name) for name in SCHEMA.names} for row in long_rows], schema=SCHEMA)
    with written_file(run.path / "results.parquet") as work:
        pq.write_table(table, work)
    for folder in ("tables", "plots"):
        shutil.rmtree(run.path / folder, ignore_errors=True)
    made = all_tables(results)
    for name, (heading, rows) in made.items():
        if rows:
            run.write_text(f"tables/{name}.md", to_markdown(rows))
            run.write_text(f"tables/{name}.tex", to_latex(rows, caption=heading, label=f"tab:{name}"))
            run.write_text(f"tables/{name}.csv", to_csv(_in_full(name, results) or rows))
    run.write_text("results.md", markdown(title, results, made))
    pictures = {name: (info, png) for name, info, png in all_plots(results)}
    for name, (_, png) in pictures.items():
        run.write_bytes(f"plots/{name}.png", png)
    content = page_content(run, results, made, pictures) | {"title": title, "settings": settings}
    write_page(run.path / "report.html", study_page(content))


def all_tables(results: Mapping[str, Any]) -> dict[str, tuple[str, list[tables.Row]]]:
    """Name of the file -> (heading, rows)."""
    return {
        "main": ("Results: mean and standard deviation over seeds", tables.main_table(results)),
        "sources": ("Results on each source of the test examples", tables.source_table(results)),
        "differences": ("Differences", tables.difference_table(results)),
        "selections": ("What was chosen", tables.selection_table(results)),
        "cost": ("What each arm cost", tables.cost_table(results)),
        "learning-rates": ("Learning rates tried", tables.rate_table(results)),
        "failures": ("What failed", tables.failure_table(results)),
    }


def _in_full(name: str, results: Mapping[str, Any]) -> list[tables.Row] | None:
    makers = {"main": tables.numbers, "differences": tables.difference_numbers}
    return makers[name](results) if name in makers else None


def markdown(title: str, results: Mapping[str, Any], made: Mapping[str, tuple[str, list[tables.Row]]]) -> str:
    """results.md: every table of the report as text, and what to know before reading it."""
    parts = [f"# {title}", *asked(results)]
    for heading, rows in made.values():
        if rows:
            parts += [f"## {heading}", to_markdown(rows).rstrip("\n")]
    parts += ["## How to read this", "\n".join(f"- {note}" for note in [*FAIRNESS, *caveats(results)])]
    return "\n\n".join(parts) + "\n"


def asked(results: Mapping[str, Any]) -> list[str]:
    """What was run, in sentences."""
    counts, arms = results["counts"], dict.fromkeys(cell["arm"] for cell in results["cells"])
    cells = tables.places(results)
    found = [
        f"{len(arms)} arms at {len(cells)} place(s) (domain, size, N) with {len(results['seeds'])} seed(s): "
        f"{counts['done']} runs done, {counts['failed']} failed, {counts['left']} left."
    ]
    if results["focus"]:
        found.append(f"Proposed: {', '.join(results['focus'])}. The other arms are baselines and controls.")
    for row in results["strongest"]:
        if row["arm"] is not None:
            found.append(f"Strongest baseline on dev of {heading_of(row)}: {row['arm']}.")
    return found


def caveats(results: Mapping[str, Any]) -> list[str]:
    """What the numbers cannot tell."""
    seeds = len(results["seeds"])
    notes = ["Nothing was trained."]
    if results["comparisons"]:
        notes = [
            f"Intervals and p-values resample test examples and seeds together; with {seeds} seed(s) the part of the "
            "seeds is understated, and p-values are too small.",
            "p is two-sided, from the bootstrap; Holm's correction runs over the arms that choose data, for each place "
            "and reference.",
        ]
    edge = sorted({trial["arm"] for trial in results["trials"] if trial["at_edge"]})
    if edge:
        notes.append(f"The chosen learning rate lies at the edge of those tried for {', '.join(edge)}: try more.")
    for name, value in results["majority"].items():
        if value is not None:
            notes.append(f"{name}: always giving the commonest answer would score {100 * value:.1f}%.")
    notes += [f"{line}." for line in tables.choices_lines(results)]
    for name, text in results.get("duplicates", {}).items():
        notes.append(f"{name}: {text}.")
    return notes


def heading_of(place: Mapping[str, Any]) -> str:
    """``finance, 100 examples, N = 300``."""
    size = "all examples" if place["size"] == "all" else f"{place['size']} examples"
    return f"{place['domain']}, {size}, N = {place['budget']:,}"


def _slug(*parts: Any) -> str:
    return "-".join("".join(c if c.isalnum() else "-" for c in str(part)) for part in parts)


# -- plots --


def all_plots(results: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, str], bytes]]:
    """(name of the file, heading, alt and caption, PNG) of every plot."""
    for place in tables.places(results):
        cells = [c for c in tables.at(results["cells"], place) if c["metric"] in c.get("test", {})]
        name = _slug(place["domain"], place["size"], place["budget"])
        if cells:
            info = {"place": heading_of(place), "metric": tables.label_of(cells[0]["metric"])}
            yield f"methods-{name}", info, _methods(cells, results)
    for axis, label in (("budget", "examples chosen (N)"), ("size", "examples of the domain")):
        yield from _over(results, axis, label)
    yield from _cost(results)
    for overlap in results["overlaps"]:
        if len(overlap["arms"]) > 1:
            png = study_plots.heat_map(overlap["arms"], overlap["jaccard"], label="Jaccard similarity (1)")
            info = {
                "heading": "Do methods choose alike?",
                "alt": f"Overlap of the selections, {heading_of(overlap)}",
                "caption": f"{heading_of(overlap)}: mean Jaccard similarity of two choices with the same seed.",
            }
            yield f"overlap-{_slug(overlap['domain'], overlap['size'], overlap['budget'])}", info, png


def _methods(cells: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> bytes:
    metric = cells[0]["metric"]
    rows = [
        {"method": c["arm"], **{k: c["test"][metric][k] for k in ("mean", "low", "high")},
         "seeds": c["test"][metric]["per_seed"] if c["runs"] > 1 else []}
        for c in cells
    ]  # fmt: skip
    chance = results["majority"].get(cells[0]["domain"]) if METRICS[metric].chance else None
    label, percent = tables.label_of(metric), tables.is_percent(metric)
    return plots.accuracy_by_method(rows, label=label, percent=percent, highlight=results["focus"], chance=chance)


def _highlight(results: Mapping[str, Any]) -> list[str]:
    """The proposed arms, random, and the strongest baselines, in colour."""
    strongest = [row["arm"] for row in results["strongest"] if row["arm"] is not None]
    return list(dict.fromkeys([*results["focus"][:4], "random", *strongest]))[:7]


def _over(results: Mapping[str, Any], axis: str, label: str) -> Iterator[tuple[str, dict[str, str], bytes]]:
    """The headline metric over budgets or domain sizes, one plot for each of the rest of the place."""
    if len({place[axis] for place in tables.places(results)}) < 2:
        return
    rest = [key for key in ("domain", "size", "budget") if key != axis]
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
        info = {"heading": what, "alt": f"{ylabel} over {label}", "caption": caption}
        yield f"by-{axis}-{_slug(*key)}", info, png


def _cost(results: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, str], bytes]]:
    for place in tables.places(results):
        points = []
        for cell in tables.at(results["cells"], place):
            cost, entry = cell["means"].get("passes_total"), cell.get("test", {}).get(cell["metric"])
            if cost is not None and entry is not None and cost["mean"]:
                points.append({"arm": cell["arm"], "cost": cost["mean"], "mean": entry["mean"], "sd": entry["sd"]})
        if len(points) > 1:
            metric = tables.at(results["cells"], place)[0]["metric"]
            percent, ylabel = tables.is_percent(metric), tables.label_of(metric)
            png = study_plots.against_cost(
                points, xlabel=COST, ylabel=ylabel, percent=percent, highlight=_highlight(results)
            )
            info = {
                "heading": "Against what it costs",
                "alt": f"{ylabel} against cost, {heading_of(place)}",
                "caption": f"{heading_of(place)}: mean and standard deviation over seeds against model passes.",
            }
            yield f"cost-{_slug(place['domain'], place['size'], place['budget'])}", info, png


# -- the page --


def page_content(
    run: RunDir,
    results: Mapping[str, Any],
    made: Mapping[str, tuple[str, list[tables.Row]]],
    pictures: Mapping[str, tuple[dict[str, str], bytes]],
) -> dict[str, Any]:
    """The dict that ``study_page`` reads, but for title and settings."""
    by_place = {info["place"]: png for info, png in pictures.values() if "place" in info}
    others = [info | {"png": png} for info, png in pictures.values() if "heading" in info]
    return {
        "lead": "Every method on the same data and steps, compared with chance and with the best of the rest.",
        "asked": asked(results),
        "command": f"ntkjax replay {run.path.name}",
        "fairness": FAIRNESS,
        "failures": made["failures"][1],
        "places": [_place(results, place, by_place) for place in tables.places(results)],
        "plots": others,
        "selections": _selections(run, results),
        "tables": [
            {"heading": h, "rows": rows} for name, (h, rows) in made.items() if name not in ("main", "failures")
        ],
        "versions": read_json(run.path / "versions.json"),
        "caveats": caveats(results),
    }


def _place(results: Mapping[str, Any], place: Mapping[str, Any], by_place: Mapping[str, bytes]) -> dict[str, Any]:
    rows, cells = tables.place_table(results, place), tables.at(results["cells"], place)
    metric = cells[0]["metric"]
    found = [(i, c["test"][metric]["mean"]) for i, c in enumerate(cells) if metric in c.get("test", {})]
    best = max(found, key=lambda pair: METRICS[metric].better(pair[1]))[0] if found else None
    return {
        "heading": heading_of(place),
        "rows": rows,
        "metric": tables.label_of(metric),
        "png": by_place.get(heading_of(place)),
        "best": () if best is None else (best,),
        "caption": "Mean ± standard deviation over seeds; differences with 95 % intervals; p after Holm's correction; "
        "the best mean in bold.",
    }


def _selections(run: RunDir, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What each method chose and rejected: of every domain the first place, of that the first seed."""
    shown, seen = [], set()
    for place in tables.places(results):
        if place["domain"] in seen:
            continue
        seen.add(place["domain"])
        methods = []
        for cell in tables.at(results["cells"], place):
            if cell.get("example_run") is None:
                continue
            content = read_json(run.path / "runs" / cell["example_run"] / "selection.json")
            examples = content["examples"]
            methods.append(
                {
                    "method": cell["arm"],
                    "diagnostics": flat_diagnostics(content["diagnostics"]),
                    "chosen_examples": examples.get("chosen", []),
                    "rejected_examples": [*examples.get("just_missed", []), *examples.get("lowest", [])],
                }
            )
        shown.append({"domain": heading_of(place), "methods": methods})
    return [entry for entry in shown if entry["methods"]]
