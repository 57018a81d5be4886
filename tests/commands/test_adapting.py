"""`adapt`, `finetune`, `evaluate`, `replay` on a tiny model: files, resumption, equal steps, the same numbers again."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

import ntkjax
import ntkjax.pipeline.study.runner as runner
from ntkjax.cli import main
from ntkjax.evaluation import read_outcomes
from ntkjax.models import load_lm

QUICK = ["--lora-rank", "2", "--token-budget", "1024", "--train.epochs", "1", "--train.batch-size", "4",
         "--train.learning-rate", "1e-2", "--warmup.batch-size", "4"]  # fmt: skip


def adapt(files, out, *flags) -> int:
    inputs = files.flags("model", "domain", "pool", "test", "dev")
    return main(["adapt", *inputs, "--n", "6", "--seeds", "2", "--out", str(out), *QUICK, *flags])


@pytest.fixture(scope="module")
def adapted(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("adapt") / "run"
    assert adapt(files, out) == 0
    return out


def test_the_table_has_every_arm(adapted):
    results = json.loads((adapted / "results.json").read_text())
    arms = ["base", "domain-only", "domain-only-equal-steps", "random", "ntk-selector"]
    assert list(results["methods"]) == arms
    assert [results["methods"][arm]["seeds"] for arm in arms] == [1, 2, 2, 2, 2]
    text = (adapted / "results.md").read_text()
    assert all(arm in text for arm in arms) and "Paired differences" in text
    pairs = {(row["method"], row["reference"]) for row in results["comparisons"]}
    assert {("ntk-selector", arm) for arm in arms[:-1]} < pairs


def test_arms_with_auxiliary_data_and_their_control_take_the_same_steps(adapted):
    runs = json.loads((adapted / "results.json").read_text())["runs"]
    steps = {arm: {r["steps"] for r in runs if r["arm"] == arm} for arm in {r["arm"] for r in runs}}
    assert steps["random"] == steps["ntk-selector"] == steps["domain-only-equal-steps"] == {5}  # ceil((12 + 6) / 4)
    assert steps["domain-only"] == {3}


def test_outcomes_agree_with_the_table(adapted):
    results = json.loads((adapted / "results.json").read_text())
    for seed in (0, 1):
        outcomes = read_outcomes(adapted / results["folders"]["random"][str(seed)] / "outcomes.jsonl")
        assert len(outcomes) == 10
        mean = np.mean([o.correct_raw for o in outcomes])
        assert results["methods"]["random"]["accuracy"]["per_seed"][seed] == pytest.approx(mean)


def test_the_report_stands_alone(adapted):
    page = (adapted / "report.html").read_text()
    assert "<img" in page and "http://" not in page and "https://" not in page and "<script" not in page
    assert {p.name for p in (adapted / "plots").iterdir()} >= {"methods.png", "training.png", "sources.png"}


def test_an_interrupted_adaptation_goes_on(adapted, files, tmp_path, monkeypatch):
    out, calls, real = tmp_path / "run", [], runner.train_on

    def stop_at_the_fourth(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "train_on", stop_at_the_fourth)
        assert adapt(files, out) == 130
    assert not (out / "results.json").exists()
    assert adapt(files, out) == 0
    read = lambda path: json.loads((path / "results.json").read_text())["methods"]
    assert read(out) == read(adapted)


def test_a_run_that_fails_is_told_and_tried_again_and_the_others_are_kept(adapted, files, study, monkeypatch, capsys):
    read = lambda: json.loads((adapted / "results.json").read_text())
    whole = read()
    for folder in (whole["folders"]["ntk-selector"]["1"], whole["selections"]["1"]["folder"]):
        shutil.rmtree(adapted / folder)

    def fail(*args, **kwargs):
        raise ValueError("the pool is upside down")

    with monkeypatch.context() as patch:
        patch.setattr(runner, "choose", fail)
        assert adapt(files, adapted) == 1
    page, table = (adapted / "report.html").read_text(), (adapted / "tables" / "failures.md").read_text()
    assert all("upside down" in said for said in (capsys.readouterr().out, page, table))
    partly, (failure,) = read(), read()["failures"]
    assert (failure["arm"], failure["seed"]) == ("ntk-selector", 1) and list(partly["folders"]["ntk-selector"]) == ["0"]
    expected = {(row["method"], row["reference"], row["metric"]): row["per_seed"] for row in whole["comparisons"]}
    for row in partly["comparisons"]:  # the seeds that both methods have
        seeds = expected[row["method"], row["reference"], row["metric"]]
        assert row["per_seed"] == (seeds[:1] if "ntk-selector" in row["method"] else seeds)
    calls = study.count_calls(monkeypatch)
    assert adapt(files, adapted) == 0
    assert calls == {"choose": 1, "warm_up": 1, "train_on": 1, "evaluate_on": 1}
    assert all(read()[part] == whole[part] for part in ("methods", "comparisons", "folders"))
    calls.clear()
    assert adapt(files, adapted) == 0 and calls == {}


def test_what_cannot_be_evaluated_is_told_before_anything_is_trained(files, study, tmp_path, monkeypatch, capsys):
    calls = study.count_calls(monkeypatch)
    assert adapt(files, tmp_path / "run", "--answer-template", "no place for the choice") == 2
    assert "answer_template" in capsys.readouterr().err and calls == {"evaluate_on": 1}


def test_replay_gives_the_same_numbers(adapted, tmp_path):
    assert main(["replay", str(adapted), "--out", str(tmp_path / "again")]) == 0
    read = lambda path: json.loads((path / "results.json").read_text())["methods"]
    assert read(tmp_path / "again") == read(adapted)


def test_finetune_then_evaluate_against_the_base(files, tmp_path, capsys):
    common = [*files.flags("model"), "--token-budget", "1024"]
    assert main(["evaluate", *common, "--test", files.test, "--out", str(tmp_path / "base")]) == 0
    train = ["--domain", files.domain, "--auxiliary", files.pool, "--dev", files.dev, "--out", str(tmp_path / "tuned")]
    assert main(["finetune", *common, *train, "--lora-rank", "2", *QUICK[4:10], "--merge"]) == 0
    assert f"adapter, merged {tmp_path / 'tuned' / 'merged'}\n" in capsys.readouterr().out
    adapter = ["--adapter", str(tmp_path / "tuned" / "adapter"), "--against", str(tmp_path / "base")]
    assert main(["evaluate", *common, *adapter, "--test", files.test, "--out", str(tmp_path / "after")]) == 0
    content = json.loads((tmp_path / "after" / "evaluation.json").read_text())
    keys = {row["key"] for row in content["against"]["differences"]}
    assert keys == {"correct_raw", "correct_norm", "nll"}
    nll = next(row for row in content["against"]["differences"] if row["key"] == "nll")
    assert nll["second"] < nll["first"]  # training on such responses makes them likelier
    merged = load_lm(str(tmp_path / "tuned" / "merged"), lora=None)
    tokens = np.arange(5, 25, dtype=np.int32)[None]
    tuned = ntkjax.load_lm(files.model, lora=ntkjax.LoraConfig(rank=2))
    tuned = tuned.with_params(ntkjax.models.load_adapter(tmp_path / "tuned" / "adapter", tuned))
    np.testing.assert_allclose(merged.logits(tokens), tuned.logits(tokens), atol=1e-5)


@pytest.mark.slow
def test_all_parameters_train_too(files, tmp_path):
    result = ntkjax.finetune(
        model=files.model, parameters="all", domain=files.domain, out=tmp_path / "run", token_budget=1024,
        train={"epochs": 1, "batch_size": 4, "learning_rate": 1e-3}, progress=False,
    )  # fmt: skip
    assert "embed" in result.params and (tmp_path / "run" / "merged" / "model.safetensors").exists()
    selected = ntkjax.select(
        model=str(tmp_path / "run" / "merged"), parameters="all", domain=files.domain, pool=files.pool, n=3,
        out=tmp_path / "select", skip_warmup=True, token_budget=1024, progress=False,
    )  # fmt: skip
    assert len(selected.selected) == 3
