"""Question: does data chosen by NTK-Selector help a small model on three real domains?

Command:  python experiments/00_adapt.py --data ../shared/data --model ../shared/models/cot-lm-7m
Hardware: 4 CPU cores, no accelerator.
Runtime:  20 to 50 minutes a domain; every domain goes on where it was stopped.
Expect:   experiments/README.md, "Three real domains".

Sizes are cut to what a CPU does in an hour: the first 4,000 examples of the pool, one epoch, short sequences, and 200
training examples of the two domains with long prompts. `--full` takes all of the pool, of the training and of the test
examples, whole prompts and 3 epochs: a day on a CPU, not run. The model has seen pool/cot-00, so the pool is cot-01.
"""

from __future__ import annotations

import dataclasses
import shutil
from itertools import islice
from pathlib import Path

import script

import ntkjax
from ntkjax.training import TrainConfig

RESULTS = Path(__file__).parent / "results" / "00_adapt"
KEPT = ("tables/main.csv", "results.md", "results.json", "config.yaml", "plots/methods.png", "plots/sources.png")


@dataclasses.dataclass(frozen=True)
class Domain:
    """Training and test examples used (None: all), examples to select, longest sequence in tokens."""

    train: int | None
    test: int | None
    n: int
    max_length: int
    epochs: float = 1


DOMAINS = {
    "finance": Domain(train=None, test=800, n=300, max_length=2048),
    "legal": Domain(train=200, test=None, n=150, max_length=192),
    "medical": Domain(train=200, test=250, n=150, max_length=192),
}
FULL = {name: Domain(train=None, test=None, n=d.n, max_length=1024, epochs=3) for name, d in DOMAINS.items()}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Run `adapt` on each domain and keep its tables and plots under experiments/results."""

    data: Path
    """Folder with pool/, finance/, legal/ and medical/."""
    model: str
    domains: tuple[str, ...] = tuple(DOMAINS)
    out: Path = Path("runs/00_adapt")
    full: bool = False
    """Nothing is cut."""
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
    pool = head(data / "pool" / "cot-01.jsonl", out / "inputs" / "pool.jsonl", None if experiment.full else 4000)
    # Micro-batches of 4: a long prompt's attention weights and logits are large.
    warmup = TrainConfig(epochs=1, learning_rate=2e-3, max_buckets=3, accumulation=4 if experiment.full else 1)
    for name in experiment.domains:
        domain = (FULL if experiment.full else DOMAINS)[name]
        ntkjax.adapt(
            model=experiment.model,
            domain=head(data / name / "train.jsonl", out / "inputs" / f"{name}-train.jsonl", domain.train),
            pool=pool,
            test=head(data / name / "test.jsonl", out / "inputs" / f"{name}-test.jsonl", domain.test),
            n=domain.n,
            seeds=experiment.seeds,
            max_length=domain.max_length,
            train=dataclasses.replace(warmup, epochs=domain.epochs),
            warmup=warmup,
            out=out / name,
        )
        for file in KEPT:
            kept = RESULTS / name / Path(file).name
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(out / name / file, kept)


if __name__ == "__main__":
    script.start(main, Experiment)
