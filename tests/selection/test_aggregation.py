"""Aggregations of ntk against the kernel matrix written out, against each other, and a planted minority."""

import numpy as np
import pytest

from ntkjax.errors import ConfigError, UserError
from ntkjax.selection import METHODS, described
from ntkjax.selection.algorithms.clusters import domain_groups

EXACT = {"sketch": "sparse", "sketch_size": 32, "stage1": "off", "pool_sample": 12}  # 8 numbers: a lossless sketch
DIRECTIONS = ["raw", "contrast", "cosine"]


def select(problem, aggregation, **options):
    return METHODS["ntk"](**{"kernel": "loss", "aggregation": aggregation} | EXACT | options)(problem)


def two_groups(seed=0, noise=0.1):
    """Domain [9, 8]: 6 examples along one axis, 3 along another; and which is which."""
    rng = np.random.default_rng(seed)
    labels = np.array([0, 1, 0, 0, 1, 0, 0, 1, 0])
    return 2 * np.eye(8)[labels] + noise * rng.normal(size=(9, 8)), labels


def drawn_mean(problem, pool):
    return pool[METHODS["ntk"](pool_sample=12).sample(problem)].mean(axis=0)


def kernel_rows(domain, pool, direction, mean):
    """k(x_i, x_j) along the direction, [N, M]."""
    if direction == "contrast":
        domain = domain - np.outer(domain @ mean / (mean @ mean), mean)
    found = pool @ domain.T
    if direction == "cosine":
        found /= np.linalg.norm(pool, axis=1)[:, None] * np.linalg.norm(domain, axis=1)
    return found


def turns(rows, n):
    """Each column in turn takes its best row that is left."""
    left, taken = set(range(len(rows))), []
    while len(taken) < n:
        best = max(sorted(left), key=lambda j: rows[j, len(taken) % rows.shape[1]])
        taken.append(best)
        left.remove(best)
    return taken


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_max_and_turns_are_those_of_the_kernel_matrix(direction, given):
    rng = np.random.default_rng(1)
    domain, pool = rng.normal(size=(5, 8)), rng.normal(size=(30, 8)) + 0.3
    problem = given(domain, pool, 7)
    mean = drawn_mean(problem, pool)
    rows = kernel_rows(domain, pool, direction, mean)
    chosen = select(problem, "max", scores="sketch", direction=direction)
    np.testing.assert_allclose(chosen.scores, rows.max(axis=1), atol=1e-4)
    assert chosen.selected.tolist() == np.argsort(-rows.max(axis=1))[:7].tolist()
    chosen = select(problem, "round-robin", scores="sketch", direction=direction)
    assert chosen.selected.tolist() == turns(rows, 7)
    np.testing.assert_allclose(chosen.scores, rows.max(axis=1), atol=1e-4)
    assert chosen.ranks[chosen.selected].tolist() == list(range(1, 8)) and sorted(chosen.ranks) == list(range(1, 31))
    assert chosen.diagnostics["aggregation"] == "round-robin"
    reference = select(problem, "mean", scores="sketch").diagnostics
    rank = np.corrcoef(chosen.scores.argsort().argsort(), (pool @ mean).argsort().argsort())[0, 1]
    np.testing.assert_allclose(
        described(chosen, problem.pool).diagnostics["rank_correlation_with_pool_mean"], rank, atol=1e-6
    )
    assert reference.keys() == chosen.diagnostics.keys()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("scores", ["forward", "sketch"])
def test_clusters_take_the_best_of_the_groups_means(direction, scores, given):
    rng = np.random.default_rng(2)
    (domain, labels), pool = two_groups(), rng.normal(size=(30, 8)) + 0.3
    domain *= rng.uniform(0.2, 5, (9, 1))  # what is in a group is decided by direction alone
    problem = given(domain, pool, 7)
    means = np.stack([domain[labels == k].mean(axis=0) for k in (0, 1)])
    expected = kernel_rows(means, pool, direction, drawn_mean(problem, pool)).max(axis=1)
    chosen = select(problem, "clusters", domain_clusters=2, scores=scores, direction=direction)
    np.testing.assert_allclose(chosen.scores, expected, atol=1e-4)
    assert sorted(chosen.diagnostics["domain_cluster_sizes"]) == [3, 6]


def test_clusters_with_a_preconditioner(given):
    (domain, labels), pool = two_groups(noise=0.3), np.random.default_rng(3).normal(size=(20, 8))
    chosen = select(given(domain, pool, 4), "clusters", domain_clusters=2, precondition="kfac", damping=0.5)
    fisher = domain.T @ domain / 9
    damped = fisher + 0.5 * np.trace(fisher) / 8 * np.eye(8)
    means = np.stack([domain[labels == k].mean(axis=0) for k in (0, 1)])
    expected = (pool @ np.linalg.solve(damped, means.T)).max(axis=1)
    np.testing.assert_allclose(chosen.scores, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kernel", ["sum_logits", "spectral:3"])
def test_one_cluster_is_the_mean_and_a_cluster_each_is_the_maximum(kernel, make, small):
    problem, options = make(), {"kernel": kernel, "sketch_size": 1 << 14, "pool_sample": 8}
    one = select(problem, "clusters", domain_clusters=1, **options)
    mean = select(problem, "mean", **options)
    np.testing.assert_allclose(one.scores, mean.scores, rtol=1e-4, atol=1e-4 * np.abs(mean.scores).max())
    each = select(problem, "clusters", domain_clusters=6, **options)  # by forward mode: exact
    assert each.diagnostics["domain_cluster_sizes"] == [1] * 6
    highest = select(problem, "max", scores="sketch", **options)
    np.testing.assert_allclose(highest.scores, each.scores, atol=0.1 * np.abs(each.scores).max())
    if kernel == "sum_logits":
        gradients = [small.explicit_gradients(problem, d, small.sum_of_logits) for d in (problem.pool, problem.domain)]
        expected = (gradients[0] @ gradients[1].T).max(axis=1)
        np.testing.assert_allclose(each.scores, expected, atol=1e-4 * np.abs(expected).max())


def test_a_minority_of_the_domain_is_served(given):
    rng = np.random.default_rng(4)
    domain, labels = two_groups()
    useful = 2 * np.eye(8)[1] + 0.1 * rng.normal(size=(6, 8))  # what the 3 examples need
    common = 1.3 * np.eye(8)[0] + 0.1 * rng.normal(size=(40, 8))
    pool = np.concatenate([useful, common])
    problem = given(domain, pool, 6)
    found = lambda aggregation, **more: int(np.sum(select(problem, aggregation, **more).selected < 6))
    assert found("mean") == 0 and found("clusters", domain_clusters=2) == 6 and found("max", scores="sketch") == 6
    assert found("round-robin", scores="sketch") == 2 == np.sum(labels[:6])  # 6 turns, 2 of them the minority's
    assert int(np.sum(METHODS["random"]()(problem).selected < 6)) < 4


def test_stage_1_and_votes(make):
    for aggregation in ("max", "round-robin", "clusters"):
        scores = "forward" if aggregation == "clusters" else "sketch"
        chosen = select(make(n=2), aggregation, stage1="on", scores=scores, sketch_size=64)
        assert chosen.scored.sum() == 8 and chosen.votes is not None
        assert chosen.diagnostics["stage1_candidates"] == 8 and np.isnan(chosen.scores[~chosen.scored]).all()


def test_groups_are_kept(make, tmp_path, monkeypatch):
    problem, options = make(work_dir=tmp_path), {"domain_clusters": 3, "sketch_size": 64}
    first = select(problem, "clusters", **options)
    labels = domain_groups(problem, lambda: 1 / 0, 3, {"kernel": "loss", "sketch": "sparse", "size": 64})
    assert np.bincount(labels).tolist() == first.diagnostics["domain_cluster_sizes"]
    monkeypatch.setattr("ntkjax.selection.algorithms.clusters._groups", lambda *a: 1 / 0)
    again = select(problem, "clusters", **options)
    np.testing.assert_array_equal(again.scores, first.scores)
    with pytest.raises(ConfigError, match="groups: was 3, is now 2"):
        select(problem, "clusters", **options | {"domain_clusters": 2})


def test_fewer_directions_than_groups(given):
    domain = np.repeat(np.eye(8)[:2], 4, axis=0) * np.arange(1, 9)[:, None]
    chosen = select(given(domain, np.eye(8), 2), "clusters", domain_clusters=5)
    assert chosen.diagnostics["domain_cluster_sizes"] == [4, 4]


def test_what_cannot_be_is_refused(given):
    for aggregation in ("max", "round-robin"):
        with pytest.raises(ConfigError, match="needs scores sketch"):
            METHODS["ntk"](aggregation=aggregation)
        with pytest.raises(ConfigError, match="needs scores forward"):
            METHODS["ntk"](aggregation=aggregation, scores="sketch", precondition="kfac")
    with pytest.raises(ConfigError, match="domain_clusters"):
        METHODS["ntk"](aggregation="clusters", domain_clusters=0)
    domain, pool = np.eye(8), np.eye(8)
    domain[3], pool[2] = 0, 0
    with pytest.raises(UserError, match="row 3"):
        select(given(domain, np.eye(8), 2), "max", scores="sketch")
    with pytest.raises(ConfigError, match="direction cosine"):
        select(given(np.eye(8), pool, 2), "max", scores="sketch", direction="cosine")
