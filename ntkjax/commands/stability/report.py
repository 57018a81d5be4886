"""Tables, plots and page of ``ntkjax stability``, from the results of its runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats
import yaml

from ntkjax.commands.stability.config import arms_of
from ntkjax.commands.stability.inputs import Study
from ntkjax.evaluation import hierarchical_bootstrap
from ntkjax.files import read_json
from ntkjax.ntk.stability import METRICS
from ntkjax.pipeline.run_dir import RunDir
from ntkjax.report.page import Bullets, Code, Details, Figure, Heading, Page, Table, Text, write_page
from ntkjax.report.stability import Panel, over_epochs
from ntkjax.report.tables import format_estimate, format_spread, to_csv, to_latex, to_markdown

SPREAD = "Mean ± standard deviation over seeds."
_SHOWN = {
    "cos_F": "cos_F",
    "cka": "CKA",
    "rank_correlation": "rank correlation of entries",
    "score_spearman": "Spearman of scores",
    "score_overlap": "top-N overlap of scores",
    "growth": "growth of norm",
    "participation_ratio": "participation ratio",
    "perturbation": "perturbation",
    "bound": "its bound",
}
_PANELS = ("cos_F", "cka", "score_spearman", "score_overlap", "velocity", "participation_ratio")
_LOGARITHMIC = {"velocity", "logits relative", "choices relative"}
_UNITS = {"velocity": "per optimiser step", "participation_ratio": "directions"}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation (n - 1) and 95% Student interval of the mean over seeds; the last three None for one."""
    table = np.asarray(values, np.float64)
    mean, n = float(table.mean()), len(table)
    if n < 2:
        return {"mean": mean, "sd": None, "low": None, "high": None, "per_seed": table.tolist()}
    sd = float(table.std(ddof=1))
    half = float(scipy.stats.t.ppf(0.975, n - 1)) * sd / math.sqrt(n)
    return {"mean": mean, "sd": sd, "low": mean - half, "high": mean + half, "per_seed": table.tolist()}


def summarise(study: Study, runs: list[dict], regressions: list[dict]) -> tuple[list[dict], dict[str, Any]]:
    """(rows of stability.csv, content of results.json) of all runs."""
    arms = {arm.name: arm for arm in arms_of(study.config)}
    rows = []
    for run in runs:
        arm = arms[run["arm"]]
        head: dict[str, Any] = {"arm": arm.label, "parameters": "all" if arm.rank is None else "lora", "rank": arm.rank}
        head |= {"learning_rate": arm.learning_rate, "seed": run["seed"]}
        rows += [head | measured for measured in _measured(run)]
    results: dict[str, Any] = {
        "summary": _summary(rows),
        "arms": [{"arm": arm.label, "parameters": arm.parameters} for arm in arms.values()],
        "epochs": study.config.epochs,
        "training_losses": {f"{run['label']}, seed {run['seed']}": run["losses"] for run in runs},
        "regressions": [_without_right(entry) for entry in regressions],
        "data": {"training": study.data.report(), "pool": None if study.pool is None else study.pool.report()}
        | ({} if study.test_report is None else {"test": study.test_report}),
    }
    if study.test is not None:
        gold = study.test.gold
        results["accuracy"], results["differences"] = _accuracies(study, runs, regressions)
        commonest = float(np.bincount(gold).max() / len(gold))
        results["test"] = {"questions": len(gold), "cut": study.test.cut, "commonest": commonest}
    return rows, results


def _measured(run: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """{epoch, step, kernel, metric, value} of everything a run measured, but for what is undefined (velocity at 0)."""
    for kernel, entries in [*run["kernels"].items(), ("", run["linear"])]:
        for entry in entries:
            at = {"epoch": entry["epoch"], "step": entry["step"], "kernel": kernel}
            values = {name: float(value) for name, value in entry.items() if name not in ("epoch", "step")}
            last = run["losses"][max(0, entry["step"] - run["steps_per_epoch"]) : entry["step"]]
            if not kernel and last:
                values["training loss"] = float(np.mean(last))
            for metric, value in values.items():
                if math.isfinite(value):
                    yield at | {"metric": metric, "value": value}


def _summary(rows: list[dict]) -> list[dict]:
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in ("arm", "kernel", "metric", "epoch")), []).append(row["value"])
    names = ("arm", "kernel", "metric", "epoch")
    return [dict(zip(names, key)) | spread(values) for key, values in groups.items()]


def _without_right(entry: Mapping[str, Any]) -> dict[str, Any]:
    formulas = {
        name: {k: v for k, v in regression.items() if k != "right"} | {"accuracy": float(np.mean(regression["right"]))}
        for name, regression in entry["formulas"].items()
    }
    return {**entry, "formulas": formulas}


def _accuracies(study: Study, runs: list[dict], regressions: list[dict]) -> tuple[list[dict], list[dict]]:
    """Accuracy of every way of answering, by arm, and the paired differences to the fine-tuned model."""
    accuracies, differences = [], []
    for arm in arms_of(study.config):
        of_arm = [run for run in runs if run["arm"] == arm.name]
        right = {
            name: np.array([run["right"][name] for run in of_arm]) for name in ("base", "fine-tuned", "linearised")
        }
        kernels = [entry for entry in regressions if entry["parameters"] == arm.parameters]
        for name in study.config.formulas if kernels else ():
            right[f"kernel {name}"] = np.array([entry["formulas"][name]["right"] for entry in kernels])
        for name, table in right.items():
            interval = hierarchical_bootstrap(table, seed=study.config.seed)
            entry = spread(table.mean(axis=1).tolist()) | {"low": interval.low, "high": interval.high}
            accuracies.append({"arm": arm.label, "method": name, **entry})
            if name != "fine-tuned":
                paired = table.astype(float) - right["fine-tuned"]
                interval = hierarchical_bootstrap(paired, seed=study.config.seed)
                entry = spread(paired.mean(axis=1).tolist()) | {"low": interval.low, "high": interval.high}
                differences.append({"arm": arm.label, "method": name, **entry})
    return accuracies, differences


# ---- tables ----


def _find(results: Mapping[str, Any], arm: str, kernel: str, metric: str, epoch: int) -> dict | None:
    wanted = {"arm": arm, "kernel": kernel, "metric": metric, "epoch": epoch}
    return next((row for row in results["summary"] if all(row[k] == v for k, v in wanted.items())), None)


def _cell(entry: Mapping[str, Any] | None, *, percent: bool = False) -> str | None:
    """Mean ± sd with digits that suit the number."""
    if entry is None:
        return None
    if percent:
        return format_spread(entry["mean"], entry["sd"], percent=True)
    mean, sd = entry["mean"], entry["sd"]
    if mean != 0 and not 1e-3 <= abs(mean) < 1e4:
        return f"{mean:.2e}" if sd is None else f"{mean:.2e} ± {sd:.1e}"
    return format_spread(mean, sd, digits=3 if abs(mean) < 10 else 1)


def kernel_rows(results: Mapping[str, Any]) -> list[dict]:
    """One row for each arm and kernel after the last epoch."""
    epoch, rows = results["epochs"], []
    for kernel in dict.fromkeys(row["kernel"] for row in results["summary"] if row["kernel"]):
        for arm in results["arms"]:
            cells = {
                title: _cell(_find(results, arm["arm"], kernel, metric, epoch)) for metric, title in _SHOWN.items()
            }
            rows.append({"kernel": kernel, "arm": arm["arm"], **cells})
    return rows


def linear_rows(results: Mapping[str, Any]) -> list[dict]:
    """One row for each arm: the linearised model against the fine-tuned one after the last epoch."""
    shown = {
        "training loss": "training loss (nats)",
        "relative_distance": "|θ − θ₀| / |θ₀|",
        "logits relative": "logits: error / change",
        "logits cosine": "logits: cosine of change",
        "choices relative": "choices: error / change",
        "choices cosine": "choices: cosine of change",
    }
    rows = []
    for arm in results["arms"]:
        find = lambda metric, name=arm["arm"]: _find(results, name, "", metric, results["epochs"])
        row = {"arm": arm["arm"]} | {title: _cell(find(metric)) for metric, title in shown.items()}
        for metric in ("accuracy fine-tuned", "accuracy linearised", "same answer"):
            row[f"{metric} (%)"] = _cell(find(metric), percent=True)
        rows.append({key: value for key, value in row.items() if value is not None})
    return rows


def accuracy_rows(results: Mapping[str, Any]) -> list[dict]:
    """One row for each arm: accuracy of every way of answering."""
    rows: dict[str, dict] = {}
    for entry in results.get("accuracy", ()):
        rows.setdefault(entry["arm"], {"arm": entry["arm"]})[f"{entry['method']} (%)"] = _cell(entry, percent=True)
    return list(rows.values())


def difference_rows(results: Mapping[str, Any]) -> list[dict]:
    """One row for each arm and method: points of accuracy against the fine-tuned model, with a 95% interval."""
    return [
        {
            "arm": entry["arm"],
            "comparison": f"{entry['method']} − fine-tuned",
            "points [95% interval]": format_estimate(entry["mean"], entry["low"], entry["high"], percent=True),
            "each seed": ", ".join(f"{100 * value:+.1f}" for value in entry["per_seed"]),
        }
        for entry in results.get("differences", ())
    ]


def regression_rows(results: Mapping[str, Any]) -> list[dict]:
    """What cross-validation chose for every regression."""
    rows = []
    for entry in results["regressions"]:
        for name, regression in entry["formulas"].items():
            row = {"parameters": entry["parameters"], "seed": entry["seed"], "kernel": name}
            row |= {"n λ / mean diagonal": regression["relative_ridge"], "weight of f₀": regression["f0_weight"]}
            row |= {"at the edge of the grid": regression["at_edge"]}
            for key in ("cross_validated", "train_accuracy", "accuracy"):
                row[f"{key.replace('_', ' ')} (%)"] = f"{100 * regression[key]:.1f}"
            rows.append(row)
    return rows


# ---- plots ----


def _lines(results: Mapping[str, Any], kernel: str, metric: str, *, start: int = 0) -> dict[str, list]:
    lines: dict[str, list] = {}
    for row in results["summary"]:
        if (row["kernel"], row["metric"]) == (kernel, metric) and row["epoch"] >= start:
            lines.setdefault(row["arm"], []).append((row["epoch"], row["mean"], row["sd"]))
    return {arm: sorted(points) for arm, points in lines.items()}


def plots(results: Mapping[str, Any]) -> dict[str, bytes]:
    """PNGs by file name: one for each kernel, and one of the linearised model."""
    made = {}
    for kernel in dict.fromkeys(row["kernel"] for row in results["summary"] if row["kernel"]):
        panels = [
            Panel(
                _SHOWN.get(metric, metric),
                _UNITS.get(metric, "against step 0"),
                _lines(results, kernel, metric),
                logarithmic=metric in _LOGARITHMIC,
                limits=(0.0, None) if metric == "participation_ratio" else (None, None),
            )
            for metric in _PANELS
        ]  # fmt: skip
        made[f"{kernel.replace(':', '-')}.png"] = over_epochs(panels)
    wanted = {
        "training loss": "nats per token", "logits relative": "error / change", "logits cosine": "cosine",
        "choices relative": "error / change", "accuracy fine-tuned": "share right",
        "accuracy linearised": "share right",
    }  # fmt: skip
    panels = [
        Panel(metric, unit, lines, logarithmic=metric in _LOGARITHMIC)
        for metric, unit in wanted.items()
        if (lines := _lines(results, "", metric))
    ]
    return made | {"linearised.png": over_epochs(panels)}


# ---- files ----


def _tables(results: Mapping[str, Any]) -> list[tuple[str, str, str, list[dict]]]:
    """(file, heading, text, rows) of every table that has rows."""
    last = f"After {results['epochs']} epochs, against the kernel before training. {SPREAD}"
    tables = [
        ("stability", "Does the kernel stay where it was?", last, kernel_rows(results)),
        ("linearised", "The linearised model", f"At the fine-tuned parameters. {SPREAD}", linear_rows(results)),
        ("accuracy", "Kernel regression against fine-tuning", f"Accuracy. {SPREAD}", accuracy_rows(results)),
        ("differences", "Differences", "Paired, over seeds and questions.", difference_rows(results)),
        ("regression", "What cross-validation chose", "On the training questions alone.", regression_rows(results)),
    ]
    return [entry for entry in tables if entry[3]]


def write_report(run: RunDir, rows: list[dict], results: Mapping[str, Any]) -> None:
    """Write stability.csv (long), a table each as md, csv and tex, results.md, plots/*.png and report.html."""
    run.write_text("stability.csv", to_csv(rows))
    tables, images = _tables(results), plots(results)
    for name, heading, text, table in tables:
        run.write_text(f"tables/{name}.csv", to_csv(table))
        run.write_text(f"tables/{name}.md", to_markdown(table))
        run.write_text(f"tables/{name}.tex", to_latex(table, caption=f"{heading} {text}"))
    parts = [f"## {heading}\n\n{text}\n\n{to_markdown(table)}" for _, heading, text, table in tables]
    run.write_text("results.md", "\n".join(["# Stability\n", *parts]))
    for name, png in images.items():
        run.write_bytes(f"plots/{name}", png)
    write_page(run.path / "report.html", _page(run, results, tables, images))


def _page(run: RunDir, results: Mapping[str, Any], tables: list, images: Mapping[str, bytes]) -> Page:
    config = (run.path / "config.yaml").read_text(encoding="utf-8")
    versions = read_json(run.path / "versions.json")
    sections: list[Any] = [Heading("What was asked"), Code(f"ntkjax replay {run.path.name}")]
    sections.append(Details("All settings", (Code(yaml.safe_dump(yaml.safe_load(config), sort_keys=False)),)))
    for name, heading, text, table in tables:
        sections += [Heading(heading), Text(text), Table(table)]
        if name == "stability":
            sections.append(Bullets([f"`{metric}`: {meaning}" for metric, meaning in METRICS.items()]))
            for file, png in images.items():
                if file != "linearised.png":
                    sections.append(Figure(png, f"{file} along fine-tuning", f"{file.removesuffix('.png')}. {SPREAD}"))
        if name == "linearised":
            sections.append(Figure(images["linearised.png"], "The linearised model along fine-tuning", SPREAD))
    known = [{"what": k, "version": str(v)} for k, v in versions.items() if k != "seeds" and v is not None]
    sections += [Heading("Caveats"), Bullets(caveats(results)), Heading("Made with")]
    sections += [Details("Versions and hardware", (Table(known),))]
    lead = (
        "Kernels of the same examples along fine-tuning, and how far the linearised model is from the fine-tuned one."
    )
    return Page("How far the tangent kernel moves during fine-tuning", lead, sections)


def caveats(results: Mapping[str, Any]) -> list[str]:
    """What a reader must know about the numbers."""
    notes = [
        "A cosine of kernels is near 1 whenever all gradients share a component; CKA leaves the shared part out.",
        "LoRA starts with B = 0, so its kernel before training sees the B factors alone; growth shows A joining in.",
    ]
    if "test" in results:
        test = results["test"]
        notes.append(
            f"Always giving the commonest answer is right for {100 * test['commonest']:.1f}% of the "
            f"{test['questions']} test questions; {test['cut']} of them lost prompt tokens on the left."
        )
        notes.append(
            "Intervals of accuracies resample seeds and questions; with few seeds the part of the seeds is understated."
        )
        notes.append("Sign kernels are derived for one output; here each choice's gradient has its own signs.")
    return notes
