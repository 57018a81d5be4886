"""What preparing a pool takes: private memory of each process, seconds and disk, at growing sizes.

Command:  python experiments/bench_size.py --rows 20000 100000 400000
Hardware: any with Linux; on two CPU cores about 15 s for each 10,000 records and process.
Expect:   memory that grows by some hundred bytes an example at most, whatever the texts are and in whatever files.

For every size, kind of files and number of processes: records are generated into four files (one row group in each of
Parquet, the worst case), then processes of their own read, tokenise, plan the batches and search for duplicates, as
`ntkjax select` does. Of several processes each does its own part, as in a job. A record has 20 words; 3 of 100 repeat
an earlier one. Private memory (RssAnon) leaves out pages of mapped files, which the system takes back when it needs
them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import tyro

FILES = 4
STEPS = ("start", "read", "tokenise", "plan", "duplicates")
MEBIBYTE = 1 << 20


@dataclasses.dataclass(frozen=True)
class SizeBench:
    """Prepare generated pools and print what it took."""

    rows: tuple[int, ...] = (20_000, 100_000)
    kinds: tuple[Literal["jsonl", "parquet"], ...] = ("jsonl", "parquet")
    processes: tuple[int, ...] = (1, 2)
    max_length: int = 256
    out: Path = Path("build/bench_size.json")
    work: Path | None = None
    """The folder of one measurement: set by the script itself, in the processes that it starts."""


def private_bytes() -> int:
    """Private memory of this process (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def examples(first: int, count: int) -> Iterator[dict[str, str]]:
    """Records ``first`` and following; of 100 the last 3 say what others before them say."""
    import numpy as np

    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    for i in range(first, first + count):
        seed = i - 50 if i % 100 >= 97 else i
        picks = np.random.default_rng(seed).integers(len(syllables), size=(20, 3))
        words = ["".join(syllables[k] for k in pick) for pick in picks]
        yield {"id": f"e{i}", "prompt": " ".join(words[:8]) + "?", "response": " ".join(words[8:]) + "."}


def write_pool(folder: Path, rows: int, kind: str) -> None:
    """The records in `FILES` files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    for k in range(FILES):
        first, last = rows * k // FILES, rows * (k + 1) // FILES
        made, path = examples(first, last - first), folder / f"{k}.{kind}"
        if kind == "jsonl":
            with path.open("w") as file:
                file.writelines(json.dumps(record) + "\n" for record in made)
        else:
            pq.write_table(pa.Table.from_pylist(list(made)), path)


def prepare(folder: Path, max_length: int) -> None:
    """What one process does; writes FOLDER/said.INDEX.json."""
    peak, steps, began = [private_bytes()], {}, time.perf_counter()

    def watch() -> None:
        while True:
            peak[0] = max(peak[0], private_bytes())
            time.sleep(0.02)

    from transformers import AutoTokenizer

    from ntkjax.assets import tiny_lm_path
    from ntkjax.data import read_records, tokenise
    from ntkjax.data.cache import Shared
    from ntkjax.data.dedup import find_duplicates
    from ntkjax.job import start

    index, count = start()
    cache = Shared(folder / "cache") if count > 1 else folder / "cache"
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_lm_path()))
    threading.Thread(target=watch, daemon=True).start()

    def step(name: str) -> None:
        nonlocal began
        time.sleep(0.05)  # for the watcher
        steps[name] = {"seconds": time.perf_counter() - began - 0.05, "peak": max(peak[0], private_bytes())}
        began = time.perf_counter()

    step("start")
    records = read_records(folder / "pool", cache_dir=cache)
    step("read")
    tokens = tokenise(records, tokenizer, max_length=max_length, cache_dir=cache)
    step("tokenise")
    batches = len(tokens.batches(token_budget=8192))
    step("plan")
    duplicates = find_duplicates(records, {}, cache_dir=cache)
    step("duplicates")
    said = {"steps": steps, "batches": batches, "kept": len(duplicates.kept), "fingerprint": tokens.fingerprint}
    (folder / f"said.{index}.json").write_text(json.dumps(said))


def measure(bench: SizeBench, rows: int, kind: str, count: int) -> dict:
    """One measurement: the processes, and what was the most of any of them."""
    folder = Path(tempfile.mkdtemp(prefix="bench-size-"))
    try:
        write_pool(folder / "pool", rows, kind)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        env = os.environ | {"JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false"}
        if count > 1:
            env |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
        argv = [sys.executable, __file__, "--work", str(folder), "--max-length", str(bench.max_length)]
        job = [subprocess.Popen(argv, env=env | {"JAX_PROCESS_ID": str(k)}) for k in range(count)]
        codes = [process.wait() for process in job]
        if any(codes):
            raise SystemExit("a process failed: see above")
        said = [json.loads((folder / f"said.{k}.json").read_text()) for k in range(count)]
        files = [path for path in (folder / "cache").rglob("*") if path.is_file()]
        most = {name: {what: max(own["steps"][name][what] for own in said) for what in ("seconds", "peak")}
                for name in STEPS}  # fmt: skip
        return {
            "rows": rows,
            "kind": kind,
            "processes": count,
            "steps": most,
            "pool_bytes": sum(path.stat().st_size for path in (folder / "pool").iterdir()),
            "cache_bytes": sum(path.stat().st_size for path in files),
            "kept": said[0]["kept"],
            "fingerprint": said[0]["fingerprint"],
        }
    finally:
        shutil.rmtree(folder)


def main(bench: SizeBench) -> None:
    """Measure, print a table and write the numbers."""
    if bench.work is not None:
        prepare(bench.work, bench.max_length)
        return
    entries = []
    print("| records | files | processes | private MiB: " + ", ".join(STEPS) + " | seconds: " + ", ".join(STEPS[1:])
          + " | pool, cache (MiB) | kept |")  # fmt: skip
    print("|---:|---|---:|---|---|---|---:|", flush=True)
    for rows in bench.rows:
        for kind in bench.kinds:
            for count in bench.processes:
                one = measure(bench, rows, kind, count)
                entries.append(one)
                peaks = ", ".join(f"{one['steps'][name]['peak'] / MEBIBYTE:.0f}" for name in STEPS)
                seconds = ", ".join(f"{one['steps'][name]['seconds']:.1f}" for name in STEPS[1:])
                sizes = ", ".join(f"{one[name] / MEBIBYTE:.0f}" for name in ("pool_bytes", "cache_bytes"))
                print(f"| {rows:,} | {kind} | {count} | {peaks} | {seconds} | {sizes} | {one['kept']:,} |", flush=True)
                bench.out.parent.mkdir(parents=True, exist_ok=True)
                bench.out.write_text(json.dumps(entries, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(SizeBench))
