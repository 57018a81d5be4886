"""A finished selection, opened again: its model, parameters, data and choice, from the config.yaml of its run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ntkjax.commands import COMMANDS, load_command
from ntkjax.data import Records, read_records
from ntkjax.errors import ConfigError
from ntkjax.files import read_json
from ntkjax.models import LanguageModel, load_adapter
from ntkjax.parallel import mesh_of
from ntkjax.pipeline.config_io import config_from_dict
from ntkjax.pipeline.deduplicate import read_held_out
from ntkjax.pipeline.inputs import INPUTS, Inputs, input_changes, inputs_of
from ntkjax.pipeline.load import Loaded, load_data, load_model, trained_parameters
from ntkjax.pipeline.options import DataOptions, SelectorOptions
from ntkjax.pipeline.run_dir import load_run
from ntkjax.pipeline.select import make_selector, problem_of
from ntkjax.pipeline.selection_io import read_scores, read_selection
from ntkjax.pipeline.study.grid import Grid, Task
from ntkjax.pipeline.study.runner import Runner
from ntkjax.pipeline.study.runs import condition_name
from ntkjax.pipeline.warmup import needs_checkpoints, warm_up
from ntkjax.selection import Selection, SelectionProblem, Selector
from ntkjax.selection.base import WarmupCheckpoint
from ntkjax.types import Params

SELECT = "select"


@dataclasses.dataclass(frozen=True)
class Which:
    """Which selection of a run that compares arms: a value, or None for the first that there is (of the arms: the first
    that the run proposes).

    Attributes:
      arm: its label. domain: a name. size: training examples, a number or ``all``. budget: N.
    """

    arm: str | None = None
    domain: str | None = None
    size: str | None = None
    budget: int | None = None
    seed: int | None = None

    @property
    def given(self) -> bool:
        """Whether anything is asked for."""
        return any(value is not None for value in dataclasses.asdict(self).values())


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished selection.

    Attributes:
      path: its folder.
      name: what it is called: the run directory, and of a run that compares arms which of its selections.
      select, n, data, seed: with what it was made. model_name, domain_files, pool_files: of what.
      model: as loaded. params: theta, with which the pool was looked at. checkpoints: the warm-up's epochs.
      selection: what it chose. domain: its training examples.
      pool: the pool as it was scored: row i is row i of scores.parquet, duplicates are not in it.
      records: the pool's records, perhaps with more, without their tokens.
      shared: where rows lie that other selections share; None: nowhere but in ``rows``.
    """

    path: Path
    name: str
    select: SelectorOptions
    n: int
    data: DataOptions
    seed: int
    model_name: str
    domain_files: tuple[str, ...]
    pool_files: tuple[str, ...]
    model: LanguageModel
    params: Params
    selection: Selection
    domain: Loaded
    pool: Callable[[], Loaded]
    records: Callable[[], Records]
    shared: Path | None = None
    checkpoints: tuple[WarmupCheckpoint, ...] = ()

    @property
    def selector(self) -> Selector:
        """The method with its options."""
        return make_selector(self.select)

    @property
    def rows(self) -> Path:
        """Where its rows lie."""
        return self.path / "rows"

    def problem(self, domain: Loaded, pool: Loaded, *, progress: bool, work_dir: Path | None) -> SelectionProblem:
        """The selection problem as the run had it, of other data where other data are given."""
        options = {"n": min(self.n, len(pool)), "data": self.data, "seed": self.seed, "progress": progress}
        problem = problem_of(self.model, self.params, domain, pool, work_dir=work_dir, **options)
        return dataclasses.replace(problem, checkpoints=self.checkpoints)


def reopen(path: str | Path, *, progress: bool, which: Which | None = None) -> Run:
    """The run in ``path``, which may have been moved since: of ``select``, or one selection of a command that compares
    arms (``adapt``, ``study``).

    Raises:
      ConfigError: no finished selection; a model, an adapter or data that are not those of the run.
    """
    path, which = Path(path), Which() if which is None else which
    if path.is_file():
        raise ConfigError(f"{path}: is a file; expected a run directory of ntkjax {SELECT}, with its config.yaml")
    command, content = load_run(path)
    if command in COMMANDS and load_command(command).grid is not None:
        return _of_grid(path, command, content, which, progress)
    if command != SELECT:
        raise ConfigError(
            f"{path}: is a run of {command}; expected one of {SELECT}, adapt or study. Make one with the same model, "
            f"data and options: ntkjax {SELECT} --out DIR, then ntkjax explain DIR"
        )
    if which.given:
        raise ConfigError(
            f"{path}: is a run of {SELECT}, which holds one selection; leave out --arm and --of-domain, --of-size, "
            "--of-budget, --of-seed"
        )
    return _of_select(path, content, progress)


def _here(config: Any) -> Any:
    """``config`` without its mesh where this process has other devices than the run had: scores are the same on one."""
    model = getattr(config, "model", None)  # a study names it in its file
    if model is None:
        return config
    try:
        mesh_of(model.mesh)
    except ConfigError:
        return dataclasses.replace(config, model=dataclasses.replace(model, mesh=None))
    return config


def _of_select(path: Path, content: dict, progress: bool) -> Run:
    if not (path / "selection.json").exists():
        raise ConfigError(
            f"{path}: has no selection.json, so the selection is not finished; ntkjax {SELECT} with the same options "
            "goes on with it"
        )
    content = content | {"out": str(path), "dry_run": False}
    config: Any = _here(config_from_dict(load_command(SELECT).config, content, where=str(path / "config.yaml")))
    model = load_model(config.model, seed=config.seed)
    domain = load_data(config.domain, model, config.data)
    check_inputs(path, inputs_of(model, config.model, domain=domain), ("model", "adapter", "domain"))
    params, checkpoints = trained_parameters(model, config.model), ()
    if config.warms_up:
        keep = needs_checkpoints(config.select)
        if (path / "adapter").is_dir() and not keep:
            params = load_adapter(path / "adapter", model)
        else:  # all parameters were trained, or its epochs are looked at: they are in the warm-up's checkpoints
            warmed = warm_up(
                model, params, domain, config.warmup, seed=config.seed, out=path, progress=progress, checkpoints=keep
            )
            params, checkpoints = warmed.params, warmed.checkpoints
    return Run(
        path, str(path), config.select, config.n, config.data, config.seed, str(config.model.model), config.domain,
        config.pool, model, params, read_selection(path), domain,
        pool=lambda: read_pool(path, config, model),
        records=lambda: read_records(list(config.pool), on_bad_record=config.data.on_bad_record),
        checkpoints=checkpoints,
    )  # fmt: skip


def _of_grid(path: Path, command: str, content: dict, which: Which, progress: bool) -> Run:
    """One selection of a run of ``command``."""
    own = {"out": str(path)} | ({"study": [str(path / "study.yaml")]} if command == "study" else {})
    made = load_command(command)
    config: Any = _here(config_from_dict(made.config, content | own, where=str(path / "config.yaml")))
    assert made.grid is not None
    grid: Grid = made.grid(config)
    task = pick(grid, which, path)
    key = grid.selection_key(task)
    folder = grid.folder("selections", key or {})
    named = f"{task.arm.label}; {condition_name(task.condition)}; seed {task.seed}"
    if not (folder / "selection.json").exists():
        raise ConfigError(
            f"{path}: the selection of {named} is not there: it was not made yet, or its model or data have changed "
            f"since (a folder is named from all that it depends on); ntkjax {command} with the same options makes it"
        )
    assert task.arm.select is not None
    params, checkpoints = grid.start_of_selection(task.seed), ()
    if task.arm.warmup is not None:
        warmed = Runner(grid, progress).warm_up(task)[0]
        params, checkpoints = warmed.params, warmed.checkpoints
    data = grid.data(task)
    return Run(
        folder, f"{path}: {named}", task.arm.select, task.condition.budget, grid.spec.data, task.seed,
        str(grid.options.model), _files(data.train), _files(data.pool), grid.model, params, read_selection(folder),
        grid.training_set(task), pool=lambda: data.pool, records=lambda: data.pool.records, shared=path / "shared",
        checkpoints=checkpoints,
    )  # fmt: skip


def _files(loaded: Loaded) -> tuple[str, ...]:
    """The files that data come from."""
    return tuple(dict.fromkeys(loaded.records.locations(np.arange(len(loaded)))[0]))


def pick(grid: Grid, which: Which, path: Path) -> Task:
    """The one task with a selection that ``which`` names.

    Raises:
      ConfigError: none; the message says what there is.
    """
    tasks = [task for task in grid.tasks() if task.arm.select is not None]
    if not tasks:
        raise ConfigError(f"{path}: no arm of this run selects anything; expected an arm with a selection method")
    labels = list(dict.fromkeys(task.arm.label for task in tasks))
    proposed = [label for label in grid.focus if label in labels]
    wanted: dict[str, Any] = {"arm": which.arm or (proposed or labels)[0]}
    wanted |= {name: getattr(which, name) for name in ("domain", "size", "budget", "seed")}
    flags = dict(zip(wanted, ("--arm", "--of-domain", "--of-size", "--of-budget", "--of-seed")))
    of = {
        "arm": lambda task: task.arm.label,
        "domain": lambda task: task.condition.domain,
        "size": lambda task: str(task.condition.size),
        "budget": lambda task: task.condition.budget,
        "seed": lambda task: task.seed,
    }
    for name, value in wanted.items():
        there = list(dict.fromkeys(map(of[name], tasks)))
        if value is not None and value not in there:
            raise ConfigError(f"{path}: {flags[name]} {value}: expected one of {', '.join(map(str, there))}")
        tasks = [task for task in tasks if of[name](task) == (there[0] if value is None else value)]
    return tasks[0]


def check_inputs(path: Path, inputs: Inputs, names: tuple[str, ...]) -> None:
    """Raise ConfigError where the inputs called ``names`` are other than the run's inputs.json says."""
    stored = read_json(path / INPUTS, remedy="run the selection again, into a new directory")
    part = lambda inputs: {name: dict(inputs[name]) for name in names if name in inputs}
    changed = input_changes(part(stored), part(inputs))
    if changed:
        raise ConfigError(
            f"{path}: the inputs of this run have changed since (digests of their content):\n  "
            + "\n  ".join(changed)
            + "\nPut them back, or run the selection again, into a new directory."
        )


def read_pool(path: Path, config: Any, model: LanguageModel) -> Loaded:
    """The pool as a run of ``select`` scored it: row i is row i of scores.parquet, duplicates are not in it.

    Raises:
      ConfigError: pool files that are not those of the run.
    """
    pool = load_data(config.pool, model, config.data)
    held_out = read_held_out(config.data, test=config.test)
    check_inputs(path, inputs_of(model, config.model, pool=pool, **held_out), ("pool", "test"))
    kept = kept_rows(path, pool.records)
    return pool if len(kept) == len(pool) else pool.subset(kept)


def kept_rows(path: Path, records: Records) -> np.ndarray:
    """int64: which ``records`` the rows of scores.parquet are, which stand in the same order."""
    table = read_scores(path, ["id", "file", "line"]).to_pydict()
    files, lines = records.locations(np.arange(len(records)))
    there = zip(map(str, records.ids), files, lines.tolist())
    kept, wanted = [], zip(table["id"], table["file"], table["line"])
    ahead = next(wanted, None)
    for row, item in enumerate(there):
        if item == ahead:
            kept.append(row)
            ahead = next(wanted, None)
    if ahead is not None:
        raise ConfigError(
            f"{path / 'scores.parquet'}: the record {ahead[0]} of {ahead[1]}:{ahead[2]} is not in the pool; expected "
            "the files that the run read; run the selection again, into a new directory"
        )
    return np.asarray(kept, np.int64)
