"""`ntkjax study` on a tiny model: every run once, what it leaves, and nothing done twice."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

import ntkjax
import ntkjax.commands.study.command as study_command
from ntkjax.cli import main
from ntkjax.commands.study.command import grid_of
from ntkjax.commands.study.spec import spec_of
from ntkjax.evaluation import METRICS, Metric, read_outcomes
from ntkjax.models import load_lm

# -- what a study leaves --


def test_every_arm_takes_equal_steps_at_its_own_learning_rate(study, done):
    cells = {cell["arm"]: cell for cell in study.results(done)["cells"]}
    assert list(cells) == ["base", "domain-only", "domain-only-equal-steps", "random", "dsir", "alignment"]
    assert {arm: cell["means"].get("steps", {}).get("values") for arm, cell in cells.items()} == {
        "base": None, "domain-only": [3, 3], "domain-only-equal-steps": [5, 5], "random": [5, 5], "dsir": [5, 5],
        "alignment": [5, 5],
    }  # fmt: skip
    trials = study.results(done)["trials"]
    assert [(trial["arm"], trial["status"]) for trial in trials] == [("alignment", "done")] * 2
    losses = {trial["learning_rate"]: trial["dev_loss"] for trial in trials}
    best, tuned = min(losses, key=losses.__getitem__), cells["alignment"]
    assert set(losses) == {1e-3, 1e-2} and losses[1e-3] != losses[1e-2]
    assert tuned["learning_rate"] == best and tuned["means"]["dev_loss"]["values"][0] == losses[best]


def test_outcomes_tables_and_the_long_form_agree(study, done):
    rows = pq.read_table(done / "results.parquet").to_pylist()
    final = [row for row in rows if row["role"] == "run" and row["metric"] == "test_accuracy"]
    assert len(final) == 1 + 5 * 2 and {row["status"] for row in final} == {"done"}
    for row in final:
        outcomes = read_outcomes(done / "runs" / row["run"] / "outcomes.jsonl")
        assert len(outcomes) == 10 and row["value"] == pytest.approx(np.mean([o.correct_raw for o in outcomes]))
    cells = {cell["arm"]: cell for cell in study.results(done)["cells"]}
    for arm, cell in cells.items():
        assert cell["test"]["accuracy"]["per_seed"] == [row["value"] for row in final if row["arm"] == arm]
    assert sum(row["role"] == "trial" for row in rows) == 2
    passes = {r["arm"]: r["value"] for r in rows if r["metric"] == "passes_total" and r["seed"] == 0}
    assert passes["alignment"] > passes["random"] > passes["domain-only"] > 0
    kernels = {row["arm"]: row["kernel"] for row in rows if row["role"] == "run"}
    assert kernels["alignment"] == "sum_logits" and kernels["dsir"] is None


def test_runs_hold_what_was_asked_and_what_was_chosen(done):
    folders = [path for path in (done / "runs").iterdir() if (path / "result.json").exists()]
    assert len(folders) == 11
    for folder in folders:
        asked = json.loads((folder / "asked.json").read_text())
        assert asked["domain"] == "ball" and "key" in asked and not (folder / "training" / "checkpoints").exists()
        if asked["kind"] == "selected":
            chosen = json.loads((folder / "selection.json").read_text())
            assert len(set(chosen["selected"])) == 6 and {"chosen", "just_missed", "lowest"} <= set(chosen["examples"])
            assert (done / chosen["folder"] / "scores.parquet").exists()
    assert len(list((done / "warmups").iterdir())) == 2  # one for each seed, whatever the methods


def test_tables_plots_and_a_page_that_stands_alone(done):
    names = {path.name for path in (done / "tables").iterdir()}
    assert {
        f"{name}.{kind}" for name in ("main", "differences", "cost", "selections") for kind in ("md", "tex", "csv")
    } < names
    assert r"\toprule" in (done / "tables" / "main.tex").read_text()
    assert "alignment" in (done / "tables" / "main.csv").read_text()
    assert {p.name.split("-")[0] for p in (done / "plots").iterdir()} == {"methods", "cost", "overlap"}
    page = (done / "report.html").read_text()
    assert "<img" in page and "http://" not in page and "https://" not in page and "<script" not in page
    for text in ("alignment", "Strongest baseline on dev", "Holm", "Chosen", "Rejected", "Colour of cube"):
        assert text in page


def test_a_metric_from_outside_is_in_the_tables_and_the_report(study, done, files, tmp_path, monkeypatch):
    """One entry of the table of metrics, over runs that are done: nothing is trained or evaluated again."""
    length = lambda outcome: float(len(outcome.gold))
    toy = Metric("answer_length", "length of the answer", length, unit="letters", higher_is_better=False)
    monkeypatch.setitem(METRICS, toy.name, toy)
    calls, out = study.count_calls(monkeypatch), tmp_path / "out"
    shutil.copytree(done, out)
    assert study.run(files, tmp_path) == 0 and calls == {}
    (run_folder, *_) = (path for path in (out / "runs").iterdir() if (path / "result.json").exists())
    mean = np.mean([len(outcome.gold) for outcome in read_outcomes(run_folder / "outcomes.jsonl")])
    page = re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", (out / "report.html").read_text()))
    assert f" {toy.column_label} " in page
    rows = page.partition(f" {toy.column_label} ")[2]
    assert f" {mean:.3f} " in rows
    main_table = (out / "tables" / "main.csv").read_text()
    assert main_table.count(toy.name) == 6 and toy.name not in (done / "tables" / "main.csv").read_text()


def test_comparisons_are_with_random_and_with_a_baseline_picked_on_dev(study, done):
    found = study.results(done)
    strongest = found["strongest"][0]["arm"]
    assert found["focus"] == ["alignment"] and strongest not in ("alignment", None)
    pairs = {(row["arm"], row["reference"]) for row in found["comparisons"]}
    assert {("alignment", "random"), ("alignment", strongest), ("base", "random")} <= pairs
    corrected = {row["arm"] for row in found["comparisons"] if row["p_holm"] is not None}
    assert corrected <= {"random", "dsir", "alignment"} and "alignment" in corrected


def test_list_says_what_there_is_and_does_nothing(study, done, files, tmp_path, capsys, monkeypatch):
    calls = study.count_calls(monkeypatch)
    out = tmp_path / "out"
    shutil.copytree(done, out)
    run_folder = next(p for p in (out / "runs").iterdir() if _arm(p) == "dsir" and (p / "result.json").exists())
    seed = json.loads((run_folder / "asked.json").read_text())["seed"]
    (run_folder / "result.json").unlink()
    capsys.readouterr()
    assert study.run(files, tmp_path, "--list") == 0
    lines = {line.split("|")[2].strip(): [c.strip() for c in line.split("|")[3:6]]
             for line in capsys.readouterr().out.splitlines() if line.startswith("| ball")}  # fmt: skip
    assert lines["random"] == ["0, 1", "", ""] and lines["base"] == ["0", "", ""]
    assert lines["dsir"] == [str(1 - seed), "", str(seed)] and calls == {}
    listed = ntkjax.study(study=tmp_path / "study.yaml", out=tmp_path / "out", list=True, progress=False)
    assert [run.status for run in listed.runs].count("left") == 1 and listed.exit_code == 0


def _arm(folder: Path) -> str:
    return json.loads((folder / "asked.json").read_text())["arm"]


# -- nothing is done twice --


def test_a_finished_study_computes_nothing_and_a_new_label_is_no_new_run(study, done, files, tmp_path, monkeypatch):
    calls = study.count_calls(monkeypatch)
    shutil.copytree(done, tmp_path / "out")
    assert study.run(files, tmp_path) == 0
    assert study.without_times(tmp_path / "out") == study.without_times(done)
    assert study.run(files, tmp_path, train=study.QUICK | {"tracker": "jsonl"}) == 0  # how it is watched is no new run
    assert study.run(files, tmp_path, methods=["dsir", study.ALIGNMENT | {"label": "another name"}]) == 0
    assert calls == {}
    assert "another name" in {cell["arm"] for cell in study.results(tmp_path / "out")["cells"]}


def test_replay_reads_the_study_from_the_run_wherever_that_lies(study, done, tmp_path, monkeypatch):
    shutil.copytree(done, tmp_path / "moved")
    (tmp_path / "moved" / "study.yaml").write_text((done / "study.yaml").read_text().replace("dsir", "length"))
    monkeypatch.setattr(study_command, "do_all", lambda *args, **kwargs: None)
    assert main(["replay", str(tmp_path / "moved"), "--out", str(tmp_path / "again")]) == 0
    arms = [cell["arm"] for cell in study.results(tmp_path / "again")["cells"]]
    assert arms[-2:] == ["length", "alignment"] and study.results(tmp_path / "again")["counts"]["left"] == 11


def test_one_more_method_computes_only_itself(study, done, files, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(done, out)
    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/result.json")}
    calls = study.count_calls(monkeypatch)
    methods = ["dsir", study.ALIGNMENT, "length"]
    assert study.run(files, tmp_path, methods=methods) == 0
    assert calls == {"choose": 2, "train_on": 2, "evaluate_on": 2 * 2}  # two seeds, each on dev and on test
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.slow
def test_one_more_seed_computes_only_itself(study, done, files, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(done, out)
    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/result.json")}
    calls = study.count_calls(monkeypatch)
    assert study.run(files, tmp_path, seeds=3) == 0
    # The learning rate of `alignment` is the one that the first seed found best: one training.
    assert calls == {"warm_up": 1, "choose": 3, "train_on": 5, "evaluate_on": 2 * 5}
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_an_input_that_changes_makes_another_run(study, files, tmp_path):
    """The hash covers weights, data, options, seed and version; not where things lie or what they are called."""

    def keys(**more):
        grid = grid_of(spec_of(study.content(files, **more)), tmp_path / "unused", "s")
        tasks = {task.arm.label: task for task in grid.tasks() if task.seed == 0}
        task = tasks.get("alignment") or tasks["renamed"]
        selection = grid.selection_key(task)
        return grid.folder("runs", grid.run_key(task, 0.1)).name, grid.folder("selections", selection or {}).name

    grid = grid_of(spec_of(study.content(files)), tmp_path / "unused", "s")
    task = next(task for task in grid.tasks() if task.arm.label == "alignment")
    # Another name here, and the runs of every study that is on disk are computed anew.
    common = {"ntkjax", "weights", "model", "data"}
    own = {"kind", "dev", "test", "evaluation", "parameters", "seed", "domain", "train", "selection"}
    assert grid.run_key(task, 0.1).keys() == common | own
    chosen = {"domain", "pool", "n", "seed", "method", "options", "warmup"}
    assert (grid.selection_key(task) or {}).keys() == common | chosen
    assert grid.warmup_key(task).keys() == common | {"domain", "seed", "warmup"}
    first = keys()
    same = [
        keys(methods=[study.ALIGNMENT | {"label": "renamed"}]),
        keys(train=study.QUICK | {"keep_checkpoints": 5}),
        keys(seeds=[0, 7]),
        keys(budgets=[6, 3]),
        keys(learning_rates=[0.3]),
    ]
    assert [key == first for key in same] == [True, True, True, False, True]  # of budget 6 and 3 the last is looked at
    other_pool = tmp_path / "pool.jsonl"
    other_pool.write_text(Path(files.pool).read_text().replace("Colour", "Color", 1))
    training_only = {"train": study.QUICK | {"weight_decay": 0.1}, "evaluation": {"answer_template": "It is {}."}}
    changed = {
        "pool": str(other_pool),
        "methods": [study.ALIGNMENT | {"kernel": "loss"}],
        "budgets": 5,
        "data": {"token_budget": 512},
        "warmup": study.QUICK | {"weight_decay": 0.1},
        "model": {"model": files.model, "lora_rank": 3},
    }
    for name, value in (changed | training_only).items():
        run_name, selection = keys(**{name: value})
        assert run_name != first[0], name
        assert (selection == first[1]) == (name in training_only), name


@pytest.mark.slow
def test_arms_that_train_all_parameters_or_select_before_a_warm_up(study, files, tmp_path):
    methods = [
        {"label": "lift", "method": "lift", "train": {"lift_rank": 1}, "learning_rates": 1e-3},
        {"label": "all", "method": "length", "parameters": "all"},
        {"label": "cold", "method": "embedding", "warmup": "none"},
        {"label": "warm", "method": "embedding"},
    ]
    assert study.run(files, tmp_path, methods=methods, seeds=1, keep_weights=True) == 0
    out = tmp_path / "out"
    folders = {_arm(path): path for path in (out / "runs").iterdir()}
    assert (folders["all"] / "merged" / "model.safetensors").exists() and (folders["warm"] / "adapter").is_dir()
    before = load_lm(files.model, lora=None).params["layers"]
    moved = {}
    for name in ("lift", "all"):
        after = load_lm(folders[name] / "merged", lora=None).params["layers"]
        same = [np.asarray(a == b).ravel() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after))]
        moved[name] = 1 - np.concatenate(same).mean()
    assert 0 < moved["lift"] < 0.6 * moved["all"]  # LIFT moves a part of the weights
    chosen = [json.loads((folders[name] / "result.json").read_text()) for name in ("cold", "warm")]
    assert "warmup" not in chosen[0]["seconds"] and chosen[0]["passes"]["warmup"] == 0 < chosen[1]["passes"]["warmup"]
