"""`select`: what it writes, that it resumes, that both score paths and a dry run work from the command line."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import ntkjax
from ntkjax.cli import main
from ntkjax.commands.select.forecast import Forecast
from ntkjax.ntk import rows
from ntkjax.pipeline.options import SelectorOptions
from ntkjax.pipeline.select import make_selector
from ntkjax.pipeline.selection_io import read_selection
from ntkjax.selection import METHODS
from ntkjax.selection.methods import ntk as ntk_method
from ntkjax.training import trackers
from ntkjax.training.trackers import TRACKERS, Kind
from ntkjax.training.trackers.base import numbers

QUICK = ["--lora-rank", "2", "--token-budget", "1024", "--warmup.batch-size", "4", "--warmup.learning-rate", "1e-3"]


def select(files, out, *flags) -> int:
    return main(["select", *files.flags("model", "domain", "pool"), "--n", "5", "--out", str(out), *QUICK, *flags])


@pytest.fixture(scope="module")
def selected(files, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("select") / "run"
    assert select(files, out) == 0
    return out


def test_every_pool_example_is_in_the_table(selected):
    table = pq.read_table(selected / "scores.parquet").to_pydict()
    assert table["id"] == [f"cube-{i}" for i in range(40)]
    scored = [score is not None for score in table["score"]]
    assert sum(scored) == 20  # stage 1 keeps 4 n
    assert sum(table["selected"]) == 5
    assert sum(table["votes"]) == 12 * 5  # every domain example votes for M_pre / 4 rows
    best = np.argsort([-(s if s is not None else -np.inf) for s in table["score"]], kind="stable")[:5]
    assert sorted(best) == [i for i, chosen in enumerate(table["selected"]) if chosen]
    assert [table["rank"][i] for i in best] == [1, 2, 3, 4, 5]


def test_the_winners_are_written_best_first(selected):
    lines = [json.loads(line) for line in (selected / "selected.jsonl").read_text().splitlines()]
    table = pq.read_table(selected / "scores.parquet").to_pydict()
    ranks = dict(zip(table["id"], table["rank"]))
    assert [ranks[line["id"]] for line in lines] == [1, 2, 3, 4, 5]
    assert all(line["response"] for line in lines)


def test_the_report_says_whether_it_is_about_the_domain(selected):
    content = json.loads((selected / "selection.json").read_text())
    diagnostics = content["diagnostics"]
    assert -1 <= diagnostics["rank_correlation_with_length"] <= 1
    assert -1 <= diagnostics["rank_correlation_with_pool_mean"] <= 1
    assert 0 <= diagnostics["negative_share"] <= 1
    assert sum(diagnostics["sources_chosen"].values()) == 5
    assert sum(diagnostics["sources_offered"].values()) == 40
    assert len(content["examples"]["chosen"]) == 5 and len(content["examples"]["just_missed"]) == 5


def test_a_finished_selection_is_read_back(selected, files):
    before = (selected / "selection.json").stat().st_mtime_ns
    assert select(files, selected) == 0
    assert (selected / "selection.json").stat().st_mtime_ns == before
    found = read_selection(selected)
    assert found.scored.sum() == 20 and len(found.selected) == 5 and found.votes is not None


def test_a_stopped_selection_goes_on_to_the_same_end(selected, files, tmp_path, monkeypatch):
    import ntkjax.pipeline.select as step

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(step, "described", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        assert select(files, out) == 130
    assert not (out / "selection.json").exists()
    assert select(files, out) == 0
    same = lambda name: (out / name).read_bytes() == (selected / name).read_bytes()
    assert same("selection.json") and same("selected.jsonl") and same("adapter/adapter_model.safetensors")


def test_a_changed_command_is_refused(selected, files, capsys):
    assert select(files, selected, "--kernel", "loss") == 2
    assert "kernel" in capsys.readouterr().err


def test_a_package_that_is_missing_is_named_before_the_warm_up(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    out = tmp_path / "run"
    assert select(files, out, "--method", "parts", "--representation", "sentence") == 2
    assert 'pip install "ntkjax[sentence]"' in capsys.readouterr().err
    assert not out.exists()


def test_whole_pool_and_sketch_agree_in_order(files, tmp_path):
    assert select(files, tmp_path / "exact", "--stage1", "off") == 0
    flags = ("--stage1", "off", "--scores", "sketch", "--sketch-size", "4096")
    assert select(files, tmp_path / "sketch", *flags) == 0
    exact, sketch = read_selection(tmp_path / "exact"), read_selection(tmp_path / "sketch")
    assert exact.scored.all() and sketch.scored.all() and exact.votes is None
    assert np.corrcoef(exact.scores, sketch.scores)[0, 1] > 0.95


@pytest.mark.slow
def test_packed_rows_give_the_same_selection(selected, files, tmp_path):
    """Warm-up, votes and scores."""
    assert select(files, tmp_path / "run", "--packing", "on") == 0
    tables = [pq.read_table(out / "scores.parquet").to_pandas() for out in (selected, tmp_path / "run")]
    assert tables[0]["selected"].tolist() == tables[1]["selected"].tolist()
    np.testing.assert_allclose(tables[1]["score"], tables[0]["score"], rtol=1e-3)


def test_dry_run_forecasts_and_does_nothing_else(files, tmp_path, capsys):
    out = tmp_path / "run"
    assert select(files, out, "--dry-run") == 0
    printed = capsys.readouterr().out
    for word in ("warm up", "embed pool", "domain gradient", "score pool", "time:", "device memory:", "disk:"):
        assert word in printed
    assert "40 examples (counted)" in printed
    assert not out.exists()


def dry_run(files, **options) -> Forecast:
    found = ntkjax.select(
        model=files.model, domain=files.domain, pool=files.pool, n=3, out="unused", lora_rank=2, token_budget=1024,
        dry_run=True, warmup={"epochs": 2}, progress=False, **options,
    )  # fmt: skip
    assert isinstance(found, Forecast)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_forecast(method, files):
    """From the same count as in a study's tables, the speed of a forward pass measured here."""
    found = dry_run(files, method=method)
    phases = {phase.name: phase for phase in found.phases}
    warm = phases.pop("warm up", None)  # of those that look at the model
    assert (warm is not None) == make_selector(SelectorOptions(method=method)).uses_model
    assert (warm is None or warm.examples == 2 * 12) and found.pool_examples == 40
    if method in ("random", "length", "dsir"):
        assert not phases
    elif make_selector(SelectorOptions(method=method)).forward_kernel is None:
        (phase,) = phases.values()
        assert phase.tokens > 0 and phase.seconds > 0


def test_what_is_counted_where_scores_are_not_one_pass(files):
    counted = lambda **options: dry_run(files, skip_warmup=True, **options).phases
    assert [phase.name for phase in counted()] == ["embed pool", "domain gradient", "score pool"]
    embedded, _, scored = [phase.tokens for phase in counted()]
    domain = counted(method="embedding")[0].tokens - embedded
    (gradients,) = counted(method="gradient-cosine")
    assert gradients.name == "gradient-cosine, counted"
    assert gradients.tokens == embedded + domain + 3 * (domain + scored)
    (diverse,) = counted(method="length", diversity="d-optimal")
    assert diverse.tokens == round(3 * 6 * embedded / 40)
    (probed,) = counted(method="quad")
    assert probed.tokens == embedded + domain + 6 * domain + 2 * scored  # 4 n rows probed, as stage 1 keeps for ntk
    wide, narrow = (dry_run(files, method="less", sketch_size=k).disk_bytes for k in (2000, 1000))
    assert wide - narrow == 4 * (12 + 12) * 1000


def test_dry_run_of_a_method_that_does_not_say_what_it_costs_is_refused(files, monkeypatch, tmp_path, capsys):
    monkeypatch.delattr(METHODS["euds"], "forward_tokens")
    assert select(files, tmp_path / "run", "--dry-run", "--method", "euds") == 2
    assert "does not say what it costs" in capsys.readouterr().err


def test_as_a_function(files, tmp_path):
    result = ntkjax.select(
        model=files.model, domain=files.domain, pool=[files.pool], n=3, out=tmp_path / "run", stage1="off",
        kernel="loss", lora_rank=2, warmup={"epochs": 1, "batch_size": 4}, progress=False,
    )  # fmt: skip
    assert len(result.selected) == 3 and result.diagnostics["kernel"] == "loss"
    with pytest.raises(ntkjax.ConfigError, match="unknown option colour"):
        ntkjax.select(model=files.model, domain=files.domain, pool=files.pool, n=3, out="x", colour="red")
    with pytest.raises(ntkjax.ConfigError, match="missing option n"):
        ntkjax.select(model=files.model, domain=files.domain, pool=files.pool, out="x")


@pytest.mark.parametrize(
    "method", ["length", "random-from-stage-1", "dsir", "rds", "betr", "tsds", "euds", "quad", "gais"]
)
def test_every_method_writes_a_selection(method, files, tmp_path):
    out = tmp_path / "run"
    assert select(files, out, "--skip-warmup", "--method", method) == 0
    found = read_selection(out)
    assert found.method == method and len(set(found.selected.tolist())) == 5
    assert len((out / "selected.jsonl").read_text().splitlines()) == 5


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_option_of_a_method_is_a_flag_with_the_same_default(method):
    flags = {field.name: field.default for field in dataclasses.fields(SelectorOptions)}
    own = {field.name: field.default for field in dataclasses.fields(METHODS[method])}
    assert own.items() <= flags.items()


@pytest.mark.parametrize("method", ["gradient-cosine", "influence", "less", "trak", "g2is"])
def test_every_gradient_method_writes_a_selection(method, files, tmp_path):
    out, flags = tmp_path / "run", ("--method", method, "--sketch-size", "64", "--warmup.epochs", "2")
    assert select(files, out, *flags) == 0
    found = read_selection(out)
    assert found.method == method and len(set(found.selected.tolist())) == 5 and found.scored.sum() == 20
    if method in ("less", "trak"):
        assert found.diagnostics["checkpoint_steps"] == [3, 6]


def test_a_method_that_never_looks_at_the_model_is_not_warmed_up_for(files, tmp_path):
    for name, flags, warm in (("words", (), False), ("then-gradients", ("--diversity", "d-optimal"), True)):
        out = tmp_path / name
        assert select(files, out, "--method", "dsir", *flags) == 0
        assert (out / "warmup").exists() == (out / "adapter").exists() == warm
    options = {"model": files.model, "domain": files.domain, "pool": files.pool, "n": 5, "lora_rank": 2}
    found = ntkjax.select(method="dsir", out=str(tmp_path / "dry"), dry_run=True, progress=False, **options)
    assert "warm up" not in {phase.name for phase in found.phases}
    assert ntkjax.explain(run=str(tmp_path / "words"), k=0, progress=False).counts["chosen"] == (5, 5)


@pytest.mark.slow
def test_an_unconverged_solve_is_told(files, tmp_path, capsys):
    """On a language model, the pool's rows packed; what is printed and what is kept."""
    flags = ("--method", "influence", "--curvature", "cg", "--skip-warmup", "--packing", "on", "--cg-iterations", "1")
    assert select(files, tmp_path / "run", *flags, "--pool-sample", "4", "--stage1", "off") == 0
    assert "conjugate gradients did not converge" in " ".join(capsys.readouterr().out.split())
    found = read_selection(tmp_path / "run").diagnostics
    assert found["cg_residual"] > 1e-3 and not found["cg_converged"]


@pytest.mark.parametrize("method", ["less", "trak", "g2is"])
def test_methods_that_look_at_the_warm_up_need_one(method, files, tmp_path, capsys):
    assert select(files, tmp_path / "run", "--skip-warmup", "--method", method) == 2
    assert "leave out --skip-warmup" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("aggregation", ["clusters", "max", "round-robin"])
def test_every_aggregation_writes_a_selection(aggregation, files, tmp_path, capsys):
    flags = ("--aggregation", aggregation, "--domain-clusters", "3", "--sketch-size", "64")
    assert select(files, tmp_path / "run", *flags) == (0 if aggregation == "clusters" else 2)
    if aggregation != "clusters":
        assert "needs scores sketch" in capsys.readouterr().err
        assert select(files, tmp_path / "run", *flags, "--scores", "sketch") == 0
    found = read_selection(tmp_path / "run")
    assert found.diagnostics["aggregation"] == aggregation and found.scored.sum() == 20


class Recorder:
    """A tracker that keeps what it is given."""

    def __init__(self, folder, settings, step):
        self.folder, self.settings, self.first, self.seen, self.closed = folder, settings, step, [], False

    def log(self, step, values):
        self.seen.append((step, dict(values)))

    def close(self):
        self.closed = True


def test_long_passes_are_written_down_and_tracked(files, tmp_path, monkeypatch):
    """Every pass with all its examples, from a run that is stopped before its scores and goes on."""
    opened: list[Recorder] = []
    monkeypatch.setitem(TRACKERS, "recorder", Kind("for tests", lambda *a: opened.append(Recorder(*a)) or opened[-1]))
    monkeypatch.setattr(rows, "TELL_SECONDS", 0.0)
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(ntk_method, "kernel_scores", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        assert select(files, out, "--tracker", "recorder", "--scores", "forward") == 130
    assert select(files, out, "--tracker", "recorder", "--scores", "forward") == 0
    lines = [json.loads(line) for line in (out / "passes.jsonl").read_text().splitlines()]
    last = {line["kind"]: line["examples"] for line in lines}
    assert {"embed-domain": 12, "embed-pool": 40, "mean-gradient": 40, "score-pool": 20}.items() <= last.items()
    assert all(line["seconds"] > 0 and line["tokens_per_second"] > 0 for line in lines)
    steps = [line["step"] for line in lines]
    assert steps == sorted(steps) and steps[-1] == 2 * 12 + 40 + 12 + 40 + 20  # domain anew, then pool
    assert all(one.closed and one.folder == out and one.settings["method"] == "ntk" for one in opened)
    assert [one.first for one in opened] == [0, opened[0].seen[-1][0]]
    told = [pair for one in opened for pair in one.seen]
    assert told == [numbers(line) for line in lines]
    assert len([line for line in lines if line["kind"] == "embed-pool"]) > 1  # batch by batch, not at the end alone


def test_a_tracker_that_is_not_installed_is_told_before_anything_is_done(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    assert select(files, tmp_path / "run", "--tracker", "tensorboard") == 2
    assert "pip install 'ntkjax[tensorboard]'" in capsys.readouterr().err and not (tmp_path / "run").exists()
