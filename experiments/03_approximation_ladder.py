"""Question: how good is each approximation of the tangent kernel, and what does it do to what is selected?

Command:  python experiments/03_approximation_ladder.py
          python experiments/03_approximation_ladder.py --model ../shared/models/cot-lm-7m --data ../shared/data
Hardware: 4 CPU cores, no accelerator.
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

import tyro

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
    out: Path = Path("runs/03_approximation_ladder")


def embedded(out: Path) -> dict[str, Any]:
    """The tiny model on the task of the demo."""
    task = write_planted_task(out / "data", 7)
    warmup = TrainConfig(epochs=DEMO.warmup_epochs, learning_rate=DEMO.learning_rate, max_buckets=1)
    return {"model": str(tiny_lm_path()), "domain": str(task["train"]), "data": str(task["pool"]), "n": 96,
            "n_full": 96, "m": (1, 4, 16, 32), "max_length": DEMO.max_length, "warmup": warmup}  # fmt: skip


def checkpoint(model: str, data: Path) -> dict[str, Any]:
    """A real model on finance, with fewer examples for the kernels of all parameters."""
    warmup = TrainConfig(epochs=1, learning_rate=2e-3, max_buckets=3)
    domain, pool = str(data / "finance" / "train.jsonl"), str(data / "pool" / "cot-01.jsonl")
    return {
        "model": model,
        "domain": domain,
        "data": pool,
        "n": 24,
        "n_full": 12,
        "m": (1, 4, 16),
        "max_length": 256,
        "memory_gib": 1.0,
        "cross_examples": 8,
        "cross_outputs": 4096,
        "warmup": warmup,
    }


def main(experiment: Experiment) -> None:
    """Run it and copy what is kept."""
    if experiment.model is None:
        name, options = "embedded", embedded(experiment.out)
    else:
        assert experiment.data is not None, "--data names the folder with finance/ and pool/"
        name, options = Path(experiment.model).name, checkpoint(experiment.model, experiment.data)
    run = experiment.out / name
    ntkjax.verify(**options, out=str(run))
    kept = RESULTS / name
    kept.mkdir(parents=True, exist_ok=True)
    for file in [*KEPT, *(f"plots/{plot}.png" for plot in PLOTS)]:
        shutil.copy(run / file, kept / Path(file).name)


if __name__ == "__main__":
    main(tyro.cli(Experiment))
