"""Diversity: greedy choices against brute force, the (1 - 1/e) bound, and a pool of near-duplicates."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

import ntkjax.selection.diversity as diversity
from ntkjax.errors import ConfigError
from ntkjax.selection import METHODS, select_top
from ntkjax.selection.base import ranked_rows
from ntkjax.selection.diversity import d_optimal, d_value, diversify, facility_location, facility_value

RIDGE = 0.1


def similarities(rng, candidates, targets):
    return np.maximum(rng.normal(size=(candidates, targets)), 0)


def directions(rng, candidates, width):
    x = rng.normal(size=(candidates, width))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def covered(similarity, places):
    """sum over targets of the best similarity, by a loop."""
    return sum(max((similarity[j, i] for j in places), default=0.0) for i in range(similarity.shape[1]))


def volume(features, places):
    """log det(I + 1/ridge sum phi phi^T), by eigenvalues of the K x K matrix."""
    total = np.eye(features.shape[1])
    for j in places:
        total = total + np.outer(features[j], features[j]) / RIDGE
    return float(np.sum(np.log(np.linalg.eigvalsh(total))))


def greedy(value, candidates, n):
    """Every candidate tried at every step, F worked out from nothing each time."""
    chosen = []
    for _ in range(n):
        left = [j for j in range(candidates) if j not in chosen]
        chosen.append(max(left, key=lambda j: (round(value([*chosen, j]), 9), -j)))
    return chosen


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["facility-location", "d-optimal"])
def test_choices_are_those_of_plain_greedy(name, seed):
    rng = np.random.default_rng(seed)
    if name == "facility-location":
        similarity = similarities(rng, 25, 12)
        assert facility_location(similarity, 8).tolist() == greedy(lambda s: covered(similarity, s), 25, 8)
        assert facility_value(similarity, np.array([3, 1])) == pytest.approx(covered(similarity, [3, 1]))
    else:
        features = directions(rng, 25, 6)  # more are chosen than there are dimensions
        assert d_optimal(features, 8, ridge=RIDGE).tolist() == greedy(lambda s: volume(features, s), 25, 8)
        for places in ([4, 2], list(range(9))):
            assert d_value(features, np.array(places), RIDGE) == pytest.approx(volume(features, places), rel=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_greedy_reaches_its_share_of_the_best_there_is(seed):
    rng = np.random.default_rng(10 + seed)
    similarity, features = similarities(rng, 12, 8), directions(rng, 12, 4)
    for value, chosen in (
        (lambda s: covered(similarity, s), facility_location(similarity, 4)),
        (lambda s: volume(features, s), d_optimal(features, 4, ridge=RIDGE)),
    ):
        best = max(value(list(s)) for s in itertools.combinations(range(12), 4))
        assert (1 - 1 / math.e) * best <= value(chosen.tolist()) <= best + 1e-9


def test_ties_go_to_the_lower_place_and_nothing_is_taken_twice():
    same = np.ones((6, 3))
    assert facility_location(same, 6).tolist() == list(range(6))
    features = np.repeat(np.eye(3), 2, axis=0)  # 0 and 1 alike, 2 and 3, 4 and 5
    assert d_optimal(features, 6, ridge=RIDGE).tolist() == [0, 2, 4, 1, 3, 5]
    features[3] = 0  # a gradient of zero adds nothing
    assert d_optimal(features, 6, ridge=RIDGE).tolist() == [0, 2, 4, 1, 5, 3]


def test_lazy_means_few_gains_are_worked_out(monkeypatch):
    pushed = []
    real = diversity.heapq.heappush
    monkeypatch.setattr(diversity.heapq, "heappush", lambda heap, item: pushed.append(1) or real(heap, item))
    similarity = similarities(np.random.default_rng(1), 400, 60)
    facility_location(similarity, 40)
    assert len(pushed) < 0.3 * 400 * 40


def test_single_precision_chooses_the_same_here():
    features = directions(np.random.default_rng(2), 300, 32)
    low, high = (d_optimal(features.astype(kind), 60, ridge=RIDGE) for kind in (np.float32, np.float64))
    assert low.tolist() == high.tolist()


def planted(rng):
    """Ten groups of thirty near-copies. One group has the domain's direction itself; the others share part of it."""
    width, axis = 24, np.eye(24)[0]
    centres = [axis] + [axis + 1.5 * np.eye(24)[k] for k in range(1, 10)]
    pool = np.concatenate([c / np.linalg.norm(c) + 0.01 * rng.normal(size=(30, width)) for c in centres])
    group = np.repeat(np.arange(10), 30)
    order = rng.permutation(300)
    return axis + 0.05 * rng.normal(size=(8, width)), pool[order], group[order]


@pytest.mark.parametrize("name", ["facility-location", "d-optimal"])
def test_one_of_each_group_and_not_ten_of_the_nearest(given, name):
    domain, pool, group = planted(np.random.default_rng(3))
    problem = given(domain, pool, 10)
    plain = METHODS["gradient-cosine"](stage1="off", sketch_size=128)(problem)
    assert set(group[plain.selected]) == {0}
    chosen = diversify(plain, problem, diversity=name, factor=30, size=128)
    assert len(set(group[chosen.selected])) == 10
    report = chosen.diagnostics
    assert report["diversity_candidates"] == 300 and report["diversity_replaced"] >= 9
    assert report["diversity_of_the_choice"] > report["diversity_without_the_pass"]
    np.testing.assert_array_equal(chosen.scores, plain.scores)
    assert chosen.ranks[chosen.selected].tolist() == list(range(1, 11))
    assert sorted(chosen.ranks.tolist()) == list(range(1, 301))
    rest = np.setdiff1d(np.argsort(-plain.scores, kind="stable"), chosen.selected)
    rest = rest[np.argsort(-plain.scores[rest], kind="stable")]
    assert chosen.ranks[rest].tolist() == list(range(11, 301))


def test_only_the_best_candidates_are_looked_at(given):
    domain, pool, _ = planted(np.random.default_rng(4))
    problem = given(domain, pool, 10)
    scores = np.where(np.arange(300) < 100, np.random.default_rng(5).random(300), np.nan)
    plain = select_top("any", scores, 10)
    chosen = diversify(plain, problem, diversity="d-optimal", factor=3, size=128)
    assert set(chosen.selected.tolist()) <= set(ranked_rows(scores)[:30].tolist())
    whole = diversify(plain, problem, diversity="d-optimal", factor=50, size=128)
    assert whole.diagnostics["diversity_candidates"] == 100
    assert (whole.ranks > 0).tolist() == (~np.isnan(scores)).tolist()


def test_a_method_that_does_not_take_the_highest_scores_keeps_its_own_among_the_candidates(given):
    domain, pool, _ = planted(np.random.default_rng(6))
    problem = given(domain, pool, 20, weighted_embed_fn=None)
    plain = METHODS["tsds"](neighbours=40)(problem)
    chosen = diversify(plain, problem, diversity="facility-location", factor=2, size=128)
    assert chosen.diagnostics["diversity_candidates"] == 40 and len(set(chosen.selected.tolist())) == 20
    best = np.argsort(plain.ranks, kind="stable")[:40]
    assert set(chosen.selected.tolist()) <= set(best.tolist()) and set(plain.selected.tolist()) <= set(best.tolist())


def test_a_bounded_set_of_targets(given, monkeypatch):
    domain, pool, group = planted(np.random.default_rng(7))
    problem = given(domain, pool, 10)
    plain = METHODS["gradient-cosine"](stage1="off", sketch_size=128)(problem)
    monkeypatch.setattr(diversity, "TARGETS", 120)
    chosen = diversify(plain, problem, diversity="facility-location", factor=30, size=128)
    assert len(set(group[chosen.selected])) == 10


def test_none_changes_nothing_and_bad_options_are_refused(given):
    domain, pool, _ = planted(np.random.default_rng(8))
    problem = given(domain, pool, 10)
    plain = METHODS["length"]()(problem)
    assert diversify(plain, problem, diversity="none") is plain
    with pytest.raises(ConfigError, match="diversity is 'dpp'"):
        diversify(plain, problem, diversity="dpp")
    with pytest.raises(ConfigError, match="diversity_factor"):
        diversify(plain, problem, diversity="d-optimal", factor=1)
