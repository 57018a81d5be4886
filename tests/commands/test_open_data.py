"""Data without choices, or with choices in some records: the likelihood alone, in every command, without a flag."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from ntkjax.cli import main
from ntkjax.commands.adapt.report import difference_rows, headline, markdown, method_rows
from ntkjax.evaluation import Outcome, read_outcomes
from ntkjax.evaluation.summary import describe_choices
from ntkjax.pipeline.compare import compare_methods, summarise_method
from ntkjax.pipeline.study.tables import choices_line

NONE = "no example has choices and an answer: there is no accuracy over choices"
QUICK = ["--token-budget", "1024", "--lora-rank", "2"]
TRAIN = ["--train.epochs", "1", "--train.batch-size", "4", "--warmup.batch-size", "4"]


def without_choices(path: str, out: Path, keep: int = 0) -> str:
    """The records of a file; all but the first ``keep`` lose answer and choices."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    for row in rows[keep:]:
        for name in ("answer", "choices"):
            row.pop(name, None)
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(out)


@pytest.fixture(scope="module")
def open_files(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("open")
    opened = {
        name: without_choices(getattr(files, name), folder / f"{name}.jsonl") for name in ("domain", "test", "dev")
    }
    return dataclasses.replace(files, **opened)


def test_describe_choices():
    assert describe_choices(4, 4) == ""
    assert describe_choices(0, 4) == NONE
    assert describe_choices(3, 4).startswith("3 of 4 examples have choices and an answer")


def test_evaluate_says_so_in_one_line(open_files, tmp_path, capsys):
    assert main(["evaluate", *open_files.flags("model", "test"), *QUICK, "--out", str(tmp_path / "a")]) == 0
    said = capsys.readouterr().out
    assert said.splitlines().count(NONE) == 1 and "response NLL" in said and "accuracy, raw" not in said
    summary = json.loads((tmp_path / "a" / "evaluation.json").read_text())["summary"]
    assert summary["choices"] is None and summary["accuracy"] is None and summary["likelihood"]["n"] == 10
    # Against an earlier run: the likelihoods are compared.
    again = ["--against", str(tmp_path / "a"), "--out", str(tmp_path / "b")]
    assert main(["evaluate", *open_files.flags("model", "test"), *QUICK, *again]) == 0
    found = json.loads((tmp_path / "b" / "evaluation.json").read_text())["against"]["differences"]
    assert [row["key"] for row in found] == ["nll"]


def test_evaluate_of_records_of_which_some_have_choices(files, tmp_path, capsys):
    test = without_choices(files.test, tmp_path / "test.jsonl", keep=3)
    assert main(["evaluate", *files.flags("model"), "--test", test, *QUICK, "--out", str(tmp_path / "a")]) == 0
    assert "3 of 10 examples have choices and an answer" in capsys.readouterr().out
    outcomes = read_outcomes(tmp_path / "a" / "outcomes.jsonl")
    assert [o.correct_raw is not None for o in outcomes] == [True] * 3 + [False] * 7
    assert all(o.nll is not None for o in outcomes)


def test_the_tables_of_adapt_do_with_the_likelihood():
    rng = np.random.default_rng(0)
    run = lambda shift: [Outcome(f"x{i}", "s", nll=float(v + shift), nll_tokens=5) for i, v in enumerate(rng.random(9))]
    outcomes = {"base": [run(1.0)], "random": [run(0.0), run(0.0)]}
    results = {
        "methods": {name: summarise_method(runs, seed=0) for name, runs in outcomes.items()},
        "comparisons": compare_methods(outcomes, [("random", "base")], seed=0),
        "runs": [],
        "selections": {},
        "majority_accuracy": None,
        "examples": {"all": 9, "with_choices": 0},
    }
    assert getattr(headline(results), "name", None) == "nll" and choices_line(results["examples"]) == NONE
    rows = method_rows(results)
    assert [list(row)[:3] for row in rows] == [["method", "response NLL (nats/token)", "95% interval"]] * 2
    low, high = map(float, rows[1]["95% interval"].split(" to "))
    assert 0 < low < np.mean([o.nll or 0.0 for r in outcomes["random"] for o in r]) < high < 1
    (difference,) = difference_rows(results)
    assert difference["metric"] == "response NLL (nats/token)" and difference["McNemar p, each seed"] is None
    assert NONE[1:] in markdown(results) and "accuracy (%)" not in markdown(results)


@pytest.mark.slow
def test_adapt(open_files, tmp_path, capsys):
    inputs = open_files.flags("model", "domain", "pool", "test", "dev")
    out = tmp_path / "run"
    arms = ["--arms", "base", "domain-only", "random", "--n", "6", "--seeds", "1"]
    assert main(["adapt", *inputs, *arms, *QUICK, *TRAIN, "--out", str(out)]) == 0
    assert NONE in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert all("nll" in entry and "accuracy" not in entry for entry in results["methods"].values())
    assert {row["metric"] for row in results["comparisons"]} == {"nll"}
    assert results["examples"] == {"all": 10, "with_choices": 0} and results["majority_accuracy"] is None
    page = (out / "report.html").read_text()
    assert "response NLL (nats per token)" in page and "commonest answer" not in page


@pytest.mark.slow
def test_adapt_with_answers_that_are_generated(files, tmp_path, capsys):
    """Answers without choices: accuracy of generated answers stands first."""
    rows = [json.loads(line) for line in Path(files.test).read_text().splitlines()]
    for row in rows:
        del row["choices"]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    inputs = [*files.flags("model", "domain", "pool"), "--test", str(tmp_path / "test.jsonl")]
    flags = ["--arms", "base", "random", "--n", "6", "--seeds", "1", "--generation", "--max-new-tokens", "8"]
    assert main(["adapt", *inputs, *flags, *QUICK, *TRAIN, "--out", str(tmp_path / "run")]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert getattr(headline(results), "name", None) == "accuracy_generated"
    assert "accuracy, generated (%)" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.slow
def test_study(study, open_files, tmp_path, capsys):
    """Learning rates are tuned, baselines picked and differences tested by the likelihood."""
    methods = [{"label": "length", "method": "length", "learning_rates": [1e-3, 1e-2]}]
    assert study.run(open_files, tmp_path, methods=methods, warmup=None) == 0
    assert f"ball: {NONE}" in capsys.readouterr().out
    results = study.results(tmp_path / "out")
    cells = {cell["arm"]: cell for cell in results["cells"]}
    assert {cell["metric"] for cell in cells.values()} == {"nll"}
    assert all(len(cell["test"]["nll"]["per_seed"]) == cell["runs"] for cell in cells.values())
    losses = {trial["learning_rate"]: trial["dev_loss"] for trial in results["trials"]}
    assert cells["length"]["learning_rate"] == min(losses, key=losses.__getitem__)
    for row in results["comparisons"]:
        assert row["low"] <= row["difference"] <= row["high"] and 0 <= row["p"] <= 1
    assert {row["arm"] for row in results["comparisons"] if row["p_holm"] is not None} >= {"length"}
    on_dev = {arm: np.mean([cell["means"]["dev_nll"]["mean"]]) for arm, cell in cells.items() if arm != "length"}
    assert results["focus"] == [] or results["strongest"][0]["arm"] == min(on_dev, key=on_dev.__getitem__)
    assert results["majority"] == {"ball": None} and results["choices"] == {"ball": {"all": 10, "with_choices": 0}}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "response NLL (nats/token)" in page and "commonest answer" not in page
