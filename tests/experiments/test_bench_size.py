"""What preparing a pool takes, and that memory hardly grows with it: experiments/bench_size.py."""

from __future__ import annotations

from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "bench_size.py"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_memory_grows_by_some_hundred_bytes_an_example(kind, load_file, monkeypatch):
    """From 10,000 to 60,000 records of about 180 bytes, on two processes; what is counted, and left out, is in the
    script. A fifth of that many bytes an example would be the texts of one process's part alone."""
    monkeypatch.setenv("PYTHONPATH", str(SCRIPT.parents[1]))
    monkeypatch.setenv("ARROW_DEFAULT_MEMORY_POOL", "system")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(128 * 1024))
    bench = load_file(SCRIPT)
    small, large = (bench.measure(bench.SizeBench(), rows, kind, 2) for rows in (10_000, 60_000))
    grown = {step: (large["steps"][step]["peak"] - small["steps"][step]["peak"]) / 50_000 for step in bench.STEPS}
    print({step: round(bytes_) for step, bytes_ in grown.items()})
    assert large["kept"] == 0.97 * 60_000 and large["pool_bytes"] > 5 * small["pool_bytes"]
    assert max(grown.values()) < 300, grown
