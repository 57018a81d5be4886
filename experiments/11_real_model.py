"""Question: is it the data or the steps? On a real instruct model, does auxiliary data help beyond the steps that it
brings, and does any selection beat random at equal steps?

Commands: make real-model
          # one GPU, the most telling arms first; a process for each domain, since one leaves the device idle
          export XLA_PYTHON_CLIENT_MEM_FRACTION=.3
          for domain in finance legal medical; do python experiments/11_real_model.py --data ../shared/data \\
              --dtype bfloat16 --minutes 8 --domains $domain & done; wait
          python experiments/11_real_model.py --data ../shared/data --first seeds --last seeds --methods 1 \\
              --domains finance --pool-size 300 --dev-size 16 --test-size 250 --budgets 100 --learning-rates 1e-3 \\
              --epochs 1 --max-length 128 --minutes 90                              # two CPU cores
Hardware: one GPU for the whole grid; two CPU cores for one domain of 100 examples.
Runtime:  as long as --minutes says: what is done is kept, and the same command goes on where it was stopped.
Expect:   experiments/README.md, "Is it the data or the steps?".

Every arm but two takes as many steps as one epoch count over domain + N gives: `domain-only-equal-steps` repeats the
domain so often. `base` is not trained and `domain-only` takes the same epochs, and so fewer steps, as the paper's
comparison has it. Learning rates are tuned on dev for every arm with the first seed; all arms of a seed start from the
same adapters.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import script
import studies

from ntkjax.evaluation import METRICS
from ntkjax.files import read_json

METHODS: tuple[Any, ...] = (
    "ntk",
    "length-matched",
    *studies.WHOLE_POOL[:2],
    "for-value",
    "embedding",
    "dsir",
    "less",
    "loss-drop",
)
"""Beside base, domain-only, domain-only-equal-steps and random, which every study has: the paper's selection, random
examples as long as those it chooses, the label-aware kernel over the whole pool by mean and by nearest example, and
baselines."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the grid; a stage holds all that the stages before it do, so that nothing is computed twice."""

    name: str
    every_domain: bool = False
    """All of --domains, or the first alone."""
    sizes: tuple[int, ...] = (100,)
    methods: int = len(METHODS)
    seeds: int = 3
    every_budget: bool = True
    """All of --budgets, or the first alone."""


STAGES = (
    Stage("steps", methods=0, seeds=1, every_budget=False),  # the first question: the arms of any study
    Stage("selection", methods=4, seeds=1, every_budget=False),
    Stage("seeds", methods=4, every_budget=False),
    Stage("size-100"),
    Stage("sizes", sizes=(100, 50, 400)),
    Stage("all", every_domain=True, sizes=(100, 50, 400)),
)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The study of a real model, part by part until the time is over."""

    data: Path
    """Folder with pool/ and the domains."""
    model: str = "real"
    """Hugging Face directory, hub id or `real` (`make real-model`)."""
    minutes: float = 8
    """When to stop; a run that is being done then is done anew next time, and its checkpoints serve."""
    first: str = "steps"
    """The first stage. A stage holds those before it and reads the data anew: skip those that the time allows."""
    last: str = "all"
    """The last stage: steps, selection, seeds, size-100, sizes or all."""
    methods: int = len(METHODS)
    """How many of the selections are compared in each stage, in the order above."""
    domains: tuple[str, ...] = ("finance", "legal", "medical")
    """Those after the first are reached in the last stage."""
    dtype: str = "float32"
    """Of the frozen weights."""
    budgets: tuple[int, ...] = (1000, 200)
    """N."""
    pool_size: int | None = None
    """Examples of the pool; none: all of its first file."""
    test_size: int | None = None
    dev_size: int = 100
    learning_rates: tuple[float, ...] = (5e-4, 1e-3)
    epochs: float = 3
    max_length: int = 512
    out: Path | None = None
    """Default: runs/11_real_model/ and the first domain's name."""
    keep: bool = True
    """Copy tables and plots to experiments/results."""


def stages(e: Experiment) -> list[Stage]:
    """The stages from the first to the last one that were asked for."""
    names = [stage.name for stage in STAGES]
    for option, name in (("first", e.first), ("last", e.last)):
        if name not in names:
            raise SystemExit(f"--{option} {name}: expected one of {', '.join(names)}")
    if not (asked := STAGES[names.index(e.first) : names.index(e.last) + 1]):
        raise SystemExit(f"--first {e.first} comes after --last {e.last}")
    return list(asked)


def folder(e: Experiment) -> Path:
    """Where the study is kept."""
    return e.out or Path("runs/11_real_model") / e.domains[0]


def content(e: Experiment, stage: Stage) -> dict[str, Any]:
    """The study of one stage."""
    sizes = {"pool": e.pool_size, "train": None, "dev": e.dev_size, "test": e.test_size}
    domains = e.domains if stage.every_domain else e.domains[:1]
    made = studies.real(e.data, e.model, domains, **sizes, max_length=e.max_length, epochs=e.epochs)
    for name, domain in made["domains"].items():
        with (e.data / name / "train.jsonl").open(encoding="utf-8") as lines:
            held = sum(1 for _ in lines)
        domain["sizes"] = [size for size in stage.sizes if size <= held]
    made["warmup"]["learning_rate"] = e.learning_rates[0]
    return made | {
        "model": {"model": e.model, "dtype": e.dtype},
        "title": "Is it the data or the steps?",
        "methods": list(METHODS[: min(stage.methods, e.methods)]),
        "budgets": list(e.budgets if stage.every_budget else e.budgets[:1]),
        "seeds": stage.seeds,
        "learning_rates": list(e.learning_rates),
    }


def main(e: Experiment) -> None:
    """Every stage in a process of its own, which is ended when the time is over; then the report of what is done."""
    over = time.monotonic() + 60 * e.minutes
    folder(e).mkdir(parents=True, exist_ok=True)
    done: Stage | None = None
    for stage in stages(e):
        left = over - time.monotonic()
        if left <= 0:
            break
        file = folder(e) / f"{stage.name}.json"  # JSON is YAML
        file.write_text(json.dumps(content(e, stage), indent=1) + "\n", encoding="utf-8")
        print(f"stage {stage.name}: {left / 60:.1f} minutes left", flush=True)
        done = stage
        try:
            finished = subprocess.run([*command(e, file)], timeout=left)
        except subprocess.TimeoutExpired:
            print(f"stage {stage.name}: stopped, the time is over", flush=True)
            break
        if finished.returncode == 2:
            raise SystemExit(2)
    if done is None:
        raise SystemExit("--minutes leaves no time for a single stage")
    report(e, done)


def command(e: Experiment, file: Path) -> list[str]:
    """``ntkjax study`` of that file."""
    return [sys.executable, "-m", "ntkjax", "study", str(file), "--out", str(folder(e) / "study")]


def report(e: Experiment, stage: Stage) -> None:
    """Tables of what is done, and the answers in words."""
    subprocess.run(
        [*command(e, folder(e) / f"{stage.name}.json"), "--report-only"], check=True, stdout=subprocess.DEVNULL
    )
    results = read_json(folder(e) / "study" / "results.json")
    text = "\n".join(answers(results)) + "\n"
    (folder(e) / "study" / "answers.md").write_text(text, encoding="utf-8")
    print((folder(e) / "study" / "tables" / "main.md").read_text(encoding="utf-8"))
    print(text)
    if e.keep:
        kept = studies.RESULTS / "11_real_model" / f"{Path(e.model).name}-{e.domains[0]}"
        studies.keep(folder(e) / "study", kept)
        (kept / "answers.md").write_text(text, encoding="utf-8")


def answers(results: Mapping[str, Any]) -> list[str]:
    """For every condition, one line on each question; the intervals are those of the study's comparisons."""
    lines, seeds = [], len(results["seeds"])
    by_condition: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in results["comparisons"]:
        if row["reference"] == "random":
            by_condition.setdefault((row["domain"], row["size"], row["budget"]), []).append(row)
    for (domain, size, budget), rows in by_condition.items():
        where = f"- {domain}, |D| = {size}, N = {budget}, {seeds} seeds"
        arms = {row["arm"]: row for row in rows}
        if "domain-only-equal-steps" in arms:
            row = arms.pop("domain-only-equal-steps")
            turned = row | {"difference": -row["difference"], "low": -row["high"], "high": -row["low"]}
            lines.append(f"{where}: random data minus the domain alone at equal steps: {_told(turned)}.")
        chosen = [row for row in arms.values() if row["p_holm"] is not None]
        gain = lambda row: METRICS[row["metric"]].better(row["difference"])
        better = [row for row in chosen if row["p_holm"] < 0.05 and gain(row) > 0]
        if chosen:
            named = "; ".join(
                f"{row['arm']}: {_told(row)}, p {row['p_holm']:.2g}" for row in better or [max(chosen, key=gain)]
            )
            verdict = f"{len(better)} of {len(chosen)} selections beat random (Holm, 0.05)"
            lines.append(f"{where}: {verdict}; {'they are' if better else 'the best is'} {named}.")
    return lines


def _told(row: Mapping[str, Any]) -> str:
    metric = METRICS[row["metric"]]
    number = lambda key: f"{metric.scale * row[key]:+.{metric.digits}f}"
    return f"{number('difference')} [{number('low')}, {number('high')}] {metric.difference_unit}"


if __name__ == "__main__":
    script.start(main, Experiment)
