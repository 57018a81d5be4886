"""How 08_throughput.py talks to its workers: JSON lines over a pipe, standard library only, on both sides.

A worker is a process that loads everything once, says it is ready, and then answers each request, so that neither
start-up nor compilation is in a measured time:

    -> {"ask": "run"}                    <- {"seconds": 1.25, "cpu": 2.4, "rows": 64}       cpu: of all its threads
    -> {"ask": "check", "out": "x.npz"}  <- {"path": "x.npz"}
    -> {"ask": "memory"}                 <- {"peak": 123456789}           bytes
    -> {"ask": "stop"}                   (the process ends)

Its first line is {"ready": true, "note": ..., "versions": {...}} or, like any answer, {"error": traceback}. Whatever a
library prints to standard output goes to standard error instead, so it cannot be taken for an answer.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import importlib.metadata
import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker measures.

    Attributes:
      run: one pass over ``rows`` examples; it returns only when the result is there.
      rows: how many examples that is.
      check: path -> None, writes evidence of what is computed (an .npz, see `08_throughput.py`).
      note: one line about how it is run.
    """

    run: Callable[[], Any]
    rows: int
    check: Callable[[str], None]
    note: str = ""


class WorkerError(RuntimeError):
    """A worker that could not start, died, or answered with an error: its own words."""


def peak_memory() -> int:
    """The largest resident size this process has had, in bytes (VmHWM where /proc has it)."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def release_memory() -> None:
    """Give back what is free: many workers wait while one works, and together they must fit. (glibc keeps freed memory;
    elsewhere nothing happens.)"""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of ``packages`` and of Python."""
    installed = {"python": ".".join(map(str, sys.version_info[:3]))}
    return installed | {name: importlib.metadata.version(name) for name in packages}


def serve(make: Callable[[dict, str], Job], packages: Sequence[str]) -> None:
    """Main function of a worker, called as ``python worker.py TASK.json VARIANT``: make the job, answer until told to
    stop or the pipe closes."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        job = make(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2])
        say(answers, {"ready": True, "note": job.note, "versions": versions(*packages)})
    except Exception:
        say(answers, {"error": traceback.format_exc()})
        return
    for line in sys.stdin:
        request = json.loads(line)
        if request["ask"] == "stop":
            return
        try:
            say(answers, _answer(job, request))
        except Exception:
            say(answers, {"error": traceback.format_exc()})


def say(stream: TextIO, message: dict) -> None:
    """One message, one line."""
    stream.write(json.dumps(message) + "\n")
    stream.flush()


def _answer(job: Job, request: dict) -> dict:
    if request["ask"] == "run":
        began, busy = time.perf_counter(), time.process_time()
        job.run()
        took = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - busy}
        release_memory()
        return took | {"rows": job.rows}
    if request["ask"] == "check":
        job.check(request["out"])
        release_memory()
        return {"path": request["out"]}
    if request["ask"] == "memory":
        return {"peak": peak_memory()}
    raise ValueError(f"unknown request {request!r}")


class Worker:
    """The other end: starts the process and asks. A context manager; leaving it ends the process."""

    def __init__(self, command: Sequence[str], *, log: Path, env: dict[str, str] | None = None) -> None:
        """Start ``command``; what it prints to standard error goes to the file ``log``.

        Raises WorkerError if it cannot be started.
        """
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        try:
            with log.open("w") as errors:
                self._process = subprocess.Popen(
                    list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=env
                )
        except OSError as error:
            raise WorkerError(f"cannot start {command[0]}: {error}") from error
        self._pending = b""

    def ready(self, timeout: float) -> dict:
        """Its first message; WorkerError if that is an error, or none comes within ``timeout`` seconds."""
        return self._read(timeout)

    def ask(self, ask: str, timeout: float = 600.0, **more: Any) -> dict:
        """Send a request and wait for its answer; WorkerError as in `ready`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write((json.dumps({"ask": ask} | more) + "\n").encode())
            self._process.stdin.flush()
        except OSError as error:
            raise WorkerError(f"{self._tail()}\nthe worker is gone: {error}") from error
        return self._read(timeout)

    def _read(self, timeout: float) -> dict:
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as wait:
            wait.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._pending:
                if not wait.select(max(0.0, deadline - time.monotonic())):
                    self.close()
                    raise WorkerError(f"{self._tail()}\nno answer within {timeout:.0f} s")
                piece = os.read(self._process.stdout.fileno(), 1 << 16)
                if not piece:
                    code = self._process.wait()
                    why = " (killed: out of memory?)" if code == -signal.SIGKILL else ""
                    raise WorkerError(f"{self._tail()}\nthe worker ended with exit code {code}{why}")
                self._pending += piece
        line, _, self._pending = self._pending.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def _tail(self, lines: int = 12) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def close(self) -> None:
        """End the process: ask it, then make it."""
        if self._process.poll() is None:
            try:
                assert self._process.stdin is not None
                self._process.stdin.write(b'{"ask": "stop"}\n')
                self._process.stdin.close()
                self._process.wait(timeout=5)
            except (OSError, ValueError, subprocess.TimeoutExpired):
                self._process.kill()
                self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None and not pipe.closed:
                with contextlib.suppress(OSError):
                    pipe.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
