"""`explain` of runs of adapt and study, and of selections from parts."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

import ntkjax
import ntkjax.commands.explain.report as report
from ntkjax.cli import main
from ntkjax.errors import ConfigError

SHOWN = ["--k", "3", "--chosen", "4", "--nearly", "4", "--rejected", "4"]
METHODS = [
    "dsir",
    {"label": "alignment", "method": "ntk", "kernel": "loss"},
    {"label": "turns", "method": "parts", "kernel": "loss", "algorithm": "round-robin", "trajectory": "epochs"},
    {"label": "words", "method": "parts", "representation": "ngrams", "algorithm": "max"},
    {"label": "cosine", "method": "gradient-cosine"},
]


@pytest.fixture(scope="module")
def small_study(load_file):
    return load_file(Path(__file__).with_name("small_study.py"))


@pytest.fixture(scope="module")
def study(files, small_study, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("explained")
    options = {"select": {"stage1": "off", "sketch_size": 256}, "budgets": [6, 8], "select_only": True}
    assert small_study.run(files, folder, methods=METHODS, learning_rates=1e-2, **options) == 0
    return folder / "out"


def explain(run: Path, *flags: str) -> int:
    return main(["explain", str(run), *SHOWN, *flags])


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def page_of(capsys, name: str = "") -> Path:
    """The folder of the page that was written; its selection is called ``name``."""
    said = capsys.readouterr().out.strip().splitlines()
    assert name in said[0]
    return Path(said[-1].removeprefix("page: ")).parent


@pytest.fixture
def pages(monkeypatch) -> list:
    """What the pages hold, in the order in which they are written."""
    made, real = [], report.write_explanation
    monkeypatch.setattr(report, "write_explanation", lambda path, page: (made.append(page), real(path, page)))
    return made


def selection_of(study: Path, arm: str, budget: int = 6, seed: int = 0) -> Path:
    """The folder of one selection, by what its run asked for."""
    for asked in study.glob("runs/*/asked.json"):
        made = json.loads(asked.read_text())
        if (made["arm"], made["budget"], made["seed"]) == (arm, budget, seed):
            return study / json.loads((asked.parent / "selection.json").read_text())["folder"]
    raise AssertionError((arm, budget, seed))


def check_sums(out: Path) -> None:
    records = lines(out / "explained.jsonl")
    scores = pq.read_table(out.parent / "scores.parquet")["score"].to_pylist()
    for record in records:
        parts = np.array(record["parts"])
        for values in (parts, [part["part"] for part in record["by_layer"]]):
            assert abs(np.sum(values) - scores[record["row"]]) < 1e-4 * np.abs(parts).sum()


def test_the_first_arm_that_a_study_proposes(study, pages, capsys):
    assert explain(study) == 0
    out = page_of(capsys, "alignment; ball, all examples, N = 6; seed 0")
    assert out == selection_of(study, "alignment") / "explain"
    check_sums(out)
    facts = dict(pages[0].facts)
    assert facts["run"] == f"{study}: alignment; ball, all examples, N = 6; seed 0" and facts["algorithm"] == "mean"
    assert pages[0].scale[0].startswith("What it is. The score of an example is the inner product of its loss gradient")
    assert {record["group"] for record in lines(out / "explained.jsonl")} == {"chosen", "nearly", "rejected"}


def test_one_selection_by_several_names(study, tmp_path, capsys):
    """The directory is the same run's whichever options name the selection; another selection's is refused."""
    first = page_of(capsys, "alignment; ball, all examples, N = 6; seed 0") if explain(study) == 0 else None
    assert first is not None and explain(study, "--arm", "alignment", "--of-seed", "0") == 0
    assert page_of(capsys, "alignment; ball, all examples, N = 6; seed 0") == first
    assert "arm: alignment" in (first / "config.yaml").read_text()
    assert explain(Path(os.path.relpath(study))) == 0  # another spelling of the path
    out = str(tmp_path / "one")
    assert explain(study, "--arm", "alignment", "--out", out) == 0
    assert explain(study, "--arm", "dsir", "--out", out) == 2
    assert "scores.parquet was" in capsys.readouterr().err


def test_any_arm_budget_and_seed(study, capsys):
    assert explain(study, "--arm", "alignment", "--of-budget", "8", "--of-seed", "1") == 0
    out = page_of(capsys, "alignment; ball, all examples, N = 8; seed 1")
    assert out == selection_of(study, "alignment", 8, 1) / "explain"
    check_sums(out)
    assert explain(study, "--arm", "dsir") == 0
    said = capsys.readouterr().out
    assert "no parts by token: its scores are not derivatives along a direction" in said


def test_selections_from_parts_are_linked_by_what_they_compared(study, files, pages, capsys):
    """The nearest of the domain are those that the similarities say; the score is the highest of them."""
    for arm in ("turns", "words"):
        assert explain(study, "--arm", arm) == 0
        said = capsys.readouterr().out
        assert "as the selection compared them; pool examples among all 40 pool examples" in said
        out = selection_of(study, arm) / "explain"
        scores = pq.read_table(out.parent / "scores.parquet")["score"].to_pylist()
        records = lines(out / "explained.jsonl")
        assert len(records) == 12 and all(len(record["near"]) == 3 for record in records)
        for record in records:
            assert record["near"][0]["cosine"] == pytest.approx(scores[record["row"]], abs=1e-5)
        facts = dict(pages[-1].facts)
        names = {"turns": ("gradients", "round-robin"), "words": ("ngrams", "max")}[arm]
        assert (facts["representation"], facts["algorithm"]) == names and facts["similarity"] == "cosine"
        assert "what the algorithm " + names[1] in pages[-1].scale[0] and names[0] in pages[-1].scale[0]
    pulled = {item["id"] for question in lines(out / "domain.jsonl") for item in question["pulled"]}
    assert pulled <= {json.loads(line)["id"] for line in Path(files.pool).read_text().splitlines()}


def test_questions_are_answered_from_what_a_study_shares(study, files, tmp_path, capsys):
    pool = lines(Path(files.pool))
    queries = tmp_path / "queries.jsonl"
    queries.write_text(json.dumps({**pool[31], "id": "asked"}) + "\n")
    assert main(["explain", "--index", str(study), "--arm", "cosine", "--queries", str(queries), "--k", "3"]) == 0
    said = capsys.readouterr().out
    assert "gradients of the kernel loss, sketched to 256, 40 pool examples" in said
    first = said.split("asked:")[1].splitlines()[3]
    assert "cube-31" in first and "1.0" in first


def test_what_is_not_there_is_said(study, files, small_study, tmp_path, capsys):
    for flags, words in (
        ({"arm": "turn"}, ["--arm turn", "dsir, alignment, turns, words, cosine"]),
        ({"of_domain": "law"}, ["--of-domain law", "ball"]),
        ({"of_budget": 7}, ["--of-budget 7", "6, 8"]),
        ({"of_seed": 9}, ["--of-seed 9", "0, 1"]),
        ({"of_size": "3"}, ["--of-size 3", "all"]),
    ):
        with pytest.raises(ConfigError) as caught:
            ntkjax.explain(run=str(study), **flags)
        assert all(word in str(caught.value) for word in words), caught.value
    changed = yaml.safe_load((study / "study.yaml").read_text()) | {"select": {"stage1": "off", "sketch_size": 128}}
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "config.yaml").write_bytes((study / "config.yaml").read_bytes())
    (moved / "study.yaml").write_text(yaml.safe_dump(changed))
    with pytest.raises(ConfigError, match="is not there: it was not made yet, or its model or data have changed"):
        ntkjax.explain(run=str(moved))
    plain = tmp_path / "select"
    plain.mkdir()
    (plain / "config.yaml").write_text("command: select\nconfig: {}\n")
    with pytest.raises(ConfigError, match="holds one selection; leave out --arm"):
        ntkjax.explain(run=str(plain), arm="ntk")


@pytest.mark.slow
def test_an_adaptation(files, tmp_path, capsys):
    quick = ["--lora-rank", "2", "--token-budget", "1024", "--train.steps", "2", "--warmup.batch-size", "4"]
    argv = ["adapt", *files.flags("model", "domain", "pool", "test"), "--n", "6", "--seeds", "2", *quick]
    out = tmp_path / "run"
    assert main([*argv, "--arms", "random", "ntk-selector", "--dedup.mode", "off", "--out", str(out)]) == 0
    capsys.readouterr()
    assert explain(out, "--of-seed", "1") == 0
    check_sums(page_of(capsys, "ntk-selector; domain, all examples, N = 6; seed 1"))
    assert explain(out, "--arm", "random") == 0
