"""The accelerator benchmark on a tiny shape: it runs, its table holds every pass, and it needs no more than it says."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ntkjax.selection.options import SketchOptions

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "bench_gpu.py"

# A bare machine: everything else that the package uses is not there.
BARE = """
import runpy, sys
absent = {"transformers", "tokenizers", "datasets", "pyarrow", "tyro", "tensorstore", "beartype", "huggingface_hub"}
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in absent:
            raise ModuleNotFoundError(f"a bare machine has no {name}", name=name)
sys.meta_path.insert(0, Absent())
runpy.run_path(sys.argv[1], run_name="imported")
print("imported")
"""


@pytest.fixture(scope="module")
def bench(load_file):
    return load_file(SCRIPT)


def test_it_imports_on_a_bare_machine(tmp_path):
    found = subprocess.run(
        [sys.executable, "-I", "-c", BARE, str(SCRIPT)], cwd=tmp_path, capture_output=True, text=True
    )
    assert found.stdout == "imported\n", found.stderr


def run(bench, tmp_path: Path, monkeypatch, *flags: str) -> dict:
    words = ["bench_gpu.py", "--tiny", "--lengths", "16", "--rounds", "1", "--out", str(tmp_path / "b.json"), *flags]
    monkeypatch.setattr(sys, "argv", words)
    bench.main(bench.parse())
    return json.loads((tmp_path / "b.json").read_text())


def check_rows(result: dict, printed: str) -> None:
    for row in result["rows"]:
        assert row["tokens_per_second"] > 0 and row["weight_bytes"] > 0 and row["of_peak"] is None
        assert (
            row["first_call"] > 0
            and (row["compile_seconds"] or 1) > 0
            and row["least"] <= row["seconds"] <= row["most"]
        )
        head = f"| tiny | 16 | {row['layout']} | {row['pass']} | xla | 8 |"
        assert f"{head} {row['tokens_per_second']:,.0f} |" in printed
    assert all(row["seconds"] > 0 for row in result["attention"]) and len(result["attention"]) == 4
    assert "not in the table" in printed and "31 A100-hours" in printed


def test_it_prints_and_writes_what_it_measured(bench, tmp_path, capsys, monkeypatch):
    result = run(bench, tmp_path, monkeypatch, "--passes", "score", "--order", "0")
    check_rows(result, capsys.readouterr().out)
    assert [(row["pass"], row["layout"]) for row in result["rows"]] == [("score", "full"), ("score", "packed")]
    assert [row["way"] for row in result["plan"]] == ["score every example, exact"]


@pytest.mark.slow
def test_every_pass_and_the_order_of_the_scores(bench, tmp_path, capsys, monkeypatch):
    result = run(bench, tmp_path, monkeypatch, "--sketch", "32")
    check_rows(result, capsys.readouterr().out)
    assert {row["pass"] for row in result["rows"]} == set(bench.PASSES) and len(result["plan"]) == 4


def test_what_no_time_is_left_for_is_named(bench, tmp_path, capsys, monkeypatch):
    result = run(bench, tmp_path, monkeypatch, "--passes", "score", "--order", "0", "--minutes", "0")
    assert result["rows"] == [] and len(result["left_out"]) == 2
    assert "Left out, the time being up: tiny T=16 full xla score" in capsys.readouterr().out


def test_a_comparison_is_watched(bench, tmp_path, monkeypatch):
    """A stand-in for nvidia-smi, which says of five samples that the device worked in two."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf '0\\n7\\n0\\n100\\n0\\n'\nexec sleep 60\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(SCRIPT.parents[1]))
    found = bench.watch_adapt(["--help"], 5)
    assert (found["exit_code"], found["samples"], found["busy"]) == (0, 5, 0.4) and found["seconds"] > 0
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    found = bench.watch_adapt(["--no-such-flag"], 5)
    assert found["exit_code"] == 2 and found["busy"] is None
    assert bench.watch_adapt(["--help"], 1e-4)["exit_code"] is None


@pytest.mark.slow
def test_the_order_of_the_scores(bench, tmp_path, monkeypatch):
    result = run(bench, tmp_path, monkeypatch, "--passes", "forward")
    assert result["float32_against_bfloat16"]["spearman"] > 0.9


def test_flops_peaks_and_plan_by_hand(bench):
    config = bench.TINY["tiny"]
    linear = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48  # q, k and v, o, the three of the MLP
    assert bench.flops_per_token(config, 10) == 2 * (2 * linear + 4 * 32 * 5)
    assert bench.peak_tflops("NVIDIA H100 80GB HBM3") == 989 and bench.peak_tflops("NVIDIA A100-SXM4-80GB") == 312
    assert bench.peak_tflops("TPU v5 lite") == 197 and bench.peak_tflops("abacus") is None
    rates = {"forward": 300.0, "score": 200.0, "features": 100.0, "paper-features": 10.0}
    rows = [{"model": "m", "length": 8, "pass": p, "tokens_per_second": r} for p, r in rates.items()]
    found = bench.plan(rows, 1_000_000, 36, 10)
    hours = [1e6 / 200 / 100, *(1e6 / 300 / 100 + 36_000 / rate / 100 for rate in (200, 100, 10))]
    assert [row["hours"] for row in found] == pytest.approx(hours)
    assert [row["pod_hours"] for row in found] == pytest.approx([h / 10 for h in hours])


def test_a_pass_that_fails_is_told_and_too_many_rows_are_halved(bench, monkeypatch):
    def step_of(what, model, batch, sketch):
        def full():
            if len(batch.index) > 2:
                raise RuntimeError("RESOURCE_EXHAUSTED: 9 GB")
            return 0

        def no_rule():
            raise NotImplementedError("no forward mode")

        return no_rule if what == "score" else full, None

    monkeypatch.setattr(bench, "step_of", step_of)
    options = argparse.Namespace(tokens=128, rounds=1, sketch=8, profile=False)
    model = bench.LanguageModel(bench.ModelSpec(bench.TINY["tiny"], attention="cudnn"), {"w": bench.jnp.zeros(3)})
    found = [bench.measure(model, "tiny", 16, "full", what, options) for what in ("forward", "score", "features")]
    assert [row["rows"] for row in found] == [2, 8, 2]
    assert found[1]["error"] == "NotImplementedError: no forward mode" and found[1]["attention"] == "cudnn"


def test_features_are_those_of_the_default_and_of_the_paper(bench, monkeypatch):
    """The sketch that a selection takes is declared once; the paper's is dense."""
    taken = []
    monkeypatch.setattr(bench, "gradient_features", lambda output, params, batches, sketch, rows: taken.append(sketch))
    model = bench.random_model(bench.TINY["tiny"], "float32", "xla")
    batch = bench.make_batch(model.config, 4, 16)
    for what in bench.SKETCH_OF:
        bench.step_of(what, model, batch, 32)[0]()
    default = SketchOptions()
    assert [sketch.describe()["sketch"] for sketch in taken] == [default.sketch, "rademacher"]
    assert default.sketch_size == bench.SKETCH_SIZE and default.sketch != "rademacher"


def test_lines_take_the_attention_that_commands_take(bench, monkeypatch):
    options = argparse.Namespace(tiny=False, models=None, lengths=None, attention=["xla", "dual"], passes=bench.PASSES)
    kinds = lambda: {kind for _, _, _, kind, what in bench.chosen_lines(options) if what == "train"}
    assert kinds() == {bench.resolve("auto", None)}
    monkeypatch.setattr(bench, "resolve", lambda name, mesh: "dual")
    assert kinds() == {"dual"}
    assert len(set(lines := bench.chosen_lines(options))) == len(lines)


def test_the_kernels_of_a_pass_are_listed(bench, tmp_path, capsys, monkeypatch):
    result = run(bench, tmp_path, monkeypatch, "--passes", "score", "--order", "0", "--no-attention", "--profile")
    printed = capsys.readouterr().out
    for row in result["rows"]:
        shares = [kernel["share"] for kernel in row["kernels"]]
        assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1 + 1e-9 and 1 <= len(shares) <= 10
        assert all(kernel["seconds"] > 0 and kernel["launches"] >= 1 for kernel in row["kernels"])
        assert f"| tiny | 16 | {row['layout']} | score | {row['kernels'][0]['name']} |" in printed


def test_of_a_gpu_the_streams_are_counted_and_of_a_loop_what_it_does_itself(bench):
    name = lambda what, pid, tid, text: {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": text}}
    ran = lambda tid, name, ts, dur, pid=1: {
        "ph": "X", "pid": pid, "tid": tid, "name": name, "ts": ts, "dur": dur, "args": {"hlo_op": name},
    }  # fmt: skip
    threads = [name("thread_name", 1, 5, "Stream #13(Compute)"), name("thread_name", 1, 6, "XLA Ops")]
    host = [name("process_name", 9, None, "/host:CPU"), name("thread_name", 9, 2, "tf_XLA")]
    loop = [ran(2, "while", 0, 100, 9), ran(2, "dot", 10, 30, 9), ran(2, "dot", 50, 20, 9), ran(2, "add", 100, 7, 9)]
    device = [name("process_name", 1, None, "/device:GPU:0"), *threads]
    kernels = [ran(5, "gemm", 0, 40), ran(5, "copy", 39, 10), ran(6, "dot.1", 0, 40)]  # the copy begins a little early
    of = lambda events: sorted((kernel, round(1e6 * seconds)) for kernel, seconds in bench.kernel_seconds(events))
    assert of(host + loop) == [("add", 7), ("dot", 20), ("dot", 30), ("while", 50)]
    assert of(host + loop + device + kernels) == [("copy", 10), ("gemm", 40)]
