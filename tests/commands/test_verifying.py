"""`verify`: its kernels against explicit Jacobians, what it writes, how it resumes and replays, what it refuses."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

import ntkjax
from ntkjax.cli import main
from ntkjax.commands.verify.comparisons import step_of
from ntkjax.commands.verify.config import VerifyConfig
from ntkjax.commands.verify.sample import draw_sample
from ntkjax.ntk import kernel_matrix
from ntkjax.ntk.agreement import METRICS
from ntkjax.ntk.precondition import PreconditionerName

QUICK = [
    *("--n", "10", "--n-domain", "3", "--n-full", "6", "--m", "2", "--seeds", "2", "--bootstrap", "10"),
    *("--damping", "0.1", "1e6"),
    *("--lora-rank", "2", "--cross-examples", "3", "--sketch-size", "64", "--max-signs", "1.2e5", "--max-length", "40"),
]
NAMES = (*("trace", "centred_trace", "spectral:2", "centred_spectral:2", "hutchinson:2", "sum_logits", "loss"),)


def verify(files, out, *flags) -> int:
    return main(
        ["verify", "--model", files.model, "--data", files.pool, "--domain", files.domain, "--out", str(out)]
        + [*QUICK, *flags]
    )


@pytest.fixture(scope="module")
def fresh(files, tmp_path_factory) -> Path:
    """A run at fresh LoRA factors."""
    out = tmp_path_factory.mktemp("verify") / "run"
    assert verify(files, out, "--skip-warmup") == 0
    return out


def results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


def rows(run: Path) -> dict:
    return {(r["column"], r["approximation"], r["against"]): r for r in results(run)["ladder"]}


def test_kernels_are_those_of_the_jacobians(fresh, files):
    config = VerifyConfig(ntkjax.pipeline.options.ModelOptions(files.model, lora_rank=2), (files.pool,), "x",
                          domain=(files.domain,), n=10, n_domain=3, reading=reading())  # fmt: skip
    kernels = np.load(fresh / "kernels.npz")
    model = ntkjax.pipeline.load.load_model(config.model, seed=0)
    sample = draw_sample(config, model)
    assert list(kernels["ids"]) == [str(i) for i in sample.tokens.ids]
    assert [i.split("-")[0] for i in kernels["ids"]] == ["ball"] * 3 + ["cube"] * 7
    whole = sample.tokens.collate(range(10))
    for seed in range(2):
        expected = kernel_matrix(model.apply_fn, model.fresh_lora(seed), whole)
        np.testing.assert_allclose(kernels["lora/trace"][seed], expected, rtol=1e-4, atol=1e-6 * expected.max())
    part = sample.tokens.subset(sample.part(6)).collate(range(6))
    base = model.select_params(r"^(?!.*lora)")
    expected = kernel_matrix(model.apply_fn, base, part)
    assert kernels["all/trace"].shape == (1, 6, 6)  # nothing in it is random
    np.testing.assert_allclose(kernels["all/trace"][0], expected, rtol=1e-4, atol=1e-6 * expected.max())
    summed = kernel_matrix(lambda p, b: model.apply_fn(p, b).sum(axis=1), base, part)
    np.testing.assert_allclose(kernels["all/sum_logits"][0], summed, rtol=1e-4, atol=1e-6 * summed.max())


def reading():
    return ntkjax.pipeline.options.DataOptions(max_length=40)


def test_every_approximation_is_compared_with_the_top_and_with_the_step_before(fresh):
    found = rows(fresh)
    for column in ("all", "lora"):
        for name in NAMES:
            against = {a for c, r, a in found if (c, r) == (column, name)}
            expected = set() if name == "trace" else {"top", "step"}
            expected |= {"centred"} if name != "centred_trace" else set()
            if column == "lora":
                expected |= {"full", "step"} if name == "trace" else {"full"}
            assert against == expected, (column, name)
            assert {(column, f"{name} sketched", against) for against in ("step", "reseed")} <= set(found)
    assert step_of("centred_spectral:2") == "centred_trace" and step_of("sum_logits") == "trace"
    assert found["lora", "trace", "step"]["reference"] == "all: trace"
    row = found["lora", "sum_logits", "top"]
    assert row["examples"] == 10 and row["scored"] == 7 and row["n"] == 1 and row["draws"] == 2
    assert found["lora", "trace", "full"]["examples"] == 6
    assert all(name in row and f"{name}_low" in row for name in METRICS)
    methods = {name: r["method"] for (column, name, _), r in found.items() if column == "lora" and "sketched" in name}
    assert methods["sum_logits sketched"] == "signs" and methods["trace sketched"] == "law"
    assert rows(fresh)["lora", "spectral:2", "top"]["passes"] == 2


def test_the_centred_trace_is_what_the_identity_says(fresh):
    kernels, vocab = np.load(fresh / "kernels.npz"), results(fresh)["columns"]["lora"]["vocab"]
    difference = kernels["lora/trace"] - kernels["lora/centred_trace"]
    np.testing.assert_allclose(difference, kernels["lora/sum_logits"] / vocab, rtol=1e-6, atol=1e-9)
    share = results(fresh)["cross_terms"][1]["shift_share"]
    parts = [np.trace(difference[s]) / np.trace(kernels["lora/trace"][s]) for s in range(2)]
    assert share == pytest.approx(np.mean(parts))


def test_what_is_written(fresh):
    table = list(csv.DictReader((fresh / "ladder.csv").open()))
    assert len(table) == len(results(fresh)["ladder"])
    assert {row["approximation"] for row in table} >= set(NAMES)
    text = (fresh / "ladder.md").read_text()
    assert "| sum_logits" in text and "noise ceiling" in text and "Cross terms" in text
    assert r"\toprule" in (fresh / "ladder.tex").read_text()
    page = (fresh / "report.html").read_text()
    assert page.count("data:image/png") == len(list((fresh / "plots").glob("*.png"))) == 8
    assert "http" not in page.replace("http-equiv", "")
    assert all(p.stat().st_size < 100_000 for p in (fresh / "plots").glob("*.png"))
    logged = [json.loads(line) for line in (fresh / "metrics.jsonl").read_text().splitlines()]
    assert {"trace", "sum_logits", "loss"} <= {line["kernel"] for line in logged}
    sizes = results(fresh)["columns"]
    assert sizes["all"]["parameters"] > sizes["lora"]["parameters"] > 0


def test_preconditioners_are_measured_against_the_explicit_solution(fresh, files):
    kernels, found = np.load(fresh / "kernels.npz"), results(fresh)
    table = {(r["precondition"], r["damping"]): r for r in found["preconditioners"]}
    assert list(table) == [(name, damping) for damping in (0.1, 1e6) for name in get_args(PreconditionerName)]
    drawn = [json.loads(p.read_text())["draw"] for p in sorted(fresh.glob("rows/lora/*/preconditioned.json"))]
    assert len(drawn) == 2 and all(row["draws"] == 2 and row["scored"] == 7 for row in table.values())
    losses = kernels["lora/loss"]
    for draw, matrix in zip(drawn, losses):
        plain = matrix[:3, 3:].mean(axis=0)
        np.testing.assert_allclose(draw["0.1"]["scores"]["none"], plain, rtol=1e-3, atol=1e-5 * np.abs(plain).max())
        # lambda so large that P is lambda I: every direction is g_bar but for scale
        assert draw["1000000.0"]["lambda"] == pytest.approx(1e7 * draw["0.1"]["lambda"])
        exact = np.array(draw["1000000.0"]["scores"]["exact"]) * draw["1000000.0"]["lambda"]
        np.testing.assert_allclose(exact, plain, rtol=2e-3, atol=2e-3 * np.abs(plain).max())
    for name in ("kfac", "ekfac", "cg"):
        assert table[name, 1e6]["relative_error"] < 1e-2 and table[name, 1e6]["score_spearman"] > 0.9
    assert table["cg", 0.1]["residual"] is not None and table["kfac", 0.1]["residual"] is None
    assert table["cg", 0.1]["relative_error"] < 0.01 and table["cg", 0.1]["score_spearman"] == pytest.approx(1)
    # every other P is another matrix at this damping
    assert all(table[name, 0.1]["relative_error"] > 0.05 for name in ("none", "adam", "kfac", "ekfac"))
    text = (fresh / "ladder.md").read_text()
    assert "whole Fisher inverted exactly" in text and "| ekfac" in text
    assert len(list(csv.DictReader((fresh / "preconditioners.csv").open()))) == 10
    assert "tab:preconditioners" in (fresh / "ladder.tex").read_text()


def test_a_replay_that_was_stopped_goes_on_and_computes_nothing_twice(fresh, files, tmp_path, monkeypatch):
    import ntkjax.commands.verify.command as command

    out = tmp_path / "again"
    with monkeypatch.context() as patch:
        patch.setattr(command, "compare", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(["replay", str(fresh), "--out", str(out)]) == 130
    logged = (out / "metrics.jsonl").read_text()
    assert not (out / "results.json").exists() and '"sum_logits sketched"' in logged
    assert verify(files, out, "--skip-warmup") == 0
    assert (out / "metrics.jsonl").read_text() == logged
    assert (out / "ladder.csv").read_bytes() == (fresh / "ladder.csv").read_bytes()
    assert verify(files, out, "--skip-warmup", "--bootstrap", "20") == 2


@pytest.mark.slow
def test_as_a_function_with_warm_up_and_all_parameters(files, tmp_path):
    options = {"model": files.model, "data": files.pool, "n": 8, "m": 1, "seeds": 2, "bootstrap": 10,
               "max_signs": 0.0, "cross_examples": 0, "max_length": 40, "progress": False}  # fmt: skip
    options["precondition"] = ()
    warm = {"steps": 2, "batch_size": 4, "learning_rate": 1e-2}
    found = ntkjax.verify(**options, n_full=0, lora_rank=2, warmup=warm, out=tmp_path / "lora")
    assert list(found.results["columns"]) == ["lora"] and found.results["warmed_up"]
    draws = found.kernels["lora/trace"]
    assert draws.shape == (2, 8, 8) and not np.array_equal(draws[0], draws[1])
    assert found.row("lora", "sum_logits", "top")["draws"] == 2
    assert "signed" not in found.results["cross_terms"][0]
    with pytest.raises(KeyError):
        found.row("lora", "sum_logits", "full")
    options["seeds"] = 1
    whole = ntkjax.verify(**options, parameters="all", skip_warmup=True, out=tmp_path / "all")
    assert list(whole.results["columns"]) == ["all"] and whole.kernels["all/trace"].shape == (1, 8, 8)


BAD = {
    "more examples than there are": (["--n", "60"], ["pool.jsonl", "40 examples", "57"]),
    "more domain examples than there are": (["--n", "40", "--n-domain", "20"], ["domain.jsonl", "12 examples", "20"]),
    "m above the width": (["--m", "17"], ["m: 17", "width 16"]),
    "m of zero": (["--m", "0"], ["m must be"]),
    "too few to score": (["--n-domain", "7"], ["n_domain", "at least 4"]),
    "top above the scored": (["--top", "7"], ["top", "1 to 6"]),
    "no seeds": (["--seeds", "0"], ["seeds must be at least 1"]),
    "no damping": (["--damping", "0"], ["damping must be", "above 0"]),
    "no memory": (["--memory-gib", "0"], ["memory_gib"]),
    "a sample that is too small": (["--n-full", "3"], ["n_full must be 0 or at least 6"]),
    "missing file": (["--data", "nowhere.jsonl"], ["nowhere.jsonl", "no such file"]),
    "missing model": (["--model", "nowhere"], ["nowhere"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_exits_with_2_and_leaves_nothing(name, files, tmp_path, capsys):
    flags, expected = BAD[name]
    out = tmp_path / "run"
    try:
        code = verify(files, out, *flags)
    except SystemExit as stop:
        code = stop.code
    message = "".join(capsys.readouterr())
    assert code == 2 and "Traceback" not in message and not out.exists()
    for word in expected:
        assert word in message
