"""The accelerator benchmark on a tiny shape: it runs, its table holds every pass, and it needs no more than it says."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
    assert {row["pass"] for row in result["rows"]} == set(bench.PASSES) and len(result["plan"]) == 3


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
    rates = {"forward": 300.0, "score": 200.0, "features": 10.0}
    rows = [{"model": "m", "length": 8, "pass": p, "tokens_per_second": r} for p, r in rates.items()]
    found = bench.plan(rows, 1_000_000, 36, 10)
    hours = [1e6 / 200 / 100, 1e6 / 300 / 100 + 36_000 / 200 / 100, 1e6 / 300 / 100 + 36_000 / 10 / 100]
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
    options = argparse.Namespace(tokens=128, rounds=1, sketch=8)
    model = bench.LanguageModel(bench.ModelSpec(bench.TINY["tiny"], attention="cudnn"), {"w": bench.jnp.zeros(3)})
    found = [bench.measure(model, "tiny", 16, "full", what, options) for what in ("forward", "score", "features")]
    assert [row["rows"] for row in found] == [2, 8, 2]
    assert found[1]["error"] == "NotImplementedError: no forward mode" and found[1]["attention"] == "cudnn"
