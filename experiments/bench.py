"""Ratios of the costs that matter, from interleaved runs on one machine: `make bench`.

Every round times all variants one after the other on the same batch; a ratio is taken within a round, and its median,
lowest and highest over the rounds go to build/bench.json (name -> {median, low, high}). No absolute time is reported:
it would say more about the machine than about the code.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import ratios
import tyro

from ntkjax import load_lm
from ntkjax.assets import tiny_lm_path
from ntkjax.ntk.features import per_example_gradients
from ntkjax.ntk.outputs import sum_logits
from ntkjax.types import Batch


@dataclasses.dataclass(frozen=True)
class Bench:
    """Time a model's passes against one plain forward pass that embeds the same batch."""

    model: str = str(tiny_lm_path())
    pool: Path | None = None
    """Pool that bench_score takes its examples from, where the model is not the embedded one."""
    rows: int = 32
    length: int = 64
    rounds: int = 9
    out: Path = Path("build/bench.json")


def variants(bench: Bench) -> dict[str, Callable]:
    """Name -> a function of nothing that runs one pass; ``forward`` is the one the others are divided by."""
    model = load_lm(bench.model)
    params, rng = model.lora, np.random.default_rng(0)
    shape = (bench.rows, bench.length)
    batch = Batch(
        tokens=rng.integers(4, model.config.vocab_size, shape, dtype=np.int32),
        response_mask=np.broadcast_to(np.arange(bench.length) >= bench.length // 2, shape),
        lengths=np.full(bench.rows, bench.length, np.int32),
        index=np.arange(bench.rows, dtype=np.int32),
    )
    output = sum_logits(model.hidden_fn, model.head_fn({}))
    forward = jax.jit(lambda fn, p, b: fn(p, b))
    gradient = jax.jit(lambda fn, p, b: jax.grad(lambda q: fn(q, b).sum())(p))
    return {
        "forward": lambda: forward(model.hidden_fn, params, batch),
        "batch_gradient_over_forward": lambda: gradient(output, params, batch),
        "per_example_gradients_over_forward": lambda: per_example_gradients(output, params, batch),
    }


def main(bench: Bench) -> None:
    """Measure, print and write."""
    ratios.record(ratios.over("forward", variants(bench), bench.rounds), bench.out)
    # Each in a process of its own, for its memory; one BLAS thread for a small eigenvalue problem, see bench_exact.
    pool = [] if bench.pool is None else ["--pool", str(bench.pool)]
    data = [] if bench.pool is None else ["--data", str(bench.pool)]
    model = ["--model", bench.model]
    for name, options in (("bench_score", model + pool), ("bench_sketch", model + data), ("bench_exact", [])):
        command = [sys.executable, str(Path(__file__).with_name(f"{name}.py")), *options, "--out", str(bench.out)]
        subprocess.run(command, check=True, env=os.environ | {"OPENBLAS_NUM_THREADS": "1"})


if __name__ == "__main__":
    main(tyro.cli(Bench))
