"""The resumable row store: what is read back, what a kill costs, what is refused."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts

from ntkjax.errors import ConfigError, UserError
from ntkjax.store import RowStore, differences, flatten

MANIFEST = {"model": "a", "train": {"lr": 0.1, "seeds": [0, 1]}}


def open_store(path: Path, **changes) -> RowStore:
    return RowStore.open(path, **{"rows": 7, "width": 3, "dtype": "float32", "manifest": MANIFEST} | changes)


def test_rows_come_back_bit_for_bit_in_any_order_of_writing(tmp_path):
    values = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    with open_store(tmp_path / "s") as store:
        store.write([5, 0, -1], values[[5, 0, 0]])
        assert not store.done().any(), "buffered rows are not durable yet"
        store.flush()
        assert np.flatnonzero(store.done()).tolist() == [0, 5]
        store.write(np.array([6, 1, 2, 3, 4], np.int32), values[[6, 1, 2, 3, 4]])
    with open_store(tmp_path / "s") as store:
        assert store.done().all()
        assert store.read().tobytes() == values.tobytes()
        assert store.read([4, 4, 0]).tobytes() == values[[4, 4, 0]].tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "int32"])
def test_rows_that_do_not_fill_the_last_chunk(tmp_path, dtype):
    width = 20_000
    rows = 2 * (256 * 1024 // (width * np.dtype(dtype).itemsize)) + 1
    values = np.random.default_rng(1).normal(size=(rows, width)).astype(dtype)
    with open_store(tmp_path / "s", rows=rows, width=width, dtype=dtype) as store:
        for row in np.random.default_rng(2).permutation(rows):
            store.write([row], values[[row]])
            store.flush()
        assert store.read().tobytes() == values.tobytes()
    assert len(list((tmp_path / "s" / "values" / "c").iterdir())) == 3


def test_not_a_number_infinities_and_negative_zero_are_kept(tmp_path):
    payload = np.array([0x7FC00001], np.uint32).view(np.float32)[0]
    values = np.array([[np.nan, np.inf, -np.inf], [-0.0, 0.0, payload], [-0.0, -0.0, -0.0]], np.float32)
    with open_store(tmp_path / "s", rows=3) as store:
        store.write([0, 1, 2], values)
        assert store.read().tobytes() == values.tobytes()
    with open_store(tmp_path / "zeros", rows=1) as store:
        store.write([0], values[[2]])
    assert open_store(tmp_path / "zeros", rows=1).read().tobytes() == values[[2]].tobytes()


def test_width_one_takes_vectors_and_the_last_of_equal_indices_counts(tmp_path):
    with open_store(tmp_path / "s", width=1) as store:
        store.write(np.arange(7), np.arange(7, dtype=np.float32))
        store.write([2, 2], np.array([10, 20], np.float32))
        assert store.read()[:, 0].tolist() == [0, 1, 20, 3, 4, 5, 6]


def test_other_zarr_readers_can_read_it(tmp_path):
    with open_store(tmp_path / "s") as store:
        store.write(np.arange(7), np.ones((7, 3), np.float32))
    meta = json.loads((tmp_path / "s" / "values" / "zarr.json").read_text())
    assert meta["zarr_format"] == 3 and meta["shape"] == [7, 3] and meta["data_type"] == "float32"
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{tmp_path / 's' / 'values'}/"}}
    assert (np.asarray(ts.open(spec).result().read().result()) == 1).all()


@pytest.mark.parametrize(
    ("index", "values"),
    [
        ([7], np.zeros((1, 3), np.float32)),
        ([-2], np.zeros((1, 3), np.float32)),
        ([0.5], np.zeros((1, 3), np.float32)),
        ([0, 1], np.zeros((1, 3), np.float32)),
        ([0], np.zeros((1, 2), np.float32)),
        ([0], np.zeros((1, 3), np.float64)),
    ],
)
def test_rows_that_do_not_fit_are_refused(tmp_path, index, values):
    with open_store(tmp_path / "s") as store:
        with pytest.raises(ValueError):
            store.write(index, values)
        assert store._pending == []


def test_reading_rows_that_were_never_written_is_an_error(tmp_path):
    with open_store(tmp_path / "s") as store:
        store.write([0], np.zeros((1, 3), np.float32))
        assert store.read([0]).shape == (1, 3)
        with pytest.raises(UserError, match="6 of 7 rows are not computed yet"):
            store.read()


def test_a_changed_manifest_names_each_changed_key_with_both_values(tmp_path):
    with open_store(tmp_path / "s") as store:
        store.write([0], np.ones((1, 3), np.float32))
    changed = {"model": "b", "train": {"lr": 0.2, "seeds": [0, 1]}, "new": 1}
    with pytest.raises(ConfigError) as caught:
        open_store(tmp_path / "s", manifest=changed, width=4)
    message = str(caught.value)
    assert 'manifest.model: was "a", is now "b"' in message
    assert "manifest.train.lr: was 0.1, is now 0.2" in message
    assert "manifest.new: was absent, is now 1" in message
    assert "shape.width: was 3, is now 4" in message
    assert "seeds" not in message and "remove this one" in message and "new output directory" in message
    assert open_store(tmp_path / "s").done().sum() == 1, "the refusal changed nothing"
    assert not open_store(tmp_path / "s", manifest=changed, overwrite=True).done().any()


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b"\xff\xfe", b""])
def test_a_damaged_manifest_is_named(tmp_path, content):
    open_store(tmp_path / "s")
    (tmp_path / "s" / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json: the manifest of this row store is damaged"):
        open_store(tmp_path / "s")
    assert not open_store(tmp_path / "s", overwrite=True).done().any()


def test_damaged_parts_are_named(tmp_path):
    with open_store(tmp_path / "s") as store:
        store.write(np.arange(7), np.ones((7, 3), np.float32))
    done = (tmp_path / "s" / "done.bits").read_bytes()
    (tmp_path / "s" / "done.bits").write_bytes(done + b"x")
    with pytest.raises(UserError, match=r"done\.bits: damaged: 2 bytes, 1 expected"):
        open_store(tmp_path / "s")
    (tmp_path / "s" / "done.bits").write_bytes(done)
    (tmp_path / "s" / "values" / "zarr.json").write_text("{")
    with pytest.raises(UserError, match="cannot open the row store"):
        open_store(tmp_path / "s")
    (tmp_path / "s" / "values" / "zarr.json").unlink()
    with pytest.raises(UserError, match=r"values/zarr\.json is not"):
        open_store(tmp_path / "s")


def test_a_foreign_directory_or_file_is_left_alone(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="not a row store"):
            open_store(tmp_path / "thesis", overwrite=overwrite)
    (tmp_path / "file").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="is a file"):
            open_store(tmp_path / "file", overwrite=overwrite)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == (tmp_path / "file").read_text() == "precious"


def test_a_full_disk_says_what_was_kept_and_the_run_goes_on_after(tmp_path, full_disk):
    values = np.arange(21, dtype=np.float32).reshape(7, 3)
    with open_store(tmp_path / "s") as store:
        store.write([0, 1], values[:2])
        store.flush()
        store.write([2], values[2:3])
        with full_disk(), pytest.raises(UserError, match=r"No space left on device\)\. Kept: 2 of 7 rows"):
            store.flush()
        assert open_store(tmp_path / "s").done().sum() == 2
        store.write([3], values[3:4])
    assert np.flatnonzero(open_store(tmp_path / "s").done()).tolist() == [0, 1, 2, 3]
    assert (open_store(tmp_path / "s").read([0, 1, 2, 3]) == values[:4]).all()


def test_values_that_cannot_be_written_are_not_marked_done(tmp_path):
    with open_store(tmp_path / "s") as store:
        (tmp_path / "s" / "values" / "c").write_text("a file where the chunks' folder should be")
        store.write([0], np.ones((1, 3), np.float32))
        with pytest.raises(UserError, match="Kept: 0 of 7 rows"):
            store.flush()
        assert not store.done().any() and not (tmp_path / "s" / "done.bits").exists()
        (tmp_path / "s" / "values" / "c").unlink()
    assert open_store(tmp_path / "s").done().sum() == 1


def test_work_done_before_an_error_is_kept(tmp_path):
    with pytest.raises(KeyboardInterrupt), open_store(tmp_path / "s") as store:
        store.write([3], np.ones((1, 3), np.float32))
        raise KeyboardInterrupt
    assert np.flatnonzero(open_store(tmp_path / "s").done()).tolist() == [3]


def test_two_processes_write_files_of_their_own_and_see_the_whole(tmp_path, monkeypatch):
    """Both sides of a job in one process: what each owns, what each may write, what both and a third reader see."""
    import ntkjax.store as module

    values, options = np.arange(210, dtype=np.float32).reshape(70, 3), {"rows": 70}
    monkeypatch.setattr(module, "barrier", lambda name: None)
    parts = []
    for index in (0, 1):
        monkeypatch.setattr(module, "process", lambda index=index: (index, 2))
        parts.append(open_store(tmp_path / "s", **options))
    own = [np.flatnonzero(part.mine()) for part in parts]
    assert sorted([*own[0], *own[1]]) == list(range(70)) and min(map(len, own)) > 30
    with pytest.raises(ValueError, match="may not write rows of another"):
        parts[1].write(own[0][:1], values[:1])
    for part, rows in zip(parts, own):
        part.write(rows, values[rows])
        part.flush()
    assert {file.name for file in (tmp_path / "s").glob("done*")} == {"done.bits", "done.1.bits"}
    assert not parts[0].done()[own[1]].any()
    parts[0].gather()
    assert parts[0].done().all() and (parts[0].read() == values).all()
    monkeypatch.setattr(module, "process", lambda: (0, 1))  # later, another number of processes
    with open_store(tmp_path / "s", **options) as alone:
        assert alone.mine() is None and alone.done().all() and alone.read().tobytes() == values.tobytes()


def test_a_batch_without_a_row_of_its_own_leaves_the_rows_alone(tmp_path, monkeypatch):
    """Chunks of one row, as in a small or a wide store of several processes."""
    monkeypatch.setattr("ntkjax.store._CHUNK_BYTES", 1)
    options = {"rows": 3, "width": 100, "dtype": "float64", "manifest": {}}
    values = np.arange(300.0).reshape(3, 100) + 1
    with RowStore.open(tmp_path / "s", **options) as store:
        store.write(np.arange(3), values)
        for _ in range(8):
            store.write([-1, -1], np.zeros((2, 100)))
            store.flush()
        np.testing.assert_array_equal(store.read(), values)


def test_an_empty_store(tmp_path):
    with open_store(tmp_path / "s", rows=0) as store:
        assert store.read().shape == (0, 3) and store.done().shape == (0,)


def test_differences_and_flatten():
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}
    assert differences({"a": 1, "n": float("nan")}, {"a": 1, "n": float("nan")}) == []
    assert differences({"a": 1}, {"a": True}) == ["a: was 1, is now true"]


# Rows whose values depend on nothing but their number, written in a scattered order and flushed often.
WORKER = """
import sys, numpy as np
from ntkjax.store import RowStore
rows, width = 501, 300
with RowStore.open(sys.argv[1], rows=rows, width=width, dtype="float32", manifest={"seed": 0}) as store:
    print("open", flush=True)
    todo = np.flatnonzero(~store.done())
    todo = todo[np.argsort(todo * 7919 % rows)]
    for start in range(0, len(todo), 5):
        index = todo[start : start + 5]
        values = np.stack([np.random.default_rng(i).normal(size=width).astype(np.float32) for i in index])
        store.write(index, values)
        store.flush()
"""


def run_worker(path: Path, kill_after: float | None) -> bool:
    """Run the worker, perhaps killed ``kill_after`` seconds after the store is open; True if it finished."""
    root = str(Path(__file__).resolve().parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(path)],
        env=os.environ | {"PYTHONPATH": root},
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"open\n"
    if kill_after is not None:
        time.sleep(kill_after)
        process.send_signal(signal.SIGKILL)
    process.stdout.read()
    code = process.wait()
    assert code in (0, -signal.SIGKILL)
    return code == 0


def check_kills(tmp_path: Path, kills: int) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run_worker(whole, None)
    moments = random.Random(0)
    cut = sum(not run_worker(broken, moments.uniform(0, 0.25)) for _ in range(kills))
    assert cut > 0, "every run finished before its kill: the test has tested nothing"
    assert run_worker(broken, None)
    options = {"rows": 501, "width": 300, "dtype": "float32", "manifest": {"seed": 0}}
    with RowStore.open(whole, **options) as a, RowStore.open(broken, **options) as b:
        assert a.read().tobytes() == b.read().tobytes()
        assert a.read([500])[0].tobytes() == np.random.default_rng(500).normal(size=300).astype("f4").tobytes()


def test_killed_twice_and_resumed_the_array_is_the_same(tmp_path):
    check_kills(tmp_path, 2)


@pytest.mark.slow
def test_killed_twenty_times_and_resumed_the_array_is_the_same(tmp_path):
    check_kills(tmp_path, 20)
