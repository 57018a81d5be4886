"""`select` killed at random moments ends bit for bit like one that was not; a changed input is refused by name."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import ntkjax.pipeline.select as selecting
from ntkjax.cli import main
from ntkjax.models import LoraConfig, adapter_lora_config, load_adapter, load_lm, save_adapter, save_merged
from ntkjax.store import RowStore

FLAGS = ["--n", "5", "--lora-rank", "2", "--token-budget", "256", "--warmup.batch-size", "4"]
FLAGS += ["--warmup.learning-rate", "1e-3", "--warmup.save-every", "1"]


def rows_of(folder: Path) -> dict[str, bytes]:
    """The bytes of every row of every store, read through the store itself."""
    found = {}
    for path in sorted((folder / "rows").iterdir()):
        held = json.loads((path / "manifest.json").read_text())
        with RowStore.open(path, **held["shape"], manifest=held["manifest"]) as store:
            done = np.flatnonzero(store.done())
            found[path.name] = done.tobytes() + store.read(done).tobytes()
    return found


FILES = ("selection.json", "selected.jsonl", "scores.parquet", "adapter/adapter_model.safetensors")


def check_same(killed: Path, whole: Path) -> None:
    assert rows_of(killed) == rows_of(whole)
    for name in FILES:
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name


def run_until(jobs, root: Path, flags: list[str], moment: random.Random) -> tuple[bool, bool]:
    """Start it and kill it at a random moment; (was it cut short, had it begun to write rows)."""
    process = jobs.start(root, *flags)
    assert process.stdout.readline() == "ready\n"
    if moment.random() < 0.5:  # any time, loading and warming up included
        timer = threading.Timer(moment.uniform(0, 6), process.kill)
        timer.start()
        lines = process.stdout.readlines()
        timer.cancel()
    else:  # while rows are being written
        lines = [process.stdout.readline() for _ in range(moment.randint(1, 4))]
        threading.Event().wait(moment.uniform(0, 0.1))
        process.kill()
        lines += process.stdout.readlines()
    return process.wait() != 0, any(line.startswith("rows") for line in lines)


def check_kills(jobs, files, root: Path, kills: int, seed: int, *more: str) -> None:
    flags = [*files.flags("model", "domain", "pool"), *FLAGS, *more, "--out"]
    jobs.finish(jobs.start(root, *flags, str(root / "whole")))
    moment, cut, writing, killed = random.Random(seed), 0, 0, root / "killed"
    while cut < kills:
        short, wrote = run_until(jobs, root, [*flags, str(killed)], moment)
        cut, writing = cut + short, writing + (short and wrote)
        if not short:  # it reached its end before its kill: look, and begin another one
            check_same(killed, root / "whole")
            shutil.rmtree(killed)
    assert writing, "no kill fell between rows: the test has tested nothing"
    jobs.finish(jobs.start(root, *flags, str(killed)))
    check_same(killed, root / "whole")


# The scoring pass alone, on a function that compiles at once: quick enough for every run of the tests.
SCORING = """
import sys, time
import jax, numpy as np
import ntkjax.store as store
from ntkjax.data.batches import TokenisedDataset
from ntkjax.ntk import Pass, kernel_scores
store._FLUSH_SECONDS = 0.0
rng = np.random.default_rng(0)
pool = TokenisedDataset.from_sequences([rng.integers(1, 50, n).tolist() for n in rng.integers(5, 20, 60)], [2] * 60)
params = {"table": jax.numpy.asarray(rng.normal(size=(50, 8)).astype("f4"))}
output = lambda p, batch: jax.numpy.tanh(p["table"][batch.tokens]).sum((1, 2)) ** 2
print("ready", flush=True)
with store.RowStore.open(sys.argv[1], rows=60, width=2, dtype="float32", manifest={"kernel": "table"}) as rows:
    write = rows.write
    def told(index, values):
        write(index, values)
        print("rows", *index.tolist(), flush=True)
        time.sleep(0.05)
    rows.write = told
    plan = pool.batches(token_budget=40, max_buckets=2)
    found = kernel_scores(output, params, plan, plan, rows=Pass(60, rows), references=[plan])
    np.save(sys.argv[1] + ".npy", np.asarray(found.scores))
"""


def score(jobs, root: Path, name: str, kill_after: int | None) -> list[str]:
    """Run the scoring pass into ``name``, killed after so many batches; the lines it printed."""
    command = [sys.executable, "-c", SCORING, str(root / name)]
    process = subprocess.Popen(command, env=jobs.environment(root), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(0 if kill_after is None else kill_after + 1)]
    if kill_after is not None:
        process.kill()
    lines += process.stdout.readlines()
    assert process.wait() == (0 if kill_after is None else -signal.SIGKILL), lines
    return lines


def test_a_scoring_pass_killed_twice_ends_the_same(jobs, tmp_path):
    whole = score(jobs, tmp_path, "whole", None)
    assert len(whole) > 10
    parts = [score(jobs, tmp_path, "killed", after) for after in (3, 2, None)]
    assert len(whole) <= sum(map(len, parts)) - 2 < len(whole) + 3  # at most a batch a kill is done again
    assert (tmp_path / "killed.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
    options = {"rows": 60, "width": 2, "dtype": "float32", "manifest": {"kernel": "table"}}
    with RowStore.open(tmp_path / "whole", **options) as a, RowStore.open(tmp_path / "killed", **options) as b:
        assert a.read().tobytes() == b.read().tobytes()


@pytest.mark.slow
def test_killed_twenty_times_it_ends_the_same(jobs, files, tmp_path):
    check_kills(jobs, files, tmp_path, 20, seed=0)


@pytest.mark.slow
def test_a_method_on_gradients_killed_eight_times_ends_the_same(jobs, files, tmp_path):
    flags = ("--method", "less", "--sketch-size", "64", "--warmup.epochs", "2")
    check_kills(jobs, files, tmp_path, 8, 1, *flags)
    stores = {path.name.rpartition("-")[0] or path.name for path in (tmp_path / "whole" / "rows").iterdir()}
    assert stores == {"embeddings", "gradients", "domain-gradients"}


# -- what has changed is named --


def change_model(root: Path) -> None:
    model = load_lm(root / "model", lora=None)
    layer = model.params["layers"]["mlp"]["up"]
    layer["kernel"] = layer["kernel"].at[1, 3, 5].add(1e-3)  # one weight of all
    save_merged(root / "model", model, {})


def change_adapter(root: Path) -> None:
    model = load_lm(root / "model", lora=adapter_lora_config(root / "adapter"))
    adapter = load_adapter(root / "adapter", model)
    layer = adapter["layers"]["mlp"]["up"]
    layer["lora_b"] = layer["lora_b"].at[0, 0, 0].add(1e-3)
    save_adapter(root / "adapter", model, adapter)


def change_line(name: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        text = (root / name).read_text()
        (root / name).write_text(text.replace("Colour", "Color", 1))

    return change


def forget(out: Path) -> None:
    """Remove what says which command and inputs the directory is of."""
    for name in ("config.yaml", "inputs.json"):
        (out / name).unlink()


CHANGES = {
    "model": change_model,
    "adapter": change_adapter,
    "domain": change_line("domain.jsonl"),
    "pool": change_line("pool.jsonl"),
    "kernel": lambda root: None,
    "ntkjax": lambda root: None,
}


def test_a_changed_input_is_refused_by_name_and_goes_on_when_put_back(files, tmp_path, monkeypatch, capsys):
    root, out = tmp_path / "in", tmp_path / "run"
    root.mkdir()
    shutil.copytree(files.model, root / "model")
    shutil.copy(files.domain, root / "domain.jsonl")
    shutil.copy(files.pool, root / "pool.jsonl")
    model = load_lm(files.model, seed=5, lora=LoraConfig(rank=2))
    save_adapter(root / "adapter", model, model.lora)
    names = {"model": "model", "adapter": "adapter", "domain": "domain.jsonl", "pool": "pool.jsonl"}
    command = ["select", *(f"--{flag}={root / name}" for flag, name in names.items()), "--n", "5", "--skip-warmup"]
    command += ["--stage1", "off", "--token-budget", "1024", "--out", str(out)]
    with monkeypatch.context() as patch:  # stopped when its rows are on disk
        patch.setattr(selecting, "write_selection", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(command) == 130
    before, inputs = rows_of(out), tmp_path / "kept"
    shutil.copytree(root, inputs)
    assert main([*command, "--kernel", "loss"]) == 2
    assert 'select.kernel: was "sum_logits", is now "loss"' in capsys.readouterr().err
    forget(out)  # from here on only the stores can object
    for changed, change in CHANGES.items():
        change(root)
        with monkeypatch.context() as patch:
            if changed == "ntkjax":
                patch.setattr(selecting, "package_version", lambda: "99.0")
            assert main([*command, *(["--kernel", "loss"] if changed == "kernel" else [])]) == 2
        said = capsys.readouterr().err
        assert f"manifest.{changed}: was" in said and "holds rows computed with other settings" in said
        assert said.count(": was") == 1, said
        assert rows_of(out) == before
        shutil.rmtree(root)
        shutil.copytree(inputs, root)
        forget(out)
    assert main(command) == 0
    assert rows_of(out) == before
