"""One run after the other: warm-up, selection, learning rates, fine-tuning, evaluation; each kept and found again by
the hash of what it depends on. On a mesh over several processes all of them do every run together.

::

    OUT/warmups/<hash>/     one for each domain, size and seed
    OUT/shared/             embeddings and gradient features, in folders named from what they depend on
    OUT/selections/<hash>/  scores.parquet, selected.jsonl, selection.json
    OUT/runs/<hash>/        asked.json (what), selection.json, training/metrics.jsonl, trained.json, dev.jsonl,
                            outcomes.jsonl (of the test set), and at the end result.json, or failure.json
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ntkjax.ahead import Ahead, Program
from ntkjax.errors import UserError
from ntkjax.evaluation import Outcome
from ntkjax.evaluation.metrics import means
from ntkjax.files import read_json, read_json_lines, write_json
from ntkjax.job import barrier, is_primary, process
from ntkjax.models import LanguageModel
from ntkjax.pipeline.cost import selection_cost, training_cost, uses_model
from ntkjax.pipeline.evaluate import evaluate_on
from ntkjax.pipeline.finetune import save_result, summary, train_on
from ntkjax.pipeline.load import Loaded
from ntkjax.pipeline.options import SelectorOptions
from ntkjax.pipeline.select import ChoiceSettings, choice_programs, choose
from ntkjax.pipeline.study.arms import BASE
from ntkjax.pipeline.study.grid import Grid, Task
from ntkjax.pipeline.warmup import WarmUp, needs_checkpoints, warm_up
from ntkjax.selection import Selection
from ntkjax.training import STEP, FitResult, TrainConfig, step_program
from ntkjax.types import Params

RESULT, FAILURE, TRAINED = "result.json", "failure.json", "trained.json"
OUTCOMES = {"dev": "dev.jsonl", "test": "outcomes.jsonl"}
"""Split -> the file of a run's outcomes on it."""
_ENVIRONMENT = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)


class RunFailed(Exception):
    """A run, or what it stands on, has failed and was recorded; its message says why."""


def recorded(folder: Path, work: Callable[[], Any], *, done: str) -> Any:
    """``work()``, or the failure that ``folder`` holds: what went wrong is written into failure.json and raised as
    ``RunFailed``; it is not tried again while that file is there.

    A full disk or a directory that cannot be written is the study's failure, not the run's, and is raised as it is.
    """
    if (folder / FAILURE).exists() and not (folder / done).exists():
        raise RunFailed(read_json(folder / FAILURE)["message"])
    barrier(f"begin {folder.name}")  # all processes have looked before one writes
    try:
        return work()
    except RunFailed as error:
        written(folder / FAILURE, {"kind": "stands on a failure", "message": str(error)})
        raise
    except Exception as error:
        # A full disk would fail every run that follows, and be remembered by each as its own failure.
        if _of_the_environment(error) or (process()[1] > 1 and not isinstance(error, UserError)):
            raise  # of several processes one alone may have failed: the job ends
        trace = None if isinstance(error, UserError) else traceback.format_exc()
        message = str(error) or type(error).__name__
        written(folder / FAILURE, {"kind": type(error).__name__, "message": message, "traceback": trace})
        raise RunFailed(message) from error


def written(path: Path, content: Any, *, replace: bool = True) -> None:
    """`write_json` by the first process of the job; when it returns all of them may read the file. ``replace`` False
    leaves a file that is there."""
    if is_primary() and (replace or not path.exists()):
        write_json(path, content)
    barrier(f"{path.parent.name}/{path.name}")


def removed(folder: Path) -> None:
    """The folder removed, if it is there, by the first process of the job."""
    if is_primary():
        shutil.rmtree(folder, ignore_errors=True)
    barrier(f"{folder.parent.name}/{folder.name}")


def _of_the_environment(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in _ENVIRONMENT:
            return True
        error = error.__cause__
    return False


@dataclasses.dataclass
class Runner:
    """Does what is missing, one task at a time.

    Attributes:
      grid: what is shared.
      progress: whether every step of a run has a progress bar.
      warmed: the last warm-up made or read, by its folder (many tasks in a row share it).
      ahead: programs that are being compiled.
    """

    grid: Grid
    progress: bool = False
    warmed: tuple[Path, WarmUp] | None = None
    ahead: Ahead = dataclasses.field(default_factory=Ahead)

    def run(self, task: Task) -> Path:
        """Bring the task to its end; gives the folder with its result.json.

        Raises:
          RunFailed: it has failed, now or before.
        """
        rate = self.tuned_rate(task)
        folder = self.run_folder(task, rate)
        if not (folder / RESULT).exists():
            recorded(folder, lambda: self._finish(task, rate, folder), done=RESULT)
            for trial in self.trials(task).values():
                removed(trial / "training" / "checkpoints")
        return folder

    def programs(self, tasks: Sequence[Task]) -> Iterator[Program]:
        """The programs that these tasks will need first: a step on the domain, which on packed rows is that of every
        arm, and those of each selection, of the first task that asks for it."""
        grid, chosen, trained = self.grid, set[SelectorOptions](), False
        for task in tasks:
            arm, domain = task.arm, grid.training_set(task)
            if arm.kind == BASE or grid.model_of(arm) is not grid.model:
                continue
            if not (trained or grid.spec.select_only) and arm.uses_domain:
                trained, config = True, grid.train_config(task, arm.rates[0])
                yield step_program(grid.model.nll_fn, grid.start(arm, task.seed), domain.tokens, config)
            if arm.select is None or arm.select in chosen or not uses_model(arm.select):
                continue
            chosen.add(arm.select)
            asked = grid.start_of_selection(task.seed), domain, grid.data(task).pool, arm.select
            yield from choice_programs(grid.model, *asked, self._settings(task), warmup=None)

    def trials(self, task: Task) -> dict[float, Path]:
        """Learning rate -> the folder of the run, with the first seed, that it is tried with."""
        first = dataclasses.replace(task, seed=self.grid.spec.seeds[0])
        return {rate: self.run_folder(first, rate) for rate in task.arm.rates}

    def run_folder(self, task: Task, rate: float) -> Path:
        """Where a run is kept."""
        return self.grid.folder("runs", self.grid.run_key(task, rate))

    # -- learning rates --

    def tuned_rate(self, task: Task) -> float:
        """The learning rate of lowest dev loss among those of the arm, tried with the first seed.

        Raises:
          RunFailed: not one of them could be trained.
        """
        if not self._is_tuned(task):
            return task.arm.rates[0]
        first, trials = dataclasses.replace(task, seed=self.grid.spec.seeds[0]), self.trials(task)
        for rate, folder in trials.items():
            if not (folder / TRAINED).exists():
                with contextlib.suppress(RunFailed):
                    recorded(folder, lambda rate=rate, folder=folder: self._train(first, rate, folder), done=TRAINED)
        known = self.known_rate(task)
        if known is not None and (trials[known] / TRAINED).exists():
            return known
        problems = "; ".join(f"{rate:g}: {read_json(folder / FAILURE)['message']}" for rate, folder in trials.items())
        message = f"no learning rate could be trained with seed {first.seed} ({problems})"
        failure = self.run_folder(task, task.arm.rates[0]) / FAILURE
        written(failure, {"kind": "tuning", "message": message}, replace=False)  # that of a trial says more
        raise RunFailed(message)

    def known_rate(self, task: Task) -> float | None:
        """The tuned rate where every trial has been made (or has failed), without making any: the first rate where all
        have failed; None otherwise."""
        if not self._is_tuned(task):
            return task.arm.rates[0]
        trials = self.trials(task)
        trained = [rate for rate, folder in trials.items() if (folder / TRAINED).exists()]
        if any(rate not in trained and not (folder / FAILURE).exists() for rate, folder in trials.items()):
            return None
        losses = [(read_json(trials[rate] / TRAINED)["dev_loss"], rate) for rate in trained]
        return min(losses)[1] if losses else task.arm.rates[0]

    def _is_tuned(self, task: Task) -> bool:
        return len(task.arm.rates) > 1 and task.arm.kind != BASE and not self.grid.spec.select_only

    # -- one run --

    def _finish(self, task: Task, rate: float, folder: Path) -> None:
        grid = self.grid
        self._ask(task, rate, folder)
        if grid.spec.select_only:
            result = self._chosen(task, folder)
        elif task.arm.kind == BASE:
            result = self._evaluated(grid.model, {}, task, folder)
        else:
            fitted = self._train(task, rate, folder)
            if grid.spec.keep_weights:
                save_result(folder, grid.model_of(task.arm), fitted.params)
            result = read_json(folder / TRAINED)
            measured = self._evaluated(grid.model_of(task.arm), fitted.params, task, folder)
            result |= measured | {"seconds": result["seconds"] | measured["seconds"]}
        written(folder / RESULT, result)
        removed(folder / "training" / "checkpoints")

    def _ask(self, task: Task, rate: float, folder: Path) -> None:
        condition = dataclasses.asdict(task.condition)
        asked = {**condition, "arm": task.arm.label, "kind": task.arm.kind, "seed": task.seed, "learning_rate": rate}
        written(folder / "asked.json", asked | {"key": self.grid.run_key(task, rate)})

    def _chosen(self, task: Task, folder: Path) -> dict[str, Any]:
        """The selection of a run as its result.json holds it, and a copy of what it chose."""
        if task.arm.select is None:
            return {}
        selection, made = self.selection(task)
        content = read_json(made / "selection.json")
        written(folder / "selection.json", {**content, "folder": str(made.relative_to(self.grid.out))})
        data, timing, domain = self.grid.data(task), read_json(made / "study.json"), self.grid.training_set(task)
        warm = task.arm.warmup and self.grid.warmup_config(task)
        config = self.grid.model.config
        cost = selection_cost(task.arm.select, selection, domain.tokens, data.pool.tokens, config, warm)
        chosen = {"diagnostics": content["diagnostics"], "n": len(selection.selected)}
        if data.useful is not None:
            chosen |= {"precision": float(data.useful[selection.selected].mean()), "chance": float(data.useful.mean())}
        return {"selection": chosen, "seconds": timing["seconds"], "passes": cost}

    def _train(self, task: Task, rate: float, folder: Path) -> FitResult:
        """Fine-tune (or take up what is there) and write trained.json."""
        grid, data = self.grid, self.grid.data(task)
        self._ask(task, rate, folder)
        chosen = self._chosen(task, folder)
        domain, auxiliary, given = grid.training_set(task), None, task.arm.given
        if task.arm.select is not None or given is not None:
            rows = read_json(folder / "selection.json")["selected"] if given is None else given.rows
            auxiliary = data.pool.subset(np.sort(np.asarray(rows, np.int64)))
        if auxiliary is not None and not task.arm.uses_domain:
            domain, auxiliary = auxiliary, None
        config = grid.train_config(task, rate)
        self.ahead.wait(STEP)
        result = train_on(
            grid.model_of(task.arm), grid.start(task.arm, task.seed), domain, auxiliary, config,
            seed=task.seed, dev=data.dev, out=folder / "training", progress=self.progress,
        )  # fmt: skip
        cost, seconds = training_cost(result.history)
        content = {
            "learning_rate": rate,
            "dev_loss": dev_loss(result, config),
            **summary(result),
            **chosen,
            "seconds": chosen.get("seconds", {}) | {"training": seconds},
            "passes": chosen.get("passes", {}) | {"training": cost},
            "curve": [[line["step"], line["loss"]] for line in result.history if "loss" in line],
        }
        written(folder / TRAINED, content)
        return result

    def _evaluated(self, model: LanguageModel, params: Params, task: Task, folder: Path) -> dict[str, Any]:
        data, began = self.grid.data(task), time.monotonic()
        outcomes = {
            split: self._outcomes(model, params, {"dev": data.dev, "test": data.test}[split], folder / OUTCOMES[split])
            for split in self.grid.evaluated
        }
        measured: dict[str, Any] = {split: means(of_split) for split, of_split in outcomes.items()}
        if task.arm.kind == BASE and "dev" in outcomes:
            measured["dev_loss"] = token_mean(outcomes["dev"])
        return measured | {"seconds": {"evaluation": time.monotonic() - began}}

    def _outcomes(self, model: LanguageModel, params: Params, data: Loaded | None, path: Path) -> list[Outcome]:
        spec = self.grid.spec
        assert data is not None
        return evaluate_on(
            model, params, data, spec.data, spec.evaluation, path=path, progress=self.progress
        ).outcomes  # fmt: skip

    # -- what many runs stand on --

    def selection(self, task: Task) -> tuple[Selection, Path]:
        """What the task's method chooses, and the folder that holds it."""
        grid, key, options = self.grid, self.grid.selection_key(task), task.arm.select
        assert key is not None and options is not None
        folder = grid.folder("selections", key)

        def work() -> Selection:
            warmed, seconds = None, {}
            if task.arm.warmup is not None:
                warmed, seconds["warmup"] = self.warm_up(task)
            settings = dataclasses.replace(self._settings(task), out=folder)
            start, domain, pool = grid.start_of_selection(task.seed), grid.training_set(task), grid.data(task).pool
            began = time.monotonic()
            chosen = choose(grid.model, start, domain, pool, options, settings, warmup=warmed)
            timing = {"selection": time.monotonic() - began} | seconds
            written(folder / "study.json", {"seconds": timing, "key": key}, replace=False)
            return chosen

        return recorded(folder, work, done="study.json"), folder

    def _settings(self, task: Task) -> ChoiceSettings:
        spec, out = self.grid.spec, self.grid.out
        options = {"progress": self.progress, "tracker": spec.train.tracker}
        return ChoiceSettings(task.condition.budget, task.seed, spec.data, out, shared=out / "shared", **options)

    def warm_up(self, task: Task) -> tuple[WarmUp, float]:
        """The warm-up of a task's condition and seed, and the seconds that it took."""
        grid = self.grid
        epochs = any(arm.select is not None and needs_checkpoints(arm.select) for arm in grid.arms)
        folder = grid.folder("warmups", grid.warmup_key(task))
        if epochs:  # they are kept, which an earlier study may not have done
            folder = folder.with_name(folder.name + "-epochs")
        if self.warmed is None or self.warmed[0] != folder:
            # The last one alone is held: tasks come in an order in which those that share a warm-up are neighbours.
            self.warmed = None  # its memory first
            work = lambda: warm_up(
                grid.model, grid.start_of_selection(task.seed), grid.training_set(task), grid.warmup_config(task),
                seed=task.seed, out=folder, progress=self.progress, checkpoints=epochs,
            )  # fmt: skip
            self.warmed = folder, recorded(folder, work, done=".none")
        return self.warmed[1], training_cost(read_json_lines(folder / "warmup" / "metrics.jsonl"))[1]


def dev_loss(result: FitResult, config: TrainConfig) -> float | None:
    """Dev loss (nats per response token) of the parameters that the run ends with; None without a dev set."""
    losses = [line["dev_loss"] for line in result.history if line.get("kind") == "dev" and line["step"] > 0]
    if not losses:
        return None
    return min(losses) if config.restore_best else losses[-1]


def token_mean(outcomes: list[Outcome]) -> float:
    """sum nll tokens / sum tokens: what training calls the dev loss."""
    scored = [(o.nll, o.nll_tokens) for o in outcomes if o.nll is not None and o.nll_tokens is not None]
    return float(sum(nll * tokens for nll, tokens in scored) / sum(tokens for _, tokens in scored))
