"""`ntkjax stability` on a tiny model: what it writes is what an independent computation gives, and it goes on."""

from __future__ import annotations

import csv
import json
import shutil

import jax
import numpy as np
import pytest

import ntkjax
from ntkjax.cli import main
from ntkjax.commands.stability.config import StabilityConfig
from ntkjax.commands.stability.outputs import ChoiceOutputs, choice_outputs, questions
from ntkjax.commands.stability.report import spread
from ntkjax.data import read_records, tokenise
from ntkjax.ntk import KernelFunctions, build, kernel_matrix
from ntkjax.ntk.linearise import linearise
from ntkjax.ntk.metrics import spearman, top_n_overlap
from ntkjax.ntk.regression import accuracy, centred_targets, output_kernels
from ntkjax.training import TrainConfig, fit

KERNEL = "centred_spectral:2"
FLAGS = ["--n", "6", "--probe", "4", "--test-n", "6", "--pool-n", "9", "--top", "3", "--ranks", "2",
         "--learning-rates", "0.02", "--full-learning-rates", "0.001", "--kernels", KERNEL, "--at", "1",
         "--seeds", "2", "--train.epochs", "2", "--train.batch-size", "3", "--train.max-buckets", "1",
         "--max-length", "128"]  # fmt: skip


def run(files, out, *flags) -> int:
    inputs = ["--model", files.model, "--data", files.domain, "--test", files.test, "--pool", files.pool]
    return main(["stability", *inputs, "--out", str(out), *FLAGS, *flags])


@pytest.fixture(scope="module")
def made(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("stability") / "run"
    assert run(files, out, "--keep-checkpoints") == 0
    return out


@pytest.fixture(scope="module")
def table(made):
    with (made / "stability.csv").open() as file:
        return list(csv.DictReader(file))


def pick(table, **wanted):
    rows = [row for row in table if all(row[key] == str(value) for key, value in wanted.items())]
    assert len(rows) == 1, (wanted, rows)
    return float(rows[0]["value"])


def check_files(made):
    assert {p.name for p in made.iterdir()} >= {
        "stability.csv", "results.json", "results.md", "report.html", "config.yaml", "versions.json", "plots", "tables",
    }  # fmt: skip
    assert {p.name for p in (made / "plots").iterdir()} == {"centred_spectral-2.png", "linearised.png"}
    for name in ("stability", "linearised", "accuracy", "differences", "regression"):
        assert all((made / "tables" / f"{name}.{kind}").stat().st_size > 50 for kind in ("md", "csv", "tex"))
    page = (made / "report.html").read_text()
    assert "<img" in page and "http://" not in page and "https://" not in page and "<script" not in page


def check_the_long_table(table):
    keys = {(r["arm"], r["seed"], r["epoch"], r["kernel"]) for r in table if r["metric"] == "cos_F"}
    arms = ("LoRA r=2, lr 0.02", "full, lr 0.001")
    assert keys == {(a, s, e, KERNEL) for a in arms for s in "01" for e in "012"}
    for arm in arms:
        assert pick(table, arm=arm, seed=0, epoch=0, kernel=KERNEL, metric="cos_F") == pytest.approx(1)
        assert pick(table, arm=arm, seed=1, epoch=0, kernel=KERNEL, metric="score_overlap") == 1
        moved = pick(table, arm=arm, seed=0, epoch=2, kernel=KERNEL, metric="perturbation")
        assert 0 < moved <= pick(table, arm=arm, seed=0, epoch=2, kernel=KERNEL, metric="bound")
    assert not any(row["value"] in ("", "nan") for row in table)


def train_again(made, files):
    """Seed 1 of the LoRA arm, trained and measured without the stage."""
    model = ntkjax.load_lm(files.model, lora=ntkjax.LoraConfig(rank=2, alpha=4.0))
    start = model.fresh_lora(1)
    records = read_records([files.domain])
    ids = json.loads((made / "lora-r2-lr0.02" / "seed-1" / "training" / "train.json").read_text())
    drawn = ntkjax.rng.numpy_rng(1, "stability", "training").permutation(12)[:6]
    tokens = tokenise(records, model.tokenizer, max_length=128).subset(drawn)
    assert ids["training data (content)"] == tokens.fingerprint
    config = TrainConfig(epochs=2, batch_size=3, max_buckets=1, learning_rate=0.02)
    end = fit(model.nll_fn, start, tokens, config, seed=1, progress=False).params
    return model, start, end, tokens, records.subset(drawn)


def check_kernels_against_an_independent_run(made, table, again):
    model, start, end, tokens, _ = again
    functions = KernelFunctions(model.hidden_fn, model.head_fn, model.nll_fn)
    probe = tokens.collate(np.arange(4))
    first, last = (kernel_matrix(build(KERNEL, functions, p, seed=0), p, probe) for p in (start, end))
    for epoch, wanted in ((0, first), (2, last)):
        with np.load(made / "lora-r2-lr0.02" / "seed-1" / f"epoch-{epoch:03d}.npz") as saved:
            found = saved[f"kernel/{KERNEL}"]
        np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=1e-4 * np.abs(wanted).max())
    cosine = np.sum(first * last) / np.linalg.norm(first) / np.linalg.norm(last)
    where = {"arm": "LoRA r=2, lr 0.02", "seed": 1, "epoch": 2, "kernel": KERNEL}
    assert pick(table, **where, metric="cos_F") == pytest.approx(cosine, abs=1e-4)
    growth = np.linalg.norm(last) / np.linalg.norm(first)
    assert pick(table, **where, metric="growth") == pytest.approx(growth, rel=1e-3)


def check_scores_of_the_pool_against_an_independent_run(made, table, again, files):
    """Spearman and overlap of mean kernel values between the six training examples and nine of the pool."""
    model, start, end, tokens, _ = again
    functions = KernelFunctions(model.hidden_fn, model.head_fn, model.nll_fn)
    drawn = np.sort(ntkjax.rng.numpy_rng(0, "stability", "pool").permutation(40)[:9])
    pool = tokenise(read_records([files.pool]), model.tokenizer, max_length=128).subset(drawn)
    domain, offered = tokens.collate(np.arange(6), length=64), pool.collate(np.arange(9), length=128)
    first, last = (
        kernel_matrix(build(KERNEL, functions, p, seed=0), p, domain, offered).mean(axis=0) for p in (start, end)
    )
    where = {"arm": "LoRA r=2, lr 0.02", "seed": 1, "epoch": 2, "kernel": KERNEL}
    assert pick(table, **where, metric="score_spearman") == pytest.approx(spearman(first, last), abs=0.02)
    assert pick(table, **where, metric="score_overlap") == pytest.approx(top_n_overlap(first, last, 3))


def check_the_linearised_model_against_jvp(table, again):
    model, start, end, tokens, _ = again
    probe = tokens.collate(np.arange(4))
    centre = lambda values: np.asarray(values) - np.asarray(values).mean(axis=1, keepdims=True)
    moved = jax.tree.map(lambda a, b: a - b, end, start)
    f0, change = jax.jvp(lambda p: model.apply_fn(p, probe), (start,), (moved,))
    d = centre(model.apply_fn(end, probe)) - centre(f0)
    error = np.linalg.norm(centre(change) - d) / np.linalg.norm(d)
    where = {"arm": "LoRA r=2, lr 0.02", "seed": 1, "epoch": 2, "kernel": ""}
    assert pick(table, **where, metric="logits relative") == pytest.approx(error, rel=2e-2)


def check_regression_and_accuracies_against_an_independent_run(made, again, files):
    """Solved here with the ridge and the weight of f_0 that it chose."""
    model, start, end, _, train_records = again
    ask = lambda records: questions(
        model, records, kind="likelihood", max_length=128, answer_template="So the answer is {}."
    )
    train, test = ask(train_records), ask(read_records([files.test]).subset(np.arange(6)))
    fn = ChoiceOutputs(model.states_fn, model.head_fn)
    of = lambda fn, params, asked: choice_outputs(fn, params, asked.rows, token_budget=8192)
    y, f0, f0_test = centred_targets(train.gold, train.valid), of(fn, start, train), of(fn, start, test)
    targets = centred_targets(test.gold, test.valid)
    within, across = output_kernels(fn, start, train.rows), output_kernels(fn, start, test.rows, train.rows)
    found = json.loads((made / "regression" / "lora-r2" / "seed-1.json").read_text())["formulas"]
    for formula, entry in found.items():
        k, k_test = within[formula].reshape(12, 12), across[formula].reshape(12, 12)
        residual = (y - entry["f0_weight"] * f0).ravel()
        alpha = np.linalg.solve(k + 6 * entry["ridge"] * np.eye(12), residual)
        predicted = entry["f0_weight"] * f0_test + (k_test @ alpha).reshape(6, 2)
        assert np.mean(entry["right"]) == pytest.approx(accuracy(predicted, targets), abs=0.17)  # a near-tie of six
        assert entry["relative_ridge"] == pytest.approx(6 * entry["ridge"] / np.mean(np.diag(k)), rel=1e-2)
    right = json.loads((made / "lora-r2-lr0.02" / "seed-1" / "run.json").read_text())["right"]
    linear = of(linearise(fn, start), end, test)
    for name, outputs in (("base", f0_test), ("fine-tuned", of(fn, end, test)), ("linearised", linear)):
        assert np.mean(right[name]) == pytest.approx(accuracy(outputs, targets), abs=0.17), name


def test_what_it_writes_is_what_an_independent_run_gives(made, table, files):
    """One test, so that parallel test workers do not each make the run."""
    check_files(made)
    check_the_long_table(table)
    again = train_again(made, files)
    check_kernels_against_an_independent_run(made, table, again)
    check_scores_of_the_pool_against_an_independent_run(made, table, again, files)
    check_the_linearised_model_against_jvp(table, again)
    check_regression_and_accuracies_against_an_independent_run(made, again, files)


def results(out):
    content = json.loads((out / "results.json").read_text())
    return {key: value for key, value in content.items() if key != "wall_seconds"}


def check_a_replay_that_is_interrupted(made, tmp_path, monkeypatch):
    import ntkjax.commands.stability.follow as stability_run

    out, calls, real = tmp_path / "again", [], stability_run._kernels

    def stop_at_the_fifth(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(stability_run, "_kernels", stop_at_the_fifth)
        assert main(["replay", str(made), "--out", str(out)]) == 130
    assert not (out / "results.json").exists()
    assert main(["replay", str(made), "--out", str(out)]) == 0
    assert results(out) == results(made)


def check_the_same_directory_again(made, files, capsys):
    assert run(files, made, "--probe", "5") == 2
    assert "probe" in capsys.readouterr().err
    checkpoints = made / "all-lr0.001" / "seed-0" / "training" / "checkpoints"
    assert {step.name for step in checkpoints.iterdir()} == {"2", "4"}
    shutil.rmtree(checkpoints.parent)
    assert run(files, made, "--memory-gib", "0.5") == 0  # neither is needed for a run that has finished


@pytest.mark.slow
def test_it_can_be_repeated_interrupted_and_gone_on_with(made, files, tmp_path, monkeypatch, capsys):
    check_a_replay_that_is_interrupted(made, tmp_path, monkeypatch)
    capsys.readouterr()
    check_the_same_directory_again(made, files, capsys)


def test_kernels_alone_and_from_python(files, tmp_path):
    found = ntkjax.stability(
        model=files.model, data=files.domain, out=tmp_path / "run", n=6, probe=4, ranks=(2,), learning_rates=(0.02,),
        full_learning_rates=(), kernels=("sum_logits",), at=(), seeds=1, max_length=128,
        train={"epochs": 1, "batch_size": 3, "max_buckets": 1}, progress=False,
    )  # fmt: skip
    assert {row["epoch"] for row in found.rows} == {0, 1} and "accuracy" not in found.results
    assert not (tmp_path / "run" / "lora-r2-lr0.02" / "seed-0" / "training" / "checkpoints").exists()
    assert {row["kernel"] for row in found.rows} == {"", "sum_logits"}
    assert all(entry["sd"] is None for entry in found.results["summary"])


BAD = {
    "probe": (["--probe", "7"], "probe must be from 3 to n = 6"),
    "kernel": (["--kernels", "fisher"], "fisher"),
    "epochs": (["--at", "3"], "from 0 to train.epochs = 2"),
    "half": (["--train.epochs", "1.5"], "whole epochs"),
    "n": (["--n", "13"], "the files hold 12"),
    "top": (["--top", "10"], "from 1 to the 9"),
    "rate": (["--learning-rates", "-0.1"], "above 0"),
    "data": (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    "test": (["--test", "POOL"], "no example has choices"),
    "template": (["--answer-template", "none"], "{}"),
    "width": (["--kernels", "spectral:99"], "between 1 and the width 16"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_named_without_a_traceback(files, tmp_path, capsys, case):
    flags, message = BAD[case]
    flags = [files.pool if flag == "POOL" else flag for flag in flags]
    assert run(files, tmp_path / "run", *flags) == 2
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed


def test_where_it_looks_unless_told():
    looked = lambda epochs, **at: (
        StabilityConfig("m", ("d",), "o", train=TrainConfig(epochs=epochs), **at).epochs_looked_at
    )
    assert looked(20) == [0, 1, 2, 4, 8, 12, 16, 20] and looked(3) == [0, 1, 2, 3] and looked(25)[-2:] == [20, 25]
    assert looked(5, at=()) == [0, 5] and looked(5, at=(3, 2)) == [0, 2, 3, 5]


def test_spread_by_hand():
    found = spread([1.0, 2.0, 6.0])
    assert found["mean"] == 3 and found["sd"] == pytest.approx(np.sqrt(7))
    half = 4.302652729911275 * np.sqrt(7) / np.sqrt(3)  # t with 2 degrees of freedom
    assert (found["low"], found["high"]) == pytest.approx((3 - half, 3 + half))
    assert spread([0.5]) == {"mean": 0.5, "sd": None, "low": None, "high": None, "per_seed": [0.5]}
