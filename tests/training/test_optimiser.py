"""AdamW against its formula in NumPy, learning rates against their closed forms."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkjax.training import TrainConfig, adam_moments, learning_rates
from ntkjax.training.optimiser import AdamW, decay_mask


def numpy_adamw(theta, grads, rates, *, b1, b2, eps, decay, clip):
    """The textbook loop over a dict of float64 arrays; decay applies to all names but 'bias'."""
    m = {k: np.zeros_like(v) for k, v in theta.items()}
    v = {k: np.zeros_like(x) for k, x in theta.items()}
    for t, (grad, lr) in enumerate(zip(grads, rates), start=1):
        norm = math.sqrt(sum(float((g**2).sum()) for g in grad.values()))
        for k in theta:
            g = grad[k] * min(1.0, clip / norm)
            m[k] = b1 * m[k] + (1 - b1) * g
            v[k] = b2 * v[k] + (1 - b2) * g**2
            update = (m[k] / (1 - b1**t)) / (np.sqrt(v[k] / (1 - b2**t)) + eps)
            theta[k] = theta[k] - lr * (update + (0.0 if k == "bias" else decay) * theta[k])
    return theta, m, v


def test_adamw_follows_its_formula(x64):
    rng = np.random.default_rng(0)
    theta = {"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)}
    grads = [{k: rng.normal(size=x.shape) * 10**-i for k, x in theta.items()} for i in range(4)]
    rates = [0.1, 0.05, 0.02, 0.01]
    adamw = AdamW(b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.3, clip_norm=0.5)
    params = jax.tree.map(jnp.asarray, theta)
    state = adamw.init(params)
    for grad, lr in zip(grads, rates):
        params, state = adamw.step(params, jax.tree.map(jnp.asarray, grad), state, lr)
    want, m, v = numpy_adamw(dict(theta), grads, rates, b1=0.8, b2=0.95, eps=1e-6, decay=0.3, clip=0.5)
    got_m, got_v, count = adam_moments(state)
    for k in theta:
        np.testing.assert_allclose(params[k], want[k], rtol=1e-10)
        np.testing.assert_allclose(got_m[k], m[k], rtol=1e-10)
        np.testing.assert_allclose(got_v[k], v[k], rtol=1e-10)
    assert int(count) == 4


def test_decay_spares_biases_and_norm_scales():
    tree = {"norm": {"scale": 1.0}, "q": {"kernel": 1.0, "bias": 1.0, "lora_a": 1.0}}
    assert decay_mask(tree) == {
        "norm": {"scale": False},
        "q": {"kernel": True, "bias": False, "lora_a": True},
    }


@pytest.mark.parametrize("steps", [1, 2, 10, 101, 300])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.03, 0.5, 0.99])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_learning_rates_are_their_closed_form(schedule, warmup_ratio, steps):
    config = TrainConfig(learning_rate=0.2, schedule=schedule, warmup_ratio=warmup_ratio)
    warmup = max(1, math.ceil(warmup_ratio * steps))
    want = []
    for s in range(1, steps + 1):
        x = (s - warmup) / (steps - warmup + 1)
        after = {"linear": 1 - x, "cosine": (1 + math.cos(math.pi * x)) / 2, "constant": 1.0}[schedule]
        want.append(0.2 * (s / warmup if s <= warmup else after))
    got = learning_rates(config, steps)
    np.testing.assert_allclose(got, want, atol=2e-7)
    assert got.dtype == np.float64 and got.min() > 0 and got.max() == pytest.approx(0.2)
