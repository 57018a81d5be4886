"""The processes that make one entry of the cache, each its own part of the rows: those of a job, or this process and
workers that it starts on the same machine. What they make does not depend on how many they are.

A worker is a new interpreter that calls `work`. It reads what to do, pickled, from its standard input, and at every
meeting of the crew writes an empty line and waits for one: where the other side is gone it reads the end of the file
instead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ntkjax.errors import DataError, UserError

ROWS_A_WORKER = 8000
"""Rows for each process at least: a worker takes three seconds to start, in which one process tokenises 6,500 rows."""
MOST_WORKERS = 16
CANNOT_WRITE = 74
"""Exit code of a worker that could not write, not even what went wrong."""


@dataclasses.dataclass(frozen=True)
class Crew:
    """The processes that make one entry of the cache, each its own part: this one is ``index`` of ``count``.

    ``meet(step)`` returns when all of them have called it.
    """

    folder: Path
    index: int = 0
    count: int = 1
    meet: Callable[[str], object] = lambda step: None

    def part(self, size: int, index: int | None = None) -> range:
        """Which of ``size`` rows process ``index`` (by default this one) prepares. Ranges follow one another."""
        index = self.index if index is None else index
        return range(size * index // self.count, size * (index + 1) // self.count)

    def each(self, step: str, do: Callable[[], Any]) -> list[Any]:
        """What ``do`` returns (a JSON value) on every process, in their order; what it wrote into ``folder`` can be
        read by all of them then. All take the same steps in the same order.

        Raises:
          DataError: as the first process whose ``do`` raises an error of the user's does, on all of them.
          OSError: a process could not write.
        """
        if self.count == 1:
            return [do()]
        said: dict[str, Any] = {}
        try:
            said["made"] = do()
        except UserError as error:
            said["error"] = str(error)
        except OSError as error:
            said["failed"] = str(error)
        file = lambda index: self.folder / f"{step}-{index}.json"
        file(self.index).write_text(json.dumps(said), encoding="utf-8")
        self.meet(f"{self.folder.parent.name}: {step}")
        all_said = [json.loads(file(index).read_text(encoding="utf-8")) for index in range(self.count)]
        self.meet(f"{self.folder.parent.name}: {step}, heard")  # before an error has the folder removed
        for index, one in enumerate(all_said):
            if "error" in one:
                raise DataError(one["error"])
            if "failed" in one:
                raise OSError(f"process {index}: {one['failed']}")
        file(self.index).unlink()
        return [one["made"] for one in all_said]


Build = Callable[[Crew], None]
"""Fills ``crew.folder``. To be done by workers it must pickle."""


def workers_for(rows: int) -> int:
    """Processes for so many rows: one for each `ROWS_A_WORKER`, as many as this process has cores, `MOST_WORKERS`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(rows // ROWS_A_WORKER, cores, MOST_WORKERS))


def build_with_workers(build: Build, folder: Path, count: int) -> None:
    """``build`` in a crew of this process and ``count`` - 1 workers on this machine.

    Raises:
      UserError: a worker was ended from outside, by want of memory, say. OSError: it could not write. Besides, what
        ``build`` raises.
    """
    if count == 1:
        build(Crew(folder))
        return
    # A worker computes nothing with jax, and must not take a share of the accelerator's memory. One thread each for the
    # tokenizer: the processes are as many as the cores.
    paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    env = os.environ | {"JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": paths}
    env["TRANSFORMERS_VERBOSITY"] = "error"  # what it has to say it has said here
    # Signals first: they reach the process that leads too, which ends its workers.
    program = "import signal, sys; [signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGTERM)]; "
    command = [sys.executable, "-c", program + "from ntkjax.data.crew import work; sys.exit(work())"]
    with contextlib.ExitStack() as stack:
        workers = []
        for _ in range(1, count):
            worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
            workers.append(stack.enter_context(worker))
            stack.callback(worker.kill)  # whatever ends this process's part; one that has ended is not there to kill
        for index, worker in enumerate(workers, 1):
            _send(worker, pickle.dumps((build, folder, index, count)))

        def meet(_: str) -> None:
            for worker in workers:
                _hear(worker)
            for worker in workers:
                _send(worker, b"\n")

        build(Crew(folder, 0, count, meet))
        for worker in workers:
            if worker.wait():
                raise _ended(worker)


def _send(worker: subprocess.Popen, content: bytes) -> None:
    assert worker.stdin is not None
    try:
        worker.stdin.write(content)
        worker.stdin.flush()
    except BrokenPipeError:
        raise _ended(worker) from None


def _hear(worker: subprocess.Popen) -> None:
    assert worker.stdout is not None
    if not worker.stdout.readline():
        raise _ended(worker)


def _ended(worker: subprocess.Popen) -> UserError | OSError:
    code = worker.wait()
    if code == CANNOT_WRITE:
        return OSError("a process could not write its part")
    how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
    return UserError(
        f"a process that prepared a part of the data ended {how}; expected it to go on; free some memory, or look at "
        "what it wrote above, and run the same command again"
    )


def work() -> int:
    """A worker's life; its exit code."""
    # What a library prints must not be taken for a line of the crew's.
    given, said = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()

    def meet(_: str) -> None:
        said.write(b"\n")
        said.flush()
        if not given.readline():
            raise EOFError

    try:
        build, folder, index, count = pickle.load(given)
        build(Crew(folder, index, count, meet))
    except (EOFError, pickle.UnpicklingError, UserError):
        return 0  # the process that leads is gone, or has heard of the user's error and tells it
    except OSError as error:
        print(f"ntkjax: {error}", file=sys.stderr)
        return CANNOT_WRITE
    return 0


def _end_with(parent: int) -> None:
    """End this process when its parent has ended, killed perhaps: its part would be nobody's."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
