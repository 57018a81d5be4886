"""QUAD: influences against an explicit Fisher, the bandit against a ledger, a planted cluster found with few probes."""

from __future__ import annotations

import math

import numpy as np
import pytest

import ntkjax.selection.methods.quad as quad
from ntkjax.errors import ConfigError
from ntkjax.selection import METHODS
from ntkjax.selection.clusters import k_means
from ntkjax.selection.methods.quad import Bandit, Probe, QuadSelector, pool_clusters


def influences(domain, pool, damping):
    """<(1/M sum g g^T + lambda I)^-1 g_bar, g_j>, lambda = damping tr H / P: for one vector the block is exact."""
    domain, pool = np.asarray(domain, np.float64), np.asarray(pool, np.float64)
    fisher = domain.T @ domain / len(domain)
    ridge = damping * np.trace(fisher) / len(fisher) * np.eye(len(fisher))
    return pool @ np.linalg.solve(fisher + ridge, domain.mean(axis=0))


def blobs(rng, centres, each, spread=0.2):
    points = np.concatenate([c + spread * rng.normal(size=(each, len(c))) for c in np.asarray(centres, float)])
    return points[rng.permutation(len(points))]


def test_probed_rows_have_their_influence(given):
    rng = np.random.default_rng(0)
    domain, pool = rng.normal(size=(12, 5)), rng.normal(size=(40, 5))
    chosen = QuadSelector(pool_clusters=4, probes=1, arms_per_round=1, damping=0.3)(given(domain, pool, 5))
    assert chosen.diagnostics["pool_clusters"] == 4
    assert chosen.scored.sum() == 20 and chosen.diagnostics["probed"] == 20
    expected = influences(domain, pool, 0.3)
    np.testing.assert_allclose(chosen.scores[chosen.scored], expected[chosen.scored], rtol=2e-4, atol=1e-5)
    best = np.flatnonzero(chosen.scored)[np.argsort(-expected[chosen.scored])][:5]
    assert chosen.selected.tolist() == best.tolist()


def test_probing_all_is_the_influence_selector(given):
    rng = np.random.default_rng(1)
    problem = given(rng.normal(size=(9, 4)), rng.normal(size=(30, 4)), 10)
    whole = QuadSelector(pool_clusters=3, probe_factor=3)(problem)
    other = METHODS["influence"](stage1="off", pool_sample=4)(problem)
    assert whole.scored.all()
    np.testing.assert_allclose(whole.scores, other.scores, rtol=1e-5, atol=1e-6)
    assert whole.selected.tolist() == other.selected.tolist()


def ledger(members, rewards, budget, probes, per_round, exploration):
    """The bandit with lists of what was seen; every arm's number worked out anew each time."""
    seen = {arm: [] for arm in range(len(members))}
    order = []
    first = True
    while len(order) < budget:
        flat = [r for found in seen.values() for r in found]
        spread = np.std(flat) if flat else 0.0
        value = {
            arm: np.mean(found) + exploration * spread * math.sqrt(2 * math.log(len(flat)) / len(found))
            for arm, found in seen.items()
            if found
        }
        opened = [arm for arm in seen if len(seen[arm]) < len(members[arm])]
        arms = opened if first else sorted(opened, key=lambda arm: (-value[arm], arm))[:per_round]
        first = False
        for arm in arms:
            take = min(probes, budget - len(order), len(members[arm]) - len(seen[arm]))
            rows = members[arm][len(seen[arm]) : len(seen[arm]) + take]
            order += list(rows)
            seen[arm] += [rewards[r] for r in rows]
    return order


@pytest.mark.parametrize("exploration", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("probes, per_round, budget", [(1, 1, 37), (3, 2, 50), (4, 5, 70)])
def test_the_bandit_keeps_the_books(exploration, probes, per_round, budget):
    rng = np.random.default_rng(2)
    sizes = [30, 7, 1, 22, 10]
    rows = rng.permutation(sum(sizes))
    members = np.split(rows, np.cumsum(sizes)[:-1])
    rewards = rng.normal(size=len(rows)) + np.repeat(rng.normal(size=5), sizes)[np.argsort(rows)]
    bandit, order = Bandit(members, probes=probes, exploration=exploration), []
    while bandit.probed < budget:
        arms = bandit.best(per_round) if order else bandit.open_arms()
        drawn = bandit.draw(arms, budget - bandit.probed)
        bandit.learn(arms, [rewards[part] for part in drawn])
        order += np.concatenate(drawn).tolist()
    assert order == ledger(members, rewards, budget, probes, per_round, exploration)
    assert len(set(order)) == budget


def planted(rng):
    """Six clusters of 50; the domain lies in the first."""
    centres = 3 * np.eye(6)
    pool = blobs(rng, centres, 50)
    domain = centres[0] + 0.2 * rng.normal(size=(10, 6))
    return domain, pool, pool[:, 0] > 1.5


def test_it_finds_the_planted_cluster_with_few_probes_and_random_does_not(given):
    domain, pool, useful = planted(np.random.default_rng(3))
    problem = given(domain, pool, 30)
    chosen = QuadSelector(pool_clusters=6, probes=2, arms_per_round=1, probe_factor=2, exploration=0.5)(problem)
    assert chosen.diagnostics["probed"] == 60 and chosen.diagnostics["pool_clusters"] == 6
    assert useful[chosen.selected].mean() >= 0.9
    assert useful[np.flatnonzero(chosen.scored)].mean() > 0.6  # the first pulls probe 2 of each of 6 clusters
    assert useful[METHODS["random"]()(problem).selected].mean() < 0.4


def test_more_exploration_probes_more_widely(given):
    domain, pool, _ = planted(np.random.default_rng(4))
    options = {"pool_clusters": 6, "probes": 2, "arms_per_round": 1, "probe_factor": 3}
    most = lambda e: QuadSelector(**options, exploration=e)(given(domain, pool, 20)).diagnostics[
        "probed_in_the_cluster_probed_most"
    ]
    assert most(0.0) > most(3.0) > 60 / 6


def test_clusters_are_those_of_the_nearest_centre(given, tmp_path, monkeypatch):
    rng = np.random.default_rng(5)
    pool = blobs(rng, 3 * np.eye(4), 25)
    problem = given(rng.normal(size=(3, 4)), pool, 5, work_dir=tmp_path)
    labels = pool_clusters(problem, 4)
    truth = pool.argmax(axis=1)
    assert len({(a, b) for a, b in zip(labels, truth)}) == 4  # a renaming of the truth
    monkeypatch.setattr(quad, "SAMPLE", 40)
    monkeypatch.setattr(quad, "k_means", lambda *a, **k: (_ for _ in ()).throw(AssertionError("computed again")))
    np.testing.assert_array_equal(pool_clusters(problem, 4), labels)
    monkeypatch.undo()
    monkeypatch.setattr(quad, "SAMPLE", 40)
    sampled = pool_clusters(given(rng.normal(size=(3, 4)), pool, 5), 4)
    assert len({(a, b) for a, b in zip(sampled, truth)}) == 4


def test_fewer_different_vectors_than_clusters():
    for vectors, groups in ((np.ones((5, 3)), 1), (np.eye(2), 2)):
        labels, centres = k_means(vectors.astype(np.float32), 3, seed=0, starts=2)
        assert set(labels) == set(range(groups)) and len(centres) == groups and centres.dtype == np.float32
        np.testing.assert_allclose(centres[labels], vectors, atol=1e-6)


def test_a_killed_run_repeats_no_probe_and_ends_the_same(given, tmp_path, monkeypatch):
    domain, pool, _ = planted(np.random.default_rng(6))
    method = QuadSelector(pool_clusters=6, probes=2, arms_per_round=4, probe_factor=3)
    make = lambda name: given(domain, pool, 20, work_dir=tmp_path / name, manifest={"model": "m"})
    whole = method(make("whole"))
    probed, real, calls = [], quad.scores_along, []

    def told(kernel, params, directions, batches, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        done = options["rows"].store.done()
        probed.extend(int(i) for batch in batches.without(done) for i in batch.index if i >= 0)
        return real(kernel, params, directions, batches, **options)

    monkeypatch.setattr(quad, "scores_along", told)
    with pytest.raises(KeyboardInterrupt):
        method(make("killed"))
    before = len(probed)
    assert 0 < before < 60
    again = method(make("killed"))
    assert len(probed) == len(set(probed)) == 60 and before == len(set(probed[:before]))
    np.testing.assert_array_equal(again.scores, whole.scores)
    np.testing.assert_array_equal(again.selected, whole.selected)
    assert again.diagnostics == whole.diagnostics


def test_rounds_compile_nothing_new(make):
    problem = make(n=4)
    probe = Probe.prepare(problem, QuadSelector())
    shapes = lambda rows: {(batch.rows, batch.length) for batch in probe.batches(np.asarray(rows)).planned}
    assert shapes([1, 7]) | shapes([0, 2, 3]) <= set(probe.plan.shapes)


def test_bad_options_are_refused():
    for name in ("pool_clusters", "probes", "arms_per_round", "probe_factor"):
        with pytest.raises(ConfigError, match=name):
            QuadSelector(**{name: 0})
    with pytest.raises(ConfigError, match="exploration"):
        QuadSelector(exploration=-1.0)
    with pytest.raises(ConfigError, match="damping"):
        QuadSelector(damping=0.0)
