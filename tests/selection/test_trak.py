"""TRAK against its closed form with explicit projected gradients, its invariances, and what it refuses."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from ntkjax.errors import ConfigError
from ntkjax.ntk import RademacherSketch
from ntkjax.rng import numpy_rng
from ntkjax.selection import METHODS
from ntkjax.selection.methods.trak import attributions

WHOLE = {"stage1": "off", "sketch": "rademacher"}


def by_definition(mean, phi, damping):
    """phi_bar^T (Phi^T Phi + lambda I)^-1 Phi^T with the K x K matrix inverted."""
    gram = phi.T @ phi
    gram = gram + damping * np.trace(gram) / len(gram) * np.eye(len(gram))
    return mean @ np.linalg.inv(gram) @ phi.T


@pytest.mark.parametrize(("count", "size"), [(20, 6), (5, 12)])
def test_a_system_without_a_unique_solution_is_refused(count, size):
    """Gradients that depend on each other: two equal candidates, or two equal columns."""
    phi = np.random.default_rng(0).standard_normal((count, size))
    phi[1], phi[:, 1] = phi[0], phi[:, 0]
    read, rows = lambda part: phi[part], np.arange(count)
    with pytest.raises(ConfigError, match=r"with --damping 1e-300 the \d+ equations .* raise --damping"):
        attributions(np.ones(size), read, rows, 1e-300)
    assert np.isfinite(attributions(np.ones(size), read, rows, 1e-6)[0]).all()


@pytest.mark.parametrize(("count", "size"), [(40, 6), (5, 9), (1100, 3)], ids=["more rows", "fewer rows", "two blocks"])
def test_attributions_are_the_closed_form(count, size):
    rng = np.random.default_rng(count)
    phi, mean = rng.normal(size=(count, size)), rng.normal(size=size)
    phi[3] = 0
    rows = np.sort(rng.choice(3 * count, count, replace=False))
    read = lambda part: phi[np.searchsorted(rows, part)]
    for damping in (0.1, 1e-3):
        found, zeros = attributions(mean, read, rows, damping)
        expected = by_definition(mean, phi, damping)
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10 * np.abs(expected).max())
        assert zeros == 1 and found[3] == 0
    with pytest.raises(ConfigError, match="gradient of every candidate is 0"):
        attributions(mean, lambda part: np.zeros((len(part), size)), rows, 0.1)


def test_with_damping_near_0_and_enough_rows_it_is_the_projection_onto_the_rows():
    """The attributions of an example of the pool to itself are its leverage, and they add up to K."""
    rng = np.random.default_rng(0)
    phi, rows = rng.normal(size=(30, 4)), np.arange(30)
    own = [attributions(phi[j], lambda part: phi[part], rows, 1e-13)[0][j] for j in range(30)]
    assert sum(own) == pytest.approx(4, rel=1e-9)


@pytest.mark.parametrize("size", [8, 64])
def test_scores_are_the_definition(make, small, size):
    """24 pool rows, K below and above; every checkpoint with its own projection, applied to explicit gradients."""
    problem = make()
    total, errors = np.zeros(24), np.zeros(24)
    for place, checkpoint in enumerate(problem.checkpoints):
        sketch = RademacherSketch(size, int(numpy_rng(problem.seed, "trak", place).integers(1 << 30)))
        project = jax.jit(lambda g, sketch=sketch: sketch({"outputs": g}))

        def features(data, checkpoint=checkpoint, project=project):
            flat = small.explicit_gradients(problem, data, problem.margin_fn, checkpoint.params)
            leaves, tree = jax.tree.flatten(checkpoint.params)
            parts = np.split(flat.astype(np.float32), np.cumsum([leaf.size for leaf in leaves])[:-1], axis=1)
            shaped = [x.reshape(-1, 1, *leaf.shape) for x, leaf in zip(parts, leaves)]
            return np.asarray(project(tree.unflatten(shaped)), np.float64)

        total += by_definition(features(problem.domain).mean(axis=0), features(problem.pool), 0.1) / 2
        for batch in problem.pool.batches(token_budget=64):
            real = np.asarray(batch.index) >= 0
            q = np.asarray(problem.error_fn(checkpoint.params, batch))
            errors[np.asarray(batch.index)[real]] += q[real] / 2
    chosen = METHODS["trak"](**WHOLE, sketch_size=size)(problem)
    expected = total * errors
    np.testing.assert_allclose(chosen.scores, expected, atol=2e-4 * np.abs(expected).max())
    assert chosen.selected.tolist() == np.argsort(-chosen.scores)[: problem.n].tolist()
    assert chosen.diagnostics["checkpoint_steps"] == [2, 4]
    assert chosen.diagnostics["mean_error"] == pytest.approx(errors.mean(), rel=1e-5)


def test_checkpoints_are_averaged_and_have_projections_of_their_own(make):
    problem = make()
    once = METHODS["trak"](**WHOLE, sketch_size=8)
    last = dataclasses.replace(problem, checkpoints=problem.checkpoints[-1:])
    twice = dataclasses.replace(problem, checkpoints=problem.checkpoints[-1:] * 2)
    assert not np.allclose(once(last).scores, once(twice).scores)  # another projection, another estimate
    reverse = dataclasses.replace(problem, checkpoints=problem.checkpoints[::-1])
    exact = METHODS["trak"](stage1="off", sketch="sparse", sketch_size=1 << 14)  # hardly an estimate any more
    np.testing.assert_allclose(exact(reverse).scores, exact(problem).scores, atol=0.03)


def test_a_killed_run_goes_on_and_stage_1_leaves_its_rows(make, tmp_path, monkeypatch):
    problem = make(n=3, work_dir=tmp_path)
    options = {"sketch": "rademacher", "sketch_size": 8, "prefilter_factor": 2}
    first = METHODS["trak"](**options)(problem)
    assert np.isfinite(first.scores).sum() == 6 and first.diagnostics["stage1_candidates"] == 6
    again = METHODS["trak"](**options)(make(n=3, work_dir=tmp_path, pool=problem.pool, domain=problem.domain))
    np.testing.assert_array_equal(again.scores, first.scores)


def test_what_it_needs(make):
    method = METHODS["trak"](**WHOLE)
    with pytest.raises(ConfigError, match="warm up first"):
        method(make(checkpoints=()))
    with pytest.raises(ConfigError, match="margin_fn"):
        method(make(margin_fn=None))
