"""``ntkjax study STUDY.yaml --out DIR``: methods x domains x sizes x budgets x seeds, every run kept, one report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from tyro.conf import Positional

from ntkjax.assets import study_path
from ntkjax.commands.base import Command
from ntkjax.commands.study.arms import arms_of, focus_of
from ntkjax.commands.study.report import write_study
from ntkjax.commands.study.results import analyse, long_rows
from ntkjax.commands.study.spec import read_study
from ntkjax.commands.study.tables import choices_lines, failure_table, main_table
from ntkjax.errors import ConfigError
from ntkjax.job import is_primary, process
from ntkjax.pipeline.alike import check_alike
from ntkjax.pipeline.deduplicate import summary
from ntkjax.pipeline.reading import reading_of_run
from ntkjax.pipeline.run_dir import RunDir
from ntkjax.pipeline.study.grid import Grid, read_inputs, set_up
from ntkjax.pipeline.study.runner import Runner
from ntkjax.pipeline.study.runs import Run, alone, collect, condition_name, do_all, forget_failures, prepared
from ntkjax.pipeline.study.spec import EMBEDDED, StudySpec
from ntkjax.pipeline.study.tables import Row
from ntkjax.report.tables import to_markdown
from ntkjax.training.trackers import check_tracker


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """Compare selection methods as a study file says. What is done is not done again: the same command goes on where it
    was stopped, and a study that grew by a method, a seed or a domain computes what is new."""

    study: Positional[tuple[str, ...]]
    """YAML files, the later ones over the earlier; `embedded` for the study that ships with the package."""
    out: str
    """Run directory: runs/, selections/, results.parquet, tables/, plots/, report.html."""
    list: bool = False
    """Say what is done, failed and left, and do nothing."""
    retry_failed: bool = False
    """Try again what failed before."""
    report_only: bool = False
    """Write the report of what is done so far."""

    def __post_init__(self):
        if self.list and (self.retry_failed or self.report_only):
            raise ConfigError("--list does nothing but list; leave out --retry-failed and --report-only")


@dataclasses.dataclass(frozen=True)
class Study:
    """A study as far as it is.

    Attributes:
      out: its run directory.
      runs: every wanted run and what there is of it.
      results: the content of results.json; empty where the study was only listed.
    """

    out: Path
    runs: Sequence[Run]
    results: Mapping[str, Any]

    @property
    def exit_code(self) -> int:
        """1 where a run has failed, 0 otherwise (also where some are left)."""
        return int(any(run.status == "failed" for run in self.runs))

    def rows(self) -> list[Row]:
        """What is done, failed and left: one row for each condition and arm, with the seeds."""
        groups: dict[tuple, list[Run]] = {}
        for run in self.runs:
            groups.setdefault((run.task.condition, run.task.arm.label), []).append(run)
        seeds = lambda runs, status: ", ".join(str(r.task.seed) for r in runs if r.status == status) or None
        return [
            {
                "where": condition_name(condition),
                "method": label,
                **{f"{status} (seeds)": seeds(runs, status) for status in ("done", "failed", "left")},
            }
            for (condition, label), runs in groups.items()
        ]


def study(config: StudyConfig, *, progress: bool = True) -> Study:
    """Do what the study file asks and is not done yet, then write the report.

    A run that fails is written down and the others go on; see ``Study.exit_code``.

    Raises:
      UserError: an unusable study file, model or data; a full disk.
    """
    files = _files(config)
    spec, content = read_study(files)
    mode = {"listing": config.list, "report_only": config.report_only, "retry_failed": config.retry_failed}
    return run_study(spec, content, config.out, where=" + ".join(files), progress=progress, **mode)


def _files(config: StudyConfig) -> list[str]:
    return [str(study_path()) if name == EMBEDDED and not Path(name).exists() else name for name in config.study]


def grid_of_config(config: StudyConfig) -> Grid:
    """`grid_of` the study that ``config`` names."""
    return grid_of(read_study(_files(config))[0], Path(config.out))


def run_study(
    spec: StudySpec,
    content: Mapping[str, Any],
    out: str | Path,
    *,
    where: str = "study",
    listing: bool = False,
    report_only: bool = False,
    retry_failed: bool = False,
    progress: bool = True,
) -> Study:
    """``study`` of a specification that need not be a file (see `ntkjax.commands.study.spec.spec_of`).

    Args:
      content: the study as a mapping, written to OUT/study.yaml; ``ntkjax replay OUT`` reads it there.
      where: what messages about the study begin with.
    """
    out = Path(out)
    config = StudyConfig((str(out / "study.yaml"),), str(out))
    own = ("study", "out", "list", "retry_failed", "report_only")
    check_tracker(spec.train.tracker, *([spec.warmup.tracker] if spec.warmup else []))
    RunDir.check(out, "study", config, ignore=own)
    check_alike(where, content, "Give a study file that all processes see by the same path, with the same content.")
    if process()[1] > 1 and (spec.model is None or spec.model.mesh is None):
        raise ConfigError(
            f"{where}: study runs in one process, and this job has {process()[1]}; start one, or give model: "
            "{mesh: auto} to run on the devices of all"
        )
    runner = Runner(grid_of(spec, out, where))
    if listing:
        return Study(out, collect(runner), {})
    run = RunDir.create(out, "study", config, ignore=own)
    settings = yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True)
    run.write_text("study.yaml", settings)
    run.write_json("data.json", runner.grid.reports)
    with alone(out):
        if retry_failed:
            forget_failures(out)
        if not report_only:
            tasks = runner.grid.tasks()
            with prepared(runner, tasks):
                do_all(runner, run, tasks, bar=progress and is_primary())
        return _report(runner, run, settings)


def grid_of(spec: StudySpec, out: Path, where: str = "study") -> Grid:
    """The study's arms, with its model and data loaded and checked.

    Raises:
      UserError: an unusable model or data, a budget larger than the pool, a size larger than the domain.
    """
    arms = arms_of(spec, where)
    return set_up(spec, arms, read_inputs(spec, out), out, focus=focus_of(spec, arms))


def _report(runner: Runner, run: RunDir, settings: str) -> Study:
    runs, grid = collect(runner), runner.grid
    results = analyse(runner, runs)
    results["duplicates"] = {
        name: summary(grid.reports[f"{name} duplicates"]).replace("\n", "; ") for name in grid.domains
    }
    run.write_json("results.json", results)
    if is_primary():
        write_study(run.path, results, long_rows(runner, runs), title=grid.spec.title, settings=settings)
    return Study(run.path, runs, results)


def describe(config: Any, result: Any) -> str:
    """What is done, failed and left; after a run the main table, the failures and the report's path."""
    if config.list:
        return to_markdown(result.rows())
    counts, parts = result.results["counts"], [to_markdown(main_table(result.results))]
    if counts["failed"]:
        parts.append("Failed (--retry-failed tries again):\n" + to_markdown(failure_table(result.results)))
    parts += choices_lines(result.results)
    done = f"{counts['done']} runs done, {counts['failed']} failed, {counts['left']} left"
    parts.append(reading_of_run(config, "data.json"))
    return "\n".join(parts) + f"\n{done}\nreport: {Path(config.out) / 'report.html'}"


COMMAND = Command(StudyConfig, study, describe, spans=True, grid=grid_of_config)
