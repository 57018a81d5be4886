"""Killed at any moment and started again, a run ends bit for bit where the undisturbed one ends."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkjax.errors import CheckpointError, UserError
from ntkjax.training import TrainConfig, fit, saved_params
from ntkjax.training.checkpoint import Checkpoints
from ntkjax.training.manifest import fingerprint_tree

TOY = Path(__file__).with_name("toy_problem.py")
ROOT = Path(__file__).resolve().parents[2]


def start(out, *options):
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, str(TOY), str(out), *map(str, options)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def without_speed(out):
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


def assert_same_end(first, second):
    a, b = np.load(f"{first}.npz"), np.load(f"{second}.npz")
    assert a.files == b.files
    for name in a.files:
        assert a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes(), name
    assert without_speed(first) == without_speed(second)


def test_killed_between_and_during_saves_the_run_ends_the_same(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    reference = start(whole, "--result", f"{whole}.npz")
    # While step 8 of 14 waits for its batch (last checkpoint: 6), then inside the save of step 12, then not.
    for options in (["--die-at-collate", 8], ["--die-in-save", 2]):
        code, output = finish(start(broken, *options))
        assert code == -signal.SIGKILL, output
    for process in (start(broken, "--result", f"{broken}.npz"), reference):
        code, output = finish(process)
        assert code == 0, output
    assert_same_end(whole, broken)
    steps = [line["step"] for line in without_speed(whole) if line["kind"] == "train"]
    assert steps == list(range(1, 15))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_killed_at_random_moments_the_run_ends_the_same(tmp_path, seed):
    rng = random.Random(seed)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    reference = start(whole, "--result", f"{whole}.npz")
    metrics, killed = broken / "metrics.jsonl", 0
    while killed < 4:
        process, before = start(broken), len(metrics.read_bytes()) if metrics.exists() else 0
        more = rng.randrange(1, 900)  # bytes of metrics after which, and a moment later, the process dies
        while process.poll() is None and not (metrics.exists() and len(metrics.read_bytes()) - before > more):
            time.sleep(0.001)
        time.sleep(rng.random() * 0.1)
        if process.poll() is not None:
            break
        process.kill()
        finish(process)
        killed += 1
    for process in (start(broken, "--result", f"{broken}.npz"), reference):
        code, output = finish(process)
        assert code == 0, output
    assert killed > 0
    assert_same_end(whole, broken)


def test_a_finished_run_is_not_run_again(run):
    first = run(buckets=(24,))
    before = (run.folder / "metrics.jsonl").stat()
    again = run(buckets=(24,))
    assert again.history == first.history and again.steps == 6 and again.best_step == first.best_step
    np.testing.assert_array_equal(again.params["table"]["kernel"], first.params["table"]["kernel"])
    assert (run.folder / "metrics.jsonl").stat().st_size == before.st_size


def test_a_run_stopped_early_stays_stopped(run, toy):
    rng = np.random.default_rng(9)
    rows = [[int(t) for t in rng.integers(11, size=9)] for _ in range(8)]
    noise = toy.TokenisedDataset.from_sequences(rows, [1] * 8)
    first = run(dev=noise, patience=1, steps=60)
    assert first.stopped_early and first.steps < 60
    again = run(dev=noise, patience=1, steps=60)
    assert again.history == first.history
    assert again.stopped_early and again.best_step == first.best_step
    np.testing.assert_array_equal(again.params["table"]["kernel"], first.params["table"]["kernel"])


@pytest.mark.parametrize("lost", [[6], [6, 4]])
def test_from_an_older_checkpoint_the_end_is_the_same(run, lost):
    first = run(keep_checkpoints=None)
    for step in lost:
        shutil.rmtree(run.folder / "checkpoints" / str(step))
    again = run(keep_checkpoints=None)
    assert [entry["step"] for entry in again.history] == [entry["step"] for entry in first.history]
    np.testing.assert_array_equal(again.params["table"]["kernel"], first.params["table"]["kernel"])
    np.testing.assert_array_equal(again.opt_state[1].mu["table"]["kernel"], first.opt_state[1].mu["table"]["kernel"])


def test_only_the_newest_checkpoints_stay(run):
    run(keep_checkpoints=1)
    assert [path.name for path in (run.folder / "checkpoints").iterdir()] == ["6"]


def test_a_changed_run_is_refused_by_name(run, toy):
    run()
    other_model, other_params = toy.make_model(seed=1)
    changes = {
        r"config\.learning_rate was 0\.1, is now 0\.2": {"learning_rate": 0.2},
        r"seed was 0, is now 1": {"seed": 1},
        r"training data \(examples\) was 16, is now 15": {"train": toy.make_data(15, 0)},
        r"training data \(content\)": {"train": toy.make_data(16, 5)},
        r"dev data \(content\)": {"dev": toy.make_data(6, 5)},
        r"domain rows": {"domain": np.array([1, 2])},
        r"initial parameters": {"params": other_params},
        r"model was": {"nll_fn": other_model},
    }
    for message, change in changes.items():
        with pytest.raises(CheckpointError, match=message):
            run(**change)
    run(save_every=3, keep_checkpoints=1)  # neither changes a number
    assert run(resume=False, learning_rate=0.2).history[1]["lr"] == pytest.approx(0.2)


def test_a_fingerprint_sees_every_weight_of_a_tree():
    """A corrected row of an embedding is one of thousands; bits count, not values: -0.0 is not 0.0."""
    tree = {"embed": np.zeros((400, 33), np.float32), "scale": np.ones(3, np.float32)}
    last, sign = tree["embed"].copy(), tree["embed"].copy()
    last[-1, -1], sign[200, 20] = 1e-30, -0.0
    others = [tree | {"embed": last}, tree | {"embed": sign}, {"embed": tree["embed"], "norm": tree["scale"]}]
    found = [fingerprint_tree(other) for other in (tree, *others)]
    assert len(set(found)) == 4 and fingerprint_tree({name: leaf.copy() for name, leaf in tree.items()}) == found[0]


def test_damage_is_named(run):
    run()
    (run.folder / "checkpoints" / "6" / "arrays" / "manifest.ocdbt").unlink()
    with pytest.raises(CheckpointError, match="checkpoints/6: the checkpoint cannot be read"):
        run()
    run(resume=False)
    metrics = run.folder / "metrics.jsonl"
    content = metrics.read_bytes()
    metrics.write_bytes(content[:-30])
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: .* only \d+ are left"):
        run()
    metrics.write_bytes(content.replace(b"{", b"[", 1))
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl:1: not a line of metrics"):
        run()
    (run.folder / "train.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"train\.json:1: not valid JSON"):
        run()


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("RESOURCE_EXHAUSTED: Error writing: Failed to write 4 bytes [os_error_code='28']"),
    ],
)
def test_a_full_disk_says_what_is_kept_and_the_run_goes_on_later(run, monkeypatch, failure):
    import orbax.checkpoint as ocp

    whole = run()
    run_again = lambda: run(resume=False)
    plain = ocp.CheckpointManager.save

    def full(self, step, *args, **kwargs):
        if step == 4:
            raise failure
        return plain(self, step, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(ocp.CheckpointManager, "save", full)
        with pytest.raises(UserError, match=r"No space left .* after step 4\. Kept: the checkpoint of step 2"):
            run_again()
    resumed = run()
    np.testing.assert_array_equal(resumed.params["table"]["kernel"], whole.params["table"]["kernel"])


def test_room_is_looked_at_before_writing(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(OSError, match="takes 80 bytes, 10 are free"):
        checkpoints.save(1, {"x": np.zeros(10)}, {})
    assert checkpoints.latest() is None
    checkpoints.close()


@contextlib.contextmanager
def small_files(most: int):
    """Inside, no file of this process grows beyond ``most`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_save_returns_before_it_is_written_and_whoever_waits_is_told_once_that_it_was_not(tmp_path):
    checkpoints, random = Checkpoints(tmp_path, keep=2), np.random.default_rng(0)
    draw = lambda: {"x": jnp.asarray(random.standard_normal(200_000, np.float32))}
    first, third = draw(), draw()
    checkpoints.save(1, first, {"n": 1})
    assert checkpoints.latest() == 1
    with small_files(50_000):
        checkpoints.save(2, draw(), {"n": 2})
        with pytest.raises(OSError, match="File too large"):
            checkpoints.wait()
    checkpoints.wait()
    assert checkpoints.latest() == 1
    checkpoints.save(3, third, {"n": 3})
    assert checkpoints.steps() == [1, 3]
    for step, wanted in ((1, first), (3, third)):
        arrays, progress = checkpoints.restore(step, {"x": jnp.zeros(200_000)})
        np.testing.assert_array_equal(arrays["x"], wanted["x"])
        assert progress == {"n": step}
    checkpoints.close()


def test_a_checkpoint_that_could_not_be_written_behind_the_steps_ends_the_run(run, monkeypatch):
    """Whether the next save meets it, or the end of the run."""
    plain = Checkpoints.save
    for broken, kept in ((4, "Kept: the checkpoint of step 2"), (6, "Kept: the checkpoint of step 4")):

        def save(self, step, arrays, progress, broken=broken):
            self.wait()
            with small_files(100) if step == broken else contextlib.nullcontext():
                plain(self, step, arrays, progress)
                while self._manager.is_saving_in_progress():
                    time.sleep(0.01)

        with monkeypatch.context() as patched:
            patched.setattr(Checkpoints, "save", save)
            with pytest.raises(UserError, match=rf"File too large.* after step 6\. {kept}"):
                run(resume=False)
        assert run().steps == 6


def test_a_donated_state_does_not_change_what_is_being_written(tmp_path):
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    checkpoints, state = Checkpoints(tmp_path, keep=None), jnp.zeros(500_000)
    for number in range(1, 6):
        state = step(state)
        checkpoints.save(number, {"x": state}, {})
    for number in checkpoints.steps():
        arrays, _ = checkpoints.restore(number, {"x": jnp.zeros(500_000)})
        np.testing.assert_array_equal(arrays["x"], np.full(500_000, number, np.float32))
    checkpoints.close()


def test_a_line_that_does_not_fit_on_the_disk(run, monkeypatch):
    from ntkjax.training.metrics_log import MetricsLog

    plain = MetricsLog.append

    def full(self, entry):
        if entry["step"] == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(self, entry)

    monkeypatch.setattr(MetricsLog, "append", full)
    with pytest.raises(UserError, match=r"after step 3\. Kept: the checkpoint of step 2"):
        run()


def test_every_step_that_was_kept_can_be_read_back(toy, tmp_path):
    """The parameters after k steps of a longer run are those that a run of k steps ends with."""
    nll_fn, params = toy.make_model()
    data = toy.make_data(18, 0)
    config = TrainConfig(
        epochs=4, batch_size=6, max_buckets=1, learning_rate=0.1, schedule="constant", keep_checkpoints=None
    )
    for dev in (None, toy.make_data(6, 1)):
        out = tmp_path / f"dev-{dev is not None}"
        last = fit(nll_fn, params, data, config, seed=1, dev=dev, out_dir=out, progress=False)
        short = fit(nll_fn, params, data, dataclasses.replace(config, epochs=2), seed=1, progress=False)
        for step, wanted in ((6, short.params), (12, None if dev else last.params)):
            found = saved_params(out, step, params, config, dev=dev is not None)
            if wanted is not None:
                for name in ("kernel", "bias"):
                    np.testing.assert_array_equal(found["table"][name], wanted["table"][name])
        with pytest.raises(CheckpointError, match=r"step 5.*3, 6, 9, 12"):
            saved_params(out, 5, params, config, dev=dev is not None)
