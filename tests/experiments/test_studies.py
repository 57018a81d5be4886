"""The experiments over `ntkjax study`: each runs on a small planted task, and says what its data say."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2] / "experiments"


@pytest.fixture(scope="module")
def load(load_file):
    """A script by its name; `studies`, which they share, is found as when they are run."""
    sys.path.insert(0, str(ROOT))
    yield lambda name: load_file(ROOT / f"{name}.py")
    sys.path.remove(str(ROOT))


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The planted task in small, and results kept in a folder of their own."""
    import studies

    def planted(pool, domain, **sizes):
        train = {"epochs": 1, "batch_size": 8, "max_buckets": 1, "learning_rate": 2e-3}
        embedded = {"pool_size": 120, "domain_size": min(domain, 30), "dev_size": 6, "test_size": 12}
        return {"embedded": embedded, "data": {"max_length": 64}, "warmup": train, "train": train}

    monkeypatch.setattr(studies, "planted", planted)
    monkeypatch.setattr(studies, "RESULTS", tmp_path / "results")


@pytest.mark.slow
def test_the_main_table(load, small, tmp_path):
    script = load("05_main_table")
    script.main(script.Experiment(methods=("dsir",), n=10, seeds=1, learning_rates=(1e-3,), out=tmp_path / "runs"))
    kept = tmp_path / "results" / "05_main_table" / "embedded"
    main = (kept / "tables" / "main.md").read_text()
    assert all(name in main for name in ("dsir", "ntk (loss, whole pool)", "random", "domain-only-equal-steps", "base"))
    assert "precision at N" in main and (kept / "plots").is_dir() and (kept / "study.yaml").exists()


def test_the_main_table_of_real_data_is_one_study_over_its_domains(load, shared_dir):
    from ntkjax.commands.study.arms import arms_of
    from ntkjax.commands.study.spec import spec_of

    script = load("05_main_table")
    e = script.Experiment(data=shared_dir / "data", model=str(shared_dir / "models" / "cot-lm-7m"), lift=True)
    name, content = e.name, script.content(e)
    spec = spec_of(content)
    assert name == "cot-lm-7m" and list(spec.domains) == ["finance", "medical", "legal"] and len(spec.seeds) == 5
    arms = {arm.label: arm for arm in arms_of(spec)}
    assert arms["lift"].parameters == "all" and arms["lift"].rates == pytest.approx([1e-4, 2e-4, 4e-4])
    sources = [s for d in spec.domains.values() for part in (d.train, d.dev, d.test) for s in part]
    assert all(Path(source.path).exists() for source in (*sources, *spec.pool))


def test_every_group_of_ablations_is_a_study(load, small, tmp_path):
    from ntkjax.commands.study.arms import arms_of
    from ntkjax.commands.study.spec import spec_of

    script = load("06_ablations")
    e = dataclasses.replace(script.Experiment(), select_only=True, out=tmp_path / "runs")
    n, (common, domain, largest) = e.budget, script.base(e)
    for group in e.groups:
        spec = spec_of(common | script.group_content(group, e, n, domain, largest))
        labels = [arm.label for arm in arms_of(spec)]
        varied = max(len(labels) - 2, len(spec.budgets) - 1, len(spec.domain_sizes) - 1)
        assert "ntk" in labels and varied > 0, group
    with pytest.raises(SystemExit, match="unknown group"):
        script.group_content("colour", e, n, domain, largest)


@pytest.mark.slow
def test_ablations_share_runs_and_length_normalisation_is_read_from_scores(load, small, tmp_path, capsys):
    script = load("06_ablations")
    e = script.Experiment(groups=("normalisation", "ratio"), n=6, ratios=(0.2,), train_size=30, seeds=1,
                          select_only=True, out=tmp_path / "runs")  # fmt: skip
    script.main(e)
    out = tmp_path / "runs" / "embedded"
    asked = [json.loads(p.read_text())["key"] for p in out.glob("selections/*/study.json")]
    # random and three directions; the ratio of 0.2 is the same N = 6 and adds nothing
    assert len(asked) == 4 and {key["n"] for key in asked} == {6}
    rows = script.length_normalisation(out, 6)
    assert {row["direction"] for row in rows} == {"raw", "contrast"}
    assert all(0 <= row["shared with the mean over the response (%)"] <= 100 for row in rows)
    assert (
        tmp_path / "results" / "06_ablations" / "embedded" / "normalisation" / "tables" / "length-normalisation.md"
    ).exists()


def test_what_stage_1_lets_through_by_hand(load):
    script = load("07_whole_pool")
    nan = np.nan
    whole = {"selected": np.array([1, 1, 0, 0, 0], bool), "rank": np.array([1, 2, 3, 4, 5])}
    staged = {"selected": np.array([1, 0, 1, 0, 0], bool), "score": np.array([3.0, nan, 2.0, 1.0, nan])}
    row = script._recall([(whole, staged)])
    assert row["let through (%)"] == "50.0" and row["in both selections (%)"] == "50.0"
    assert row["by chance (%)"] == pytest.approx(60) and row["mean rank of the dropped"] == 2


@pytest.mark.slow
def test_whole_pool_against_two_stages(load, small, tmp_path):
    script = load("07_whole_pool")
    e = script.Experiment(kernels=("loss",), factors=(2, 20), n=6, seeds=1, select_only=True, out=tmp_path / "runs")
    script.main(e)
    lines = (tmp_path / "results" / "07_whole_pool" / "embedded" / "stage1.csv").read_text().splitlines()
    recall = {line.split(",")[2]: line.split(",")[3] for line in lines[1:]}
    assert recall["20"] == "100.0"  # 120 of 120 rows are let through
    assert 0 <= float(recall["2"]) <= 100


@pytest.mark.slow
def test_planted_truth(load, tmp_path, monkeypatch):
    script = load("09_planted_truth")
    monkeypatch.setattr(script, "RESULTS", tmp_path / "results")
    e = script.Experiment(methods=("dsir",), seeds=1, domain_sizes=(30,), noise=(0.9,), pool_sizes=(120,),
                          domain_size=30, pool_size=120, warmup_epochs=1, out=tmp_path / "runs")  # fmt: skip
    script.main(e)
    for name in ("domain-size", "noise", "pool-size"):
        assert (tmp_path / "results" / f"{name}.png").stat().st_size > 1000
        text = (tmp_path / "results" / f"{name}.md").read_text()
        assert all(method in text for method in ("dsir", "ntk (loss, whole pool)", "random", "(chance)"))
    tasks = {path.parent.name: path for path in (tmp_path / "runs").glob("*/task")}
    skills = {
        name: [json.loads(line)["skill"] for line in (path / "train.jsonl").open()] for name, path in tasks.items()
    }
    noisy = next(v for k, v in skills.items() if k.endswith("noise-90"))
    clean = next(v for k, v in skills.items() if k.endswith("domain-30-noise-0"))
    assert sum(s not in script.SHOP_TASKS for s in noisy) == 27 and all(s in script.SHOP_TASKS for s in clean)


@pytest.fixture
def real_layout(tmp_path):
    """The planted task in files laid out as real data are, and what reads them."""
    from ntkjax.assets import tiny_lm_path, write_planted_task

    made = write_planted_task(tmp_path / "task", 7, pool_size=60, domain_size=12, dev_size=6, test_size=12)
    folder = tmp_path / "data"
    for name, target in {
        "pool": "pool/cot-01",
        "train": "finance/train",
        "dev": "finance/dev",
        "test": "finance/test",
    }.items():
        file = folder / f"{target}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(Path(made[name]).read_bytes())
    return folder, str(tiny_lm_path())


def test_a_stage_of_the_real_model_holds_those_before_it(load, real_layout, monkeypatch):
    from ntkjax.commands.study.arms import arms_of
    from ntkjax.commands.study.spec import spec_of

    script = load("11_real_model")
    data, model = real_layout
    e = script.Experiment(data=data, model=model, last="sizes")
    before: set = set()
    for stage in script.stages(e):
        spec = spec_of(script.content(e, stage))
        labels = {arm.label for arm in arms_of(spec)}
        assert {"base", "domain-only", "domain-only-equal-steps", "random"} <= labels and before <= labels
        assert spec.domains["finance"].sizes == ()  # twelve examples are fewer than any size
        before = labels
    assert len(before) == 4 + len(script.METHODS)
    with pytest.raises(SystemExit, match="size-100"):
        script.stages(dataclasses.replace(e, last="everything"))
    with pytest.raises(SystemExit, match="--first sizes comes after --last steps"):
        script.stages(dataclasses.replace(e, first="sizes", last="steps"))
    assert [stage.name for stage in script.stages(dataclasses.replace(e, first="seeds"))] == [
        "seeds",
        "size-100",
        "sizes",
    ]
    assert script.folder(dataclasses.replace(e, domains=("legal", "finance"))).name == "legal"


def test_the_answers_of_the_real_model_are_its_comparisons(load):
    script = load("11_real_model")
    head = {"domain": "finance", "size": 100, "budget": 200, "reference": "random", "metric": "accuracy"}
    row = lambda arm, difference, p: head | {
        "arm": arm, "difference": difference, "low": difference - 0.01, "high": difference + 0.02, "p_holm": p,
    }  # fmt: skip
    rows = [
        row("domain-only-equal-steps", 0.1, None),
        row("a", 0.03, 0.01),
        row("b", -0.05, 0.001),
        row("c", 0.02, 0.2),
    ]
    first, second = script.answers({"comparisons": rows, "seeds": [0, 1, 2]})
    assert first.endswith("at equal steps: -10.0 [-12.0, -9.0] points.") and "3 seeds" in first
    assert second.endswith("1 of 3 selections beat random (Holm, 0.05); they are a: +3.0 [+2.0, +5.0] points, p 0.01.")
    _, second = script.answers({"comparisons": [rows[0], *rows[2:]], "seeds": [0]})
    assert "0 of 2 selections" in second and "the best is c: +2.0" in second


@pytest.mark.slow
def test_the_real_model_stops_when_the_time_is_over_and_goes_on(load, real_layout, monkeypatch, tmp_path, capfd):
    script = load("11_real_model")
    data, model = real_layout
    monkeypatch.setattr(script.studies, "RESULTS", tmp_path / "results")
    stages = (dataclasses.replace(script.STAGES[0], sizes=(8,)), dataclasses.replace(script.STAGES[1], sizes=(8,)))
    monkeypatch.setattr(script, "STAGES", stages)
    e = script.Experiment(
        data=data, model=model, last="selection", minutes=0.2, budgets=(6,),
        dev_size=6, learning_rates=(2e-3,), epochs=1, max_length=64,
        out=tmp_path / "runs",
    )  # fmt: skip
    script.main(e)
    assert "stopped, the time is over" in capfd.readouterr().out
    script.main(dataclasses.replace(e, minutes=30))
    shown = capfd.readouterr().out
    assert "random data minus the domain alone at equal steps" in shown and "of 3 selections beat random" in shown
    assert (tmp_path / "results" / "11_real_model" / "tiny-lm-finance" / "answers.md").exists()
