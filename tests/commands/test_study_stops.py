"""`ntkjax study` stopped, killed, with runs that fail, with a full disk, and with what it must refuse."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import yaml

import ntkjax.pipeline.study.runner as study_run
import ntkjax.pipeline.study.runs as study_runs
from ntkjax.errors import UserError
from ntkjax.selection import METHODS, Selector

# -- stopped, and gone on --


def test_a_study_stopped_at_many_points_ends_the_same(study, done, files, stopped, tmp_path):
    """Stopped in turn in an evaluation, a training, before a result is written, in a selection and a warm-up."""
    out, less = tmp_path / "out", {"seeds": 1, "methods": [study.ALIGNMENT]}
    for name, at in (("evaluate_on", 4), ("train_on", 2), ("write_json", 3), ("choose", 1), ("warm_up", 1)):
        with stopped(study_run, name, at):
            assert study.run(files, tmp_path, **less) == 130, name
        assert not (out / "results.json").exists()
    assert study.run(files, tmp_path, "--report-only", **less) == 0
    assert study.results(out)["counts"]["left"] > 0
    stale = out / "plots" / "of-another-place.png"
    stale.parent.mkdir(exist_ok=True)
    stale.write_bytes(b"")
    assert study.run(files, tmp_path, **less) == 0
    assert not stale.exists()
    found, whole = study.results(out), {cell["arm"]: cell for cell in study.results(done)["cells"]}
    assert study.results(out)["counts"] == {"done": 5, "failed": 0, "left": 0}
    for cell in found["cells"]:
        for metric in ("accuracy", "nll"):
            assert cell["test"][metric]["per_seed"] == whole[cell["arm"]]["test"][metric]["per_seed"][:1]
        for name, entry in cell["means"].items():
            if not name.startswith("seconds"):
                assert entry["values"] == whole[cell["arm"]]["means"][name]["values"][:1], (cell["arm"], name)
    ask = lambda folder: {path.name for path in (folder / "runs").iterdir() if (path / "result.json").exists()}
    assert ask(out) < ask(done)


@pytest.mark.slow
def test_a_study_killed_at_random_moments_ends_the_same(study, done, files, jobs, tmp_path):
    moment, runs = random.Random(0), tmp_path / "out" / "runs"
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study.content(files), sort_keys=False))
    words = [sys.executable, "-m", "ntkjax", "study", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out")]
    for begun in (1, 3, 5, 8):  # runs that have begun when the kill comes
        process = subprocess.Popen(words, env=jobs.environment(tmp_path))
        while process.poll() is None and len(list(runs.glob("*"))) < begun:
            time.sleep(0.01)
        time.sleep(moment.uniform(0, 0.5))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    subprocess.run(words, env=jobs.environment(tmp_path), check=True)
    same = lambda out: [(c["arm"], c["test"], c["means"].get("dev_loss")) for c in study.without_times(out)["cells"]]
    assert same(tmp_path / "out") == same(done)


# -- what fails --


@dataclasses.dataclass(frozen=True)
class Broken(Selector):
    """A selector that fails."""

    def __call__(self, problem):
        raise ValueError("the pool is upside down")


def test_failures_are_kept_shown_and_tried_again_only_when_asked(study, files, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(METHODS, "betr", Broken)
    methods = ["betr", "dsir", {"label": "too fast", "method": "dsir", "learning_rates": [1e30, 1e32]}]
    options = {"methods": methods, "seeds": 1}
    calls = study.count_calls(monkeypatch)
    assert study.run(files, tmp_path, **options) == 1
    out, said = tmp_path / "out", capsys.readouterr().out
    found = study.results(out)
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
    assert study.run(files, tmp_path, **options) == 1 and calls == {}  # nothing is tried again by itself
    assert study.run(files, tmp_path, "--list", **options) == 1
    monkeypatch.setitem(METHODS, "betr", METHODS["length"])
    assert study.run(files, tmp_path, "--retry-failed", **options) == 1
    assert study.results(out)["counts"] == {"done": 6, "failed": 1, "left": 0}
    assert [row["arm"] for row in study.results(out)["failures"]] == ["too fast"]


def test_two_processes_do_not_work_on_one_study(study, done, files, tmp_path, capsys):
    import fcntl

    shutil.copytree(done, tmp_path / "out")
    with (tmp_path / "out" / ".lock").open("w") as held:  # another open file is another holder
        fcntl.flock(held, fcntl.LOCK_EX)
        assert study.run(files, tmp_path) == 2
        assert "another process" in capsys.readouterr().err
        assert study.run(files, tmp_path, "--list") == 0
    assert study.run(files, tmp_path) == 0


def test_compiled_programs_are_dropped_when_they_are_too_many(monkeypatch):
    size, cleared = [10**9], []
    monkeypatch.setattr(study_runs.psutil.Process, "memory_info", lambda self: SimpleNamespace(rss=size[0]))
    monkeypatch.setattr(study_runs.psutil, "virtual_memory", lambda: SimpleNamespace(total=8 * 10**9))
    monkeypatch.setattr(study_runs.jax, "clear_caches", lambda: cleared.append(size[0]))
    memory = study_runs.Memory()
    for now in (2, 3, 3.1, 4, 5.2):
        size[0] = int(now * 10**9)
        memory.spare()
    assert cleared == [3_100_000_000, 5_200_000_000]


def test_a_full_disk_stops_the_study_and_is_no_failure_of_a_run(study, files, tmp_path, monkeypatch, capsys):
    import errno

    def full(*args, **kwargs):
        raise UserError("cannot write") from OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(study_run, "choose", full)
        assert study.run(files, tmp_path, seeds=1) == 2
    assert "cannot write" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*/*/failure.json"))


def test_what_cannot_be_is_said_before_anything_is_run(study, files, tmp_path, capsys):
    for more, words in (
        ({"budgets": 41}, ["41", "40"]),
        ({"domain_sizes": [13]}, ["ball", "13", "12"]),
        ({"model": {"model": files.model, "parameters": "all"}, "methods": [
            {"label": "a", "method": "dsir", "parameters": "lora"}]}, ["a", "LoRA"]),
    ):  # fmt: skip
        assert study.run(files, tmp_path, **more) == 2
        said = capsys.readouterr().err
        assert all(word in said for word in words), said
        assert not (tmp_path / "out" / "config.yaml").exists()
