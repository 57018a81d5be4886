"""`ntkjax study` on a tiny model: every run once, kills, extension, failures, and files that agree with one another."""

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
from types import SimpleNamespace

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

import ntkjax
import ntkjax.stages.study_command as study_command
import ntkjax.stages.study_run as study_run
from ntkjax.cli import main
from ntkjax.errors import UserError
from ntkjax.evaluation import read_outcomes
from ntkjax.models import load_lm
from ntkjax.selection import METHODS
from ntkjax.stages.study_file import spec_of
from ntkjax.stages.study_setup import set_up

QUICK = {"epochs": 1, "batch_size": 4, "max_buckets": 1}
ALIGNMENT = {"label": "alignment", "method": "ntk", "stage1": "off", "learning_rates": [1e-3, 1e-2]}


def content(files, **more) -> dict:
    domain = {"train": files.domain, "dev": files.dev, "test": files.test}
    return {
        "model": {"model": files.model, "lora_rank": 2},
        "pool": files.pool,
        "domains": {"ball": domain},
        "methods": ["dsir", ALIGNMENT],
        "budgets": 6,
        "seeds": 2,
        "learning_rates": 1e-2,
        "data": {"token_budget": 1024},
        "dedup": {"mode": "off"},  # records that differ in a number: near-duplicates are meant here
        "warmup": QUICK,
        "train": QUICK,
    } | more


def run(files, folder: Path, *flags: str, **more) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.yaml").write_text(yaml.safe_dump(content(files, **more), sort_keys=False))
    return main(["study", str(folder / "study.yaml"), "--out", str(folder / "out"), *flags])


@pytest.fixture(scope="module")
def done(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    assert run(files, folder) == 0
    return folder / "out"


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def without_times(out: Path) -> dict:
    """results.json but for what a clock measured."""
    found = results(out)
    for cell in found["cells"]:
        cell["means"] = {name: value for name, value in cell["means"].items() if not name.startswith("seconds")}
    return found


def count_calls(patch: pytest.MonkeyPatch) -> Counter:
    calls: Counter = Counter()

    def counted(name, real):
        def call(*args, **kwargs):
            calls[name] += 1
            return real(*args, **kwargs)

        return call

    for name in ("train_on", "choose", "warm_up", "evaluate_on"):
        patch.setattr(study_run, name, counted(name, getattr(study_run, name)))
    return calls


# -- what a study leaves --


def test_every_arm_takes_equal_steps_at_its_own_learning_rate(done):
    cells = {cell["arm"]: cell for cell in results(done)["cells"]}
    assert list(cells) == ["base", "domain-only", "domain-only-equal-steps", "random", "dsir", "alignment"]
    assert {arm: cell["means"].get("steps", {}).get("values") for arm, cell in cells.items()} == {
        "base": None, "domain-only": [3, 3], "domain-only-equal-steps": [5, 5], "random": [5, 5], "dsir": [5, 5],
        "alignment": [5, 5],
    }  # fmt: skip
    trials = results(done)["trials"]
    assert [(trial["arm"], trial["status"]) for trial in trials] == [("alignment", "done")] * 2
    losses = {trial["learning_rate"]: trial["dev_loss"] for trial in trials}
    best, tuned = min(losses, key=losses.__getitem__), cells["alignment"]
    assert set(losses) == {1e-3, 1e-2} and losses[1e-3] != losses[1e-2]
    assert tuned["learning_rate"] == best and tuned["means"]["dev_loss"]["values"][0] == losses[best]


def test_outcomes_tables_and_the_long_form_agree(done):
    rows = pq.read_table(done / "results.parquet").to_pylist()
    final = [row for row in rows if row["role"] == "run" and row["metric"] == "test_accuracy"]
    assert len(final) == 1 + 5 * 2 and {row["status"] for row in final} == {"done"}
    for row in final:
        outcomes = read_outcomes(done / "runs" / row["run"] / "outcomes.jsonl")
        assert len(outcomes) == 10 and row["value"] == pytest.approx(np.mean([o.correct_raw for o in outcomes]))
    cells = {cell["arm"]: cell for cell in results(done)["cells"]}
    for arm, cell in cells.items():
        assert cell["test"]["accuracy"]["per_seed"] == [row["value"] for row in final if row["arm"] == arm]
    assert sum(row["role"] == "trial" for row in rows) == 2
    passes = {r["arm"]: r["value"] for r in rows if r["metric"] == "passes_total" and r["seed"] == 0}
    assert passes["alignment"] > passes["random"] > passes["domain-only"] > 0
    kernels = {row["arm"]: row["kernel"] for row in rows if row["role"] == "run"}
    assert kernels["alignment"] == "sum_logits" and kernels["dsir"] is None


def test_runs_hold_what_was_asked_and_what_was_chosen(done):
    folders = [path for path in (done / "runs").iterdir() if (path / "result.json").exists()]
    assert len(folders) == 11
    for folder in folders:
        asked = json.loads((folder / "asked.json").read_text())
        assert asked["domain"] == "ball" and "key" in asked and not (folder / "training" / "checkpoints").exists()
        if asked["kind"] == "selected":
            chosen = json.loads((folder / "selection.json").read_text())
            assert len(set(chosen["selected"])) == 6 and {"chosen", "just_missed", "lowest"} <= set(chosen["examples"])
            assert (done / chosen["folder"] / "scores.parquet").exists()
    assert len(list((done / "warmups").iterdir())) == 2  # one for each seed, whatever the methods


def test_tables_plots_and_a_page_that_stands_alone(done):
    names = {path.name for path in (done / "tables").iterdir()}
    assert {
        f"{name}.{kind}" for name in ("main", "differences", "cost", "selections") for kind in ("md", "tex", "csv")
    } < names
    assert r"\toprule" in (done / "tables" / "main.tex").read_text()
    assert "alignment" in (done / "tables" / "main.csv").read_text()
    assert {p.name.split("-")[0] for p in (done / "plots").iterdir()} == {"methods", "cost", "overlap"}
    page = (done / "report.html").read_text()
    assert "<img" in page and "http://" not in page and "https://" not in page and "<script" not in page
    for text in ("alignment", "Strongest baseline on dev", "Holm", "Chosen", "Rejected", "Colour of cube"):
        assert text in page


def test_comparisons_are_with_random_and_with_a_baseline_picked_on_dev(done):
    found = results(done)
    strongest = found["strongest"][0]["arm"]
    assert found["focus"] == ["alignment"] and strongest not in ("alignment", None)
    pairs = {(row["arm"], row["reference"]) for row in found["comparisons"]}
    assert {("alignment", "random"), ("alignment", strongest), ("base", "random")} <= pairs
    corrected = {row["arm"] for row in found["comparisons"] if row["p_holm"] is not None}
    assert corrected <= {"random", "dsir", "alignment"} and "alignment" in corrected


def test_list_says_what_there_is_and_does_nothing(done, files, tmp_path, capsys, monkeypatch):
    calls = count_calls(monkeypatch)
    out = tmp_path / "out"
    shutil.copytree(done, out)
    run_folder = next(p for p in (out / "runs").iterdir() if _arm(p) == "dsir" and (p / "result.json").exists())
    seed = json.loads((run_folder / "asked.json").read_text())["seed"]
    (run_folder / "result.json").unlink()
    capsys.readouterr()
    assert run(files, tmp_path, "--list") == 0
    lines = {line.split("|")[2].strip(): [c.strip() for c in line.split("|")[3:6]]
             for line in capsys.readouterr().out.splitlines() if line.startswith("| ball")}  # fmt: skip
    assert lines["random"] == ["0, 1", "", ""] and lines["base"] == ["0", "", ""]
    assert lines["dsir"] == [str(1 - seed), "", str(seed)] and calls == {}
    found = ntkjax.study(study=tmp_path / "study.yaml", out=tmp_path / "out", list=True, progress=False)
    assert [run.status for run in found.found].count("left") == 1 and found.exit_code == 0


def _arm(folder: Path) -> str:
    return json.loads((folder / "asked.json").read_text())["arm"]


# -- nothing is done twice --


def test_a_finished_study_computes_nothing_and_a_new_label_is_no_new_run(done, files, tmp_path, monkeypatch):
    calls = count_calls(monkeypatch)
    shutil.copytree(done, tmp_path / "out")
    assert run(files, tmp_path) == 0
    assert without_times(tmp_path / "out") == without_times(done)
    assert run(files, tmp_path, methods=["dsir", ALIGNMENT | {"label": "another name"}]) == 0
    assert calls == {}
    assert "another name" in {cell["arm"] for cell in results(tmp_path / "out")["cells"]}


def test_replay_reads_the_study_from_the_run_wherever_that_lies(done, tmp_path, monkeypatch):
    shutil.copytree(done, tmp_path / "moved")
    (tmp_path / "moved" / "study.yaml").write_text((done / "study.yaml").read_text().replace("dsir", "length"))
    monkeypatch.setattr(study_command, "_run_all", lambda *args: None)
    assert main(["replay", str(tmp_path / "moved"), "--out", str(tmp_path / "again")]) == 0
    arms = [cell["arm"] for cell in results(tmp_path / "again")["cells"]]
    assert arms[-2:] == ["length", "alignment"] and results(tmp_path / "again")["counts"]["left"] == 11


def test_one_more_method_computes_only_itself(done, files, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(done, out)
    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/result.json")}
    calls = count_calls(monkeypatch)
    methods = ["dsir", ALIGNMENT, "length"]
    assert run(files, tmp_path, methods=methods) == 0
    assert calls == {"choose": 2, "train_on": 2, "evaluate_on": 2 * 2}  # two seeds, each on dev and on test
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.slow
def test_one_more_seed_computes_only_itself(done, files, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(done, out)
    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/result.json")}
    calls = count_calls(monkeypatch)
    assert run(files, tmp_path, seeds=3) == 0
    # The learning rate of `alignment` is the one that the first seed found best: one training.
    assert calls == {"warm_up": 1, "choose": 3, "train_on": 5, "evaluate_on": 2 * 5}
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_an_input_that_changes_makes_another_run(files, tmp_path):
    """The hash covers weights, data, options, seed and version; not where things lie or what they are called."""

    def keys(**more):
        bench = set_up(spec_of(content(files, **more)), tmp_path / "unused", "s")
        tasks = {task.arm.label: task for task in bench.tasks() if task.seed == 0}
        task = tasks.get("alignment") or tasks["renamed"]
        selection = bench.selection_key(task)
        return bench.folder("runs", bench.run_key(task, 0.1)).name, bench.folder("selections", selection or {}).name

    first = keys()
    same = [
        keys(methods=[ALIGNMENT | {"label": "renamed"}]),
        keys(train=QUICK | {"keep_checkpoints": 5}),
        keys(seeds=[0, 7]),
        keys(budgets=[6, 3]),
        keys(learning_rates=[0.3]),
    ]
    assert [key == first for key in same] == [True, True, True, False, True]  # of budget 6 and 3 the last is looked at
    other_pool = tmp_path / "pool.jsonl"
    other_pool.write_text(Path(files.pool).read_text().replace("Colour", "Color", 1))
    training_only = {"train": QUICK | {"weight_decay": 0.1}, "evaluation": {"answer_template": "It is {}."}}
    changed = {
        "pool": str(other_pool),
        "methods": [ALIGNMENT | {"kernel": "loss"}],
        "budgets": 5,
        "data": {"token_budget": 512},
        "warmup": QUICK | {"weight_decay": 0.1},
        "model": {"model": files.model, "lora_rank": 3},
    }
    for name, value in (changed | training_only).items():
        run_name, selection = keys(**{name: value})
        assert run_name != first[0], name
        assert (selection == first[1]) == (name in training_only), name


@pytest.mark.slow
def test_arms_that_train_all_parameters_or_select_before_a_warm_up(files, tmp_path):
    methods = [
        {"label": "lift", "method": "lift", "train": {"lift_rank": 1}, "learning_rates": 1e-3},
        {"label": "all", "method": "length", "parameters": "all"},
        {"label": "cold", "method": "embedding", "warmup": "none"},
        {"label": "warm", "method": "embedding"},
    ]
    assert run(files, tmp_path, methods=methods, seeds=1, keep_weights=True) == 0
    out = tmp_path / "out"
    folders = {_arm(path): path for path in (out / "runs").iterdir()}
    assert (folders["all"] / "merged" / "model.safetensors").exists() and (folders["warm"] / "adapter").is_dir()
    before = load_lm(files.model, lora=None).params["layers"]
    moved = {}
    for name in ("lift", "all"):
        after = load_lm(folders[name] / "merged", lora=None).params["layers"]
        same = [np.asarray(a == b).ravel() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after))]
        moved[name] = 1 - np.concatenate(same).mean()
    assert 0 < moved["lift"] < 0.6 * moved["all"]  # LIFT moves a part of the weights
    chosen = [json.loads((folders[name] / "result.json").read_text()) for name in ("cold", "warm")]
    assert "warmup" not in chosen[0]["seconds"] and chosen[0]["passes"]["warmup"] == 0 < chosen[1]["passes"]["warmup"]


# -- stopped, and gone on --


def test_a_study_stopped_at_many_points_ends_the_same(done, files, tmp_path):
    """Stopped in turn in an evaluation, a training, before a result is written, in a selection and a warm-up."""
    out, less = tmp_path / "out", {"seeds": 1, "methods": [ALIGNMENT]}
    for name, at in (("evaluate_on", 4), ("train_on", 2), ("write_json", 3), ("choose", 1), ("warm_up", 1)):
        real, seen = getattr(study_run, name), []

        def stop(*args, real=real, seen=seen, at=at, **kwargs):
            seen.append(1)
            if len(seen) == at:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(study_run, name, stop)
            assert run(files, tmp_path, **less) == 130, name
        assert not (out / "results.json").exists()
    assert run(files, tmp_path, "--report-only", **less) == 0
    assert results(out)["counts"]["left"] > 0
    stale = out / "plots" / "of-another-place.png"
    stale.parent.mkdir(exist_ok=True)
    stale.write_bytes(b"")
    assert run(files, tmp_path, **less) == 0
    assert not stale.exists()
    found, whole = results(out), {cell["arm"]: cell for cell in results(done)["cells"]}
    assert results(out)["counts"] == {"done": 5, "failed": 0, "left": 0}
    for cell in found["cells"]:
        for metric in ("accuracy", "nll"):
            assert cell["test"][metric]["per_seed"] == whole[cell["arm"]]["test"][metric]["per_seed"][:1]
        for name, entry in cell["means"].items():
            if not name.startswith("seconds"):
                assert entry["values"] == whole[cell["arm"]]["means"][name]["values"][:1], (cell["arm"], name)
    ask = lambda folder: {path.name for path in (folder / "runs").iterdir() if (path / "result.json").exists()}
    assert ask(out) < ask(done)


@pytest.mark.slow
def test_a_study_killed_at_random_moments_ends_the_same(done, files, jobs, tmp_path):
    moment, runs = random.Random(0), tmp_path / "out" / "runs"
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content(files), sort_keys=False))
    words = [sys.executable, "-m", "ntkjax", "study", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out")]
    for begun in (1, 3, 5, 8):  # runs that have begun when the kill comes
        process = subprocess.Popen(words, env=jobs.environment(tmp_path))
        while process.poll() is None and len(list(runs.glob("*"))) < begun:
            time.sleep(0.01)
        time.sleep(moment.uniform(0, 0.5))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    subprocess.run(words, env=jobs.environment(tmp_path), check=True)
    same = lambda out: [(c["arm"], c["test"], c["means"].get("dev_loss")) for c in without_times(out)["cells"]]
    assert same(tmp_path / "out") == same(done)


# -- what fails --


@dataclasses.dataclass(frozen=True)
class Broken:
    """A selector that fails with what it is told."""

    error: type = ValueError

    def __call__(self, problem):
        raise self.error("the pool is upside down")


def test_failures_are_kept_shown_and_tried_again_only_when_asked(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(METHODS, "betr", Broken)
    methods = ["betr", "dsir", {"label": "too fast", "method": "dsir", "learning_rates": [1e30, 1e32]}]
    options = {"methods": methods, "seeds": 1}
    calls = count_calls(monkeypatch)
    assert run(files, tmp_path, **options) == 1
    out, said = tmp_path / "out", capsys.readouterr().out
    found = results(out)
    assert found["counts"] == {"done": 5, "failed": 2, "left": 0}
    messages = {row["arm"]: row["message"] for row in found["failures"]}
    assert messages["betr"] == "the pool is upside down"
    assert "not finite" in messages["too fast"] or "training stopped" in messages["too fast"]
    assert "upside down" in said and "1 of 1 failed" in said
    assert "upside down" in (out / "report.html").read_text() and "upside down" in (out / "results.md").read_text()
    rows = pq.read_table(out / "results.parquet").to_pylist()
    assert {(r["arm"], r["status"]) for r in rows if r["message"]} >= {("betr", "failed"), ("too fast", "failed")}
    failure = next(out.glob("selections/*/failure.json"))
    kept = json.loads(failure.read_text())
    assert kept["kind"] == "ValueError" and "Broken" not in kept["message"] and "upside down" in kept["traceback"]

    calls.clear()
    assert run(files, tmp_path, **options) == 1 and calls == {}  # nothing is tried again by itself
    assert run(files, tmp_path, "--list", **options) == 1
    monkeypatch.setitem(METHODS, "betr", METHODS["length"])
    assert run(files, tmp_path, "--retry-failed", **options) == 1
    assert results(out)["counts"] == {"done": 6, "failed": 1, "left": 0}
    assert [row["arm"] for row in results(out)["failures"]] == ["too fast"]


def test_two_processes_do_not_work_on_one_study(done, files, tmp_path, capsys):
    import fcntl

    shutil.copytree(done, tmp_path / "out")
    with (tmp_path / "out" / ".lock").open("w") as held:  # another open file is another holder
        fcntl.flock(held, fcntl.LOCK_EX)
        assert run(files, tmp_path) == 2
        assert "another process" in capsys.readouterr().err
        assert run(files, tmp_path, "--list") == 0
    assert run(files, tmp_path) == 0


def test_compiled_programs_are_dropped_when_they_are_too_many(monkeypatch):
    size, cleared = [10**9], []
    monkeypatch.setattr(study_command.psutil.Process, "memory_info", lambda self: SimpleNamespace(rss=size[0]))
    monkeypatch.setattr(study_command.psutil, "virtual_memory", lambda: SimpleNamespace(total=8 * 10**9))
    monkeypatch.setattr(study_command.jax, "clear_caches", lambda: cleared.append(size[0]))
    memory = study_command._Memory()
    for now in (2, 3, 3.1, 4, 5.2):
        size[0] = int(now * 10**9)
        memory.spare()
    assert cleared == [3_100_000_000, 5_200_000_000]


def test_a_full_disk_stops_the_study_and_is_no_failure_of_a_run(files, tmp_path, monkeypatch, capsys):
    import errno

    def full(*args, **kwargs):
        raise UserError("cannot write") from OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(study_run, "choose", full)
        assert run(files, tmp_path, seeds=1) == 2
    assert "cannot write" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*/*/failure.json"))


def test_what_cannot_be_is_said_before_anything_is_run(files, tmp_path, capsys):
    for more, words in (
        ({"budgets": 41}, ["41", "40"]),
        ({"domain_sizes": [13]}, ["ball", "13", "12"]),
        ({"model": {"model": files.model, "parameters": "all"}, "methods": [
            {"label": "a", "method": "dsir", "parameters": "lora"}]}, ["a", "LoRA"]),
    ):  # fmt: skip
        assert run(files, tmp_path, **more) == 2
        said = capsys.readouterr().err
        assert all(word in said for word in words), said
        assert not (tmp_path / "out" / "config.yaml").exists()
