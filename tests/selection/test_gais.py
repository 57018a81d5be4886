"""GAIS: attention against sums written out node by node, scores that need no company, a planted group found."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ntkjax.selection.methods.gais as gais
from ntkjax.errors import ConfigError, UserError
from ntkjax.selection import METHODS
from ntkjax.selection.methods.gais import GaisSelector, Nodes, attend, confidence, fresh_network, graph_loss, threshold


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def network():
    found = fresh_network(5, jax.random.key(3))
    return found | {"bias": np.float32(0.3)}


def by_hand(layer, own, others, neighbours):
    """Node by node, neighbour by neighbour, in float64."""
    w, s, t = (np.asarray(layer[k], np.float64) for k in "wst")
    rows = []
    for i, x in enumerate(own.astype(np.float64)):
        nodes = [x, *(others[j].astype(np.float64) for j in neighbours[i])]
        scores = np.array([x @ w @ s + y @ w @ t for y in nodes])
        scores = np.exp(np.where(scores > 0, scores, 0.2 * scores))
        rows.append(sum(a * (y @ w) for a, y in zip(scores / scores.sum(), nodes)))
    return np.array(rows)


def elu(x):
    return np.where(x > 0, x, np.expm1(x))


def test_attention_is_the_sum_over_neighbours(network):
    rng = np.random.default_rng(0)
    own, others = rng.normal(size=(6, 5)).astype(np.float32), rng.normal(size=(9, 5)).astype(np.float32)
    joined = rng.random((6, 9)) < 0.4
    joined[2] = False  # a node alone
    neighbours = [np.flatnonzero(row) for row in joined]
    found = np.asarray(attend(network["first"], *map(jnp.asarray, (own, others, joined))))
    np.testing.assert_allclose(found, by_hand(network["first"], own, others, neighbours), atol=1e-5)
    np.testing.assert_allclose(found[2], own[2] @ np.asarray(network["first"]["w"]), atol=1e-6)


def test_confidence_is_two_layers_over_the_graph(network):
    rng = np.random.default_rng(1)
    rows, graph, tau = unit(rng.normal(size=(7, 5))), unit(rng.normal(size=(12, 5))), 0.2
    apart = np.ones((7, 12), bool)
    apart[0, :6] = False
    inside = [[j for j in range(12) if j != i and graph[i] @ graph[j] >= tau] for i in range(12)]
    to_graph = [[j for j in range(12) if apart[i, j] and rows[i] @ graph[j] >= tau] for i in range(7)]
    context = elu(by_hand(network["first"], graph, graph, inside))
    hidden = elu(by_hand(network["first"], rows, graph, to_graph))
    expected = by_hand(network["second"], hidden, context, to_graph)[:, 0] + 0.3
    np.testing.assert_allclose(confidence(network, rows, graph, apart, np.float32(tau)), expected, atol=1e-5)


def test_without_edges_it_is_a_plain_network(network):
    x = unit(np.random.default_rng(2).normal(size=(8, 5)))
    found = confidence(network, x, x, ~np.eye(8, dtype=bool), np.float32(2))
    plain = elu(x @ np.asarray(network["first"]["w"])) @ np.asarray(network["second"]["w"])
    np.testing.assert_allclose(found, plain[:, 0] + 0.3, atol=1e-5)


def test_both_classes_weigh_the_same(network):
    """The loss of 2 and 10 nodes is the mean of two means; repeating a class changes nothing without edges."""
    x = unit(np.random.default_rng(3).normal(size=(12, 5)))
    labels = np.array([1.0] * 2 + [0.0] * 10, np.float32)
    kept = lambda x: jnp.ones((len(x), len(x)), bool)
    loss = lambda x, labels: float(graph_loss(network, jnp.asarray(x), jnp.asarray(labels), kept(x), np.float32(2)))
    z = np.asarray(confidence(network, x, x, ~np.eye(12, dtype=bool), np.float32(2)), np.float64)
    expected = (np.log1p(np.exp(-z[:2])).mean() + np.log1p(np.exp(z[2:])).mean()) / 2
    assert loss(x, labels) == pytest.approx(expected, rel=1e-5)
    twice = np.concatenate([np.arange(12), np.arange(2, 12)])
    assert loss(x[twice], labels[twice]) == pytest.approx(expected, rel=1e-5)


def test_the_threshold_joins_the_share_of_pairs():
    x = unit(np.random.default_rng(4).normal(size=(60, 8)))
    pairs = (x @ x.T)[np.triu_indices(60, 1)]
    assert np.mean(pairs >= threshold(x, 0.1)) == pytest.approx(0.1, abs=1 / len(pairs))


def test_graphs_hold_both_kinds_and_name_their_rows():
    rng = np.random.default_rng(5)
    domain, pool = rng.normal(size=(30, 4)).astype(np.float32), rng.normal(size=(100, 4)).astype(np.float32)
    nodes = Nodes.prepare(domain, lambda rows: pool[rows], np.arange(20, 100), seed=0)
    assert len(nodes.pool) == 80
    index, x, labels = nodes.draw(rng, 40)
    assert labels.sum() == 20 and (index[:20] == -1).all() and len(set(index[20:].tolist())) == 20
    np.testing.assert_allclose(x[20:], nodes.centred(pool[index[20:]]), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, atol=1e-5)
    index, _, labels = nodes.draw(rng, 400)  # the domain is smaller than half, the pool smaller than the rest
    assert labels.sum() == 30 and len(index) == 110


def planted(rng, width=16):
    """600 pool rows in twelve groups; the domain's two groups are two of them, moved a little."""
    centres = rng.normal(size=(12, width))
    kind = rng.integers(0, 12, 600)
    pool = centres[kind] + 0.5 * rng.normal(size=(600, width))
    moved = centres[:2] + 0.3 * rng.normal(size=(1, width))
    domain = moved[rng.integers(0, 2, 40)] + 0.5 * rng.normal(size=(40, width))
    return domain, pool, kind < 2


@pytest.mark.parametrize("options", [{}, {"graph_features": "gradients", "stage1": "off", "sketch_size": 64}])
def test_it_finds_the_planted_groups_and_random_does_not(given, options):
    domain, pool, useful = planted(np.random.default_rng(6))
    problem = given(domain, pool, 60)
    chosen = GaisSelector(graph_nodes=128, graph_steps=60, **options)(problem)
    assert useful[chosen.selected].mean() >= 0.9
    assert useful[METHODS["random"]()(problem).selected].mean() < 0.4
    assert chosen.diagnostics["graph_accuracy"] > 0.7


def test_stage_1_limits_the_gradients(given):
    domain, pool, _ = planted(np.random.default_rng(7))
    options = {"graph_features": "gradients", "sketch_size": 64, "graph_nodes": 32, "graph_steps": 3}
    chosen = GaisSelector(**options)(given(domain, pool, 10))
    assert chosen.scored.sum() == 40 and chosen.votes is not None


def test_a_score_needs_no_company_and_a_second_run_is_the_same(given, monkeypatch):
    domain, pool, _ = planted(np.random.default_rng(8))
    method = GaisSelector(graph_nodes=64, graph_steps=20)
    whole = method(given(domain, pool, 30))
    np.testing.assert_array_equal(method(given(domain, pool, 30)).scores, whole.scores)
    monkeypatch.setattr(gais, "CHUNK", 77)
    np.testing.assert_allclose(method(given(domain, pool, 30)).scores, whole.scores, atol=1e-5)
    assert not np.array_equal(method(given(domain, pool, 30, seed=1)).scores, whole.scores)


def test_bad_options_and_features_are_refused(given):
    bad = {"graph_edges": 0.0, "graph_nodes": 3, "graph_steps": 0, "sketch_size": 0}
    for name, value in bad.items():
        with pytest.raises(ConfigError, match=name):
            GaisSelector(**{name: value})
    rng = np.random.default_rng(10)
    domain = rng.normal(size=(3, 4))
    domain[1] = 0
    with pytest.raises(UserError, match="1 domain examples"):
        GaisSelector(graph_nodes=8, graph_steps=1)(given(domain, rng.normal(size=(20, 4)), 2))
