"""What stage 1 takes at the paper's size: 1.8 M pool rows, 1,000 domain points, embeddings of width 4,096.

Command:  python experiments/bench_vote.py
Hardware: any; on 4 CPU cores about three minutes, 2 GiB.
Expect:   time that is linear in the pool, and memory that does not depend on it.

The vote runs on random embeddings for a few chunks of the pool, with the real numbers of domain points, votes (k = N =
9,000) and width; the time of a further chunk is the slope between two lengths, and the whole pool is that slope times
its chunks. Reading the embeddings (1.8 M x 4,096 float32 = 29.5 GB) and making them (one forward pass over the pool)
come on top. A plan from measured pieces, not a measurement of the whole.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import tyro

from ntkjax.rng import numpy_rng
from ntkjax.selection.vote import vote


@dataclasses.dataclass(frozen=True)
class VoteBench:
    """Time the streamed vote on a few chunks and say what the whole pool takes."""

    rows: int = 1_800_000
    domain: int = 1000
    width: int = 4096
    votes: int = 9000
    chunks: tuple[int, int] = (2, 6)
    out: Path = Path("build/bench_vote.json")


def private_bytes() -> int:
    """Private memory of this process (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def main(bench: VoteBench) -> None:
    """Measure and print the plan."""
    rng = numpy_rng(0, "bench vote")
    domain = rng.normal(size=(bench.domain, bench.width)).astype(np.float32)
    block = rng.normal(size=(bench.votes, bench.width)).astype(np.float32)
    peaks: list[int] = []

    def read(index: np.ndarray) -> np.ndarray:
        peaks.append(private_bytes())
        return block[: len(index)]

    vote(domain, read, rows=bench.votes, k=bench.votes)  # compiles: every chunk has one shape
    times = []
    for chunks in bench.chunks:
        began = time.perf_counter()
        vote(domain, read, rows=chunks * bench.votes, k=bench.votes)
        times.append(time.perf_counter() - began)
    slope = (times[1] - times[0]) / (bench.chunks[1] - bench.chunks[0])
    total = -(-bench.rows // bench.votes) * slope
    flops = 2 * bench.votes * bench.domain * bench.width
    entries = {
        "rows": bench.rows,
        "seconds_per_chunk": slope,
        "rows_per_chunk": bench.votes,
        "plan_minutes": total / 60,
        "gflop_per_second": flops / slope / 1e9,
        "peak_bytes": max(peaks),
        "embeddings_bytes_float32": bench.rows * bench.width * 4,
    }
    for name, value in entries.items():
        print(f"{name:26s} {value:,.1f}" if isinstance(value, float) else f"{name:26s} {value:,}")
    bench.out.parent.mkdir(parents=True, exist_ok=True)
    bench.out.write_text(json.dumps(entries, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(VoteBench))
