"""Run directories: what is recorded, what may be resumed, what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from ntkjax.errors import ConfigError, UserError
from ntkjax.files import plain
from ntkjax.pipeline.config_io import config_from_dict
from ntkjax.pipeline.run_dir import RunDir, load_run
from ntkjax.pipeline.versions import versions


@dataclasses.dataclass(frozen=True)
class Train:
    lr: float = 1e-3
    seed: int = 5


@dataclasses.dataclass(frozen=True)
class Config:
    model: Path = Path("m")
    seeds: tuple[int, ...] = (0, 1)
    train: Train = Train()
    progress: bool = True


def test_a_run_can_be_replayed_from_its_directory(tmp_path):
    config = Config(model=Path("größe"), train=Train(lr=2e-5))
    RunDir.create(tmp_path / "deep" / "run", "adapt", config)
    for named in (tmp_path / "deep" / "run", tmp_path / "deep" / "run" / "config.yaml"):
        command, data = load_run(named)
        assert command == "adapt"
        assert config_from_dict(Config, data) == config


def test_options_newer_than_a_run_are_at_their_defaults_in_it(tmp_path):
    RunDir.create(tmp_path / "run", "adapt", Config())
    file = tmp_path / "run" / "config.yaml"
    content = yaml.safe_load(file.read_text())
    del content["config"]["progress"], content["config"]["train"]["seed"]
    file.write_text(yaml.safe_dump(content))
    assert RunDir.create(tmp_path / "run", "adapt", Config()).held
    with pytest.raises(ConfigError, match=r"train\.seed: was 5, is now 6"):
        RunDir.create(tmp_path / "run", "adapt", Config(train=Train(seed=6)))
    with pytest.raises(ConfigError, match="command: was"):
        RunDir.create(tmp_path / "run", "select", Config())


def test_a_directory_that_was_moved_holds_its_run(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Placed(Config):
        out: str = ""

    RunDir.create(tmp_path / "a", "adapt", Placed(out=str(tmp_path / "a")))
    (tmp_path / "a").rename(tmp_path / "b")
    assert RunDir.create(tmp_path / "b", "adapt", Placed(out=str(tmp_path / "b"))).held
    with pytest.raises(ConfigError, match=r"model: was .*, is now"):
        RunDir.create(tmp_path / "b", "adapt", Placed(model=Path("other"), out=str(tmp_path / "b")))


def test_versions_and_seeds_are_recorded(tmp_path):
    RunDir.create(tmp_path / "run", "adapt", Config())
    found = json.loads((tmp_path / "run" / "versions.json").read_text())
    assert found["python"] == platform.python_version()
    assert found["jax"] == jax.__version__ and found["numpy"] == np.__version__
    assert found["backend"] == jax.default_backend() and found["device_count"] == len(jax.devices())
    assert found["seeds"] == {"seeds": [0, 1], "train.seed": 5}
    assert found.keys() >= set(versions())


def test_the_same_run_goes_on_and_another_is_refused(tmp_path):
    run = RunDir.create(tmp_path / "run", "adapt", Config())
    run.log(step=1)
    again = RunDir.create(tmp_path / "run", "adapt", Config())
    assert again.metrics() == [{"step": 1}]
    with pytest.raises(ConfigError) as caught:
        RunDir.create(tmp_path / "run", "select", Config(seeds=(0,), train=Train(lr=0.5), progress=False))
    message = str(caught.value)
    assert 'command: was "adapt", is now "select"' in message
    assert "\n  train.lr: was 0.001, is now 0.5" in message
    assert "\n  seeds: was [0, 1], is now [0]" in message
    assert "progress: was true, is now false" in message and "model" not in message
    assert "--out" in message
    before = (tmp_path / "run" / "config.yaml").read_text()
    RunDir.create(tmp_path / "run", "adapt", Config(progress=False), ignore=("progress",))
    assert (tmp_path / "run" / "config.yaml").read_text() == before
    with pytest.raises(ConfigError, match="already holds a run"):
        RunDir.create(tmp_path / "run", "adapt", Config(), resume=False)


GIVEN = {"ntkjax": {"version": "1.0.0"}, "pool": {"a.jsonl": "0" * 16, "b.jsonl": "1" * 16}}


@dataclasses.dataclass(frozen=True)
class Packed(Config):
    data: dict = dataclasses.field(default_factory=lambda: {"max_length": 64, "packing": "auto"})


def test_how_examples_lie_in_batches_may_change_and_earlier_runs_did_not_say(tmp_path):
    before = Packed(data={"max_length": 64})
    RunDir.create(tmp_path / "run", "adapt", before).log(step=1)
    for config in (Packed(), Packed(data={"max_length": 64, "packing": "on"})):
        assert RunDir.create(tmp_path / "run", "adapt", config).metrics() == [{"step": 1}]
    with pytest.raises(ConfigError, match=r"data\.max_length: was 64, is now 65"):
        RunDir.create(tmp_path / "run", "adapt", Packed(data={"max_length": 65, "packing": "on"}))


def test_a_run_of_other_inputs_is_refused_and_each_is_named(tmp_path):
    out = tmp_path / "run"
    assert not RunDir.create(out, "select", Config(), inputs=GIVEN).held
    assert RunDir.create(out, "select", Config(), inputs=GIVEN).held
    before = {path: path.read_bytes() for path in out.iterdir()}
    others = {"ntkjax": {"version": "1.0.1"}, "pool": {"a.jsonl": "0" * 15 + "1", "c.jsonl": "1" * 16}}
    for refuse in (RunDir.check, RunDir.create):
        with pytest.raises(ConfigError) as caught:
            refuse(out, "select", Config(), inputs=others)
        lines = str(caught.value).splitlines()
        assert lines[0].startswith(f"{out}: holds results of other inputs")
        assert lines[1:-1] == [
            "  ntkjax: version was 1.0.0, is now 1.0.1",
            "  pool: a.jsonl was 00000000, is now 00000000",  # the digits that differ are further on
            "  pool: c.jsonl was absent, is now 11111111",
            "  pool: b.jsonl was 11111111, is now absent",
        ]
        assert "--out" in lines[-1] and f"remove {out}" in lines[-1]
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_inputs_are_on_disk_before_anything_else_and_cannot_be_lost(tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "write_text", write_one(RunDir.write_text))
        with pytest.raises(KeyboardInterrupt):
            RunDir.create(out, "select", Config(), inputs=GIVEN)
    assert [path.name for path in out.iterdir()] == ["inputs.json"]
    RunDir.create(out, "select", Config(), inputs=GIVEN)
    for content in ("{", "[1]", '{"pool": 3}'):
        (out / "inputs.json").write_text(content)
        with pytest.raises(ConfigError, match=r"inputs\.json: not the inputs of a run .* remove"):
            RunDir.create(out, "select", Config(), inputs=GIVEN)
    (out / "inputs.json").unlink()
    with pytest.raises(ConfigError, match=r"holds a run without inputs\.json.* remove"):
        RunDir.create(out, "select", Config(), inputs=GIVEN)


def write_one(write):
    """``write`` for the first time it is called; the second is interrupted."""
    calls = []

    def call(self, name, text):
        if calls:
            raise KeyboardInterrupt
        calls.append(name)
        return write(self, name, text)

    return call


def test_metrics_are_flushed_line_by_line_and_a_cut_line_is_dropped(tmp_path):
    run = RunDir.create(tmp_path / "run", "adapt", Config())
    assert run.metrics() == []
    run.log(step=1, loss=np.float32(0.5), rate=jnp.float32(0.25))
    file = tmp_path / "run" / "metrics.jsonl"
    assert json.loads(file.read_text()) == {"step": 1, "loss": 0.5, "rate": 0.25}
    with file.open("a") as out:
        out.write('{"step": 2, "lo')
    run.log(step=2, loss=float("nan"))
    assert run.metrics() == [{"step": 1, "loss": 0.5, "rate": 0.25}, {"step": 2, "loss": "NaN"}]


def test_plain_keeps_numbers_that_json_cannot_hold():
    value = plain({"a": [np.nan, np.inf, -np.inf], 3: (Path("x"), np.arange(2)), "c": Train(), "n": None})
    assert value == {
        "a": ["NaN", "Infinity", "-Infinity"],
        "3": ["x", [0, 1]],
        "c": {"lr": 0.001, "seed": 5},
        "n": None,
    }
    assert json.loads(json.dumps(value, allow_nan=False)) == value
    assert np.isnan(float(value["a"][0])) and float(value["a"][2]) == -np.inf


def test_files_are_written_whole(tmp_path):
    run = RunDir.create(tmp_path / "run", "adapt", Config())
    assert json.loads(run.write_json("sub/a.json", {"x": np.arange(2)}).read_text()) == {"x": [0, 1]}
    assert run.write_text("b.md", "ü").read_text(encoding="utf-8") == "ü"
    with pytest.raises(TypeError):
        run.write_json("sub/a.json", {"x": object()})
    assert json.loads((tmp_path / "run" / "sub" / "a.json").read_text()) == {"x": [0, 1]}
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_names_the_file_and_keeps_what_was_there(tmp_path, full_disk):
    run = RunDir.create(tmp_path / "run", "adapt", Config())
    run.write_json("a.json", 1)
    with full_disk(), pytest.raises(UserError, match=r"a\.json: cannot be written \(No space left on device\)"):
        run.write_json("a.json", 2)
    assert json.loads((tmp_path / "run" / "a.json").read_text()) == 1
    # The file system itself answers "no space left" to whatever is written here.
    (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written"):
        run.log(step=1)


def test_places_that_cannot_hold_a_run_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        RunDir.create(tmp_path / "file", "adapt", Config())
    with pytest.raises(UserError, match="cannot write the run directory"):
        RunDir.create(tmp_path / "file" / "run", "adapt", Config())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission_is_refused(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UserError, match="Permission denied"):
        RunDir.create(tmp_path / "locked" / "run", "adapt", Config())


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        ("command: adapt\nconfig: [1\nx: {", UserError, r"config\.yaml:3: not valid YAML"),
        ("a: b: c", UserError, r"config\.yaml:1: not valid YAML: mapping values are not allowed"),
        ("", ConfigError, "expected the keys command and config, got None"),
        ("command: adapt", ConfigError, "key config: expected a mapping, got None"),
        ("config: {}", ConfigError, "key command: expected a string, got None"),
        (
            "command: adapt\nconfig: !!python/object:os.system {}",
            UserError,
            r"config\.yaml:2: not valid YAML",
        ),
    ],
)
def test_a_damaged_config_is_named_with_its_line(tmp_path, content, kind, message):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(kind, match=message):
        load_run(tmp_path)
    with pytest.raises(kind, match=message):
        RunDir.create(tmp_path, "adapt", Config())


def test_a_run_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"config\.yaml: not found"):
        load_run(tmp_path)
    with pytest.raises(UserError, match="nowhere: not found"):
        load_run(tmp_path / "nowhere")
    (tmp_path / "config.yaml").write_bytes(b"\xff")
    with pytest.raises(UserError, match="cannot be read"):
        load_run(tmp_path)


def test_the_config_on_disk_is_plain_yaml(tmp_path):
    RunDir.create(tmp_path / "run", "adapt", Config())
    content = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert list(content) == ["ntkjax", "command", "config"]
    assert content["config"]["train"] == {"lr": 0.001, "seed": 5}
