"""Question: how good is each approximation of the tangent kernel, and what does it do to what is selected?

Command:  python experiments/03_approximation_ladder.py
          python experiments/03_approximation_ladder.py --model ../shared/models/cot-lm-7m --data ../shared/data
          python experiments/03_approximation_ladder.py --model real --data ../shared/data --n-full 0 --seeds 1 \\
              --learning-rate 5e-4 --memory-gib 24                                  # a GPU; `make real-model` first
Hardware: 4 CPU cores, no accelerator; one GPU for the model named real.
Runtime:  the embedded model 20 minutes, the real one (7 M parameters, V = 4,096, D = 256) an hour, each on two busy
          cores. A stopped run goes on where it was.
Expect:   experiments/README.md, "The approximation ladder".

`ntkjax verify` with the embedded model on its generated task, or with the real one on finance as the domain and
pool/cot-01 as the pool (the model has seen cot-00): full-parameter trace -> LoRA trace -> centred -> spectral(m) ->
centred spectral(m) -> hutchinson(m) -> sum_logits -> loss -> each sketched to K = 8,192, LoRA r = 16 warmed up on the
domain as `select` does, 3 seeds.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import script

import ntkjax
from ntkjax.assets import DEMO, tiny_lm_path, write_planted_task
from ntkjax.training import TrainConfig

RESULTS = Path(__file__).parent / "results" / "03_approximation_ladder"
KEPT = ("ladder.md", "ladder.csv", "cross_terms.csv", "curves.csv", "noise.csv", "config.yaml")
PLOTS = ("scores-against-trace", "scores-against-centred", "scores", "cka-against-trace", "kernels", "outputs",
         "sketch-noise", "cross-output-cosines")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Run `verify` and keep its tables and plots under experiments/results."""

    model: str | None = None
    """A checkpoint; the embedded model by default."""
    data: Path | None = None
    """Folder with finance/ and pool/, for a checkpoint."""
    n: int | None = None
    """Examples in every kernel matrix; 96 of the embedded model, 24 of a checkpoint."""
    n_full: int | None = None
    """Of these in the kernels of all parameters, 0: none; by default 96 of the embedded model, 12 of a checkpoint."""
    seeds: int = 3
    max_length: int = 256
    """Of a checkpoint's data, in tokens."""
    learning_rate: float = 2e-3
    """Of a checkpoint's warm-up."""
    cross_outputs: int = 4096
    """Most outputs compared with each other, of a checkpoint."""
    memory_gib: float = 1.0
    """Gradients held at a time."""
    out: Path = Path("runs/03_approximation_ladder")


def embedded(e: Experiment) -> dict[str, Any]:
    """The tiny model on the task of the demo."""
    task = write_planted_task(e.out / "data", 7)
    warmup = TrainConfig(epochs=DEMO.warmup_epochs, learning_rate=DEMO.learning_rate, max_buckets=1)
    return {"model": str(tiny_lm_path()), "domain": str(task["train"]), "data": str(task["pool"]), "n": e.n or 96,
            "n_full": 96 if e.n_full is None else e.n_full, "m": (1, 4, 16, 32), "max_length": DEMO.max_length,
            "warmup": warmup}  # fmt: skip


def checkpoint(e: Experiment, model: str, data: Path) -> dict[str, Any]:
    """A real model on finance, with fewer examples for the kernels of all parameters."""
    warmup = TrainConfig(epochs=1, learning_rate=e.learning_rate, max_buckets=3)
    domain, pool = str(data / "finance" / "train.jsonl"), str(data / "pool" / "cot-01.jsonl")
    return {
        "model": model,
        "domain": domain,
        "data": pool,
        "n": e.n or 24,
        "n_full": 12 if e.n_full is None else e.n_full,
        "m": (1, 4, 16),
        "max_length": e.max_length,
        "cross_examples": 8,
        "cross_outputs": e.cross_outputs,
        "warmup": warmup,
    }


def main(experiment: Experiment) -> None:
    """Run it and copy what is kept."""
    script.both_or_neither(experiment.data, experiment.model)
    if experiment.data is None or experiment.model is None:
        name, options = "embedded", embedded(experiment)
    else:
        name, options = Path(experiment.model).name, checkpoint(experiment, experiment.model, experiment.data)
    run = experiment.out / name
    ntkjax.verify(**options, seeds=experiment.seeds, memory_gib=experiment.memory_gib, out=str(run))
    kept = RESULTS / name
    kept.mkdir(parents=True, exist_ok=True)
    for file in [*KEPT, *(f"plots/{plot}.png" for plot in PLOTS)]:
        shutil.copy(run / file, kept / Path(file).name)


if __name__ == "__main__":
    script.start(main, Experiment)
