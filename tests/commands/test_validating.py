"""`ntkjax validate`: scores that are right reach an LDS of 1, flipped answers are found, and a stopped run goes on."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.stats
from sklearn.metrics import roc_auc_score

import ntkjax
import ntkjax.pipeline.study.runner as study_run
from ntkjax.cli import main
from ntkjax.commands.validate.command import judge
from ntkjax.commands.validate.config import ValidateConfig, impossible, scores_of
from ntkjax.commands.validate.flip import flip
from ntkjax.commands.validate.measures import auc, ceiling, lds, predictions, tenths
from ntkjax.data import read_records
from ntkjax.errors import ConfigError
from ntkjax.pipeline.options import ModelOptions, SelectorOptions

OPTIONS = {"seed": 0, "samples": 100}


# -- the measures --


def linear_task(m: int = 24, rows: int = 40, width: int = 5):
    """A linear model, loss -theta . x, trained by one gradient step on the mean over S_k: the test loss is
    -lr / |S_k| sum_j <g_bar, g_j>, minus the sum of the scores up to a factor."""
    rng = np.random.default_rng(0)
    pool, domain = rng.normal(size=(rows, width)), rng.normal(size=(6, width))
    members = np.stack([rng.permutation(rows) < rows // 2 for _ in range(m)])
    nll = lambda theta, x: -jnp.mean(x @ theta)
    gradient = lambda x: np.asarray(jax.grad(nll)(jnp.zeros(width), jnp.asarray(x)))
    scores = np.asarray([gradient(domain) @ gradient(pool[j : j + 1]) for j in range(rows)])
    losses = []
    for row in members:
        theta = -0.1 * gradient(pool[row])
        losses.append(float(nll(jnp.asarray(theta), jnp.asarray(domain))))
    return members, scores, np.asarray(losses)


def test_the_lds_of_exactly_additive_scores_is_1_and_that_of_shuffled_ones_is_chance(x64):
    members, scores, losses = linear_task()
    found = lds(-losses, members, scores, **OPTIONS)
    assert found == {"value": pytest.approx(1), "low": pytest.approx(1), "high": pytest.approx(1)}
    assert lds(-losses, members, -scores, **OPTIONS)["value"] == pytest.approx(-1)
    assert lds(-losses, members, 3 * scores + 7, **OPTIONS)["value"] == pytest.approx(1)  # subsets are of one size
    rng = np.random.default_rng(1)
    shuffled = [lds(-losses, members, rng.permutation(scores), seed=0, samples=10)["value"] for _ in range(200)]
    assert abs(np.mean(shuffled)) < 0.07 and 0.1 < np.std(shuffled) < 0.35  # of ranks at random: 1 / sqrt(23) = 0.21


def test_lds_is_spearman_with_minus_the_loss_as_scipy_has_it():
    rng = np.random.default_rng(2)
    members, scores = rng.random((30, 50)) < 0.3, rng.integers(0, 3, 50).astype(float)  # with ties
    losses = rng.normal(size=30)
    sums = [sum(scores[j] for j in range(50) if members[k, j]) for k in range(30)]
    np.testing.assert_allclose(predictions(members, scores), sums, rtol=1e-12)
    found = lds(-losses, members, scores, seed=0, samples=500)
    assert found["value"] == pytest.approx(scipy.stats.spearmanr(sums, -losses).statistic, abs=1e-12)
    assert found["low"] < found["value"] < found["high"]
    assert np.isnan(lds(-losses, members, np.zeros(50), **OPTIONS)["value"])


def test_the_ceiling_is_what_two_seeds_share():
    rng = np.random.default_rng(3)
    truth = rng.normal(size=400)
    seeds = np.stack([truth + rng.normal(size=400) for _ in range(3)])
    found = ceiling(seeds, **OPTIONS)
    pairs = [scipy.stats.spearmanr(seeds[a], seeds[b]).statistic for a, b in ((0, 1), (0, 2), (1, 2))]
    r = np.mean(pairs)
    assert found["between_seeds"] == pytest.approx(r, abs=1e-12) and found["low"] < r < found["high"]
    assert found["ceiling"] == pytest.approx(np.sqrt(3 * r / (1 + 2 * r)), abs=1e-12)
    assert found["ceiling"] == pytest.approx(np.corrcoef(truth, seeds.mean(axis=0))[0, 1], abs=0.05)
    assert ceiling(np.stack([truth, truth]), **OPTIONS)["ceiling"] == pytest.approx(1)
    assert ceiling(np.stack([truth, -truth]), **OPTIONS)["ceiling"] == 0


def test_auc_is_that_of_scikit_learn_with_low_scores_as_the_sign():
    rng = np.random.default_rng(4)
    marked, scores = rng.random(80) < 0.3, rng.integers(0, 9, 80).astype(float)
    assert auc(marked, scores) == pytest.approx(roc_auc_score(marked, -scores), abs=1e-12)
    assert auc(marked, np.where(marked, -1.0, 1.0)) == 1 and auc(marked, np.zeros(80)) == 0.5
    with pytest.raises(ValueError, match="0 and 3"):
        auc(np.zeros(3, bool), np.zeros(3))


def test_tenths_are_of_one_size_and_in_order():
    scores = np.random.default_rng(5).permutation(25).astype(float)
    found = {name: sorted(scores[rows].tolist()) for name, rows in tenths(scores).items()}
    assert found == {"best": [23, 24], "middle": [12, 13], "worst": [0, 1]}
    assert tenths(np.zeros(20)) == {"best": [0, 1], "middle": [9, 10], "worst": [18, 19]}


def test_subsets_that_failed_are_in_no_number():
    members, scores, losses = linear_task(m=12)
    config = ValidateConfig(ModelOptions("m"), ("d",), ("p",), ("t",), "o", subsets=12, bootstrap=20)
    table = np.stack([losses, losses])
    table[1, 3] = np.nan
    found = judge(config, {"right": scores, "wrong": -scores, "none": np.zeros(40)}, members, table, table * np.nan)
    assert [row["score"] for row in found["scores"]] == ["right", "wrong", "none"]
    assert found["subsets_done"] == 11 and found["scores"][0]["lds"]["value"] == pytest.approx(1)
    assert "lds_accuracy" not in found["scores"][0] and found["ceiling"]["ceiling"] == pytest.approx(1)
    assert found["losses"]["mean"] == pytest.approx(np.delete(losses, 3).mean())


# -- flipped answers --


def test_flipping_changes_the_answer_where_the_response_gives_it_and_nothing_else(tmp_path):
    rows = [{"id": str(i), "source": "ab"[i % 2], "prompt": f"Q {i}", "response": f"Thus. So the answer is {i % 3}.",
             "answer": str(i % 3)} for i in range(20)]  # fmt: skip
    rows[0] |= {"choices": ["0", "seven"]}
    rows[1]["response"] = "I do not say."
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    records, out = read_records([path]), tmp_path / "out.jsonl"
    made = flip(records, 0.9, "So the answer is {}.", seed=1, path=out)
    assert made.flipped.sum() == 18 and made.able.sum() == 19 and not made.able[1]
    copy = [json.loads(line) for line in out.read_text().splitlines()]
    for row, new, flipped in zip(rows, copy, made.flipped):
        if not flipped:
            assert new == row
            continue
        assert new["answer"] != row["answer"] and new["response"] == f"Thus. So the answer is {new['answer']}."
        assert new["answer"] in row.get("choices", ["0", "1", "2"])
        assert {k: v for k, v in new.items() if k not in ("answer", "response")} == {
            k: v for k, v in row.items() if k not in ("answer", "response")
        }
    before = out.read_bytes()
    assert (flip(records, 0.9, "So the answer is {}.", seed=1, path=out).flipped == made.flipped).all()
    assert out.read_bytes() == before
    for share, template in ((0.95, "So the answer is {}."), (0.01, "So the answer is {}."), (0.2, "Answer: {}")):
        with pytest.raises(ConfigError, match="--flip"):
            flip(records, share, template, seed=0, path=out)


# -- the command --


UNSCORED = "random-from-stage-1"
"""A method that leaves pool rows without a score."""


def argv(files, out: Path, *more: str) -> list[str]:
    return [
        "validate", *files.flags("model", "domain", "pool", "test"), "--out", str(out), "--lora-rank", "2",
        "--token-budget", "1024", "--train.epochs", "1", "--train.batch-size", "8", "--train.max-buckets", "1",
        "--train.learning-rate", "1e-2", "--warmup.epochs", "1", "--warmup.batch-size", "8",
        "--warmup.max-buckets", "1", "--dedup.mode", "off", "--subsets", "4", "--bootstrap", "20",
        "--methods", "ntk,length", UNSCORED,
        "--kernels", "loss", "--flip-in", "domain", "--flip", "0.25", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def validated(files, tmp_path_factory) -> Path:
    """The run directory of a small validation, finished."""
    out = tmp_path_factory.mktemp("validate") / "out"
    assert main(argv(files, out)) == 0
    return out


def results(out: Path) -> dict:
    found = json.loads((out / "results.json").read_text())
    del found["wall_seconds"]
    return found


def test_what_is_written_is_what_was_trained(validated, files):
    found, table = results(validated), pq.read_table(validated / "subsets.parquet").to_pylist()
    scores = pq.read_table(validated / "scores.parquet").to_pydict()
    assert found["sizes"] == {"pool": 40, "domain": 12, "test": 10} and found["subset_size"] == 20
    assert found["steps"] == {"subset": 4, "tenth": 2}
    assert [row["score"] for row in found["unjudged"]] == [UNSCORED]
    assert "values 16 of 40 examples" in found["unjudged"][0]["why"]
    assert set(scores) == {"id", "source", "ntk (loss)", "length"} and scores["id"][0] == "cube-0"
    assert [(row["subset"], row["seed"]) for row in table] == [(k, seed) for seed in (0, 1) for k in range(4)]
    assert all(len(row["rows"]) == 20 and row["rows"] == sorted(set(row["rows"])) for row in table)
    losses = np.asarray([row["nll"] for row in table]).reshape(2, 4)
    assert len({row["run"] for row in table}) == 8 and len(np.unique(losses)) == 8
    for row in found["scores"]:  # LDS by hand from what is on disk
        sums = [sum(scores[row["score"]][j] for j in entry["rows"]) for entry in table[:4]]
        wanted = scipy.stats.spearmanr(sums, -losses.mean(axis=0)).statistic
        assert row["lds"]["value"] == pytest.approx(wanted, abs=1e-9)
    assert found["ceiling"]["between_seeds"] == pytest.approx(scipy.stats.spearmanr(*losses).statistic, abs=1e-9)
    assert {(row["score"], row["tenth"]) for row in found["leave_in"]} == {
        (name, place) for name in ("ntk (loss)", "length") for place in ("best", "middle", "worst")
    }
    flipped = found["flipped"]["ntk (loss)"]
    assert (flipped["flipped"], flipped["able"], flipped["examples"]) == (3, 12, 12) and 0 <= flipped["auc"] <= 1
    page = (validated / "report.html").read_text()
    assert "LDS" in page and UNSCORED in page and "Caveats" in page
    assert len((validated / "metrics.jsonl").read_text().splitlines()) == 8 + 1 + 6


def test_a_subset_is_trained_and_measured_as_by_hand(validated, files):
    """Subset 2 of seed 1: the study's engine on domain and rows is `finetune` and `evaluate` on files of them."""
    row = pq.read_table(validated / "subsets.parquet").to_pylist()[6]
    lines = Path(files.pool).read_text().splitlines(keepends=True)
    given = validated.parent / "given.jsonl"
    given.write_text("".join(lines[j] for j in row["rows"]))
    train = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-2, "buckets": buckets(validated, row["run"])}
    tuned = validated.parent / "tuned"
    ntkjax.finetune(model=files.model, lora_rank=2, domain=files.domain, auxiliary=str(given), out=str(tuned), seed=1,
                    token_budget=1024, train=train, progress=False)  # fmt: skip
    measured = ntkjax.evaluate(model=files.model, adapter=str(tuned / "adapter"), test=files.test, token_budget=1024,
                               out=str(validated.parent / "measured"), progress=False)  # fmt: skip
    assert np.mean([outcome.nll for outcome in measured.outcomes]) == pytest.approx(row["nll"], rel=1e-5)


def buckets(out: Path, run: str) -> tuple[int, ...]:
    return tuple(json.loads((out / "runs" / run / "asked.json").read_text())["key"]["train"]["buckets"])


def test_a_run_stopped_at_many_points_ends_the_same(validated, files, stopped, tmp_path):
    out = tmp_path / "out"
    for name, at in (("choose", 2), ("evaluate_on", 2), ("train_on", 4), ("write_json", 5), ("evaluate_on", 7)):
        with stopped(study_run, name, at):
            assert main(argv(files, out)) == 130, name
        assert not (out / "results.json").exists()
    assert main(argv(files, out)) == 0
    assert results(out) == results(validated)
    for name in ("scores.parquet", "subsets.parquet"):
        assert pq.read_table(out / name) == pq.read_table(validated / name)


@pytest.mark.slow
def test_a_run_killed_ends_the_same(validated, files, jobs, tmp_path):
    out = tmp_path / "out"
    words = [sys.executable, "-m", "ntkjax", *argv(files, out)]
    for begun in (2, 9):  # trainings that have begun when the kill comes
        process = subprocess.Popen(words, env=jobs.environment(tmp_path), stdout=subprocess.DEVNULL)
        while process.poll() is None and len(list((out / "runs").glob("*"))) < begun:
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    subprocess.run(words, env=jobs.environment(tmp_path), stdout=subprocess.DEVNULL, check=True)
    assert results(out) == results(validated)
    assert pq.read_table(out / "subsets.parquet") == pq.read_table(validated / "subsets.parquet")


def test_more_of_the_same_adds_to_what_there_is(validated, files, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(validated, out)
    config = out / "config.yaml"
    config.write_text(config.read_text().replace(str(validated), str(out)))
    trained, real = [], study_run.train_on

    def counted(*args, **kwargs):
        trained.append(kwargs["out"])
        return real(*args, **kwargs)

    monkeypatch.setattr(study_run, "train_on", counted)
    assert main(argv(files, out)) == 0 and trained == []
    assert main([*argv(files, out, "--subsets", "5", "--leave-in", "0"), "--methods", "length,random"]) == 0
    assert len(trained) == 2
    before, after = (pq.read_table(folder / "subsets.parquet").to_pylist() for folder in (validated, out))
    assert [row for row in after if row["subset"] < 4] == before
    assert "subsets: 5" in config.read_text()
    assert {row["score"] for row in results(out)["scores"]} == {"length", "random"}


def test_without_the_domain_and_by_failing_trainings(files, tmp_path, monkeypatch):
    seen, real = [], study_run.train_on

    def watched(model, params, domain, auxiliary, config, **kwargs):
        seen.append((len(domain), auxiliary))
        if len(seen) == 3:
            raise FloatingPointError("not finite")
        return real(model, params, domain, auxiliary, config, **kwargs)

    monkeypatch.setattr(study_run, "train_on", watched)
    flags = ("--with-domain", "off", "--reseeds", "0", "--leave-in", "0", "--alpha", "0.25", "--flip", "0")
    words = [*argv(files, tmp_path / "out", *flags), "--methods", "length"]
    assert main(words) == 1
    found = results(tmp_path / "out")
    assert seen == [(10, None)] * 4 and found["steps"]["subset"] == 2 and found["ceiling"] is None
    assert found["subsets_done"] == 3 and found["failures"][0]["message"] == "not finite"
    assert main(words) == 0 and len(seen) == 5  # tried again, alone
    assert results(tmp_path / "out")["subsets_done"] == 4


def test_the_dry_run_counts_the_trainings_that_there_are(validated, files, tmp_path, capsys):
    out = tmp_path / "none"
    assert main(argv(files, out, "--dry-run")) == 0
    said = capsys.readouterr().out
    # ntk, length and the one without all scores: 2 x 4 subsets, the domain alone, 3 tenths each
    assert f"{8 + 1 + 9} trainings at most" in said and not out.exists()
    trained = [json.loads(p.read_text())["passes"]["training"] for p in validated.glob("runs/*/trained.json")]
    told = ntkjax.validate(
        model=files.model, lora_rank=2, domain=files.domain, pool=files.pool, test=files.test, out=str(out),
        dry_run=True, subsets=4, methods=("ntk", "length"), kernels=("loss",), dedup={"mode": "off"}, leave_in=0,
        train={"epochs": 1, "batch_size": 8, "max_buckets": 1}, progress=False,
    )  # fmt: skip
    (subsets,) = (part for part in told.parts if part.name == "random subsets")
    assert (subsets.count, subsets.steps) == (8, 4)
    assert subsets.tokens == pytest.approx(sum(sorted(trained)[-8:]), rel=0.1)


def test_what_cannot_be_validated_is_told(files, tmp_path, capsys):
    words = argv(files, tmp_path / "out")
    cases = {
        ("--test", files.domain): "each of its 12 examples stands in --domain",
        ("--alpha", "0.001"): "a subset takes 0",
        ("--subsets", "3"): "subsets must be at least 4",
        ("--method", "ntk", "--kernel", "trace"): "name them with --kernels",
        ("--diversity", "facility-location"): "leave it out",
        ("--train.patience", "2"): "equally many steps",
        ("--methods", "nonsense"): "unknown selection method 'nonsense'",
        ("--kernels", "nonsense"): "unknown kernel 'nonsense'",
        ("--flip", "1.5"): "flip must be",
        ("--with-domain", "off", "--train.domain-share", "0.5"): "--with-domain is off",
    }
    for flags, message in cases.items():
        assert main([*words, *flags]) == 2, flags
        assert message in capsys.readouterr().err, flags
        assert not (tmp_path / "out").exists()


def test_what_is_known_to_help_is_judged_as_a_score(validated, files, tmp_path):
    out, truth = tmp_path / "out", tmp_path / "truth.json"
    shutil.copytree(validated, out)
    config = out / "config.yaml"
    config.write_text(config.read_text().replace(str(validated), str(out)))
    table = pq.read_table(validated / "subsets.parquet").to_pylist()
    losses = np.asarray([row["nll"] for row in table]).reshape(2, 4).mean(axis=0)
    best, worst = table[int(losses.argmin())]["rows"], table[int(losses.argmax())]["rows"]
    useful = sorted(set(best) - set(worst))
    truth.write_text(json.dumps({"useful_ids": [f"cube-{row}" for row in useful]}))
    flags = ("--truth", str(truth), "--leave-in", "0", "--flip", "0", "--methods", "length")
    assert main([*argv(files, out), *flags]) == 0
    (row,) = (row for row in results(out)["scores"] if row["score"] == "truth")
    counts = [len(set(useful) & set(entry["rows"])) for entry in table[:4]]
    wanted = scipy.stats.spearmanr(counts, -losses).statistic
    assert wanted > 0 and row["lds"]["value"] == pytest.approx(wanted, abs=1e-9)
    assert sum(pq.read_table(out / "scores.parquet").to_pydict()["truth"]) == len(useful)
    assert main([*argv(files, out), *flags[:1], str(tmp_path / "none.json")]) == 2


def test_scores_that_need_the_warm_up_are_named_without_it(files, tmp_path):
    words = argv(files, tmp_path / "out", "--skip-warmup", "--leave-in", "0", "--reseeds", "0", "--flip", "0")
    assert main([*words, "--methods", "less,length"]) == 0
    (row,) = results(tmp_path / "out")["unjudged"]
    assert row["score"] == "less" and "--skip-warmup" in row["why"]


def test_a_method_that_has_no_use_for_kernels_is_scored_once():
    options = SelectorOptions(stage1="off", representation="ngrams")
    inputs = {"model": ModelOptions("m"), "domain": ("d",), "pool": ("p",), "test": ("t",), "out": "o"}
    config = ValidateConfig(**inputs, methods=("parts",), select=options, skip_warmup=True)
    assert [arm.label for arm in scores_of(config)] == ["parts"]
    config = dataclasses.replace(config, methods=("parts,loss-drop",), select=SelectorOptions(stage1="off"))
    arms = scores_of(config)
    assert [arm.label for arm in arms] == ["parts (sum_logits)", "parts (loss)", "loss-drop"]
    assert impossible(config, arms[0]) is None and "--skip-warmup" in str(impossible(config, arms[2]))


def test_what_cannot_be_flipped_or_is_no_list_is_said_before_anything_is_scored(files, tmp_path, capsys):
    truth = tmp_path / "truth.json"
    truth.write_text(json.dumps({"useful_ids": "cube-1"}))
    for flags, said in ((("--flip", "0.001"), "asks for 0 of"), (("--truth", str(truth)), "is 'cube-1'")):
        assert main(argv(files, tmp_path / "out", *flags, "--dry-run")) == 2
        assert said in capsys.readouterr().err


def test_the_help_shows_the_defaults_of_this_command(capsys):
    with pytest.raises(SystemExit):
        main(["validate", "--method", "ntk", "--help"])
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "off: score the whole pool. (default: off)" in said  # select: on
