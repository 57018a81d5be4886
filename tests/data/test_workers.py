"""A pool prepared with workers on the same machine is the pool of one process, and what goes wrong in one is told."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import psutil
import pytest

from ntkjax.data import crew, read_records, tokenise
from ntkjax.data.crew import build_with_workers, workers_for
from ntkjax.data.dedup import find_duplicates
from ntkjax.errors import DataError, UserError

WORDS = ("kara", "loto", "mivi", "nepe", "sura", "kato", "lovi", "mipe")


@pytest.fixture
def pool(tmp_path) -> Path:
    """Records of which every fifth repeats another's content, or nearly so."""
    rng, rows = np.random.default_rng(0), []
    for i in range(90):
        words = [str(word) for word in rng.choice(WORDS, size=60)]
        if i % 5 == 4:
            words = rows[i - 3]["response"].split()
            words[7:8] = ["other"] if i % 2 else words[7:8]
        rows.append({"prompt": f"Question {i}?" if i % 5 != 4 else rows[i - 3]["prompt"], "response": " ".join(words)})
    file = tmp_path / "pool.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def prepared(pool: Path, tokenizer, folder: Path) -> tuple:
    records = read_records(pool, cache_dir=folder)
    tokens = tokenise(records, tokenizer, max_length=48, cache_dir=folder)
    found = find_duplicates(records, {"test": records.subset(range(0, 90, 17))}, held_out=("test",), cache_dir=folder)
    rows = [(tokens.tokens(i)[0].tolist(), tokens.trained(i).tolist()) for i in range(len(tokens))]
    return rows, tokens.report, tokens.fingerprint, found


@pytest.mark.parametrize("count", [2, 3])
def test_workers_prepare_what_one_process_prepares(count, pool, toy_tokenizer, tmp_path, monkeypatch):
    alone = prepared(pool, toy_tokenizer, tmp_path / "alone")
    assert alone[3].pairs
    monkeypatch.setattr("ntkjax.data.cache.workers_for", lambda rows: count if rows else 1)
    assert prepared(pool, toy_tokenizer, tmp_path / "crew") == alone
    (made,) = (tmp_path / "crew" / "tokens").iterdir()
    assert len(list(made.glob("part-*"))) == count


def test_workers_are_as_many_as_rows_and_cores_are_worth(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    rows = (0, crew.ROWS_A_WORKER, 5 * crew.ROWS_A_WORKER + 1, 10**7)
    assert [workers_for(n) for n in rows] == [1, 1, 5, crew.MOST_WORKERS]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    assert workers_for(10**7) == 2


BUILDS = """
import os, signal, time
from ntkjax.errors import DataError

def write_own(own):
    own.each("write", lambda: (own.folder / f"part-{own.index}").write_text(str(os.getpid())))

def fail_in_one(own):
    def do():
        if own.index == 1:
            raise DataError("pool.jsonl:7: no response")
    own.each("read", do)

def die(own):
    if own.index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    own.each("write", lambda: None)

def full_disk(own):
    if own.index == 1:
        raise OSError(28, "No space left on device")  # outside a step, as in writing what went wrong
    own.each("write", lambda: None)

def linger(own):
    (own.folder / f"pid-{own.index}").write_text(str(os.getpid()))
    time.sleep(600)

def break_in_one(own):
    if own.index == 1:
        raise AssertionError("a fault of the program")
    own.each("write", lambda: None)
"""


@pytest.fixture
def builds(tmp_path_factory, monkeypatch) -> ModuleType:
    """What crews do, in a module that workers can import too."""
    folder = tmp_path_factory.mktemp("builds")
    (folder / "crew_builds.py").write_text(BUILDS)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "crew_builds", raising=False)
    return importlib.import_module("crew_builds")


def test_each_of_them_is_a_process(builds, tmp_path):
    build_with_workers(builds.write_own, tmp_path, 3)
    assert len({(tmp_path / f"part-{k}").read_text() for k in range(3)}) == 3
    assert (tmp_path / "part-0").read_text() == str(os.getpid())


def test_what_is_wrong_in_a_workers_part_is_told(builds, tmp_path):
    with pytest.raises(DataError, match=r"^pool\.jsonl:7: no response$"):
        build_with_workers(builds.fail_in_one, tmp_path, 3)


@pytest.mark.parametrize(("name", "how"), [("die", "by signal 9"), ("break_in_one", "with exit code 1")])
def test_a_worker_that_ends_is_told(name, how, builds, tmp_path):
    with pytest.raises(UserError, match=how):
        build_with_workers(getattr(builds, name), tmp_path, 3)


def test_a_worker_that_cannot_write_at_all_is_a_disk_that_is_full(builds, tmp_path):
    with pytest.raises(OSError, match="could not write"):
        build_with_workers(builds.full_disk, tmp_path, 3)


def test_workers_end_with_a_process_that_is_killed(builds, tmp_path):
    leads = "import pathlib, sys, crew_builds; from ntkjax.data.crew import build_with_workers"
    leads += "; build_with_workers(crew_builds.linger, pathlib.Path(sys.argv[1]), 2)"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    first = subprocess.Popen([sys.executable, "-c", leads, str(tmp_path)], env=env)
    until(lambda: (tmp_path / "pid-1").exists() and (tmp_path / "pid-1").read_text())
    worker = int((tmp_path / "pid-1").read_text())
    first.kill()
    first.wait()
    until(lambda: not psutil.pid_exists(worker) or psutil.Process(worker).status() == psutil.STATUS_ZOMBIE)


def until(reached, seconds=60.0):
    """Wait for that; fail where it does not come."""
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)
