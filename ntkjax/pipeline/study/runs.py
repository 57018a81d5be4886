"""Every wanted run: done one after the other, one process at a time, and collected again from disk."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import psutil
from tqdm import tqdm

from ntkjax.ahead import compiled_ahead, worthwhile
from ntkjax.errors import UserError
from ntkjax.evaluation import Outcome, read_outcomes
from ntkjax.files import read_json
from ntkjax.job import barrier, is_primary
from ntkjax.pipeline.run_dir import RunDir
from ntkjax.pipeline.study.grid import Condition, Task
from ntkjax.pipeline.study.runner import FAILURE, OUTCOMES, RESULT, RunFailed, Runner


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that is wanted, and what there is of it.

    Attributes:
      folder: None while its learning rate is not tuned.
      result: the content of result.json, of a run that is done.
      message: of a run that failed: why.
    """

    task: Task
    status: Literal["done", "failed", "left"]
    folder: Path | None = None
    rate: float | None = None
    result: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    message: str = ""

    @property
    def path(self) -> Path:
        """The folder, of a run that is done or failed."""
        assert self.folder is not None
        return self.folder

    def outcomes(self) -> list[Outcome]:
        """Of a run that is done: its outcomes on the test set."""
        return read_outcomes(self.path / OUTCOMES["test"])

    def failure(self) -> dict[str, Any]:
        """Of a run that failed: what it was, its folder's name, and why."""
        named = dataclasses.asdict(self.task.condition) | {"arm": self.task.arm.label, "seed": self.task.seed}
        return named | {"run": self.path.name, "message": self.message}


def collect(runner: Runner) -> list[Run]:
    """Every wanted run in order, from what is on disk; nothing is computed."""
    return [collected(runner, task) for task in runner.grid.tasks()]


def collected(runner: Runner, task: Task) -> Run:
    """What there is of one run on disk."""
    rate = runner.known_rate(task)
    if rate is None:
        return Run(task, "left")
    folder = runner.run_folder(task, rate)
    if (folder / RESULT).exists():
        return Run(task, "done", folder, rate, read_json(folder / RESULT))
    if (folder / FAILURE).exists():
        return Run(task, "failed", folder, rate, message=read_json(folder / FAILURE)["message"])
    return Run(task, "left", folder, rate)


def do_all(runner: Runner, run: RunDir, tasks: Sequence[Task], *, bar: bool, command: str = "study") -> None:
    """Bring every task to its end; each is a line of the run directory's metrics.jsonl. A task that fails is recorded,
    and the others go on.

    Args:
      bar: one progress bar over all tasks, called after the ``command``.
    """
    failed, memory = 0, Memory()
    with tqdm(tasks, disable=not bar, unit="run", desc=command) as shown:
        for task in shown:
            memory.spare()
            shown.set_postfix_str(
                f"{task.arm.label}, {condition_name(task.condition)}, seed {task.seed}; {failed} failed"
            )
            new = not is_done(runner, task)
            entry = dataclasses.asdict(task.condition) | {"arm": task.arm.label, "seed": task.seed}
            try:
                folder = runner.run(task)
            except RunFailed as error:
                failed += 1
                run.log(**entry, status="failed", message=str(error))
            else:
                if new:
                    run.log(**entry, status="done", run=folder.name)


@contextlib.contextmanager
def prepared(runner: Runner, tasks: Sequence[Task]) -> Iterator[None]:
    """Compile what the tasks that are left will need while the first of them are done (`ntkjax.ahead`)."""
    left = [task for task in tasks if not is_done(runner, task)]
    with compiled_ahead(lambda: runner.programs(left), worthwhile(runner.grid.model.mesh)) as runner.ahead:
        yield


def is_done(runner: Runner, task: Task) -> bool:
    """Whether its result is there."""
    known = runner.known_rate(task)
    return known is not None and (runner.run_folder(task, known) / RESULT).exists()


def condition_name(condition: Condition | Mapping[str, Any]) -> str:
    """``finance, 100 examples, N = 300``."""
    of = dataclasses.asdict(condition) if isinstance(condition, Condition) else condition
    size = "all examples" if of["size"] == "all" else f"{of['size']} examples"
    return f"{of['domain']}, {size}, N = {of['budget']:,}"


def forget_failures(out: Path) -> None:
    """Remove what says that runs, selections and warm-ups failed, so that they are tried again from where they are."""
    for kind in ("runs", "selections", "warmups") if is_primary() else ():
        for failure in (out / kind).glob(f"*/{FAILURE}"):
            failure.unlink()
    barrier("failures forgotten")


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Hold the directory's lock, which the system releases whatever becomes of this process. Of a job that works here
    together the first process holds it.

    Raises:
      UserError: another process holds it.
    """
    if not is_primary():
        yield
        return
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out}: another process is at work here; wait for it, or give another --out") from None
        except OSError:  # a file system without locks
            pass
        yield


@dataclasses.dataclass
class Memory:
    """Compiled programs pile up, one for each shape of a batch that a selection makes: drop them where this process has
    grown by a quarter of the machine's memory."""

    before: int = dataclasses.field(default_factory=lambda: psutil.Process().memory_info().rss)

    def spare(self) -> None:
        """Drop compiled programs if there are too many."""
        if psutil.Process().memory_info().rss - self.before > psutil.virtual_memory().total / 4:
            jax.clear_caches()
            self.before = psutil.Process().memory_info().rss
