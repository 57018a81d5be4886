"""G2IS against the walk written out with every edge, the core against an SVD, and planted groups that conflict."""

import jax.numpy as jnp
import numpy as np
import pytest

from ntkjax.errors import ConfigError, UserError
from ntkjax.selection import METHODS
from ntkjax.selection.base import WarmupCheckpoint
from ntkjax.selection.methods.g2is import core_knowledge, walk

EXACT = {"sketch": "sparse", "sketch_size": 32, "stage1": "off"}  # no inner product of 8 numbers is changed


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def select(problem, **options):
    return METHODS["g2is"](**EXACT | options)(problem)


def written_out(nodes, core, n, keep):
    """The dense graph, every constraint looked up anew in every step."""
    edges, left, order, starts = nodes @ nodes.T, set(range(len(nodes))), [], []
    mean_cosine = lambda rows: np.mean(rows, axis=0) @ core / np.linalg.norm(np.mean(rows, axis=0))
    while len(order) < n:
        walked = order[starts[-1] :] if starts else []
        allowed = []
        for j in sorted(left) if walked else []:
            mean = np.mean(nodes[walked], axis=0)
            moved = mean + nodes[j]
            near = moved @ core / np.linalg.norm(moved) >= keep * mean_cosine(nodes[walked])
            if near and all(edges[j, s] >= 0 for s in walked):
                allowed.append(j)
        if allowed:
            best = max(allowed, key=lambda j: edges[j, walked[-1]])
        else:
            starts.append(len(order))
            best = max(sorted(left), key=lambda j: nodes[j] @ core)
        order.append(best)
        left.remove(best)
    return order, starts


@pytest.mark.parametrize("seed, width, spread", [(0, 3, 1.0), (1, 8, 1.0), (2, 8, 3.0), (3, 40, 1.0), (4, 5, 0.5)])
@pytest.mark.parametrize("keep", [0.8, 1.0, 0.1])
def test_the_walk_is_that_of_the_dense_graph(seed, width, spread, keep):
    rng = np.random.default_rng(seed)
    core = unit(rng.normal(size=width))
    nodes = unit(spread * rng.normal(size=(40, width)) + core).astype(np.float32)
    found = walk(nodes, core, 25, keep)
    order, starts = written_out(nodes.astype(np.float64), core, 25, keep)
    assert found.nodes.tolist() == order and list(found.starts) == starts


def test_a_walk_has_no_conflict_in_it():
    rng = np.random.default_rng(5)
    core = unit(rng.normal(size=6))
    nodes = unit(rng.normal(size=(60, 6))).astype(np.float32)
    found = walk(nodes, core, 60, 0.8)
    assert sorted(found.nodes) == list(range(60)) and len(found.starts) > 3
    for part in np.split(found.nodes, found.starts[1:]):
        assert (nodes[part] @ nodes[part].T).min() >= -1e-6


def test_the_core_is_the_mean_in_the_leading_components():
    rng = np.random.default_rng(6)
    rows = rng.normal(size=(9, 30)) + 0.5
    _, _, directions = np.linalg.svd(rows, full_matrices=False)
    for share, kept in ((0.5, 5), (0.01, 1), (1.0, 9)):
        core, components = core_knowledge(rows, share)
        leading = directions[:kept]
        expected = leading.T @ (leading @ rows.mean(axis=0))
        np.testing.assert_allclose(core, unit(expected), atol=1e-10)
        assert components == kept
    np.testing.assert_allclose(core, unit(rows.mean(axis=0)), atol=1e-10)  # all components: the mean itself
    assert core_knowledge(np.tile(rows[:1], (4, 1)), 0.5)[1] == 1  # the rank counts, not the rows
    with pytest.raises(UserError, match="zero"):
        core_knowledge(np.zeros((3, 5)), 0.5)


def test_a_selection_is_the_walk_over_adams_updates(given):
    rng = np.random.default_rng(7)
    domain, pool = rng.normal(size=(6, 8)) + 1, rng.normal(size=(30, 8))
    tree = lambda values: {"w": jnp.asarray(values, jnp.float32)}
    point = WarmupCheckpoint(tree(np.zeros(8)), tree(rng.normal(size=8)), tree(rng.uniform(0.1, 3, 8)), 1e-3, 1)
    problem = given(domain, pool, 9, checkpoints=(point,))
    m, v = np.asarray(point.first["w"], np.float64), np.asarray(point.second["w"], np.float64)
    nodes = unit((0.9 * m + 0.1 * pool) / np.sqrt(0.999 * v + 0.001 * pool**2 + 1e-8))
    core, _ = core_knowledge(domain, 0.5)
    order, starts = written_out(nodes, core, 9, 0.8)
    chosen = select(problem)
    assert chosen.selected.tolist() == order and chosen.ranks[order].tolist() == list(range(1, 10))
    np.testing.assert_allclose(chosen.scores, nodes @ core, atol=1e-5)
    assert chosen.diagnostics["restarts"] == len(starts) - 1
    assert sorted(chosen.ranks.tolist()) == list(range(1, 31))
    plain = select(problem, adam="off")
    assert plain.selected.tolist() == written_out(unit(pool), core, 9, 0.8)[0] != order


def test_it_keeps_to_one_of_two_groups_that_conflict_and_random_does_not(given):
    rng = np.random.default_rng(8)
    axis, noise = np.eye(8), lambda rows: 0.05 * rng.normal(size=(rows, 8))
    scatter = 0.3 * rng.normal(size=(10, 8))
    domain = 3 * axis[0] + scatter - scatter.mean(axis=0)
    one = axis[0] + 1.5 * axis[1] + noise(10)
    other = axis[0] - 1.5 * axis[1] + noise(10)  # as near the domain, against the first
    away = -3 * axis[0] + 0.5 * rng.normal(size=(40, 8))
    problem = given(domain, np.concatenate([one, other, away]), 8)
    chosen = select(problem, walk_core=0.5)
    assert (chosen.selected < 10).all() or ((chosen.selected >= 10) & (chosen.selected < 20)).all()
    assert chosen.diagnostics["restarts"] == 0 and chosen.diagnostics["longest_walk"] == 8
    both = METHODS["gradient-cosine"](**EXACT)(problem).selected
    assert (both < 10).any() and ((both >= 10) & (both < 20)).any()
    drawn = METHODS["random"]()(problem).selected
    assert np.sum(drawn >= 20) > 2
    more = select(given(domain, np.concatenate([one, other, away]), 20), walk_core=0.5)
    assert sorted(more.selected) == list(range(20)) and more.diagnostics["restarts"] == 1


def test_stage_1_leaves_the_rest_without_a_rank(make):
    chosen = METHODS["g2is"](sketch_size=64)(make(n=2))
    assert chosen.scored.sum() == 8 == chosen.diagnostics["stage1_candidates"]
    assert np.isnan(chosen.scores[~chosen.scored]).all() and (chosen.ranks[~chosen.scored] == 0).all()


def test_what_cannot_be_is_refused(given):
    with pytest.raises(ConfigError, match="moments"):
        select(given(np.eye(8), np.eye(8), 2, checkpoints=()))
    for bad in ({"core_share": 0.0}, {"walk_core": 1.5}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            METHODS["g2is"](**bad)
