"""``ntkjax launch --processes P -- COMMAND ...``: one command as a job of several processes on this machine.

What Slurm, a TPU pod or Kubernetes does on many machines (docs/guide/several-machines.md): the processes find each
other by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Nothing else is shared but the directory
``--out``.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO

from tyro.conf import Positional

from ntkjax.commands import COMMANDS, load_command
from ntkjax.commands.base import Command
from ntkjax.devices import simulated_devices
from ntkjax.errors import ConfigError
from ntkjax.preemption import EXIT_CODE

GRACE_SECONDS = 15.0
"""How long the other processes have, after one has ended with an error, to end with a message of their own; and again
after they were asked to end (SIGTERM), before they are killed."""
KEPT_LINES = 40
"""How many lines of a process's errors are kept, and shown when it fails."""


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """Run a command as a job of several processes on this machine, which end together."""

    command: Positional[tuple[str, ...]]
    """The command and its flags, after `--`: `ntkjax launch --processes 2 -- select --model DIR ...`."""
    processes: int = 2
    """How many."""
    devices: int | None = None
    """Devices of each process: so many of the GPUs, in order, or simulated ones on a CPU. Default: on a CPU one; each
    process of a job on GPUs must be given its own."""
    platform: str | None = None
    """cpu, cuda or tpu, as JAX_PLATFORMS. Default: what JAX finds."""
    port: int | None = None
    """Of process 0, where the others find it, on 127.0.0.1. Default: a free one."""

    def __post_init__(self):
        if self.processes < 1:
            raise ConfigError(f"--processes is {self.processes}: expected at least 1")
        if self.devices is not None and self.devices < 1:
            raise ConfigError(f"--devices is {self.devices}: expected at least 1")
        if self.port is not None and not 1 <= self.port <= 65535:
            raise ConfigError(f"--port is {self.port}: expected a number from 1 to 65535, or none for a free one")
        name = self.command[0] if self.command else None
        jobs = {name: load_command(name) for name in COMMANDS if name != "launch"}
        able = sorted(name for name, command in jobs.items() if command.divides or command.spans)
        if name not in able:
            said = "no command was given" if name is None else f"{name!r} does not run as several processes"
            raise ConfigError(f"{said}; expected `-- COMMAND FLAGS` with one of {', '.join(able)}")


@dataclasses.dataclass(frozen=True)
class Ended:
    """How the processes ended.

    Attributes:
      codes: exit code of each, in order; below 0, the signal that ended it, with its sign turned.
      first: the process that ended first with another code than 0; None where all ended with 0.
      said: its last lines on stderr.
    """

    codes: tuple[int, ...]
    first: int | None
    said: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """That of the process that failed first, 1 where a signal ended it; 0 where none failed."""
        return 0 if self.first is None else max(1, self.codes[self.first])


def environment(config: LaunchConfig, index: int, port: int, env: Mapping[str, str]) -> dict[str, str]:
    """The environment of process ``index`` of the job, ``env`` that of this process.

    Raises:
      ConfigError: CUDA_VISIBLE_DEVICES names fewer GPUs than the job needs.
    """
    own = dict(env) | {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(config.processes),
        "JAX_PROCESS_ID": str(index),
    }
    if config.platform is not None:
        own["JAX_PLATFORMS"] = config.platform
    if config.devices is not None:
        first = index * config.devices
        visible = env.get("CUDA_VISIBLE_DEVICES")
        # Each process sees its own GPUs alone, of those that this one sees.
        gpus = visible.split(",") if visible else [str(number) for number in range(first + config.devices)]
        if visible and len(gpus) < (needed := config.processes * config.devices):
            raise ConfigError(
                f"CUDA_VISIBLE_DEVICES names {len(gpus)} GPUs, and --processes x --devices is {config.processes} x "
                f"{config.devices} = {needed}; name as many, or unset it"
            )
        own["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[first : first + config.devices])
        own["XLA_FLAGS"] = simulated_devices(env.get("XLA_FLAGS", ""), config.devices)
    return own


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_together(
    command: Sequence[str], environments: Sequence[Mapping[str, str]], *, grace: float = GRACE_SECONDS
) -> Ended:
    """Start ``command`` once with each environment, and wait for all.

    Process 0 writes to this process's stdout and stderr. Of the others stdout is dropped (they print what process 0
    prints) and the last lines of stderr are kept. When a process ends with an error, the others get ``grace`` seconds
    to end, then SIGTERM, then as long again, then SIGKILL: a collective whose partner is gone may wait for minutes.
    SIGINT and SIGTERM to this process go to all of them.
    """
    started: list[subprocess.Popen] = []
    kept: list[collections.deque[str]] = [collections.deque(maxlen=KEPT_LINES) for _ in environments]
    readers = []

    def ask(number: int, _: object) -> None:
        for process in started:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for index, env in enumerate(environments):
            # A session of their own: a terminal sends Ctrl-C to its whole group, and they would get it twice.
            process = subprocess.Popen(
                list(command), env=dict(env), stdout=None if index == 0 else subprocess.DEVNULL,
                stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True,
            )  # fmt: skip
            started.append(process)
            reader = threading.Thread(target=_read, args=(process.stderr, kept[index], index == 0), daemon=True)
            reader.start()
            readers.append(reader)
        first = _wait(started, grace)
    finally:
        for process in started:
            # With what it has started: that would hold its stderr open, at whose end the readers below wait.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for number, handler in before.items():
            signal.signal(number, handler)
    last = time.monotonic() + 5
    for reader in readers:
        reader.join(timeout=max(0.0, last - time.monotonic()))
    codes = tuple(process.wait() for process in started)
    return Ended(codes, first, tuple(kept[first]) if first is not None else ())


def _cause(code: int) -> tuple[bool, int]:
    """Orders exit codes of processes that failed together: one that was asked to end before a killed one before others,
    which may have failed for lack of it."""
    return code != EXIT_CODE, code


def _wait(started: Sequence[subprocess.Popen], grace: float) -> int | None:
    """Wait for all; which process failed first. Where several failed before they were looked at, by `_cause`."""

    def failed_first() -> int | None:
        failed = [index for index, process in enumerate(started) if process.poll() not in (None, 0)]
        return min(failed, key=lambda index: _cause(started[index].returncode), default=None)

    first, deadline, asked = None, float("inf"), False
    while any(process.poll() is None for process in started):
        if first is None and (first := failed_first()) is not None:
            deadline = time.monotonic() + grace
        if time.monotonic() > deadline:
            for process in started:
                if process.poll() is None:
                    process.kill() if asked else process.terminate()
            asked, deadline = True, time.monotonic() + grace
        time.sleep(0.05)
    return failed_first() if first is None else first


def _read(lines: IO[str], kept: collections.deque[str], shown: bool) -> None:
    """Keep what a process says; pass that of process 0 on, character by character, since progress bars end no line."""
    line = ""
    while character := lines.read(1):
        if shown:
            sys.stderr.write(character)
            sys.stderr.flush()
        if character in "\r\n":
            if line.strip() and character == "\n":
                kept.append(line)
            line = ""
        else:
            line += character
    if line.strip():
        kept.append(line)


def run(config: LaunchConfig, *, progress: bool = True) -> Ended:
    """Run ``config.command`` as ``config.processes`` processes."""
    port = config.port or free_port()
    environments = [environment(config, index, port, os.environ) for index in range(config.processes)]
    return run_together([sys.executable, "-m", "ntkjax", *config.command], environments)


def describe(config: LaunchConfig, ended: Ended) -> str:
    """How the job ended; what the process that failed first said, unless it was process 0, which has said it."""
    if ended.first is None:
        return f"{config.processes} processes ended"
    code = ended.codes[ended.first]
    how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    # A mistake in the flags or files is one until it is mended; the lines of the process say how.
    again = "" if code == 2 else " Run the same command again to go on from what is finished."
    lines = [f"process {ended.first} of {config.processes} {how}; the others were ended.{again}"]
    return "\n".join(lines + ([] if ended.first == 0 else [f"[process {ended.first}] {line}" for line in ended.said]))


COMMAND = Command(LaunchConfig, run, describe)
