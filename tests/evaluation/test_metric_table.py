"""One entry in the table of metrics is enough: a metric from outside is summed up, compared, tabled and drawn."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

import ntkjax
from ntkjax.commands.adapt.report import difference_rows, headline, method_rows, write_adaptation
from ntkjax.commands.evaluate import differences
from ntkjax.commands.study import tables
from ntkjax.errors import UserError
from ntkjax.evaluation import METRICS, Metric, Outcome, compare, summarise, values
from ntkjax.evaluation.metrics import means
from ntkjax.pipeline.compare import compare_methods, summarise_method

PACKAGE = Path(ntkjax.__file__).parent
TOY = Metric(
    "response_nll",
    "NLL of the whole response",
    lambda outcome: None if outcome.nll is None else outcome.nll * (outcome.nll_tokens or 0),
    unit="nats per response",
    higher_is_better=False,
)
LABEL = "NLL of the whole response (nats/response)"


@pytest.fixture
def toy(monkeypatch) -> Metric:
    monkeypatch.setitem(METRICS, TOY.name, TOY)
    return TOY


def outcome(row: int, nll: float | None, **more) -> Outcome:
    return Outcome(f"x{row}", "s", nll=nll, nll_tokens=None if nll is None else 2 + row, **more)


def run(shift: float, **more) -> list[Outcome]:
    return [outcome(row, float(nll) + shift, **more) for row, nll in enumerate(np.linspace(0.1, 0.9, 8))]


def results_of(outcomes) -> dict:
    """What `adapt` puts into results.json, as far as its tables read it."""
    return {
        "methods": {name: summarise_method(runs, seed=0) for name, runs in outcomes.items()},
        "comparisons": compare_methods(outcomes, [("random", "base")], seed=0),
        "runs": [{"arm": "random", "seed": seed, "steps": 3, "curve": [[0, 1.0], [1, 0.5]]} for seed in (0, 1)],
        "selections": {},
        "duplicates": None,
    }


def test_it_is_in_the_summary_of_an_evaluation(toy):
    outcomes = [*run(0.0), outcome(8, None)]
    entry = summarise(outcomes)["metrics"][toy.name]
    by_hand = np.array([nll * (2 + row) for row, nll in enumerate(np.linspace(0.1, 0.9, 8))])
    assert entry["n"] == 8 and entry["mean"] == pytest.approx(by_hand.mean())
    assert entry["interval"][0] < entry["mean"] < entry["interval"][1]
    assert means(outcomes)[toy.name] == pytest.approx(by_hand.mean())
    assert toy.name not in summarise([outcome(0, None)])["metrics"]


def test_two_evaluations_are_compared_in_it(toy):
    second = [outcome(row, 0.1 * (row % 3)) for row in range(8)]
    rows = {row["key"]: row for row in differences(run(0.0), second, seed=0)}
    assert set(rows) == {"nll", toy.name} and rows[toy.name]["mcnemar"] is None
    nll = [0.1 * (row % 3) - nll for row, nll in enumerate(np.linspace(0.1, 0.9, 8))]
    by_hand = np.mean([nll[row] * (2 + row) for row in range(8)])
    assert rows[toy.name]["difference"]["estimate"] == pytest.approx(by_hand)


def test_it_is_in_the_tables_and_the_report_of_adapt(toy, tmp_path):
    outcomes = {"base": [run(1.0)], "random": [run(0.0), run(0.1)]}
    results = results_of(outcomes)
    rows = method_rows(results)
    mean = np.mean([values(one, toy).mean() for one in outcomes["random"]])  # pyright: ignore[reportOptionalMemberAccess]
    assert rows[1][LABEL].startswith(f"{mean:.3f} ± ")
    (difference,) = [row for row in difference_rows(results) if row["metric"] == LABEL]
    assert difference["difference [95% interval]"].startswith("-") and difference["McNemar p, each seed"] is None
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    (tmp_path / "versions.json").write_text("{}")
    write_adaptation(tmp_path, results)
    page = (tmp_path / "report.html").read_text()
    assert LABEL in page and f"{mean:.3f} ± " in page
    assert LABEL in (tmp_path / "results.md").read_text()
    assert f"random,2,{toy.name},{mean}," in (tmp_path / "tables" / "main.csv").read_text()


def test_it_is_in_the_tables_of_a_study(toy):
    test = summarise_method([run(0.0), run(0.1)], seed=0)
    place = {"domain": "d", "size": "all", "budget": 4}
    cell = place | {"arm": "random", "metric": "nll", "test": test, "means": {}, "runs": 2, "failed": 0}
    results = {"cells": [cell], "comparisons": []}
    (row,) = tables.condition_table(results, place)
    assert row[LABEL] == f"{test[toy.name]['mean']:.3f} ± {test[toy.name]['sd']:.3f}"
    assert {row["metric"] for row in tables.numbers(results)} == {"nll", toy.name}
    # As the metric that stands first: its label, unit and decimals.
    compared = place | {"arm": "random", "reference": "base", "role": "random", "metric": toy.name, "p": 0.5}
    compared |= {"p_holm": 0.5, "difference": 1.0, "low": 0.5, "high": 1.5, "per_seed": [1.0]}
    (row,) = tables.difference_table({"comparisons": [compared]})
    assert row["metric"] == LABEL and row["difference [95% interval]"] == "+1.0000 [0.5000, 1.5000]"
    (row,) = tables.main_table({"cells": [cell | {"metric": toy.name}]})
    assert row[f"d: {LABEL}"].startswith(f"{test[toy.name]['mean']:.3f}")


def test_the_first_metric_that_all_methods_have_stands_first(monkeypatch):
    with_choices = {"base": [run(0.0, correct_raw=True, correct_norm=False)], "random": [run(0.0)]}
    first = headline({"methods": {name: summarise_method(runs, seed=0) for name, runs in with_choices.items()}})
    assert first is METRICS["nll"]
    norm_alone = {"base": [[Outcome("x", "s", correct_norm=True)] * 3]}
    assert headline(results_of(norm_alone)) is None
    monkeypatch.setitem(METRICS, "accuracy_norm", dataclasses.replace(METRICS["accuracy_norm"], headline=True))
    assert headline(results_of(norm_alone)) is METRICS["accuracy_norm"]


def test_directions_units_and_decimals():
    accuracy, nll = METRICS["accuracy"], METRICS["nll"]
    assert accuracy.better(0.5) > accuracy.better(0.4) and nll.better(0.4) > nll.better(0.5)
    assert (accuracy.text(0.4567), nll.text(0.45678)) == ("45.7", "0.4568")
    assert (accuracy.axis_label, accuracy.difference_unit) == ("accuracy (%)", "points")
    assert (nll.axis_label, nll.column_label) == ("response NLL (nats per token)", "response NLL (nats/token)")
    assert Metric("words", "words", lambda _: 1.0).axis_label == "words"


def test_mcnemar_is_for_values_that_are_right_or_wrong(monkeypatch):
    """A share that is not 0 or 1 for each example (F1, say) has an interval and no test."""
    monkeypatch.setitem(METRICS, "f1", Metric("f1", "F1", lambda o: o.nll, share=True))
    outcomes = {"base": [run(0.1, correct_raw=False)], "random": [run(0.0, correct_raw=True)]}
    tested = {row["metric"]: row["p_mcnemar"] for row in compare_methods(outcomes, [("random", "base")], seed=0)}
    assert tested["f1"] is None and tested["nll"] is None
    assert tested["accuracy"] == [pytest.approx(2 * 0.5**8)]


def test_a_value_that_is_not_finite_is_refused(monkeypatch):
    broken = Metric("broken", "a broken metric", lambda o: float("nan"))
    for call in (lambda: values(run(0.0), broken), lambda: compare(run(0.0), run(0.0), broken)):
        with pytest.raises(UserError, match="'x0': a broken metric is nan"):
            call()
    with pytest.raises(UserError, match="'x0'"):
        compare([{"id": "x0", "nll": float("inf")}], [{"id": "x0", "nll": 1.0}], "nll")


def test_outcomes_read_back_as_json_have_the_same_values(toy):
    kept = [json.loads(json.dumps(o.to_json())) for o in run(0.0)]
    assert compare(kept, run(0.0), toy)["difference"]["estimate"] == 0


# -- nobody asks a metric for its name --


def named(source: str) -> list[int]:
    """Lines that hold a metric's name, or the field of its values, as a string."""
    known = set(itertools.chain.from_iterable((metric.name, metric.key) for metric in METRICS.values()))
    nodes = ast.walk(ast.parse(source))
    return [node.lineno for node in nodes if isinstance(node, ast.Constant) and node.value in known]


def test_what_compares_and_reports_names_no_metric():
    folders = ("pipeline", "pipeline/study", "report", "commands/adapt", "commands/study")
    files = [path for folder in folders for path in (PACKAGE / folder).glob("*.py")]
    files.append(PACKAGE / "commands/evaluate.py")
    assert len(files) > 30
    faults = {path.name: lines for path in files if (lines := named(path.read_text(encoding="utf-8")))}
    assert not faults, "read the metric from ntkjax/evaluation/metrics.py instead"


@pytest.mark.parametrize("line", ['x = metric == "nll"', 'f = {"accuracy": 1}', 'getattr(o, "correct_raw")'])
def test_a_metric_that_is_named_is_found(line):
    assert named(f"\n{line}\n") == [2]
