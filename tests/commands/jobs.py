"""``ntkjax select`` in processes of its own: watched, killed, one or several of them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Every batch reaches the disk before the next one starts, and says so: a kill can then fall between any two.
WORKER = """
import sys, time
import ntkjax.store as store
from ntkjax.cli import main
store._FLUSH_SECONDS = 0.0
write = store.RowStore.write
def told(self, index, values):
    write(self, index, values)
    print("rows", self.path.name, *index[index >= 0].tolist(), flush=True)
    time.sleep(0.05)
store.RowStore.write = told
print("ready", flush=True)
sys.exit(main(sys.argv[1:]))
"""


def environment(root: Path) -> dict[str, str]:
    """One simulated device, programs compiled once for all runs that share ``root``."""
    flags = os.environ["XLA_FLAGS"].split()
    flags = [f for f in flags if "device_count" not in f]
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": " ".join(flags),
        "JAX_COMPILATION_CACHE_DIR": str(root / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        "NTKJAX_CACHE": str(root / "data"),
    }


def start(root: Path, *flags: str, env: dict[str, str] | None = None) -> subprocess.Popen:
    """``ntkjax select FLAGS`` under the worker above, its output in a pipe."""
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, "select", *flags],
        env=environment(root) | (env or {}),
        stdout=subprocess.PIPE,
        stderr=(root / f"stderr.{(env or {}).get('JAX_PROCESS_ID', '0')}").open("ab"),
        text=True,
        cwd=root,
    )


def start_job(root: Path, count: int, *flags: str) -> list[subprocess.Popen]:
    """``count`` processes that find each other by environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    common = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    return [start(root, *flags, env=common | {"JAX_PROCESS_ID": str(i)}) for i in range(count)]


def finish(process: subprocess.Popen) -> list[str]:
    """The lines it still prints; it must end well."""
    assert process.stdout is not None
    lines = process.stdout.read().splitlines()
    assert process.wait() == 0, lines
    return lines


def written(lines: list[str], store: str) -> list[int]:
    """Rows that the worker said it wrote into ``store``, in order."""
    words = [line.split() for line in lines]
    return [int(row) for word in words if word[:2] == ["rows", store] for row in word[2:]]
