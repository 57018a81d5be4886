"""Bad input from the command line: exit code 2, a message that names the culprit and the remedy, never a traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

from ntkjax.cli import main

GOOD = '{"id": "a", "prompt": "p", "response": "r"}\n'


def records(text: str, name: str = "bad.jsonl") -> Callable[[Path, object], list[str]]:
    def flags(tmp: Path, files) -> list[str]:
        (tmp / name).write_bytes(text.encode("utf-8", "surrogateescape"))
        return ["--pool", str(tmp / name)]

    return flags


def model(change: Callable[[Path], None]) -> Callable[[Path, object], list[str]]:
    def flags(tmp: Path, files) -> list[str]:
        folder = tmp / "model"
        shutil.copytree(files.model, folder)
        change(folder)
        return ["--model", str(folder)]

    return flags


def config(**values) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, **values}))

    return change


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def flags(*words: str) -> Callable[[Path, object], list[str]]:
    return lambda tmp, files: list(words)


CASES = {
    "malformed line": (records(GOOD + "{oops\n"), ["bad.jsonl:2", "not valid JSON"]),
    "not an object": (records("[1, 2]\n"), ["bad.jsonl:1"]),
    "missing field": (records('{"question": "p", "reply": "r"}\n'), ["bad.jsonl:1", "prompt"]),
    "empty response": (records('{"prompt": "p", "response": "  "}\n'), ["bad.jsonl:1", "response"]),
    "wrong type": (records('{"prompt": "p", "response": 3}\n'), ["bad.jsonl:1", "response"]),
    "duplicate id": (records(GOOD + GOOD), ["bad.jsonl:2", "bad.jsonl:1", "'a'"]),
    "not UTF-8": (records('{"prompt": "\udcff", "response": "r"}\n'), ["bad.jsonl:1", "UTF-8"]),
    "answer not among the choices": (
        records('{"prompt": "p", "response": "r", "answer": "x", "choices": ["y", "z"]}\n'),
        ["bad.jsonl:1", "x"],
    ),
    "empty file": (records(""), ["bad.jsonl", "empty"]),
    "unknown extension": (records(GOOD, "bad.txt"), ["bad.txt", ".jsonl"]),
    "broken parquet": (records("PAR1", "bad.parquet"), ["bad.parquet"]),
    "missing file": (flags("--pool", "nowhere.jsonl"), ["nowhere.jsonl", "no such file"]),
    "missing model": (flags("--model", "nowhere"), ["nowhere"]),
    "no config": (model(lambda f: (f / "config.json").unlink()), ["config.json"]),
    "config is not JSON": (model(lambda f: (f / "config.json").write_text("{")), ["config.json"]),
    "unknown architecture": (model(config(architectures=["MambaForCausalLM"], model_type="mamba")), ["amba", "Llama"]),
    "unknown rope type": (
        model(config(rope_scaling={"rope_type": "spiral", "factor": 2.0}, rope_parameters={"rope_type": "spiral"})),
        ["spiral", "llama3"],
    ),
    "unknown activation": (model(config(hidden_act="sine")), ["sine", "silu"]),
    "misshapen tensor": (model(config(intermediate_size=32)), ["model.layers.0.mlp", "shape"]),
    "missing tensor": (model(config(num_hidden_layers=3)), ["model.layers.2"]),
    "unused tensor": (model(config(num_hidden_layers=1)), ["model.layers.1"]),
    "pickle only": (model(only_pickle), ["pytorch_model.bin", "save_pretrained"]),
    "truncated weights": (model(truncated), ["model.safetensors"]),
    "no tokenizer": (model(lambda f: [p.unlink() for p in f.glob("tokenizer*")]), ["tokenizer"]),
    "more than the pool holds": (flags("--n", "41"), ["41", "40"]),
    "n of zero": (flags("--n", "0"), ["n must be at least 1"]),
    "LoRA target that matches nothing": (flags("--lora-targets", "wheel"), ["wheel", "attention/q"]),
    "negative learning rate": (flags("--warmup.learning-rate", "-1"), ["learning_rate", "-1"]),
    "batch size of zero": (flags("--warmup.batch-size", "0"), ["batch_size"]),
    "missing adapter": (flags("--adapter", "nowhere"), ["nowhere"]),
    "unknown method": (flags("--method", "oracle"), ["oracle", "random"]),
    "unknown kernel": (flags("--kernel", "gaussian"), ["kernel"]),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_named_and_exits_with_2(name, files, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, expected = CASES[name]
    bad = make(tmp_path, files)
    given = {"--model": files.model, "--domain": files.domain, "--pool": files.pool, "--n": "5", "--out": "run"}
    given |= dict(zip(bad[::2], bad[1::2]))
    try:
        code = main(["select", *[word for pair in given.items() for word in pair]])
    except SystemExit as stop:  # the flag parser's own way
        code = stop.code
    captured = capsys.readouterr()
    message = captured.err + captured.out
    assert code == 2
    assert "Traceback" not in message
    assert not Path("run").exists()  # so that the mended command can use the same --out
    for word in expected:
        assert word in message


def test_out_that_is_a_file_or_another_run(files, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    common = ["evaluate", *files.flags("model", "test")]
    assert main([*common, "--out", str(tmp_path / "file")]) == 2
    assert "is a file" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("command: select\nconfig: {n: 3}\n")
    assert main([*common, "--out", str(tmp_path / "run")]) == 2
    assert "select" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("command: [\n", "config.yaml:"),
        ("command: dance\nconfig: {}\n", "dance"),
        ("command: demo\nconfig: {colour: red}\n", "colour"),
        ("command: demo\nconfig: {seeds: many}\n", "seeds"),
    ],
)
def test_replay_of_a_damaged_config(text, expected, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(text)
    assert main(["replay", str(tmp_path)]) == 2
    assert expected in capsys.readouterr().err


def test_skip_counts_and_lists_what_it_skipped(files, tmp_path):
    pool = tmp_path / "pool.jsonl"
    pool.write_text(Path(files.pool).read_text() + "{oops\n" + '{"prompt": "p", "response": ""}\n')
    given = [*files.flags("model", "domain"), "--pool", str(pool), "--n", "3", "--out", str(tmp_path / "run")]
    quick = ["--lora-rank", "2", "--skip-warmup", "--stage1", "off", "--token-budget", "1024"]
    assert main(["select", *given, *quick, "--on-bad-record", "skip"]) == 0
    report = json.loads((tmp_path / "run" / "data.json").read_text())["pool"]["records"]
    assert report["skipped"] == 2 and report["records"] == 40
    assert [line.split(": ")[0] for line in report["skipped_lines"]] == [f"{pool}:41", f"{pool}:42"]


def test_the_installed_command_prints_one_line_and_exits_with_2(files, tmp_path):
    words = ["select", *files.flags("domain", "pool"), "--model", "nowhere", "--n", "3", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-m", "ntkjax", *words], capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("ntkjax: error: 'nowhere'")]


def test_a_device_out_of_memory_says_what_to_lower(monkeypatch, capsys):
    def start():
        raise jax.errors.JaxRuntimeError(said)

    monkeypatch.setattr("ntkjax.job.start", start)
    words = ["show", "--model", "m", "--data", "d"]
    said = "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."
    assert main(words) == 2
    found = capsys.readouterr().err
    assert "lower --token-budget" in found and "allocating 9 bytes" in found
    said = "INTERNAL: another failure of the runtime, which is none of the user's"
    with pytest.raises(jax.errors.JaxRuntimeError):
        main(words)
