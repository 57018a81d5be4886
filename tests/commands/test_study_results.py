"""What a study says of its runs, against numbers worked out by hand: differences, Holm, baseline, overlaps, cost."""

from __future__ import annotations

import dataclasses
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest

from ntkjax.commands.study import tables
from ntkjax.commands.study.results import ConditionResults, jaccard
from ntkjax.data import TokenisedDataset
from ntkjax.evaluation import hierarchical_bootstrap, hierarchical_p, write_outcomes
from ntkjax.evaluation.outcomes import Outcome
from ntkjax.models import ModelConfig, init_lm
from ntkjax.pipeline.cost import multiplied_weights, selection_cost, training_cost
from ntkjax.pipeline.options import SelectorOptions
from ntkjax.pipeline.study.arms import Arm
from ntkjax.pipeline.study.grid import Condition, Grid, Task
from ntkjax.pipeline.study.runs import Run
from ntkjax.pipeline.study.spec import StudySpec
from ntkjax.selection import METHODS, Selection, Selector
from ntkjax.training import TrainConfig

CONDITION = Condition("x", "all", 4)
SEEDS = (0, 1, 2)
TRAIN = TrainConfig()


def arm(label: str, kind: str = "selected", method: str = "dsir") -> Arm:
    select = SelectorOptions(method=method) if kind == "selected" else None
    return Arm(label, kind, select, TRAIN, None, "lora", (1e-3,))


ARMS = (arm("base", "base"), arm("random", method="random"), arm("weak"), arm("strong"), arm("mine", method="ntk"))
RIGHT = {"base": 20, "random": 22, "weak": 30, "strong": 24, "mine": 33}
"""Right answers of 40 with seed 0 on test; on dev `strong` is the better baseline, on test `weak`."""
DEV = {"base": 0.3, "random": 0.5, "weak": 0.55, "strong": 0.7, "mine": 0.9}
CHOSEN = {"random": [0, 1, 2, 3], "weak": [2, 3, 4, 5], "strong": [2, 3, 4, 5], "mine": [9, 8, 7, 6]}


def outcomes(right: int, seed: int) -> list[Outcome]:
    flags = np.zeros(40, bool)
    flags[:right] = True
    flags = np.roll(flags, seed)
    return [
        Outcome(
            f"t{i}",
            "even" if i % 2 == 0 else "odd",
            gold="a",
            correct_raw=bool(f),
            correct_norm=bool(f),
            nll=1.0 - f / 2,
            nll_tokens=2,
        )
        for i, f in enumerate(flags)
    ]


class Partial(Grid):
    """A grid with the parts that results are made from, and no data."""

    def __init__(self):
        pass


@pytest.fixture(scope="module")
def grid():
    config = ModelConfig(
        family="llama", vocab_size=60, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
        intermediate_size=24, tied=True,
    )  # fmt: skip
    made = Partial()
    parts = {"spec": StudySpec(seeds=SEEDS), "arms": ARMS, "focus": ("mine",), "model": init_lm(config, seed=0)}
    parts |= {"domains": {"x": SimpleNamespace(examples=lambda size: 10)}}
    for name, value in parts.items():
        object.__setattr__(made, name, value)
    return made


def find(folder, arms=ARMS, skip=()) -> list[Run]:
    """Finished runs of every arm and seed on disk, but for those of ``skip``, which failed."""
    found = []
    for one, seed in itertools.product(arms, SEEDS):
        if one.kind == "base" and seed:
            continue
        place = folder / f"{one.label}-{seed}"
        place.mkdir(parents=True)
        if (one.label, seed) in skip:
            found.append(Run(Task(CONDITION, one, seed), "failed", place, 1e-3, message="no"))
            continue
        write_outcomes(place / "outcomes.jsonl", outcomes(RIGHT[one.label] + seed, seed))
        shifted = [row + seed for row in CHOSEN.get(one.label, [])]
        (place / "selection.json").write_text(json.dumps({"selected": shifted}))
        result = {
            "dev": {"accuracy": DEV[one.label]}, "dev_loss": 1 - DEV[one.label], "test": {"accuracy": 0.5},
            "selection": {"precision": 0.25, "chance": 0.1, "diagnostics": {"scored": 9, "sources": {}}},
            "passes": {"selection": 5.0, "training": 7.0}, "steps": 4,
        }  # fmt: skip
        found.append(Run(Task(CONDITION, one, seed), "done", place, 1e-3, result))
    return found


@pytest.fixture(scope="module")
def cells(grid, tmp_path_factory):
    return ConditionResults(grid, CONDITION, find(tmp_path_factory.mktemp("runs")))


def test_the_strongest_baseline_is_picked_on_dev_and_is_none_of_the_proposed(cells, grid, tmp_path):
    assert cells.strongest() == "strong"  # `weak` is better on test, `mine` is proposed
    # A baseline with a failed run is no reference, however good.
    incomplete = ConditionResults(grid, CONDITION, find(tmp_path, skip={("strong", 1)}))
    assert incomplete.strongest() == "weak"


def test_differences_are_paired_by_example_and_seed(cells):
    row = next(r for r in cells.comparisons() if (r["arm"], r["role"]) == ("mine", "strongest"))
    ours, theirs = (np.array([[o.correct_raw for o in outcomes(RIGHT[name] + s, s)] for s in SEEDS], float)
                    for name in ("mine", "strong"))  # fmt: skip
    table = ours - theirs
    assert row["reference"] == "strong" and row["per_seed"] == pytest.approx(table.mean(axis=1).tolist())
    interval = hierarchical_bootstrap(table)
    assert (row["difference"], row["low"], row["high"]) == (interval.estimate, interval.low, interval.high)
    assert row["p"] == hierarchical_p(table) and row["difference"] == pytest.approx(9 / 40)


def test_the_base_models_one_run_is_paired_with_every_seed(cells):
    row = next(r for r in cells.comparisons() if (r["arm"], r["role"]) == ("base", "random"))
    base = np.array([o.correct_raw for o in outcomes(RIGHT["base"], 0)], float)
    expected = [base.mean() - (RIGHT["random"] + seed) / 40 for seed in SEEDS]
    assert row["per_seed"] == pytest.approx(expected) and row["p_holm"] is None


def test_holm_by_hand_over_the_methods_of_one_condition_and_reference(cells, monkeypatch):
    """p of weak, strong, mine against random 0.04, 0.01, 0.03: sorted, times 3, 2, 1, running maximum."""
    monkeypatch.setattr("ntkjax.commands.study.results.hierarchical_p", lambda table: next(values))
    order = ["base", "weak", "strong", "mine"]
    values = iter([0.5, 0.04, 0.01, 0.03, 0.5, 0.2, 0.3, 0.001])
    rows = cells.comparisons()
    against_random = {r["arm"]: r["p_holm"] for r in rows if r["role"] == "random"}
    assert list(against_random) == order and against_random["base"] is None
    assert [against_random[a] for a in order[1:]] == pytest.approx([0.06, 0.03, 0.06])
    against_strongest = {r["arm"]: r["p_holm"] for r in rows if r["role"] == "strongest"}
    # random, weak, mine: 0.2, 0.3, 0.001 -> 0.001 * 3, 0.2 * 2, max(0.4, 0.3)
    assert [against_strongest[a] for a in ("random", "weak", "mine")] == pytest.approx([0.4, 0.4, 0.003])


def test_a_failed_run_is_in_no_mean_and_is_counted(grid, tmp_path):
    cells = ConditionResults(grid, CONDITION, find(tmp_path, skip={("mine", 0)}))
    row = next(r for r in cells.rows() if r["arm"] == "mine")
    assert (row["runs"], row["failed"]) == (2, 1)
    assert row["test"]["accuracy"]["per_seed"] == pytest.approx([34 / 40, 35 / 40])
    compared = next(r for r in cells.comparisons() if (r["arm"], r["role"]) == ("mine", "random"))
    assert compared["per_seed"] == pytest.approx([11 / 40, 11 / 40])  # seeds 1 and 2 of both
    results = {"cells": cells.rows(), "comparisons": cells.comparisons()}
    assert "(1 of 3 failed)" in tables.main_table(results)[-1]["x: accuracy (%)"]


def test_results_on_each_source_by_hand(cells):
    row = next(r for r in cells.rows() if r["arm"] == "mine")
    right = [[o.correct_raw for o in outcomes(RIGHT["mine"] + s, s)] for s in SEEDS]
    even = [float(np.mean(flags[::2])) for flags in right]
    assert row["by_source"]["even"]["values"] == pytest.approx(even) and row["by_source"]["even"]["examples"] == 20
    table = tables.source_table({"cells": cells.rows()})
    assert table[-1]["even"] == f"{100 * np.mean(even):.1f} ± {100 * np.std(even, ddof=1):.1f}"


def test_overlaps_by_hand(cells):
    found = cells.overlap()
    share = dict(zip(found["arms"], found["jaccard"]))
    assert found["arms"] == ["random", "weak", "strong", "mine"]
    assert share["weak"] == pytest.approx([2 / 6, 1, 1, 0]) and share["mine"] == pytest.approx([0, 0, 0, 1])
    # random chose {0..3}, {1..4}, {2..5}: 3/5 twice and 2/6.
    assert found["between_seeds"]["random"] == pytest.approx((3 / 5 + 3 / 5 + 2 / 6) / 3)
    assert jaccard(set(), set()) == 1


def test_tables_hold_the_cells(cells):
    results = {
        "cells": cells.rows(),
        "comparisons": cells.comparisons(),
        "overlaps": [cells.overlap()],
        "focus": ["mine"],
    }
    main = tables.main_table(results)
    assert [row["method"] for row in main] == [one.label for one in ARMS]
    assert main[-1]["x: accuracy (%)"] == "85.0 ± 2.5" and main[-1]["x: precision at N (%)"] == "25.0 ± 0.0"
    row = tables.condition_table(results, dataclasses.asdict(CONDITION))[-1]
    assert row["− random"].startswith("+27.5 [") and row["− strongest (strong)"].startswith("+22.5 [")
    in_full = [r for r in tables.numbers(results) if (r["arm"], r["metric"]) == ("mine", "accuracy")]
    assert in_full[0]["mean"] == pytest.approx(34 / 40) and in_full[0]["sd"] == pytest.approx(1 / 40)
    cost = {row["method"]: row for row in tables.cost_table(results)}["mine"]
    assert cost["total (tokens forward)"] == 12 and cost["steps"] == 4
    assert {row["method"] for row in tables.selection_table(results)} == {"random", "weak", "strong", "mine"}


# -- cost --


LENGTHS = np.array([10, 20, 30, 40])


def tokens(lengths) -> TokenisedDataset:
    return TokenisedDataset.from_sequences([[1] * n for n in lengths], [1] * len(lengths))


def cost(config, warmup=None, scored=(0, 1, 2, 3), **options) -> dict[str, float]:
    ranks = np.zeros(4, np.int64)
    ranks[list(scored)] = np.arange(1, len(scored) + 1)
    found = Selection(options["method"], np.zeros(4), ranks, np.arange(2))
    return selection_cost(SelectorOptions(**options), found, tokens([5, 7]), tokens(LENGTHS), config, warmup)


def test_passes_of_selections_by_hand(grid):
    """Domain of 12 tokens, pool of 100; forward 1, with gradient 3, t tangents 1 + t."""
    config, warm = grid.model.config, TrainConfig(epochs=2)
    assert cost(config, warm, method="random") == {"warmup": 0, "selection": 0}
    assert cost(config, warm, method="embedding") == {"warmup": 3 * 12 * 2, "selection": 112}
    # sum_logits, all rows: gradients of domain and sample (two examples of 25 tokens on average), two tangents.
    whole = cost(config, method="ntk", stage1="off", pool_sample=2)
    assert whole == {"warmup": 0, "selection": 3 * (12 + 50) + 3 * 100}
    staged = cost(config, method="ntk", pool_sample=2, scored=(0, 3))
    assert staged["selection"] == 112 + 3 * 62 + 3 * 50
    # 12 outputs: 25 for a gradient of all, 24 tangents on two primal passes.
    wide = cost(config, method="ntk", stage1="off", pool_sample=2, kernel="spectral:12")
    assert wide["selection"] == 25 * 62 + 26 * 100
    assert cost(config, method="gradient-cosine", scored=(1,))["selection"] == 112 + 3 * (12 + 20)
    assert cost(config, warm, method="less", stage1="off")["selection"] == 2 * 3 * 112  # two epochs
    diverse = cost(config, warm, method="dsir", diversity="d-optimal", diversity_factor=2)
    assert diverse == {"warmup": 72, "selection": 3 * 4 * 25}  # four candidates for the two chosen, 25 tokens each
    assert cost(config, method="quad", scored=(0, 1))["selection"] == 112 + 6 * 12 + 2 * 30


@pytest.mark.parametrize("method", METHODS)
def test_the_passes_of_every_selector_are_known(method, grid):
    found = cost(grid.model.config, TrainConfig(epochs=1), method=method)
    assert set(found) == {"warmup", "selection"}
    assert (found["selection"] > 0) == (method not in ("random", "length", "dsir")) == (found["warmup"] > 0)


def test_a_method_that_does_not_say_what_it_costs_has_no_cost(grid, monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Quiet(Selector):
        def __call__(self, problem):
            raise NotImplementedError

    monkeypatch.setitem(METHODS, "quiet", Quiet)
    assert cost(grid.model.config, TrainConfig(epochs=1), method="quiet") == {}


def test_training_cost_and_weights(grid):
    history = [{"kind": "dev", "dev_loss": 1.0}] + [
        {"kind": "train", "tokens": 100 * i, "tokens_per_second": 50.0} for i in (1, 2)
    ]
    assert training_cost(history) == (900.0, 6.0)
    d, f, kv, v = 16, 24, 8, 60  # q and o [16, 16], k and v [16, 8], three matrices of the MLP, the tied head
    assert multiplied_weights(grid.model.params, grid.model.config) == 2 * (2 * d * d + 2 * d * kv + 3 * d * f) + v * d
