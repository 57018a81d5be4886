"""Memory of a selection does not grow with the pool."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ntkjax.assets import tiny_lm_path

SELECT = """
import sys, threading, time
def private():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))
peak = [0]
def watch():
    while True:
        peak[0] = max(peak[0], private())
        time.sleep(0.02)
threading.Thread(target=watch, daemon=True).start()
import ntkjax
folder, stage1 = sys.argv[1:]
ntkjax.select(
    model=MODEL, domain=folder + "/domain.jsonl", pool=[folder + "/pool.jsonl"], n=64, out=folder + "/run-" + stage1,
    skip_warmup=True, stage1=stage1, pool_sample=64, max_length=32, token_budget=512, progress=False,
)
print(peak[0])
"""


def peak_of(folder: Path, rows: int, stage1: str) -> int:
    """KiB of private memory at the highest point of a selection from ``rows`` examples."""
    folder.mkdir()
    number = lambda i: 100_000 + i * (800_000 // rows)  # six digits whatever the size: the same shapes of batches
    example = lambda i: json.dumps({"prompt": f"{(n := number(i))} plus {i % 7}", "response": f"it is {n + i % 7}"})
    for name, count in (("domain", 32), ("pool", rows)):
        with (folder / f"{name}.jsonl").open("w") as file:
            file.writelines(example(i) + "\n" for i in range(count))
    script = f"MODEL = {str(tiny_lm_path())!r}\n" + SELECT
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder), stage1],
        capture_output=True, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("stage1", ["off", "on"])
def test_ten_times_the_pool_takes_the_same_memory(tmp_path, monkeypatch, stage1):
    """16,000 and 160,000 examples peak within 5% of each other; pages of mapped files, which the system takes back
    when it needs them, are not counted.

    What would hide growth is kept out. The programs are compiled by a first run, since a compiler's memory is tens of
    MiB more or less by chance; batches are small, since their buffers overlap by chance; and the C library and Arrow
    give back every large block, where they would hold on to some of what was freed.
    """
    monkeypatch.setenv("NTKJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("ARROW_DEFAULT_MEMORY_POOL", "system")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(128 * 1024))
    peak_of(tmp_path / "first", 16_000, stage1)
    small, large = (peak_of(tmp_path / str(rows), rows, stage1) for rows in (16_000, 160_000))
    print(f"{small} KiB for 16,000 examples, {large} for 160,000")
    assert large <= 1.05 * small, f"{small} KiB for 16,000 examples, {large} for 160,000"
