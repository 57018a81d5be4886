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
    skip_warmup=True, stage1=stage1, pool_sample=64, max_length=32, token_budget=2048, progress=False,
)
print(peak[0])
"""


def peak_of(folder: Path, rows: int, stage1: str) -> int:
    """KiB of private memory at the highest point of a selection from ``rows`` examples."""
    folder.mkdir()
    example = lambda i: json.dumps({"prompt": f"{i} plus {i % 7}", "response": f"it is {i + i % 7}"}) + "\n"
    for name, count in (("domain", 32), ("pool", rows)):
        with (folder / f"{name}.jsonl").open("w") as file:
            file.writelines(example(i) for i in range(count))
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
    when it needs them, are not counted."""
    monkeypatch.setenv("NTKJAX_CACHE", str(tmp_path / "cache"))
    small, large = (peak_of(tmp_path / str(rows), rows, stage1) for rows in (16_000, 160_000))
    assert large <= 1.05 * small, f"{small} KiB for 16,000 examples, {large} for 160,000"
