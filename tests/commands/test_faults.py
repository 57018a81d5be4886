"""Jobs of two processes, one of which is killed at a random moment, twenty times in all: the job ends with the cause,
the same command goes on, and the end is bit for bit that of a job that was left alone."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import psutil
import pytest

from ntkjax.assets import tiny_lm_path, write_planted_task
from ntkjax.store import RowStore

PROMISED_SECONDS = 60.0
"""What the guide promises: when one process has failed, all of its job have ended after that."""
FILES = ("selection.json", "selected.jsonl", "scores.parquet", "adapter/adapter_model.safetensors")
PHASES = {"selection.json": "chosen", "rows/scores": "scores", "rows/embeddings": "stage 1", "warmup": "warm-up"}
"""What is there of a run when a process is killed -> how far it is, the last first."""

# `launch` as it is, but for the program that it starts: the worker, under which every batch reaches the disk at once.
LAUNCHER = """
import sys
from ntkjax.cli import main
from ntkjax.commands import launch
worker, started = sys.argv[1], launch.run_together
def under_worker(command, environments):
    return started([sys.executable, "-c", worker, *command[3:]], environments)
launch.run_together = under_worker
sys.exit(main(["launch", *sys.argv[2:]]))
"""


@dataclasses.dataclass
class Job:
    """A job under `launch` that is at work; what it prints goes into the file ``said``."""

    launcher: subprocess.Popen
    said: Path
    processes: int

    def workers(self) -> list[psutil.Process]:
        """Its processes, by index; [] while not all are there."""
        try:
            found = psutil.Process(self.launcher.pid).children()
            by_index = {int(child.environ()["JAX_PROCESS_ID"]): child for child in found}
        except (psutil.Error, KeyError):  # it has ended, or has forked and not begun its program
            return []
        return [by_index[index] for index in range(self.processes)] if len(by_index) == self.processes else []

    def batches(self) -> int:
        """How many batches the first process has written."""
        return self.said.read_text(errors="replace").count("\nrows ")

    def end(self) -> str:
        """Wait; what it printed."""
        self.launcher.wait(timeout=600)
        return self.said.read_text(errors="replace")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One selection, and how its jobs are started."""

    jobs: ModuleType
    root: Path
    flags: tuple[str, ...]

    def start(self, out: Path, processes: int, devices: int) -> Job:
        said = self.root / "said"
        launch = ["--processes", str(processes), "--devices", str(devices), "--platform", "cpu", "--", "select"]
        command = [sys.executable, "-c", LAUNCHER, self.jobs.WORKER, *launch, *self.flags, "--out", str(out)]
        with said.open("wb") as file:
            env = self.jobs.environment(self.root)
            launcher = subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT, cwd=self.root)
        return Job(launcher, said, processes)

    def whole(self, out: Path, processes: int, devices: int) -> tuple[float, int]:
        """A job that is left alone: its seconds, and its batches."""
        began, job = time.monotonic(), self.start(out, processes, devices)
        said = job.end()
        assert job.launcher.returncode == 0, said[-4000:]
        return time.monotonic() - began, job.batches()


def setting(jobs: ModuleType, root: Path, *flags: str) -> Setting:
    """A selection of the embedded model on a small embedded task."""
    files = write_planted_task(root / "task", 0, pool_size=48, domain_size=16, dev_size=3, test_size=3)
    named = ["--model", str(tiny_lm_path()), "--domain", str(files["train"]), "--pool", str(files["pool"])]
    own = ["--n", "6", "--lora-rank", "2", "--token-budget", "512", "--warmup.batch-size", "4"]
    own += ["--warmup.learning-rate", "1e-3", "--warmup.save-every", "1", "--dedup.mode", "off"]
    return Setting(jobs, root, (*named, *own, *flags))


def phase(out: Path) -> str:
    """How far the run in ``out`` is."""
    return next((name for file, name in PHASES.items() if (out / file).exists()), "loading")


def rows_of(out: Path) -> dict[str, bytes]:
    """The bytes of every row of every store, read through the store itself."""
    found = {}
    for path in sorted((out / "rows").iterdir()):
        held = json.loads((path / "manifest.json").read_text())
        with RowStore.open(path, **held["shape"], manifest=held["manifest"]) as store:
            done = np.flatnonzero(store.done())
            found[path.name] = done.tobytes() + store.read(done).tobytes()
    return found


def check_same(killed: Path, whole: Path) -> None:
    assert rows_of(killed) == rows_of(whole)
    for name in FILES:
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name


def killed(job: Job, out: Path, moment: random.Random, seconds: float, batches: int) -> str | None:
    """Kill one of its processes, either at a random time or between random batches, and look at how the job ends; the
    phase in which it was killed, None where it came to its end before."""
    victim, began = moment.randrange(job.processes), time.monotonic()
    at_time, at_batch, wait = moment.uniform(0, seconds), moment.randint(1, max(1, batches)), moment.uniform(0, 0.1)
    by_time = moment.random() < 0.5
    while job.launcher.poll() is None:
        workers = job.workers()
        due = time.monotonic() - began >= at_time if by_time else job.batches() >= at_batch
        if workers and due:
            time.sleep(0 if by_time else wait)
            found = phase(out)
            try:
                workers[victim].kill()
            except psutil.NoSuchProcess:
                break
            before = time.monotonic()
            job.launcher.wait(timeout=PROMISED_SECONDS)
            assert not [worker for worker in workers if worker.is_running() and worker.status() != "zombie"]
            said = job.said.read_text(errors="replace")
            if job.launcher.returncode == 0:  # it had done its work
                return None
            assert f"process {victim} of {job.processes} was ended by signal {signal.SIGKILL.value}" in said, said[
                -4000:
            ]
            assert "Run the same command again to go on from what is finished" in said
            print(
                f"\n{found}: process {victim} of {job.processes}; ended {time.monotonic() - before:.1f} s later", end=""
            )
            return found
        time.sleep(0.01)
    said = job.end()
    assert job.launcher.returncode == 0, said[-4000:]
    return None


def check_kills(setting: Setting, kills: int, seed: int, *, shapes: list[tuple[int, int]]) -> None:
    """``kills`` kills of a process of several; ``shapes``: (processes, devices of each) that a job may have, the first
    that of the whole."""
    whole, out, moment = setting.root / "whole", setting.root / "killed", random.Random(seed)
    setting.whole(whole, *shapes[0])  # compiles
    seconds, batches = setting.whole(setting.root / "again", *shapes[0])
    check_same(setting.root / "again", whole)  # else bit for bit would mean nothing
    phases: Counter[str] = Counter()
    while phases.total() < kills:
        job = setting.start(out, *moment.choice(shapes))
        found = killed(job, out, moment, seconds, batches)
        if found is not None:
            phases[found] += job.processes > 1
            continue
        check_same(out, whole)
        shutil.rmtree(out)
    setting.whole(out, *shapes[0])
    check_same(out, whole)
    print(f"\n{dict(phases)}")
    assert sum(count > 0 for count in phases.values()) >= 3, f"kills fell into {dict(phases)} alone"


@pytest.mark.slow
def test_a_job_on_a_mesh_killed_twelve_times_ends_the_same(jobs, tmp_path):
    """Two processes of one device each, sometimes one process of both."""
    check_kills(setting(jobs, tmp_path, "--mesh", "data=2"), 12, 0, shapes=[(2, 1), (2, 1), (2, 1), (1, 2)])


@pytest.mark.slow
def test_a_job_that_divides_the_pool_killed_eight_times_ends_the_same(jobs, tmp_path):
    """Two processes that each hold the model, sometimes one."""
    check_kills(setting(jobs, tmp_path), 8, 1, shapes=[(2, 1), (2, 1), (2, 1), (1, 1)])
