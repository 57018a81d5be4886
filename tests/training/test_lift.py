"""LIFT against NumPy: which weights, how many, and what Adam does to them when the mask moves."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkjax.errors import ConfigError
from ntkjax.training import TrainConfig, fit
from ntkjax.training.lift import Lift, principal_mask, principal_weights
from ntkjax.training.optimiser import AdamW
from ntkjax.training.step import init_state

ADAM = {"b1": 0.9, "b2": 0.99, "eps": 1e-8, "weight_decay": 0.01, "clip_norm": None}


def mask_by_hand(matrix, rank):
    u, s, vt = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    reduced = sum((s[i] * np.outer(u[:, i], vt[i]) for i in range(rank)), np.zeros(matrix.shape))
    m, n = matrix.shape
    order = np.argsort(-np.abs(reduced).ravel(), kind="stable")[: min(rank * (m + n), m * n)]
    mask = np.zeros(m * n, bool)
    mask[order] = True
    return mask.reshape(m, n)


@pytest.mark.parametrize(("shape", "rank"), [((12, 20), 1), ((20, 12), 3), ((9, 9), 2), ((6, 5), 5)])
def test_principal_weights_are_the_equation(x64, shape, rank):
    matrix = np.random.default_rng(0).normal(size=shape)
    found = np.asarray(principal_weights(jnp.asarray(matrix), rank=rank))
    np.testing.assert_array_equal(found, mask_by_hand(matrix, rank))
    assert found.sum() == min(rank * sum(shape), shape[0] * shape[1])


def test_noise_around_a_low_rank_matrix_is_left_out(x64):
    """A planted rank-1 pattern under noise as large: after the reduction its entries are found, by size alone not."""
    rng = np.random.default_rng(1)
    a, b = (rng.random(40) < 0.3).astype(float), (rng.random(50) < 0.3).astype(float)
    planted = np.outer(a, b) > 0
    matrix = 1.5 * np.outer(a, b) + rng.normal(size=(40, 50)) * 0.9
    count = 90
    assert planted.sum() >= count
    found = np.asarray(principal_weights(jnp.asarray(matrix), rank=1))
    largest = np.zeros(2000, bool)
    largest[np.argsort(-np.abs(matrix).ravel())[:count]] = True
    precision = lambda mask: planted[mask].mean()
    assert found.sum() == count
    assert precision(found) > 0.95 > precision(largest.reshape(40, 50))


def test_stacked_layers_are_separate_and_the_rest_is_untouched():
    rng = np.random.default_rng(2)
    params = {
        "embed": {"weight": jnp.asarray(rng.normal(size=(7, 4)), jnp.float32)},
        "layers": {
            "up": {
                "kernel": jnp.asarray(rng.normal(size=(3, 8, 10)), jnp.float32),
                "bias": jnp.zeros((3, 10), jnp.float32),
            },
            "norm": {"scale": jnp.ones((3, 8), jnp.float32)},
        },
    }
    mask = principal_mask(params, 2)
    for i in range(3):
        kernel = params["layers"]["up"]["kernel"][i]
        np.testing.assert_array_equal(mask["layers"]["up"]["kernel"][i], mask_by_hand(np.asarray(kernel), 2))
    assert sum(int(leaf.sum()) for leaf in jax.tree.leaves(mask)) == 3 * 2 * 18


def adam_by_hand(w, gradients, rate, rank, interval):
    """AdamW with decay on the masked entries, the moments cut to the new mask whenever there is one."""
    m, v, mask = np.zeros_like(w), np.zeros_like(w), None
    for t, g in enumerate(gradients, 1):
        if (t - 1) % interval == 0:
            mask = mask_by_hand(w, rank)
            m, v = m * mask, v * mask
        g = g * mask
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + 1e-8) + 0.01 * w
        w = w - rate * step * mask
    return w


@pytest.mark.parametrize("interval", [1, 2, 100])
def test_steps_are_masked_adam(x64, interval):
    rng = np.random.default_rng(3)
    w, gradients = rng.normal(size=(6, 8)), rng.normal(size=(5, 6, 8))
    optimiser = AdamW(**ADAM, lift=Lift(1, interval))
    params = {"kernel": jnp.asarray(w)}
    state = optimiser.init(params)
    for g in gradients:
        params, state = optimiser.step(params, {"kernel": jnp.asarray(g)}, state, 0.3)
    np.testing.assert_allclose(params["kernel"], adam_by_hand(w, gradients, 0.3, 1, interval), atol=1e-10)


def test_the_mask_does_move(x64):
    """Else the test above would not see the moments at a change of mask."""
    rng = np.random.default_rng(3)
    w, gradients = rng.normal(size=(6, 8)), rng.normal(size=(5, 6, 8))
    one, five = adam_by_hand(w, gradients, 0.3, 1, 1), adam_by_hand(w, gradients, 0.3, 1, 100)
    assert np.abs(one - five).max() > 1e-3


def test_clipping_sees_the_masked_gradient_alone(x64):
    w = np.random.default_rng(4).normal(size=(6, 8))
    optimiser = AdamW(
        **ADAM | {"b1": 0.0, "b2": 0.0, "eps": 1e9, "weight_decay": 0.0, "clip_norm": 1.0}, lift=Lift(1, 9)
    )
    params = {"kernel": jnp.asarray(w)}
    mask = mask_by_hand(w, 1)
    g = np.where(mask, 0.01, 1e6)  # clipped before the mask, nothing would be left of the small entries
    new, _ = optimiser.step(params, {"kernel": jnp.asarray(g)}, optimiser.init(params), 1e9)
    np.testing.assert_allclose(w - np.asarray(new["kernel"]), np.where(mask, 0.01, 0.0), atol=1e-9)


def test_full_rank_is_adamw_on_the_linear_layers(toy):
    nll_fn, params = toy.make_model()
    options = {"steps": 1, "batch_size": 6, "learning_rate": 0.05, "clip_norm": None}
    plain, lift = (
        fit(nll_fn, params, toy.make_data(20, 1), TrainConfig(**options, **more), seed=0, progress=False).params[
            "table"
        ]
        for more in ({}, {"lift_rank": 11})
    )
    np.testing.assert_array_equal(lift["kernel"], plain["kernel"])
    np.testing.assert_array_equal(lift["bias"], params["table"]["bias"])
    assert np.abs(plain["bias"] - params["table"]["bias"]).max() > 0


def test_a_stopped_run_ends_as_the_uninterrupted_one(toy, tmp_path):
    """The mask and its age are in the checkpoint: stopped between two masks, a run goes on bit for bit."""
    nll_fn, params = toy.make_model()
    data = toy.make_data(20, 1)
    config = TrainConfig(steps=9, batch_size=6, learning_rate=0.05, lift_rank=1, lift_interval=4, save_every=3)

    class Stop(Exception):
        pass

    def stop(_):
        nonlocal left
        left -= 1
        if left == 0:
            raise Stop
        return {}

    want = fit(nll_fn, params, data, config, seed=0, progress=False, extra_metrics=lambda _: {})
    left = 3  # the third evaluation: after the second epoch, 8 steps; the checkpoint is of step 6
    with pytest.raises(Stop):
        fit(nll_fn, params, data, config, seed=0, out_dir=tmp_path, progress=False, extra_metrics=stop)
    left = 99
    found = fit(nll_fn, params, data, config, seed=0, out_dir=tmp_path, progress=False, extra_metrics=stop)
    for a, b in zip(jax.tree.leaves((found.params, found.opt_state)), jax.tree.leaves((want.params, want.opt_state))):
        np.testing.assert_array_equal(a, b)


def test_without_a_linear_layer_it_is_refused():
    with pytest.raises(ConfigError, match="parameters all"):
        init_state({"q": {"lora_a": jnp.zeros((3, 4)), "lora_b": jnp.zeros((4, 3))}}, AdamW(**ADAM, lift=Lift(1, 2)))
