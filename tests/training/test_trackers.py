"""Trackers: what they are given, that they change nothing else, and the files of two of them read back.

tensorboardX and wandb are extras: their tests are skipped where they are not installed (requirements/trackers.txt);
`make test-torch` has them.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import struct
import time

import numpy as np
import pytest

from ntkjax.errors import ConfigError, UserError
from ntkjax.pipeline.study.grid import _train_dict
from ntkjax.training import TrainConfig, trackers
from ntkjax.training.trackers import TRACKERS, Kind, check_tracker
from ntkjax.training.trackers.base import numbers


@pytest.fixture
def run(run):
    """A run of six steps with two checkpoints and three evaluations, under a tracker."""

    def go(tracker, **changed):
        return run(tracker=tracker, **changed)

    go.folder = run.folder
    return go


class Recorder:
    """A tracker that keeps what it is given."""

    opened: list[Recorder]

    def __init__(self, folder, settings, step):
        self.folder, self.settings, self.first, self.seen, self.closed = folder, settings, step, [], False
        self.opened.append(self)

    def log(self, step, values):
        self.seen.append((step, values))

    def close(self):
        self.closed = True


@pytest.fixture
def recorded(monkeypatch):
    """A tracker from outside the package: one line in the table."""
    Recorder.opened = []
    monkeypatch.setitem(TRACKERS, "recorder", Kind("for tests", Recorder))
    return Recorder.opened


def test_a_tracker_is_given_every_line_of_metrics_and_closed(run, recorded):
    result = run("recorder")
    (one,) = recorded
    assert one.closed and one.first == 0 and one.folder == run.folder and one.settings["learning_rate"] == 0.1
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert one.seen == [numbers(line) for line in lines] and len(lines) == 10
    step, values = one.seen[1]
    assert step == 1 and values["train/loss"] == result.history[1]["loss"] and values["train/clipped"] in (0.0, 1.0)
    assert one.seen[0] == (0, {"dev/dev_loss": result.history[0]["dev_loss"]})
    # A finished run opens nothing.
    run("recorder")
    assert len(recorded) == 1


def test_a_run_goes_on_with_the_steps_that_are_left_and_another_tracker(run, recorded):
    whole = run("none", keep_checkpoints=None)
    for step in (6, 4):
        shutil.rmtree(run.folder / "checkpoints" / str(step))
    again = run("recorder", keep_checkpoints=None)
    (one,) = recorded
    assert one.first == 2 and sorted({step for step, _ in one.seen}) == [3, 4, 5, 6]
    np.testing.assert_array_equal(again.params["table"]["kernel"], whole.params["table"]["kernel"])


def test_how_a_run_is_watched_is_no_part_of_its_name():
    assert _train_dict(TrainConfig(tracker="wandb")) == _train_dict(TrainConfig())
    assert "tracker" not in _train_dict(TrainConfig())
    with pytest.raises(ConfigError, match="tracker = 'aim': expected one of none, jsonl, tensorboard, wandb"):
        TrainConfig(tracker="aim")


@pytest.mark.parametrize(("name", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_package_is_told_before_anything_is_written(run, monkeypatch, name, package):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"{package} is not installed; .* pip install 'ntkjax\[{name}\]'"):
        run(name)
    assert not run.folder.exists()
    check_tracker("none", "jsonl")
    with pytest.raises(ConfigError, match="tracker 'abacus': expected one of none, jsonl, tensorboard, wandb"):
        check_tracker("none", "abacus")


def records(path):
    """The payloads of a file of TensorFlow's records: length, checksum, payload, checksum."""
    data, at = path.read_bytes(), 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        yield data[at + 12 : at + 12 + length]
        at += 16 + length


def test_tensorboard_files_hold_the_numbers(run):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    result = run("tensorboard", keep_checkpoints=None)
    (file,) = (run.folder / "tensorboard").iterdir()
    events = [Event.FromString(record) for record in records(file)]
    found = {(v.tag, event.step): v.simple_value for event in events for v in event.summary.value}
    for entry in result.history:
        step, values = numbers(entry)
        for name, value in values.items():
            assert found[name, step] == pytest.approx(value, rel=1e-6)
    assert any("learning_rate: 0.1" in str(event) for event in events)
    # Going on from step 2: a second file that takes back what the first holds after it.
    for step in (6, 4):
        shutil.rmtree(run.folder / "checkpoints" / str(step))
    run("tensorboard", keep_checkpoints=None)
    assert len(list((run.folder / "tensorboard").iterdir())) == 2
    if importlib.util.find_spec("tensorboard") is not None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        read = EventAccumulator(str(run.folder / "tensorboard")).Reload()
        assert [event.step for event in read.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
        losses = [entry["loss"] for entry in result.history if entry["kind"] == "train"]
        assert [event.value for event in read.Scalars("train/loss")] == pytest.approx(losses, rel=1e-6)
    run("tensorboard", resume=False)
    assert len(list((run.folder / "tensorboard").iterdir())) == 1


def wandb_records(path):
    """The payloads of a file of wandb: 7 bytes, then LevelDB's log, 32 KiB blocks of checksum, length, kind, piece."""
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last piece
            yield whole
            whole = b""


@pytest.mark.slow
def test_wandb_writes_offline(run, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.delenv("WANDB_MODE", raising=False)
    result = run("wandb")
    (file,) = (run.folder / "wandb").glob("offline-run-*/*.wandb")
    written = lambda: [Record.FromString(record) for record in wandb_records(file)]
    until = time.monotonic() + 30  # a process of wandb's own writes the file
    while written()[-1].WhichOneof("record_type") != "exit" and time.monotonic() < until:
        time.sleep(0.1)
    found = {}
    for record in written():
        items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        if "train/loss" in items:
            found[int(items["_step"])] = json.loads(items["train/loss"])
    losses = {entry["step"]: entry["loss"] for entry in result.history if entry["kind"] == "train"}
    assert found == pytest.approx(losses)
