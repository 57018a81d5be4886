"""A finished run of ``select``, opened again: its model, parameters, data and selection, from its config.yaml."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from ntkjax.commands import load_command
from ntkjax.data import Records
from ntkjax.errors import ConfigError
from ntkjax.files import read_json
from ntkjax.models import LanguageModel, load_adapter
from ntkjax.pipeline.config_io import config_from_dict
from ntkjax.pipeline.deduplicate import read_held_out
from ntkjax.pipeline.inputs import INPUTS, Inputs, input_changes, inputs_of
from ntkjax.pipeline.load import Loaded, load_data, load_model, trained_parameters
from ntkjax.pipeline.run_dir import load_run
from ntkjax.pipeline.select import make_selector, problem_of
from ntkjax.pipeline.selection_io import read_scores, read_selection
from ntkjax.pipeline.warmup import warm_up
from ntkjax.selection import Selection, SelectionProblem, Selector
from ntkjax.types import Params

SELECT = "select"


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished selection before its data are read.

    Attributes:
      path: its directory. config: that of its command.
      model: as loaded. params: theta, with which the pool was looked at.
      selection: what it chose.
    """

    path: Path
    config: Any
    model: LanguageModel
    params: Params
    selection: Selection
    domain: Loaded

    @property
    def selector(self) -> Selector:
        """The method with its options."""
        return make_selector(self.config.select)

    @property
    def rows(self) -> Path:
        """Where its rows lie."""
        return self.path / "rows"

    def problem(self, domain: Loaded, pool: Loaded, *, progress: bool, work_dir: Path | None) -> SelectionProblem:
        """The selection problem as the run had it, of other data where other data are given."""
        n = min(self.config.n, len(pool))
        options = {"n": n, "data": self.config.data, "seed": self.config.seed, "progress": progress}
        return problem_of(self.model, self.params, domain, pool, work_dir=work_dir, **options)


def reopen(path: str | Path, *, progress: bool) -> Run:
    """The run in ``path``, which may have been moved since.

    Raises:
      ConfigError: no finished run of ``select``; a model, an adapter or domain files that are not those of the run.
    """
    path = Path(path)
    if path.is_file():
        raise ConfigError(f"{path}: is a file; expected a run directory of ntkjax {SELECT}, with its config.yaml")
    command, content = load_run(path)
    if command != SELECT:
        raise ConfigError(
            f"{path}: is a run of {command}; expected one of {SELECT}. Make one with the same model, data and options: "
            f"ntkjax {SELECT} --out DIR, then ntkjax explain DIR"
        )
    if not (path / "selection.json").exists():
        raise ConfigError(
            f"{path}: has no selection.json, so the selection is not finished; ntkjax {SELECT} with the same options "
            "goes on with it"
        )
    content = content | {"out": str(path), "dry_run": False}
    config: Any = config_from_dict(load_command(SELECT).config, content, where=str(path / "config.yaml"))
    model = load_model(config.model, seed=config.seed)
    domain = load_data(config.domain, model, config.data)
    check_inputs(path, inputs_of(model, config.model, domain=domain), ("model", "adapter", "domain"))
    params = trained_parameters(model, config.model)
    if not config.skip_warmup:
        if (path / "adapter").is_dir():
            params = load_adapter(path / "adapter", model)
        else:  # all parameters were trained: they are in the warm-up's checkpoint
            warmed = warm_up(model, params, domain, config.warmup, seed=config.seed, out=path, progress=progress)
            params = warmed.params
    return Run(path, config, model, params, read_selection(path), domain)


def check_inputs(path: Path, inputs: Inputs, names: tuple[str, ...]) -> None:
    """Raise ConfigError where the inputs called ``names`` are other than the run's inputs.json says."""
    stored = read_json(path / INPUTS, remedy="run the selection again, into a new directory")
    part = lambda found: {name: dict(found[name]) for name in names if name in found}
    changed = input_changes(part(stored), part(inputs))
    if changed:
        raise ConfigError(
            f"{path}: the inputs of this run have changed since (digests of their content):\n  "
            + "\n  ".join(changed)
            + "\nPut them back, or run the selection again, into a new directory."
        )


def read_pool(run: Run) -> Loaded:
    """The pool as the run scored it: row i is row i of scores.parquet, duplicates are not in it.

    Raises:
      ConfigError: pool files that are not those of the run.
    """
    pool = load_data(run.config.pool, run.model, run.config.data)
    held_out = read_held_out(run.config.data, test=run.config.test)
    check_inputs(run.path, inputs_of(run.model, run.config.model, pool=pool, **held_out), ("pool", "test"))
    kept = kept_rows(run.path, pool.records)
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
