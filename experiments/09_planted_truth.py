"""Question: how much of the data that truly helps does every method find, and when does it stop finding it?

Command:  python experiments/09_planted_truth.py
Hardware: 4 CPU cores, no accelerator.
Runtime:  experiments/README.md; nothing is trained but the warm-ups, every selection is kept.
Expect:   experiments/README.md, "Finding what helps". The pool's examples of the domain's three skills are known, about
          16% of it: a method that finds nothing has that precision. More domain examples should help every method
          that averages over them; noise in the domain (examples of other skills) should hurt the same ones least.

Precision at N (N: a tenth of the pool) of every selector as the domain's size, the share of noise in it and the pool's
size vary, one at a time, on the embedded generator.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import script
import studies

from ntkjax.assets.planted import PlantedTask, planted_task, told_row
from ntkjax.assets.skills import SHOP_TASKS, SKILLS, draw_arguments, pick
from ntkjax.report import study as plots
from ntkjax.report.tables import format_spread, to_csv, to_markdown
from ntkjax.rng import numpy_rng
from ntkjax.selection import METHODS

RESULTS = studies.RESULTS / "09_planted_truth"


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Three series of select-only studies."""

    methods: tuple[str, ...] = ("all",)
    kernels: tuple[str, ...] = ("sum_logits",)
    seeds: int = 3
    """Seeds of warm-up and selection; the task is one."""
    task_seed: int = 7
    domain_sizes: tuple[int, ...] = (12, 24, 48, 96, 192)
    noise: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75)
    """Shares of the domain that ask other skills."""
    pool_sizes: tuple[int, ...] = (600, 1200, 2400, 4800)
    domain_size: int = 96
    pool_size: int = 1200
    warmup_epochs: float = 8
    max_length: int = 64
    out: Path = Path("runs/09_planted_truth")
    keep: bool = True


def write_task(folder: Path, task: PlantedTask, noise: float, seed: int) -> dict[str, Any]:
    """The task's files, with a share of its domain replaced by stories about skills that it does not need."""
    rng = numpy_rng(seed, "experiment 09", "noise")
    others = [skill for name, skill in SKILLS.items() if name not in SHOP_TASKS and skill.story]
    train = [dict(row) for row in task.train]
    for i in rng.permutation(len(train))[: round(noise * len(train))]:
        skill = pick(rng, others)
        told = told_row(skill, "story", skill.story, rng, draw_arguments(skill, rng, length=4))
        train[int(i)] = {"id": train[int(i)]["id"], "source": "noise", **told}
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("pool", task.pool), ("train", train)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "truth.json").write_text(json.dumps({"useful_ids": task.useful_ids}), encoding="utf-8")
    domain = {"train": str(folder / "train.jsonl"), "truth": str(folder / "truth.json")}
    return {"model": "embedded", "pool": str(folder / "pool.jsonl"), "domains": {"shop": domain}}


def point(e: Experiment, name: str, pool: int, domain: int, noise: float) -> list[dict[str, Any]]:
    """The cells of one study: one task, every method."""
    task = planted_task(e.task_seed, pool_size=pool, domain_size=domain, dev_size=3, test_size=3)
    out = e.out / name
    train = {"epochs": e.warmup_epochs, "batch_size": 16, "max_buckets": 1, "learning_rate": 2e-3}
    content = write_task(out / "task", task, noise, e.task_seed) | {
        "title": f"Planted truth: pool {pool}, domain {domain}, noise {noise:g}",
        "methods": [*e.methods, *studies.WHOLE_POOL],
        "kernels": list(e.kernels),
        "budgets": pool // 10,
        "seeds": e.seeds,
        "select_only": True,
        "data": {"max_length": e.max_length},
        "dedup": {"mode": "off"},  # the pool is drawn without repeats, and its templates are alike
        "warmup": train,
    }
    return studies.run(content, out, None).results["cells"]


def series(e: Experiment) -> dict[str, list[tuple[float, list[dict[str, Any]]]]]:
    """What varies -> (its value, cells of that study)."""
    name = lambda pool, domain, noise: f"pool-{pool}-domain-{domain}-noise-{round(100 * noise)}"
    at = lambda pool, domain, noise: point(e, name(pool, domain, noise), pool, domain, noise)
    return {
        "domain size": [(size, at(e.pool_size, size, 0.0)) for size in e.domain_sizes],
        "noise (%)": [(100 * noise, at(e.pool_size, e.domain_size, noise)) for noise in e.noise],
        "pool size": [(size, at(size, e.domain_size, 0.0)) for size in e.pool_sizes],
    }


def table(points: list[tuple[float, list[dict[str, Any]]]], label: str) -> list[dict[str, Any]]:
    """One row for each method: precision at N, mean ± sd over seeds, for each value."""
    rows: dict[str, dict[str, Any]] = {}
    for value, cells in points:
        for cell in cells:
            entry = cell["means"].get("precision")
            row = rows.setdefault(cell["arm"], {"method": cell["arm"]})
            row[f"{label} = {value:g}"] = format_spread(entry["mean"], entry["sd"], percent=True) if entry else "failed"
    chance = {f"{label} = {value:g}": f"{100 * _chance(cells):.1f}" for value, cells in points}
    return [*rows.values(), {"method": "(chance)", **chance}]


def _chance(cells: list[dict[str, Any]]) -> float:
    return next(cell["means"]["chance"]["mean"] for cell in cells if "chance" in cell["means"])


def main(e: Experiment) -> None:
    """Run the series; a table and a plot for each."""
    if unknown := [m for m in e.methods if m not in METHODS and m != "all"]:
        raise SystemExit(f"unknown method {', '.join(unknown)}; expected some of all, {', '.join(METHODS)}")
    folders = [e.out, *([RESULTS] if e.keep else [])]
    for label, points in series(e).items():
        rows = table(points, label)
        print(to_markdown(rows))
        curves: dict[str, list] = {}
        for value, cells in points:
            for cell in cells:
                entry = cell["means"].get("precision")
                if entry:
                    curves.setdefault(cell["arm"], []).append((value, entry["mean"], entry["sd"]))
        highlight = [name for name in curves if name.startswith("ntk")] + ["random"]
        png = plots.over_sizes(curves, xlabel=label, ylabel="precision at N (%)", percent=True, highlight=highlight,
                               logarithmic=label != "noise (%)")  # fmt: skip
        name = label.split(" (")[0].replace(" ", "-")
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.md").write_text(to_markdown(rows), encoding="utf-8")
            (folder / f"{name}.csv").write_text(to_csv(rows), encoding="utf-8")
            (folder / f"{name}.png").write_bytes(png)


if __name__ == "__main__":
    script.start(main, Experiment)
