"""``ntkjax validate``: do the scores predict what training on the examples does?

Every training starts from the same parameters with the same rule for the order of its data, takes equally many steps,
and is measured on held-out examples of the domain:

- m random subsets S_k of the pool: LDS, the rank correlation of -L_k (L_k: test loss) with sum_{j in S_k} s_j, for
  every score at once; and the same subsets with other seeds: how far two trainings agree, which bounds it.
- The best, the middle and the worst tenth of every score, added to the domain: the change of the test loss.
- A copy of the data with flipped answers, scored: whether low scores find them. Nothing is trained for it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float
from tqdm import tqdm

from ntkjax.commands.base import Command
from ntkjax.commands.validate.config import EXTENT, ValidateConfig, impossible
from ntkjax.commands.validate.flip import flip
from ntkjax.commands.validate.forecast import Forecast, forecast
from ntkjax.commands.validate.measures import auc, ceiling, lds, tenths
from ntkjax.commands.validate.report import main_table, unjudged_table, write_validation
from ntkjax.commands.validate.trainings import DOMAIN, READ, Setting, load
from ntkjax.errors import UserError
from ntkjax.evaluation import METRICS, Outcome
from ntkjax.evaluation.significance import hierarchical_bootstrap
from ntkjax.files import written_file
from ntkjax.fingerprint import digest
from ntkjax.pipeline.deduplicate import FILE as DUPLICATES
from ntkjax.pipeline.deduplicate import summary, totals
from ntkjax.pipeline.load import load_data
from ntkjax.pipeline.reading import reading
from ntkjax.pipeline.run_dir import RunDir
from ntkjax.pipeline.study.grid import Grid, Task
from ntkjax.pipeline.study.runner import FAILURE, RunFailed, Runner
from ntkjax.pipeline.study.runs import Run, alone, collected, do_all, forget_failures
from ntkjax.report.tables import to_markdown
from ntkjax.training.trackers import check_tracker

TRUTH = "truth"
"""The score that is 1 for what is known to help and 0 for the rest."""


@dataclasses.dataclass(frozen=True)
class Validation:
    """The result of a validation; ``results`` is the content of results.json.

    Attributes:
      results: ``scores`` (a row for each), ``ceiling``, ``losses``, ``leave_in``, ``unjudged``, ``failures``, sizes.
      scores: name of the score -> its values for the pool without duplicates, float64 [N].
      members: which pool rows each subset holds.
      losses: test NLL of every seed and subset (nats per token); NaN where the training failed.
    """

    results: dict[str, Any]
    scores: Mapping[str, Float[np.ndarray, " N"]]
    members: Bool[np.ndarray, "m N"]
    losses: Float[np.ndarray, "R m"]

    @property
    def exit_code(self) -> int:
        """1 where a training has failed, 0 otherwise."""
        return int(bool(self.results["failures"]))


def validate(config: ValidateConfig, *, progress: bool = True) -> Validation:
    """Measure as ``config`` says; writes results.json, the scores, the subsets, tables and report.html into OUT.

    What is done is not done again: the same command goes on where it was stopped, and one that asks for more of the
    same (`EXTENT`) adds it. A training that fails is written down, the others go on, and the same command tries it
    again; a score that fails is named under ``unjudged``.

    Raises:
      UserError: unusable model, data or options; all trainings fail; a full disk.
    """
    began = time.monotonic()
    check_tracker(config.train.tracker, config.warmup.tracker)
    RunDir.check(config.out, "validate", config, ignore=EXTENT)
    setting = load(config, progress=progress)
    RunDir.check(config.out, "validate", config, inputs=setting.inputs, ignore=EXTENT)
    run = RunDir.create(config.out, "validate", config, inputs=setting.inputs, ignore=EXTENT, rewrite=True)
    run.tell("results.json", progress)
    reports, runner = setting.grid.reports, Runner(setting.grid)
    if reports[f"{DOMAIN} duplicates"] is not None:
        run.write_json(DUPLICATES, reports[f"{DOMAIN} duplicates"])
    with alone(run.path):
        forget_failures(run.path)
        scores, unjudged = find_scores(runner, setting, setting.score_tasks(), progress, "scores")
        useful = setting.grid.domains[DOMAIN].useful
        known = {} if useful is None else {TRUTH: useful.astype(np.float64)}
        _write_table(run, "scores.parquet", _of_pool(setting) | scores | known)
        flipped = find_flipped(setting, scores, run, progress) if config.flip else {}
        tasks = setting.subset_tasks()
        do_all(runner, run, tasks, bar=progress, command="subsets")
        subsets = [collected(runner, task) for task in tasks]
        left_in, more = _leave_in(runner, setting, scores, run, progress) if config.leave_in else ([], [])
    members, losses = setting.members(), _measured(subsets, "nll", config)
    if np.isnan(losses).all():
        raise UserError(f"{subsets[0].message} (recorded in {subsets[0].path / FAILURE})")
    _write_table(run, "subsets.parquet", _of_subsets(setting, subsets, members))
    failures = {made.path.name: made.failure() for made in [*subsets, *more] if made.status == "failed"}
    results: dict[str, Any] = {
        **_sizes(setting),
        **judge(config, scores | known, members, losses, _measured(subsets, "accuracy", config)),
        "leave_in": left_in,
        "flipped": flipped,
        "unjudged": [{"score": name, "why": why} for name, why in unjudged.items()],
        "failures": list(failures.values()),
        "duplicates": totals(reports[f"{DOMAIN} duplicates"]),
        "data": {name: reports[read] for name, read in READ.items()},
        "wall_seconds": time.monotonic() - began,
    }
    run.write_json("results.json", results)
    write_validation(run.path, results)
    return Validation(results, scores, members, losses)


# -- scores --


def find_scores(
    runner: Runner, setting: Setting, tasks: Sequence[Task], progress: bool, name: str
) -> tuple[dict[str, Float[np.ndarray, " N"]], dict[str, str]]:
    """(every score that values all pool rows, by name; why the others cannot be judged)."""
    scores, unjudged = {}, {}
    for task in tqdm(tasks, disable=not progress, unit="score", desc=name):
        why = impossible(setting.config, task.arm)
        if why is None:
            try:
                values = np.asarray(runner.selection(task)[0].scores, np.float64)
            except RunFailed as error:
                why = str(error)
            else:
                finite = int(np.isfinite(values).sum())
                if finite == len(values):
                    scores[task.arm.label] = values
                    continue
                why = f"values {finite} of {len(values)} examples, and the sum over a subset needs all of them"
        unjudged[task.arm.label] = why
    return scores, unjudged


def find_flipped(
    setting: Setting, scores: Mapping[str, np.ndarray], run: RunDir, progress: bool
) -> dict[str, dict[str, Any]]:
    """Score -> ``auc`` of its low values for the flipped examples of a copy, among those that could be flipped."""
    config, data = setting.config, setting.grid.domains[DOMAIN]
    original = data.pool if config.flip_in == "pool" else data.train
    template = config.evaluation.answer_template
    asked = digest(original.records.fingerprint, config.flip, template, config.seed)[:16]
    path = run.path / "data" / f"flipped-{config.flip_in}-{asked}.jsonl"
    made = flip(original.records, config.flip, template, seed=config.seed, path=path)
    copy = load_data([str(path)], setting.grid.model, config.data)
    if len(copy) != len(original):  # a record that the copy's tokens do not hold would shift all others
        raise UserError(f"{path}: {len(original) - len(copy)} records are left out when it is read; give --flip 0")
    # Longer answers may not fit the padded lengths of the data as they are; with the domain unchanged they do.
    changed = {"pool": copy} if config.flip_in == "pool" else {"pool": copy, "train": copy, "buckets": None}
    grid: Grid = dataclasses.replace(setting.grid, domains={DOMAIN: dataclasses.replace(data, **changed)})
    tasks = [task for task in setting.score_tasks() if task.arm.label in scores]
    n = min(setting.n, len(copy))
    tasks = [dataclasses.replace(task, condition=dataclasses.replace(task.condition, budget=n)) for task in tasks]
    values, missing = find_scores(Runner(grid), setting, tasks, progress, "scores, answers flipped")
    counts = {"flipped": int(made.flipped.sum()), "able": int(made.able.sum()), "examples": len(made.able)}
    entries = {name: {"auc": auc(made.flipped[made.able], values[name][made.able]), **counts} for name in values}
    return entries | {name: {"auc": None, "why": why, **counts} for name, why in missing.items()}


# -- trainings --


def _measured(runs: Sequence[Run], metric: str, config: ValidateConfig) -> Float[np.ndarray, "R m"]:
    """The mean test metric of every seed and subset; NaN where a run failed or has no such metric."""
    values = [made.result["test"].get(metric, np.nan) if made.status == "done" else np.nan for made in runs]
    return np.asarray(values, np.float64).reshape(len(config.seeds), config.subsets)


def judge(
    config: ValidateConfig,
    scores: Mapping[str, Float[np.ndarray, " N"]],
    members: Bool[np.ndarray, "m N"],
    losses: Float[np.ndarray, "R m"],
    accuracies: Float[np.ndarray, "R m"],
) -> dict[str, Any]:
    """``scores`` (LDS of every score, best first), ``ceiling`` (None with one seed) and ``losses`` (their spread), over
    the subsets whose trainings are done with every seed."""
    done = ~np.isnan(losses).any(axis=0)
    options = {"seed": config.seed, "samples": config.bootstrap}
    if done.sum() < 2:
        return {"scores": [], "ceiling": None, "losses": None, "subsets_done": int(done.sum())}
    losses, accuracies, members = losses[:, done], accuracies[:, done], members[done]
    rows = []
    for name, values in scores.items():
        row: dict[str, Any] = {"score": name, "lds": lds(-losses.mean(axis=0), members, values, **options)}
        if not np.isnan(accuracies).any():
            row["lds_accuracy"] = lds(accuracies.mean(axis=0), members, values, **options)
        rows.append(row)
    defined = [row for row in rows if not np.isnan(row["lds"]["value"])]
    undefined = [row for row in rows if np.isnan(row["lds"]["value"])]
    rows = sorted(defined, key=lambda row: -row["lds"]["value"]) + undefined
    means = losses.mean(axis=0)
    spread = {"mean": float(means.mean()), "sd": float(means.std(ddof=1)), "least": float(means.min()),
              "most": float(means.max())}  # fmt: skip
    if len(losses) > 1:
        spread["sd_between_seeds"] = float(losses.std(axis=0, ddof=1).mean())
    if not np.isnan(accuracies).any():
        spread["accuracy"] = float(accuracies.mean())
    return {
        "scores": rows,
        "ceiling": ceiling(losses, **options) if len(losses) > 1 else None,
        "losses": spread,
        "subsets_done": int(done.sum()),
    }


def _leave_in(
    runner: Runner, setting: Setting, scores: Mapping[str, np.ndarray], run: RunDir, progress: bool
) -> tuple[list[dict[str, Any]], list[Run]]:
    """(a row for each score and tenth: the mean change of the test NLL, with its interval; the runs)."""
    alone = setting.alone_tasks()
    wanted = {
        (name, tenth): setting.tenth_tasks(f"{tenth} tenth of {name}", rows)
        for name, values in scores.items()
        for tenth, rows in tenths(values).items()
    }
    tasks = [*alone, *(task for of_tenth in wanted.values() for task in of_tenth)]
    do_all(runner, run, tasks, bar=progress, command="tenths")
    base = {task.seed: collected(runner, task) for task in alone}
    runs, rows = list(base.values()), []
    for (name, tenth), of_tenth in wanted.items():
        made = [collected(runner, task) for task in of_tenth]
        runs += made
        pairs = [(base[r.task.seed], r) for r in made if r.status == base[r.task.seed].status == "done"]
        row: dict[str, Any] = {"score": name, "tenth": tenth, "seeds": len(pairs)}
        if pairs:
            table = [_nll(second.outcomes()) - _nll(first.outcomes()) for first, second in pairs]
            rows.append(row | hierarchical_bootstrap(table, seed=setting.config.seed).as_dict())
    return rows, runs


def _nll(outcomes: Sequence[Outcome]) -> Float[np.ndarray, " n"]:
    return np.asarray([METRICS["nll"].value(outcome) for outcome in outcomes], np.float64)


# -- files --


def _sizes(setting: Setting) -> dict[str, Any]:
    config, grid = setting.config, setting.grid
    data, task = grid.domains[DOMAIN], setting.subset_tasks()[0]
    assert data.test is not None
    return {
        "sizes": {"pool": len(data.pool), "domain": len(data.train), "test": len(data.test)},
        "subsets": config.subsets,
        "alpha": config.alpha,
        "subset_size": setting.size,
        "tenth": setting.tenth,
        "with_domain": config.with_domain,
        "seeds": list(config.seeds),
        "leave_in_seeds": list(config.leave_in_seeds),
        "steps": {
            "subset": grid.steps(task),
            "tenth": grid.steps(setting.alone_tasks()[0]) if config.leave_in else None,
        },
        "n": setting.n,
        "flip": {"share": config.flip, "in": config.flip_in},
    }


def _of_pool(setting: Setting) -> dict[str, Any]:
    records = setting.pool.records
    return {"id": list(records.ids), "source": list(records.sources)}


def _of_subsets(setting: Setting, runs: Sequence[Run], members: Bool[np.ndarray, "m N"]) -> dict[str, Any]:
    """One row for each subset and seed: its rows of the pool, its folder, what was measured."""
    number = lambda k: k % setting.config.subsets
    of = lambda name: [run.result["test"].get(name) if run.status == "done" else None for run in runs]
    return {
        "subset": [number(k) for k in range(len(runs))],
        "seed": [run.task.seed for run in runs],
        "run": [run.path.name for run in runs],
        "nll": of("nll"),
        "accuracy": pa.array(of("accuracy"), pa.float64()),
        "rows": [np.flatnonzero(members[number(k)]).tolist() for k in range(len(runs))],
    }


def _write_table(run: RunDir, name: str, columns: Mapping[str, Any]) -> None:
    with written_file(run.path / name) as work:
        pq.write_table(pa.table(dict(columns)), work)


def describe(config: Any, result: Any) -> str:
    """The table of scores, what bounds it, what is not judged, and the report's path; or the forecast of a dry run."""
    if isinstance(result, Forecast):
        return result.text()
    results = result.results
    parts = [to_markdown(main_table(results))]
    if results["unjudged"]:
        parts.append("Not judged:\n" + to_markdown(unjudged_table(results)))
    parts += [summary(results["duplicates"]), reading(results["data"])]
    if results["failures"]:
        parts.append(f"{len(results['failures'])} trainings failed; the same command tries them again")
    return "\n".join(parts) + f"\nreport: {Path(config.out) / 'report.html'}"


COMMAND = Command(ValidateConfig, validate, describe, dry_run=forecast)
