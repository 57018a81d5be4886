"""Question: does the tangent kernel stay where it was along fine-tuning, and does the linear model then tell the tale?

Commands: python experiments/01_kernel_stability.py
          python experiments/01_kernel_stability.py --data ../shared/data --model ../shared/models/cot-lm-7m
          python experiments/01_kernel_stability.py --data ../shared/data --model real --arms lora --epochs 8 \\
              --memory-gib 8                                                        # a GPU; `make real-model` first
Hardware: 4 CPU cores, no accelerator; one GPU for the model named real.
Runtime:  embedded model half an hour on two busy cores, --arms full 11 minutes; a stopped run goes on where it was.
Expect:   experiments/README.md, "Does the kernel stay put?". The paper (Fig. 2a) reports a stable kernel along LoRA.

64 examples (32 of the real task), 20 epochs, kernels of half of them at some epochs, scores of pool examples against
all; LoRA at two ranks and two learning rates, and full fine-tuning, 3 seeds each. A learning rate of 2e-3 is what
experiment 00 trains with, one of 5e-4 what experiment 11 trains the model named real with.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any, Literal

import script

import ntkjax
from ntkjax.assets import tiny_lm_path, write_planted_task
from ntkjax.models.real import REAL

RESULTS = Path(__file__).parent / "results" / "01_kernel_stability"
KEPT = ("results.md", "stability.csv", "plots", "tables/stability.csv", "tables/linearised.csv")
REAL_RATES = {"learning_rate": 5e-4, "full_learning_rate": 2e-5}
"""Of the model named real where none are given: those that the smaller models take are too high for it."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Run `ntkjax stability` and keep its tables and plots under experiments/results."""

    data: Path | None = None
    """Folder with finance/ and pool/; without it the embedded model and its generated task."""
    model: str | None = None
    """Hugging Face directory, hub id or `real` (`make real-model`); with --data."""
    domain: str = "finance"
    small: bool = True
    """Of the real study: half of the examples, no pool, no test questions, one rank and learning rate of LoRA; the
    probe examples score each other."""
    arms: Literal["both", "lora", "full"] = "both"
    """Which parameters are trained: one kind alone goes to a folder of its own."""
    n: int | None = None
    """Training examples; 32 of the small real study, 64 otherwise."""
    probe: int | None = None
    """How many of them the kernels are computed on; none: half."""
    epochs: int = 20
    at: tuple[int, ...] | None = None
    """Epochs at which to look, beside the first and the last; none: 1, 5 and, of the embedded model, 10."""
    max_length: int = 256
    """Of the real study, in tokens."""
    learning_rate: float | None = None
    """Of LoRA in the small real study; none: 2e-3, of the model named real 5e-4."""
    full_learning_rate: float | None = None
    """Of full fine-tuning; none: 3e-4, of the model named real 2e-5."""
    memory_gib: float = 1.0
    """Gradients held at a time."""
    out: Path = Path("runs/01_kernel_stability")
    seeds: int = 3

    def rate(self, name: str, otherwise: float) -> float:
        """The learning rate that was given; without one that of the model."""
        given = getattr(self, name)
        return given or (REAL_RATES[name] if self.model == REAL else otherwise)

    def looks(self, *otherwise: int) -> tuple[int, ...]:
        """The epochs that were given; without them those of ``otherwise`` that training reaches."""
        return tuple(e for e in otherwise if e <= self.epochs) if self.at is None else self.at


def files(experiment: Experiment) -> tuple[str, dict[str, Any]]:
    """(name of the study, what differs between the embedded model and a real one)."""
    script.both_or_neither(experiment.data, experiment.model)
    if experiment.data is None or experiment.model is None:
        paths = write_planted_task(
            experiment.out / "task", 7, pool_size=400, domain_size=128, dev_size=90, test_size=300
        )
        settings = {"data": str(paths["train"]), "test": str(paths["test"]), "pool": str(paths["pool"])}
        kernels = ("sum_logits", "centred_spectral:4", "trace", "centred_trace")
        # Exact traces of all parameters at every look take hours on two cores.
        kernels = kernels[:2] if experiment.arms == "full" else kernels
        settings |= {"model": str(tiny_lm_path()), "kernels": kernels, "max_length": 64}
        return "tiny", settings | {"at": experiment.looks(1, 5, 10), "pool_n": 96, "top": 24, "test_n": 100}
    folder, length = experiment.data / experiment.domain, experiment.max_length
    settings = {"data": str(folder / "train.jsonl"), "model": experiment.model, "max_length": length}
    settings |= {"kernels": ("sum_logits", "centred_spectral:4"), "at": experiment.looks(1, 5)}
    settings |= {"top": None if experiment.small else 8}
    if not experiment.small:
        settings |= {"test": str(folder / "test.jsonl"), "test_n": 100, "pool_n": 96, "top": 24}
        settings |= {"pool": str(experiment.data / "pool" / "cot-01.jsonl")}
    return f"{Path(experiment.model).name}-{experiment.domain}", settings


def main(experiment: Experiment) -> None:
    """One study."""
    name, given = files(experiment)
    name += "" if experiment.arms == "both" else f"-{experiment.arms}"
    small = experiment.data is not None and experiment.small
    ranks, rates = ((16,), (experiment.rate("learning_rate", 2e-3),)) if small else ((4, 16), (2e-4, 2e-3))
    n, out = experiment.n or (32 if small else 64), experiment.out / name
    ntkjax.stability(
        **given,
        out=out,
        n=n,
        probe=experiment.probe or n // 2,
        ranks=ranks if experiment.arms != "full" else (),
        learning_rates=rates if experiment.arms != "full" else (),
        full_learning_rates=(experiment.rate("full_learning_rate", 3e-4),) if experiment.arms != "lora" else (),
        formulas=(),
        seeds=experiment.seeds,
        memory_gib=experiment.memory_gib,
        train={"epochs": experiment.epochs, "max_buckets": 2},
    )
    kept = RESULTS / name
    kept.mkdir(parents=True, exist_ok=True)
    for file in KEPT:
        for source in [out / file] if (out / file).is_file() else sorted((out / file).iterdir()):
            shutil.copy(source, kept / source.name)


if __name__ == "__main__":
    script.start(main, Experiment)
