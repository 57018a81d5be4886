"""A directory never holds the results of other data: every command that finds results in --out, against every input
that can change under the same command line."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import get_type_hints

import pytest

import ntkjax.data.cache as cache
import ntkjax.pipeline.inputs as inputs
from ntkjax.cli import main
from ntkjax.commands import COMMANDS, load_command
from ntkjax.commands.study.command import grid_of
from ntkjax.commands.study.spec import spec_of
from ntkjax.models import LoraConfig, adapter_lora_config, load_adapter, load_lm, save_adapter, save_merged
from ntkjax.pipeline.run_dir import RunDir

FILES = {
    "select": ("domain", "pool", "test"),
    "finetune": ("domain", "auxiliary", "dev"),
    "evaluate": ("test",),
    "adapt": ("domain", "pool", "test", "dev"),
    "verify": ("data", "domain"),
    "stability": ("data", "test", "pool"),
    "validate": ("domain", "pool", "test"),
    "doctor": ("data",),
}
"""The data of every command that refuses other inputs, by flag."""
ELSEWHERE = {
    "explain": "the inputs of the run that it explains, in tests/commands/test_explaining.py",
    "study": "folders named from the inputs",
    "demo": "its own data, given to adapt and select",
    "import-gguf": "a directory that must not be there",
}
TRAIN = ["--train.epochs", "1", "--train.batch-size", "4", "--train.max-buckets", "1"]
WARM = ["--warmup.epochs", "1", "--warmup.batch-size", "4", "--warmup.max-buckets", "1"]
FLAGS = {
    "select": ["--n", "5", "--skip-warmup", "--method", "length"],
    "finetune": TRAIN,
    "evaluate": [],
    "adapt": ["--n", "5", "--seeds", "1", "--stage1", "off", *TRAIN, *WARM],
    "verify": ["--n", "8", "--n-domain", "2", "--n-full", "0", "--m", "2", "--seeds", "1", "--full-seeds", "1",
               "--bootstrap", "10", "--cross-examples", "0", "--sketch-size", "8", "--max-signs", "1", "--skip-warmup"],
    "stability": ["--n", "4", "--probe", "3", "--test-n", "4", "--pool-n", "4", "--ranks", "2", "--kernels",
                  "sum_logits", "--full-learning-rates", "--formulas", "--at", "1", "--seeds", "1", *TRAIN],
    "validate": ["--subsets", "4", "--reseeds", "0", "--leave-in", "0", "--methods", "length", "--bootstrap", "10",
                 *TRAIN],
    "doctor": ["--n", "2", "--dtypes", "float32"],
}  # fmt: skip
RESULT = {"select": "selection.json", "finetune": "finetune.json", "evaluate": "evaluation.json"}
"""What a finished run has; results.json for the others."""
FRESH = ("stability", "doctor")
"""They make LoRA factors of their own, and have no flag for an adapter."""


@dataclasses.dataclass(frozen=True)
class Bed:
    """Copies of all inputs under ``root``, which a test may change; ``put_back`` restores them."""

    root: Path
    kept: Path

    def put_back(self) -> None:
        shutil.rmtree(self.root)
        shutil.copytree(self.kept, self.root)

    def file(self, flag: str) -> Path:
        return self.root / f"{flag}.jsonl"

    def argv(self, command: str, out: Path, *more: str) -> list[str]:
        given = [f"--{flag}={self.file(flag)}" for flag in FILES[command]]
        if command not in FRESH:
            given.append(f"--adapter={self.root / 'adapter'}")
        return [command, f"--model={self.root / 'model'}", *given, f"--out={out}", *FLAGS[command], *more]


@pytest.fixture(scope="module")
def bed(files, tmp_path_factory) -> Bed:
    folder = tmp_path_factory.mktemp("other-data")
    root = folder / "inputs"
    root.mkdir()
    shutil.copytree(files.model, root / "model")
    for name in ("domain", "pool", "test", "dev"):
        shutil.copy(getattr(files, name), root / f"{name}.jsonl")
    for name, like in (("data", "domain"), ("auxiliary", "pool")):
        shutil.copy(getattr(files, like), root / f"{name}.jsonl")
    model = load_lm(files.model, seed=5, lora=LoraConfig(rank=2))
    save_adapter(root / "adapter", model, model.lora)
    shutil.copytree(root, folder / "kept")
    return Bed(root, folder / "kept")


def in_place(path: Path, old: str, new: str) -> None:
    """Other content of the same length, at the same time of modification."""
    before, text = path.stat(), path.read_text()
    assert old in text and len(old) == len(new)
    with path.open("r+") as file:
        file.write(text.replace(old, new, 1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size and path.stat().st_mtime_ns == before.st_mtime_ns


def change_weight(bed: Bed) -> None:
    """The last entry of the embedding."""
    model = load_lm(bed.root / "model", lora=None)
    weight = model.params["embed"]["weight"]
    save_merged(bed.root / "model", model, {"embed": {"weight": weight.at[-1, -1].add(1e-3)}})


def change_configuration(bed: Bed) -> None:
    """How positions are encoded: the same weights are another function."""
    path = bed.root / "model" / "config.json"
    content = json.loads(path.read_text())
    content["rope_theta"] = 5000.0
    if "rope_parameters" in content:
        content["rope_parameters"] = content["rope_parameters"] | {"rope_theta": 5000.0}
    path.write_text(json.dumps(content))


def change_template(bed: Bed) -> None:
    path = bed.root / "model" / "chat_template.jinja"
    if path.exists():
        in_place(path, "|>\n{{ m", "|> {{ m")
    else:
        in_place(path.with_name("tokenizer_config.json"), "|>\\n{{ m", "|>  {{ m")


def change_factor(bed: Bed) -> None:
    model = load_lm(bed.root / "model", lora=adapter_lora_config(bed.root / "adapter"))
    adapter = load_adapter(bed.root / "adapter", model)
    layer = adapter["layers"]["mlp"]["up"]
    layer["lora_b"] = layer["lora_b"].at[0, 0, 0].add(1e-3)
    save_adapter(bed.root / "adapter", model, adapter)


def change_alpha(bed: Bed) -> None:
    path = bed.root / "adapter" / "adapter_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"lora_alpha": 2 * content["lora_alpha"]}))


def change_data(flag: str) -> Callable[[Bed], None]:
    return lambda bed: in_place(bed.file(flag), "Colour", "Colors")


@dataclasses.dataclass(frozen=True)
class Change:
    """``make`` it; then the refusal has ``line``, with ROOT for the folder of the inputs."""

    make: Callable[[Bed], None]
    line: str
    flags: tuple[str, ...] = ()


OF_THE_MODEL = {
    "weights": Change(change_weight, "model: weights of ROOT/model was "),
    "configuration": Change(change_configuration, "model: configuration of ROOT/model was "),
    "template": Change(change_template, "model: tokenizer of ROOT/model was "),
    "adapter": Change(change_factor, "adapter: weights of ROOT/adapter was "),
    "alpha": Change(change_alpha, "adapter: configuration of ROOT/adapter was "),
    "option": Change(lambda bed: None, "max_length: was 2048, is now 64", ("--max-length", "64")),
    "version": Change(lambda bed: None, "ntkjax: version was "),
}


def changes_of(command: str) -> dict[str, Change]:
    data = {flag: Change(change_data(flag), f"{flag}: ROOT/{flag}.jsonl was ") for flag in FILES[command]}
    left_out = ("adapter", "alpha") if command in FRESH else ()
    return {**data, **{name: change for name, change in OF_THE_MODEL.items() if name not in left_out}}


ALL = [(command, name) for command in FILES for name in changes_of(command)]


def content_of(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def check_refused(command: str, name: str, bed: Bed, out: Path, capsys) -> None:
    """Changed, the command is refused, what changed is named and nothing else, and nothing in OUT is touched."""
    change, before = changes_of(command)[name], content_of(out)
    capsys.readouterr()
    try:
        with pytest.MonkeyPatch.context() as patch:
            if name == "version":
                patch.setattr(inputs, "package_version", lambda: "99.0")
            change.make(bed)
            assert main(bed.argv(command, out, *change.flags)) == 2
    finally:
        bed.put_back()
    said = capsys.readouterr()
    assert said.out == ""
    assert change.line.replace("ROOT", str(bed.root)) in said.err
    assert said.err.count(" was ") == said.err.count(", is now ") == 1, said.err
    assert f"remove {out}" in said.err and "--out" in said.err
    assert content_of(out) == before


# -- runs that were stopped at their beginning: quick, as nothing is computed --


@pytest.fixture(scope="module")
def begun(bed, tmp_path_factory) -> dict[str, Path]:
    """For each command a run directory whose run was stopped before its first result."""
    root, create = tmp_path_factory.mktemp("begun"), RunDir.create

    def create_alone(*args, **options):
        create(*args, **options)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDir, "create", create_alone)
        for command in FILES:
            assert main(bed.argv(command, root / command)) == 130
    return {command: root / command for command in FILES}


@pytest.mark.parametrize(("command", "name"), ALL)
def test_other_inputs_are_refused_by_name(command, name, bed, begun, capsys):
    check_refused(command, name, bed, begun[command], capsys)


def test_every_command_and_every_file_it_reads_is_looked_at(begun):
    """A new command, or a new flag for files, has to be added to the table above."""
    with_out = {name for name in COMMANDS if "out" in get_type_hints(load_command(name).config)}
    assert with_out - {"replay"} == FILES.keys() | ELSEWHERE.keys()
    no_files = {"arms", "methods", "kernels", "formulas", "lora_targets"}
    for command, flags in FILES.items():
        hints = get_type_hints(load_command(command).config)
        assert {name for name, hint in hints.items() if hint == tuple[str, ...]} - no_files == set(flags), command
        own = {"ntkjax", "model"} | ({"adapter"} if command not in FRESH else set())
        assert json.loads((begun[command] / "inputs.json").read_text()).keys() == {*own, *flags}, command


# -- finished runs --


def test_a_finished_selection_is_read_back_for_the_same_inputs_alone(bed, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(bed.argv("select", out)) == 0
    capsys.readouterr()
    before = content_of(out)
    assert main(bed.argv("select", out)) == 0
    assert "what is finished is read back" in capsys.readouterr().err
    assert content_of(out) == before
    check_refused("select", "pool", bed, out, capsys)
    (out / "inputs.json").unlink()  # as an earlier version left it
    assert main(bed.argv("select", out)) == 2
    assert "without inputs.json" in capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(bed, tmp_path_factory) -> Callable[[str], Path]:
    """The directory of a command's finished run, made when first asked for."""
    root = tmp_path_factory.mktemp("finished")

    def of(command: str) -> Path:
        if not (root / command).exists():
            assert main(bed.argv(command, root / command)) == 0
        return root / command

    return of


@pytest.mark.slow
@pytest.mark.parametrize(("command", "name"), ALL)
def test_a_finished_run_keeps_its_results(command, name, bed, finished, capsys):
    out = finished(command)
    assert (out / RESULT.get(command, "results.json")).exists()
    check_refused(command, name, bed, out, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("command", FILES)
def test_a_finished_run_is_read_back(command, bed, finished, capsys):
    out = finished(command)
    capsys.readouterr()
    assert main(bed.argv(command, out)) == 0
    assert "what is finished is read back" in capsys.readouterr().err


def test_a_replay_goes_to_a_directory_of_the_same_inputs(bed, begun, tmp_path, capsys):
    out = tmp_path / "replayed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDir, "tell", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(["replay", str(begun["evaluate"]), "--out", str(out)]) == 130
    try:
        change_data("test")(bed)
        assert main(["replay", str(begun["evaluate"]), "--out", str(out)]) == 2
    finally:
        bed.put_back()
    assert f"test: {bed.file('test')} was " in capsys.readouterr().err


# -- a study: other inputs lie in other folders --


TRUTH = "truth"


@pytest.fixture(scope="module")
def study_keys(bed, study, files, tmp_path_factory) -> Callable[..., tuple[str, str]]:
    """The names of the folders of one run and its selection."""
    out = tmp_path_factory.mktemp("study-keys")

    def keys(**more) -> tuple[str, str]:
        root = bed.root
        (root / "truth.json").write_text(json.dumps({"useful_ids": ["cube-1", "cube-2"]}))
        if more.pop(TRUTH, False):
            (root / "truth.json").write_text(json.dumps({"useful_ids": ["cube-1", "cube-3"]}))
        domain = {"train": str(root / "domain.jsonl"), "truth": str(root / "truth.json")}
        domain |= {name: str(root / f"{name}.jsonl") for name in ("dev", "test")}
        model = {"model": str(root / "model"), "adapter": str(root / "adapter")}
        settings = {"model": model, "pool": str(root / "pool.jsonl"), "domains": {"ball": domain}}
        grid = grid_of(spec_of(study.content(files, **(settings | more))), out, "study")
        task = next(task for task in grid.tasks() if task.arm.label == "alignment")
        run, selection = grid.run_key(task, 0.1), grid.selection_key(task)
        return grid.folder("runs", run).name, grid.folder("selections", selection or {}).name

    return keys


STUDY = {
    **{name: Change(change_data(name), "") for name in ("domain", "pool", "dev", "test")},
    **{name: OF_THE_MODEL[name] for name in ("weights", "configuration", "template", "adapter", "alpha")},
    TRUTH: Change(lambda bed: None, ""),
}
TRAINING_ONLY = ("dev", "test", TRUTH)


def test_other_inputs_of_a_study_are_other_runs(bed, study_keys):
    first = study_keys()
    assert study_keys() == first
    for name, change in STUDY.items():
        try:
            change.make(bed)
            run, selection = study_keys(**({TRUTH: True} if name == TRUTH else {}))
        finally:
            bed.put_back()
        assert run != first[0], name
        assert (selection == first[1]) == (name in TRAINING_ONLY), name
    assert study_keys() == first


# -- files too large to be read for it --


@pytest.mark.parametrize("replaced", [False, True])
def test_a_large_file_of_the_same_size_and_time_is_another(replaced, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "HASHED_FILE_BYTES", 0)
    path = tmp_path / "pool.jsonl"
    path.write_text("Colour" * 100)
    before = cache.file_signature(path)
    assert cache.file_signature(path) == before
    if replaced:
        other = tmp_path / "other"
        other.write_text("Colors" * 100)
        os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
        other.replace(path)
    else:
        in_place(path, "Colour", "Colors")
    assert cache.file_signature(path) != before
