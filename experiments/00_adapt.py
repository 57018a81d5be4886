"""Question: does data chosen by NTK-Selector help a small model on three real domains?

Command:  python experiments/00_adapt.py --data ../shared/data --model ../shared/models/cot-lm-7m
Hardware: 4 CPU cores, no accelerator.
Runtime:  about an hour a domain on a quiet machine; every domain goes on where it was stopped.
Expect:   experiments/README.md, "Three real domains".

The whole of pool/cot-01 (the model has seen cot-00); every training and test example, except for medical, whose long
prompts are not cut; the paper's setting: stage 1 on, `sum_logits`. Sequences are cut at the model's 1,024 positions.
"""

from __future__ import annotations

import dataclasses
import shutil
from itertools import islice
from pathlib import Path

import tyro

import ntkjax
from ntkjax.training import TrainConfig

RESULTS = Path(__file__).parent / "results" / "00_adapt"
KEPT = ("results.csv", "results.md", "results.json", "config.yaml", "plots/methods.png", "plots/sources.png")


@dataclasses.dataclass(frozen=True)
class Domain:
    """Examples to select, epochs of fine-tuning in every arm, training and test examples used (None: all)."""

    n: int
    epochs: int
    train: int | None = None
    test: int | None = None


DOMAINS = {
    "finance": Domain(n=300, epochs=3),
    "legal": Domain(n=150, epochs=2),
    "medical": Domain(n=150, epochs=1, train=200, test=250),
}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Run `adapt` on each domain and keep its tables and plots under experiments/results."""

    data: Path
    """Folder with pool/, finance/, legal/ and medical/."""
    model: str
    domains: tuple[str, ...] = tuple(DOMAINS)
    out: Path = Path("runs/00_adapt")
    seeds: int = 3


def head(source: Path, target: Path, count: int | None) -> str:
    """The first ``count`` lines of ``source`` as a file of their own; ``source`` itself where count is None."""
    if count is None:
        return str(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open() as lines, target.open("w") as out:
        out.writelines(islice(lines, count))
    return str(target)


def main(experiment: Experiment) -> None:
    """Run the domains one after the other."""
    data, out = experiment.data, experiment.out
    warmup = TrainConfig(epochs=1, learning_rate=2e-3, accumulation=4)
    for name in experiment.domains:
        domain = DOMAINS[name]
        ntkjax.adapt(
            model=experiment.model,
            domain=head(data / name / "train.jsonl", out / "inputs" / f"{name}-train.jsonl", domain.train),
            pool=str(data / "pool" / "cot-01.jsonl"),
            test=head(data / name / "test.jsonl", out / "inputs" / f"{name}-test.jsonl", domain.test),
            n=domain.n,
            seeds=experiment.seeds,
            max_length=1024,
            train=dataclasses.replace(warmup, epochs=domain.epochs),
            warmup=warmup,
            out=out / name,
        )
        for file in KEPT:
            kept = RESULTS / name / Path(file).name
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(out / name / file, kept)


if __name__ == "__main__":
    main(tyro.cli(Experiment))
