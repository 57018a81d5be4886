"""``ntkjax study STUDY.yaml --out DIR``: methods x domains x sizes x budgets x seeds, every run kept, one report."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import psutil
import yaml
from tqdm import tqdm
from tyro.conf import Positional

from ntkjax.assets import study_path
from ntkjax.commands.base import Command
from ntkjax.commands.study.report import heading_of, write_report
from ntkjax.commands.study.results import Found, analyse, collect, long_rows
from ntkjax.commands.study.runner import FAILURE, RESULT, RunFailed, Runner
from ntkjax.commands.study.setup import Bench, set_up
from ntkjax.commands.study.spec import EMBEDDED, StudySpec, read_study
from ntkjax.commands.study.tables import Row, choices_lines, failure_table, main_table
from ntkjax.errors import ConfigError, UserError
from ntkjax.pipeline.deduplicate import summary
from ntkjax.pipeline.reading import reading_of_run
from ntkjax.pipeline.run_dir import RunDir
from ntkjax.report.tables import to_markdown


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
      found: every wanted run and what there is of it.
      results: the content of results.json; empty where the study was only listed.
    """

    out: Path
    found: Sequence[Found]
    results: Mapping[str, Any]

    @property
    def exit_code(self) -> int:
        """1 where a run has failed, 0 otherwise (also where some are left)."""
        return int(any(run.status == "failed" for run in self.found))

    def rows(self) -> list[Row]:
        """What is done, failed and left: one row for each place and arm, with the seeds."""
        groups: dict[tuple, list[Found]] = {}
        for run in self.found:
            groups.setdefault((run.task.place, run.task.arm.label), []).append(run)
        seeds = lambda runs, status: ", ".join(str(r.task.seed) for r in runs if r.status == status) or None
        return [
            {
                "where": heading_of(dataclasses.asdict(place)),
                "method": label,
                **{f"{status} (seeds)": seeds(runs, status) for status in ("done", "failed", "left")},
            }
            for (place, label), runs in groups.items()
        ]


def study(config: StudyConfig, *, progress: bool = True) -> Study:
    """Do what the study file asks and is not done yet, then write the report.

    A run that fails is written down and the others go on; see ``Study.exit_code``.

    Raises:
      UserError: an unusable study file, model or data; a full disk.
    """
    files = [str(study_path()) if name == EMBEDDED and not Path(name).exists() else name for name in config.study]
    spec, content = read_study(files)
    mode = {"listing": config.list, "report_only": config.report_only, "retry_failed": config.retry_failed}
    return run_study(spec, content, config.out, where=" + ".join(files), progress=progress, **mode)


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
    RunDir.check(out, "study", config, ignore=own)
    runner = Runner(set_up(spec, out, where))
    if listing:
        return Study(out, collect(runner), {})
    run = RunDir.create(out, "study", config, ignore=own)
    settings = yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True)
    run.write_text("study.yaml", settings)
    run.write_json("data.json", runner.bench.reports)
    with _alone(out):
        if retry_failed:
            forget_failures(runner.bench)
        if not report_only:
            _run_all(runner, run, progress)
        return _report(runner, run, settings)


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold the directory's lock, which the system releases whatever becomes of this process.

    Raises:
      UserError: another process holds it.
    """
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out}: another process is at work on this study; wait for it, or give another --out "
                            "(--list shows how far it is)") from None  # fmt: skip
        except OSError:  # a file system without locks
            pass
        yield


@dataclasses.dataclass
class _Memory:
    """Compiled programs pile up, one for each shape of a batch that a selection makes: drop them where this process has
    grown by a quarter of the machine's memory."""

    before: int = dataclasses.field(default_factory=lambda: psutil.Process().memory_info().rss)

    def spare(self) -> None:
        """Drop compiled programs if there are too many."""
        if psutil.Process().memory_info().rss - self.before > psutil.virtual_memory().total / 4:
            jax.clear_caches()
            self.before = psutil.Process().memory_info().rss


def _run_all(runner: Runner, run: RunDir, progress: bool) -> None:
    tasks, failed, memory = runner.bench.tasks(), 0, _Memory()
    with tqdm(tasks, disable=not progress, unit="run", desc="study") as bar:
        for task in bar:
            memory.spare()
            where = heading_of(dataclasses.asdict(task.place))
            bar.set_postfix_str(f"{task.arm.label}, {where}, seed {task.seed}; {failed} failed")
            known = runner.known_rate(task)
            new = known is None or not (runner.run_folder(task, known) / RESULT).exists()
            entry = dataclasses.asdict(task.place) | {"arm": task.arm.label, "seed": task.seed}
            try:
                folder = runner.run(task)
            except RunFailed as error:
                failed += 1
                run.log(**entry, status="failed", message=str(error))
            else:
                if new:
                    run.log(**entry, status="done", run=folder.name)


def _report(runner: Runner, run: RunDir, settings: str) -> Study:
    found, bench = collect(runner), runner.bench
    results = analyse(runner, found)
    results["duplicates"] = {
        name: summary(bench.reports[f"{name} duplicates"]).replace("\n", "; ") for name in bench.domains
    }
    run.write_json("results.json", results)
    write_report(run, results, long_rows(runner, found), title=bench.spec.title, settings=settings)
    return Study(run.path, found, results)


def forget_failures(bench: Bench) -> None:
    """Remove what says that runs, selections and warm-ups failed, so that they are tried again from where they are."""
    for kind in ("runs", "selections", "warmups"):
        for failure in (bench.out / kind).glob(f"*/{FAILURE}"):
            failure.unlink()


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


COMMAND = Command(StudyConfig, study, describe)
