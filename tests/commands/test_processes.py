"""`select` in a job of two processes: one store, the selection of one process, nothing finished is lost."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from ntkjax.cli import main

FLAGS = ["--n", "5", "--lora-rank", "2", "--token-budget", "256", "--warmup.batch-size", "4"]
FLAGS += ["--warmup.learning-rate", "1e-3"]


def table(out: Path) -> dict[str, np.ndarray]:
    columns = pq.read_table(out / "scores.parquet")
    return {name: columns[name].to_numpy(zero_copy_only=False) for name in ("score", "votes", "rank", "selected")}


def check_same(out: Path, one: Path) -> None:
    """The same votes, ranks and choice; scores as far as single precision goes (other rows share a batch)."""
    here, there = table(out), table(one)
    for name in ("votes", "rank", "selected"):
        np.testing.assert_array_equal(here[name], there[name], err_msg=name)
    np.testing.assert_allclose(here["score"], there["score"], rtol=1e-5)
    chosen = lambda folder: json.loads((folder / "selection.json").read_text())["selected"]
    assert chosen(out) == chosen(one)


@pytest.fixture(scope="module")
def one(files, jobs, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("job")
    jobs.finish(jobs.start(root, *files.flags("model", "domain", "pool"), *FLAGS, "--out", str(root / "one")))
    return root / "one"


@pytest.mark.slow
def test_two_processes_write_one_store_and_choose_what_one_chooses(files, jobs, one):
    out = one.parent / "two"
    job = jobs.start_job(one.parent, 2, *files.flags("model", "domain", "pool"), *FLAGS, "--out", str(out))
    lines = [jobs.finish(process) for process in job]
    for store, count in (("embeddings", 40), ("scores", 20)):
        parts = [jobs.written(said, store) for said in lines]
        assert all(parts), "a process had nothing to do: the test has tested nothing"
        assert len(parts[0] + parts[1]) == len({*parts[0], *parts[1]}) == count
    assert any("selected 5 examples" in line for line in lines[0])
    assert not any("selected" in line for line in lines[1])
    check_same(out, one)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        ("less",),
        ("ntk", "--aggregation", "clusters", "--domain-clusters", "3"),
        ("euds", "--semantic-samples", "2", "--semantic-tokens", "4"),
        ("quad", "--probes", "1"),
        ("gais",),
        ("length", "--diversity", "d-optimal"),
    ],
    ids=lambda method: method[0],
)
def test_two_processes_share_gradients_groups_and_epochs(method, files, jobs, one):
    flags = [*files.flags("model", "domain", "pool"), *FLAGS, "--warmup.epochs", "2", "--sketch-size", "64"]
    flags += ["--method", *method, "--out"]
    alone, out = (one.parent / f"{method[0]}-{count}" for count in ("one", "two"))
    jobs.finish(jobs.start(one.parent, *flags, str(alone)))
    for process in jobs.start_job(one.parent, 2, *flags, str(out)):
        jobs.finish(process)
    check_same(out, alone)


@pytest.mark.slow
def test_a_job_killed_and_started_again_does_nothing_twice(files, jobs, one):
    out = one.parent / "killed"
    flags = [*files.flags("model", "domain", "pool"), *FLAGS, "--out", str(out)]
    done: dict[str, list[int]] = {"embeddings": [], "scores": []}
    for store in done:  # process 1 dies at its first batch of this store, and its job goes with it
        job = jobs.start_job(one.parent, 2, *flags)
        said = []
        for line in job[1].stdout:
            said.append(line)
            if line.startswith(f"rows {store}"):
                break
        for process in reversed(job):
            process.kill()
        said += job[1].stdout.readlines() + job[0].stdout.readlines()
        for process in job:
            process.wait()
        for name in done:
            done[name] += jobs.written(said, name)
        if store == "embeddings":
            assert 0 < len(done[store]) < 40
    said = [line for process in jobs.start_job(one.parent, 2, *flags) for line in jobs.finish(process)]
    for store, count in (("embeddings", 40), ("scores", 20)):
        assert sorted(done[store] + jobs.written(said, store)) == sorted({*done[store], *jobs.written(said, store)})
        assert len(done[store] + jobs.written(said, store)) == count
    check_same(out, one)
    out = one.parent / "alone"  # a job of two begun, one process ends it
    job = jobs.start_job(one.parent, 2, *flags[:-1], str(out))
    next(line for line in job[1].stdout if line.startswith("rows scores"))
    for process in reversed(job):
        process.kill()
        process.wait()
    jobs.finish(jobs.start(one.parent, *flags[:-1], str(out)))
    check_same(out, one)


def test_a_command_that_does_not_divide_its_work_says_so(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ntkjax.job.start", lambda: (1, 2))
    assert main(["evaluate", *files.flags("model", "test"), "--out", str(tmp_path / "out")]) == 2
    assert "evaluate runs in one process, and this job has 2" in capsys.readouterr().err
