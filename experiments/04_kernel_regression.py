"""Question: does kernel regression with the kernel before training answer as well as fine-tuning does?

Commands: python experiments/04_kernel_regression.py
          python experiments/04_kernel_regression.py --data ../shared/data --model ../shared/models/cot-lm-7m
Hardware: 4 CPU cores, no accelerator.
Runtime:  embedded model 15 minutes on two busy cores; the 7 M model, n = 16, 32. A stopped run goes on where it was.
Expect:   experiments/README.md, "Kernel regression against fine-tuning". Malladi et al. 2023 (arXiv 2210.05643) find it
          within a few points of fine-tuning on most prompted tasks; the paper's Table 3 repeats that for its models.

n training examples, 3 seeds that each draw their own (5 there); ridge and weight of f_0 by 5-fold
cross-validation on those n alone; the SGD kernel and both sign kernels; LoRA r = 16 and all parameters.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import script

import ntkjax
from ntkjax.assets import tiny_lm_path, write_planted_task
from ntkjax.report.tables import format_spread, to_csv, to_markdown

RESULTS = Path(__file__).parent / "results" / "04_kernel_regression"


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Run `ntkjax stability` for every n and put the accuracies into one table."""

    data: Path | None = None
    """Folder with finance/, legal/ and medical/; without it the embedded model and its generated task."""
    model: str | None = None
    domains: tuple[str, ...] = ("finance",)
    sizes: tuple[int, ...] = (16, 64)
    out: Path = Path("runs/04_kernel_regression")
    seeds: int = 3


def studies(experiment: Experiment) -> dict[str, dict[str, Any]]:
    """name -> files and model."""
    script.both_or_neither(experiment.data, experiment.model)
    if experiment.data is None:
        paths = write_planted_task(
            experiment.out / "task", 7, pool_size=400, domain_size=128, dev_size=90, test_size=300
        )
        files = {"data": str(paths["train"]), "test": str(paths["test"]), "model": str(tiny_lm_path())}
        return {"tiny": files | {"max_length": 64}}
    return {
        name: {
            "data": str(experiment.data / name / "train.jsonl"),
            "test": str(experiment.data / name / "test.jsonl"),
            "model": experiment.model,
            "max_length": 192,
        }
        for name in experiment.domains
    }


def main(experiment: Experiment) -> None:
    """Every study and n, one after the other."""
    for name, given in studies(experiment).items():
        rows, kept = [], RESULTS / name
        kept.mkdir(parents=True, exist_ok=True)
        for n in experiment.sizes:
            out = experiment.out / name / f"n-{n}"
            study = ntkjax.stability(
                **given,
                out=out,
                n=n,
                probe=3,
                kernels=(),
                test_n=150,
                ranks=(16,),
                learning_rates=(2e-3,),
                full_learning_rates=(3e-4,),
                at=(),
                seeds=experiment.seeds,
                train={"epochs": 20, "batch_size": 8, "max_buckets": 2},
            )
            rows += table(n, study.results)
            for file in ("differences.csv", "regression.csv"):
                shutil.copy(out / "tables" / file, kept / f"n-{n}-{file}")
            (kept / f"n-{n}.json").write_text(json.dumps(summary(study.results), indent=1) + "\n")
        (kept / "accuracy.csv").write_text(to_csv(rows))
        (kept / "accuracy.md").write_text(to_markdown(rows))


def summary(results: Any) -> dict[str, Any]:
    """The accuracies and differences with their intervals."""
    return {key: results[key] for key in ("test", "accuracy", "differences")}


def table(n: int, results: Any) -> list[dict[str, Any]]:
    """One row for each set of trained parameters: accuracy of every way of answering, mean ± sd over seeds."""
    rows: dict[str, dict[str, Any]] = {}
    for entry in results["accuracy"]:
        row = rows.setdefault(entry["arm"], {"n": n, "arm": entry["arm"]})
        row[f"{entry['method']} (%)"] = format_spread(entry["mean"], entry["sd"], percent=True)
    return list(rows.values())


if __name__ == "__main__":
    script.start(main, Experiment)
