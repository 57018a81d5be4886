"""Tables, plot and report.html of a validation, from results.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ntkjax.files import read_json
from ntkjax.report import plots, sections
from ntkjax.report.files import NamedTable, Report, write_report
from ntkjax.report.page import Bullets, Figure, Heading, Page, Section, Table, Text
from ntkjax.report.tables import format_estimate, to_markdown

LEAD = "Do the scores predict what training on the examples does to the test loss?"
CHAPTER = "How well each score predicts"
READING = (
    "**LDS**: Spearman correlation, over random subsets of the pool, of minus the test NLL after training on a subset "
    "with the sum of the scores in it. 1: the score orders subsets as training does; 0: it says nothing; below 0: the "
    "wrong way round. `[low, high]` is the 95% bootstrap interval over subsets.",
    "**Best, middle, worst tenth**: mean change of the test NLL (nats per token) when that tenth of the pool is added "
    "to the domain, against the domain alone for equally many steps; below 0 it helps. A score that predicts has its "
    "lowest number in the first of the three columns. Intervals resample test examples and seeds together.",
    "**AUC**: how often a flipped example scores below one that is not; 0.5 is chance.",
)
CAVEATS = (
    "One pool, one domain and one model: intervals over subsets say nothing about others.",
    "LDS is about sums over random halves. It can be low because scores are wrong, because training is noisy (the "
    "ceiling), or because examples do not add up.",
    "Scores are judged by the mean test NLL after short trainings; another measure may order them otherwise.",
)


def main_table(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each score, best LDS first, then what bounds it."""
    tenths = {(row["score"], row["tenth"]): row for row in results["leave_in"]}
    rows = []
    for row in results["scores"]:
        name = row["score"]
        made: dict[str, Any] = {"score": name, "LDS": estimate(row["lds"])}
        if "lds_accuracy" in row:
            made["LDS, accuracy"] = estimate(row["lds_accuracy"])
        for tenth in ("best", "middle", "worst"):
            if (name, tenth) in tenths:
                made[f"{tenth} tenth"] = f"{tenths[name, tenth]['estimate']:+.4f}"
        if name in results["flipped"]:
            area = results["flipped"][name]["auc"]
            made["AUC, flipped"] = None if area is None else f"{area:.3f}"
        rows.append(made)
    if results["ceiling"] is not None and rows:
        bound = results["ceiling"]
        rows.append(
            {"score": "(two seeds of the same subsets)", "LDS": estimate({**bound, "value": bound["between_seeds"]})}
        )
        rows.append({"score": "(ceiling)", "LDS": f"{bound['ceiling']:.3f}"})
    return rows


def estimate(entry: Mapping[str, Any]) -> str:
    """``0.462 [0.431, 0.493]``; ``undefined`` where there is no order."""
    numbers = [float(entry[key]) for key in ("value", "low", "high")]
    if math.isnan(numbers[0]):
        return "undefined"
    return format_estimate(*numbers) if not any(map(math.isnan, numbers)) else format_estimate(numbers[0])


def tenth_table(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The change of the test NLL for each score and tenth, with its interval."""
    return [
        {"score": row["score"], "tenth": row["tenth"], "seeds": row["seeds"],
         "change of the test NLL": format_estimate(row["estimate"], row["low"], row["high"], digits=4)}
        for row in results["leave_in"]
    ]  # fmt: skip


def unjudged_table(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The scores that cannot be judged, and why."""
    return [dict(row) for row in results["unjudged"]]


def asked(results: Mapping[str, Any]) -> list[str]:
    """What was measured, in sentences."""
    sizes, steps, losses = results["sizes"], results["steps"], results["losses"]
    together = "with the domain" if results["with_domain"] == "on" else "without the domain"
    said = [
        f"Pool: {sizes['pool']:,} examples; domain: {sizes['domain']:,}; test: {sizes['test']:,}, held out.",
        f"{results['subsets']} random subsets of {results['subset_size']:,} pool examples (alpha = "
        f"{results['alpha']:g}), each trained on {together} for {steps['subset']:,} steps, with "
        f"{len(results['seeds'])} seed(s); {results['subsets_done']} subsets are done with every seed.",
    ]
    if results["subsets_done"] > 1:
        chance = 1 / math.sqrt(results["subsets_done"] - 1)
        said.append(
            f"Scores drawn at random have an LDS of 0 with standard deviation {chance:.2f} over so many subsets, and "
            f"the best of {len(results['scores'])} of them more than that."
        )
    if steps["tenth"] is not None:
        seeds = len(results["leave_in_seeds"])
        said.append(
            f"Tenths: the domain with {results['tenth']:,} pool examples for {steps['tenth']:,} steps, with {seeds} "
            "seed(s)."
        )
    if losses is not None:
        said.append(
            f"Test NLL over the subsets: mean {losses['mean']:.4f}, standard deviation {losses['sd']:.4f}, from "
            f"{losses['least']:.4f} to {losses['most']:.4f} nats per token."
        )
        if "sd_between_seeds" in losses:
            said.append(f"Standard deviation between seeds of one subset: {losses['sd_between_seeds']:.4f}.")
    for entry in list(results["flipped"].values())[:1]:
        said.append(
            f"{entry['flipped']} answers of the {results['flip']['in']} are flipped ({entry['able']} of "
            f"{entry['examples']} could be), in a copy that is scored anew."
        )
    return said


def write_validation(out: Path, results: Mapping[str, Any]) -> None:
    """Write results.md, tables/, plots/ and report.html into the run directory."""
    made = {
        "scores": NamedTable(CHAPTER, main_table(results)),
        "tenths": NamedTable("Tenths", tenth_table(results)),
        "unjudged": NamedTable("Not judged", unjudged_table(results)),
    }
    figures = {"lds": _figure(results)} if results["scores"] else {}
    page = Page("Do the scores predict training?", LEAD, _sections(out, results, made, list(figures.values())))
    write_report(
        out, Report(page, markdown(results, made), made, {name: figure.png for name, figure in figures.items()})
    )


def markdown(results: Mapping[str, Any], made: Mapping[str, NamedTable]) -> str:
    """results.md: what was measured, every table, how to read it."""
    bullets = lambda texts: "\n".join(f"- {text}" for text in texts)
    parts = ["# Do the scores predict training?", bullets(asked(results))]
    for table in made.values():
        if table.rows:
            parts += [f"## {table.heading}", to_markdown(table.rows).rstrip("\n")]
    return "\n\n".join([*parts, "## How to read this", bullets([*READING, *CAVEATS])]) + "\n"


def _figure(results: Mapping[str, Any]) -> Figure:
    rows = [
        {"method": row["score"], "mean": row["lds"]["value"], "low": row["lds"]["low"], "high": row["lds"]["high"]}
        for row in results["scores"]
        if not math.isnan(float(row["lds"]["value"]))
    ]
    png = plots.accuracy_by_method(rows, label="LDS (Spearman)", percent=False, chance=0.0)
    return Figure(png, "LDS by score", "Bar: LDS. Band: 95 % interval over subsets.")


def _sections(
    out: Path, results: Mapping[str, Any], made: Mapping[str, NamedTable], figures: list[Figure]
) -> list[Section]:
    settings = (out / "config.yaml").read_text(encoding="utf-8")
    parts: list[Section] = [
        *sections.asked(f"ntkjax replay {out.name}", settings, points=asked(results)),
        *sections.failed(results["failures"], "The same command tries them again."),
        Heading(CHAPTER),
        Bullets(READING),
        Table(made["scores"].rows),
        *figures,
    ]
    if results["ceiling"] is not None:
        text = (
            "Two seeds of the same subsets agree to the correlation in the last rows, and the ceiling is what the true "
            "effect of every subset would reach against the mean over the seeds (Spearman-Brown)."
        )
        parts.append(Text(text, kind="note"))
    parts += sections.named_table(made["tenths"].heading, made["tenths"].rows)
    parts += sections.named_table(made["unjudged"].heading, made["unjudged"].rows)
    seconds = {"all": results["wall_seconds"]}
    parts += sections.made_with(read_json(out / "versions.json"), seeds=results["seeds"], seconds=seconds)
    return [*parts, *sections.caveats(CAVEATS)]
