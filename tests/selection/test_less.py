"""LESS against loops over explicit gradients, its invariances, and a planted subtask."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkjax.errors import ConfigError
from ntkjax.selection import METHODS
from ntkjax.selection.base import WarmupCheckpoint

EXACT = {"sketch": "sparse", "sketch_size": 32, "stage1": "off"}  # no inner product of 8 numbers is changed


def select(problem, **options):
    return METHODS["less"](**EXACT | options)(problem)


def checkpoint(first, second, rate, width=8):
    tree = lambda values: {"w": jnp.asarray(np.broadcast_to(values, width), jnp.float32)}
    return WarmupCheckpoint(tree(0.0), tree(first), tree(second), rate, 1)


def cosine(a, b):
    return a @ b / np.sqrt(a @ a * (b @ b))


def brute(domain, pool, sources, checkpoints):
    """Every cosine on its own, float64; ``domain``, ``pool``, and moments: one list entry a checkpoint."""
    rates, scores = [c[2] for c in checkpoints], np.zeros(len(pool[0]))
    for j in range(len(scores)):
        best = -np.inf
        for source in set(sources):
            total = 0.0
            for t, (m, v, rate) in enumerate(checkpoints):
                g = pool[t][j]
                step = (0.9 * m + 0.1 * g) / np.sqrt(0.999 * v + 0.001 * g**2 + 1e-8)
                each = [cosine(step, domain[t][i]) for i in range(len(sources)) if sources[i] == source]
                total += rate / sum(rates) * np.mean(each)
            best = max(best, total)
        scores[j] = best
    return scores


def test_scores_are_the_definitions(given):
    rng = np.random.default_rng(0)
    domain, pool = rng.normal(size=(7, 8)), rng.normal(size=(20, 8))
    sources = ["a", "b", "a", "c", "b", "a", "a"]
    moments = [(rng.normal(size=8), rng.uniform(0.1, 2, 8), rate) for rate in (3e-4, 1e-4, 1e-5)]
    problem = given(domain, pool, 6, sources=sources, checkpoints=tuple(checkpoint(*m) for m in moments))
    chosen = select(problem)
    expected = brute([domain] * 3, [pool] * 3, sources, moments)
    np.testing.assert_allclose(chosen.scores, expected, atol=1e-5)
    assert chosen.selected.tolist() == np.argsort(-expected)[:6].tolist()
    assert sum(chosen.diagnostics["subtasks_chosen_for"].values()) == 6
    np.testing.assert_allclose(chosen.diagnostics["checkpoint_weights"], np.array([30, 10, 1]) / 41)


def test_gradients_are_taken_at_each_checkpoint(make, small):
    scaled = lambda tree, by: jax.tree.map(lambda leaf: by * leaf, tree)
    points = [
        dataclasses.replace(c, first=scaled(c.first, 0.01), second=scaled(c.second, 1e-3)) for c in make().checkpoints
    ]
    problem = make(checkpoints=tuple(points))
    flat = lambda tree: np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])
    gradients = lambda data: [small.explicit_gradients(problem, data, params=c.params) for c in problem.checkpoints]
    moments = [(flat(c.first), flat(c.second), c.learning_rate) for c in problem.checkpoints]
    expected = brute(gradients(problem.domain), gradients(problem.pool), problem.domain.sources, moments)
    np.testing.assert_allclose(select(problem, sketch_size=1 << 16).scores, expected, atol=0.005)
    last = [small.explicit_gradients(problem, data) for data in (problem.domain, problem.pool)]
    wrong = brute([last[0]] * 2, [last[1]] * 2, problem.domain.sources, moments)
    assert np.abs(wrong - expected).max() > 0.05  # what looking at the last theta alone would give


def test_without_adam_it_is_the_mean_cosine_of_plain_gradients(given):
    rng = np.random.default_rng(3)
    domain, pool = rng.normal(size=(5, 8)), rng.normal(size=(20, 8))
    points = (checkpoint(5.0, 2.0, 3e-4), checkpoint(-7.0, 1.0, 1e-4))  # moments that would decide everything
    chosen = select(given(domain, pool, 4, checkpoints=points), adam="off")
    unit = lambda rows: rows / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(chosen.scores, unit(pool) @ unit(domain).mean(axis=0), atol=1e-5)


def test_what_it_does_not_depend_on(given):
    rng = np.random.default_rng(1)
    domain, pool = rng.normal(size=(6, 8)), rng.normal(size=(20, 8))
    points = (checkpoint(0.1, 1.0, 3e-4), checkpoint(-0.2, 0.5, 1e-4))
    plain = select(given(domain, pool, 5, checkpoints=points)).scores
    louder = domain * rng.uniform(0.01, 100, (6, 1))
    np.testing.assert_allclose(select(given(louder, pool, 5, checkpoints=points)).scores, plain, atol=1e-5)
    faster = tuple(dataclasses.replace(p, learning_rate=7 * p.learning_rate) for p in points)
    np.testing.assert_allclose(select(given(domain, pool, 5, checkpoints=faster)).scores, plain, atol=1e-6)
    order = rng.permutation(6)
    np.testing.assert_allclose(select(given(domain[order], pool, 5, checkpoints=points)).scores, plain, atol=1e-5)


def test_it_finds_a_small_subtask_that_the_mean_over_all_hides(given):
    rng = np.random.default_rng(2)
    axis = np.eye(8)
    domain = np.concatenate([3 * axis[0] + 0.1 * rng.normal(size=(20, 8)), 3 * axis[1] + 0.1 * rng.normal(size=(2, 8))])
    useful = axis[1] + 0.1 * rng.normal(size=(8, 8))
    others = 0.6 * axis[0] + 0.8 * axis[2:][rng.integers(0, 6, 50)] + 0.05 * rng.normal(size=(50, 8))
    sources = ["large"] * 20 + ["small"] * 2
    problem = given(domain, np.concatenate([useful, others]), 8, sources=sources)
    chosen = select(problem)
    assert sorted(chosen.selected) == list(range(8))
    assert chosen.diagnostics["subtasks_chosen_for"] == {"small": 8}
    assert not set(METHODS["gradient-cosine"](**EXACT)(problem).selected) & set(range(8))
    assert np.sum(METHODS["random"]()(problem).selected < 8) < 4


def test_zero_gradients_are_counted(given):
    domain, pool = np.eye(8)[:3], np.ones((6, 8))
    domain[1], pool[4] = 0, 0
    chosen = select(given(domain, pool, 2))
    assert chosen.diagnostics["zero_gradients"] == chosen.diagnostics["zero_domain_gradients"] == 1
    assert chosen.scores[4] == 0


def test_without_checkpoints_it_is_refused(given):
    with pytest.raises(ConfigError, match="epochs"):
        select(given(np.eye(8), np.eye(8), 2, checkpoints=()))
