"""What the benchmarks share: times within interleaved rounds, ratios with their spread, build/bench.json."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from ntkjax.rng import numpy_rng

Ratio = dict[str, float]
"""median, low, high over the rounds: an entry of build/bench.json."""


def seconds(run: Callable[[], Any]) -> float:
    """Wall time of one call, whose result is ready when it returns."""
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


def spread(values: Sequence[float]) -> Ratio:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def over(base: str, runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Ratio]:
    """Ratio of every run's time to that of ``base`` in the same round, after one round that compiles.

    Each round has an order of its own, so that no run always follows the same one.
    """
    for run in runs.values():
        seconds(run)
    random = numpy_rng(0, "bench", "order of a round")
    times = [{name: seconds(runs[name]) for name in random.permutation(list(runs)).tolist()} for _ in range(rounds)]
    return {name: spread([took[name] / took[base] for took in times]) for name in runs if name != base}


def record(entries: dict[str, Ratio], path: Path) -> None:
    """Print the entries and add them to those of other benchmarks in ``path``."""
    for name, ratio in entries.items():
        print(f"{name:44s} {ratio['median']:8.3f}   [{ratio['low']:.3f}, {ratio['high']:.3f}]")
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | entries, indent=2) + "\n")
    print(f"written: {path}", flush=True)
