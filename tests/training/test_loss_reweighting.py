"""Loss reweighting against NumPy, its limits, and what it may not change."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkjax.training import TrainConfig, fit
from ntkjax.training.loss_reweighting import LossReweighting
from ntkjax.training.optimiser import AdamW
from ntkjax.training.step import init_state, leaf_dtypes, train_step

STRATEGIES = ("linupper", "quadratic", "extremes")
SMOOTH = AdamW(b1=0.0, b2=0.0, eps=1e6, weight_decay=0.0, clip_norm=None)
"""Adam with so large an eps is gradient descent: theta - rate / eps * g."""


def by_hand(losses, strategy, r):
    low, high = min(losses), max(losses)
    f = []
    for loss in losses:
        h = 0.0 if high == low else (2 * loss - high - low) / (high - low)
        f.append({"linupper": min(h + 1, 1), "quadratic": 1 - h * h, "extremes": abs(h)}[strategy])
    e = [np.exp(x / r) for x in f]
    return np.array(e) / sum(e)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("r", [0.4, 1.0])
def test_weights_are_the_equation(x64, strategy, r):
    losses = np.random.default_rng(0).uniform(0.5, 3.0, size=9)
    found = LossReweighting(strategy, r).weights(jnp.asarray(losses), jnp.full(9, 3, jnp.int32))
    np.testing.assert_allclose(found, by_hand(list(losses), strategy, r), atol=1e-12)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_fillers_weigh_nothing_and_do_not_stretch_the_scale(strategy):
    losses, counts = jnp.array([1.0, 2.0, 0.0, 3.0]), jnp.array([2, 2, 0, 2], jnp.int32)
    found = LossReweighting(strategy, 0.4).weights(losses, counts)
    np.testing.assert_allclose(found[np.array([0, 1, 3])], by_hand([1.0, 2.0, 3.0], strategy, 0.4), rtol=1e-5)
    assert found[2] == 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_limits(strategy):
    """Equal losses, one example, or a large r: equal weights. A loss that is not finite is not hidden."""
    counts = jnp.full(4, 1, jnp.int32)
    np.testing.assert_allclose(LossReweighting(strategy, 0.4).weights(jnp.full(4, 1.5), counts), 0.25)
    np.testing.assert_allclose(LossReweighting(strategy, 1e6).weights(jnp.arange(4.0), counts), 0.25, rtol=1e-5)
    assert np.isnan(LossReweighting(strategy, 0.4).weights(jnp.array([1.0, jnp.nan, 2.0, 3.0]), counts)).any()


def step_of(toy, accumulation, reweighting, rows=12, examples=9):
    nll_fn, params = toy.make_model()
    batch = toy.make_data(20, 3).collate(np.arange(examples), rows=rows, length=24)
    state = init_state(params, SMOOTH)
    options = {"optimiser": SMOOTH, "accumulation": accumulation, "dtypes": leaf_dtypes(params)}
    new, metrics = train_step(nll_fn, state, batch, 1e6, reweighting=reweighting, **options)
    return nll_fn, params, batch, new.params, metrics


def test_the_step_follows_the_weighted_gradients_without_one_of_the_weights(toy):
    """theta - sum_i v_i grad l_i, every gradient taken alone."""
    reweighting = LossReweighting("linupper", 0.4)
    nll_fn, params, batch, found, metrics = step_of(toy, 1, reweighting)
    nll = [float(nll_fn(params, batch)[i]) for i in range(9)]
    v = by_hand(nll, "linupper", 0.4)
    want = params
    for i in range(9):
        g = jax.grad(lambda p, i=i: nll_fn(p, batch)[i])(params)
        want = jax.tree.map(lambda w, d, i=i: w - v[i] * d, want, g)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, atol=2e-6)
    np.testing.assert_allclose(metrics.weights[:9], v, rtol=1e-5)
    counts = np.asarray(metrics.counts)[:9]
    assert float(metrics.loss) == pytest.approx(np.sum(counts * nll) / counts.sum(), rel=1e-6)


@pytest.mark.parametrize("accumulation", [2, 3, 6])
def test_accumulation_changes_nothing(toy, accumulation):
    """The smallest and the largest loss are those of the whole batch, however it is cut."""
    reweighting = LossReweighting("quadratic", 0.4)
    *_, whole, one = step_of(toy, 1, reweighting)
    *_, cut, many = step_of(toy, accumulation, reweighting)
    np.testing.assert_allclose(one.weights, many.weights, atol=1e-6)
    np.testing.assert_allclose(one.nll, many.nll, atol=1e-6)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(cut)):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_examples_that_are_learnt_lose_weight(toy):
    """One example over and over beside others: linupper turns to the others as its loss falls."""
    nll_fn, params = toy.make_model()
    data = toy.make_data(8, 3)
    config = TrainConfig(steps=30, batch_size=8, learning_rate=0.05, loss_reweighting="linupper")
    result = fit(nll_fn, params, data, config, seed=0, progress=False)
    lines = [line for line in result.history if line["kind"] == "train"]
    assert all(1 <= line["effective_examples"] <= 8 + 1e-6 for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    plain = fit(nll_fn, params, data, TrainConfig(steps=30, batch_size=8, learning_rate=0.05), seed=0, progress=False)
    assert "effective_examples" not in plain.history[-1]
    spread = lambda r: float(np.ptp(nll_fn(r.params, data.collate(np.arange(8), rows=8, length=24))))
    assert spread(result) < spread(plain)
