"""results.md, plots and report.html of an adaptation, from results.json and the files of its selections."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from ntkjax.evaluation import METRICS, Metric
from ntkjax.evaluation import metrics as metric_table
from ntkjax.evaluation.summary import describe_choices
from ntkjax.files import read_json, write_bytes
from ntkjax.pipeline.deduplicate import summary
from ntkjax.pipeline.run_dir import RunDir
from ntkjax.report import plots
from ntkjax.report.comparison import comparison_page
from ntkjax.report.page import write_page
from ntkjax.report.sections import flat_diagnostics
from ntkjax.report.tables import format_estimate, format_spread, to_csv, to_latex, to_markdown


def write_report(run: RunDir, results: Mapping[str, Any], *, extra: list[dict] | None = None) -> None:
    """Write results.md, results.csv, results.tex, plots/*.png and report.html into the run directory.

    Args:
      results: the content of results.json.
      extra: further tables for the page, ``[{heading, text, rows}, ...]``.
    """
    rows = method_rows(results)
    run.write_text("results.csv", to_csv(rows))
    run.write_text("results.tex", to_latex(rows, caption="Mean and standard deviation over seeds."))
    run.write_text("results.md", markdown(results, extra or []))
    content = page_content(run, results, extra or [])
    _write_plots(run.path / "plots", content)
    write_page(run.path / "report.html", comparison_page(content))


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


def markdown(results: Mapping[str, Any], extra: list[dict]) -> str:
    """results.md: the tables of the report as text."""
    majority = results.get("majority_accuracy")
    parts = ["# Results", to_markdown(method_rows(results))]
    if majority is not None:
        parts.append(f"Always giving the commonest answer: {100 * majority:.1f}% accuracy.")
    parts += [f"{line[0].upper()}{line[1:]}." for line in filter(None, [choices_line(results)])]
    parts += ["## Paired differences", to_markdown(difference_rows(results))]
    for seed, selection in results["selections"].items():
        rows = [{"diagnostic": k, "value": v} for k, v in flat_diagnostics(selection["diagnostics"]).items()]
        parts += [f"## Selection of seed {seed}", to_markdown(rows)]
    for table in extra:
        parts += [f"## {table['heading']}", *filter(None, [table.get("text")]), to_markdown(table["rows"])]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def page_content(run: RunDir, results: Mapping[str, Any], extra: list[dict]) -> dict[str, Any]:
    """The dict that ``comparison_page`` reads."""
    config = _yaml(run.path / "config.yaml")
    first = headline(results)
    assert first is not None  # every method was evaluated on the same examples with the same options
    beside = [m for m in METRICS.values() if m.beside and m is not first]
    beside = [m for m in beside if any(m.name in entry for entry in results["methods"].values())]
    methods = [
        {
            "method": method,
            **{k: entry[first.name][k] for k in ("mean", "low", "high")},
            "seeds": entry[first.name]["per_seed"] if entry["seeds"] > 1 else [],
            **{m.name: m.text(entry[m.name]["mean"]) for m in beside if m.name in entry},
        }
        for method, entry in results["methods"].items()
    ]
    return {
        "title": "Does selected data help?",
        "lead": "Fine-tuning on the domain alone, with random pool data, and with what the tangent kernel chose.",
        "command": f"ntkjax replay {run.path.name}",
        "settings": config,
        "metric": first.axis_label,
        "percent": first.share,
        "lower_is_better": not first.higher_is_better,
        "methods": methods,
        "columns": {m.name: m.axis_label for m in beside},
        "chance": results.get("majority_accuracy") if first.chance else None,
        "highlight": ["ntk-selector"],
        "extra": [{"heading": "Paired differences", "rows": difference_rows(results)}, *extra],
        "selections": [_selection(run, seed, found) for seed, found in list(results["selections"].items())[:1]],
        "training": _curves(results),
        "versions": read_json(run.path / "versions.json"),
        "seeds": sorted({r["seed"] for r in results["runs"]}),
        "runtime": {"whole run": results.get("wall_seconds")},
        "caveats": _caveats(results),
    }


def _selection(run: RunDir, seed: str, found: Mapping[str, Any]) -> dict[str, Any]:
    folder = run.path / f"seed-{seed}" / "ntk-selector" / "selection"
    table = pq.read_table(folder / "scores.parquet").to_pydict()
    scores = np.asarray([np.nan if s is None else s for s in table["score"]], np.float64)
    scored = np.isfinite(scores)
    diagnostics = found["diagnostics"]
    examples = found.get("examples", {})
    return {
        "method": f"NTK-Selector (seed {seed})",
        "text": f"{int(scored.sum()):,} of {len(scored):,} pool examples were scored; the others fell to stage 1."
        if not scored.all()
        else "Every pool example was scored.",
        "diagnostics": flat_diagnostics(diagnostics),
        "scores": scores[scored],
        "lengths": np.asarray(table["response_tokens"])[scored],
        "selected": np.asarray(table["selected"])[scored],
        "offered": diagnostics["sources_offered"],
        "chosen": diagnostics["sources_chosen"],
        "chosen_examples": examples.get("chosen", []),
        "rejected_examples": [*examples.get("just_missed", []), *examples.get("lowest", [])],
    }


def _curves(results: Mapping[str, Any]) -> dict[str, list]:
    seeds = sorted({r["seed"] for r in results["runs"]})
    return {r["arm"]: r["curve"] for r in results["runs"] if seeds and r["seed"] == seeds[0]}


def _caveats(results: Mapping[str, Any]) -> list[str]:
    entries = results["methods"].values()
    runs = max((entry["seeds"] for entry in entries), default=0)
    notes = [
        f"Intervals resample test examples and seeds together; with {runs} seeds the part of the seeds is understated."
    ]
    if results.get("duplicates") is not None:
        notes += [line[0].upper() + line[1:] + "." for line in summary(results["duplicates"]).splitlines()]
    notes += [f"{line[0].upper()}{line[1:]}." for line in filter(None, [choices_line(results)])]
    if results.get("majority_accuracy") is not None:
        notes.append(f"Always giving the commonest answer would score {100 * results['majority_accuracy']:.1f}%.")
    return notes


def _write_plots(folder: Path, content: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    made = {
        "methods.png": plots.accuracy_by_method(
            content["methods"],
            label=content["metric"],
            percent=content["percent"],
            highlight=content["highlight"],
            chance=content["chance"],
        ),
        "training.png": plots.training_curves(content["training"]),
    }
    for entry in content["selections"]:
        made["scores.png"] = plots.score_distribution(entry["scores"], entry["selected"])
        made["score-against-length.png"] = plots.score_against_length(
            entry["scores"], entry["lengths"], entry["selected"]
        )
        made["sources.png"] = plots.sources(entry["offered"], entry["chosen"])
    for name, png in made.items():
        write_bytes(folder / name, png)


def _yaml(path: Path) -> dict:
    import yaml

    return yaml.safe_load(path.read_text(encoding="utf-8"))
