"""Exact kernels of a linear network f = W A x, in closed form: heads of low rank, heads computed from parameters."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from ntkjax.errors import ConfigError
from ntkjax.ntk.exact import centred_trace_ntk, logits, trace_ntk


def linear_hidden(params, x):
    return x @ params["inner"]


def own_head(params):
    return params["head"]


def deficient(rank: int, vocab: int, seed: int = 3):
    """A linear network whose head [vocab, 5] has the given rank, and three inputs."""
    rng = np.random.default_rng(seed)
    head = rng.normal(size=(vocab, rank)) @ rng.normal(size=(rank, 5))
    params = {"inner": jnp.asarray(rng.normal(size=(4, 5))), "head": jnp.asarray(head)}
    return params, jnp.asarray(rng.normal(size=(3, 4)))


@pytest.mark.parametrize(("rank", "vocab"), [(5, 11), (3, 11), (5, 5), (3, 3), (1, 2)])
def test_heads_that_are_rank_deficient_or_low(x64, rank, vocab):
    """f = W A x: trace_ntk = |W|^2 x.x' (A trained) + V <h, h'> (W trained); centred with W_c and V - 1."""
    params, x = deficient(rank, vocab)
    weight, h = np.asarray(params["head"]), np.asarray(linear_hidden(params, x))
    fn, inputs, hiddens = logits(linear_hidden, own_head), np.asarray(x @ x.T), h @ h.T
    centred = weight - weight.mean(axis=0)
    trace = trace_ntk(fn, params, x, backend="spectral")
    np.testing.assert_allclose(trace, np.sum(weight**2) * inputs + vocab * hiddens, rtol=1e-10)
    found = centred_trace_ntk(fn, params, x, backend="spectral")
    np.testing.assert_allclose(found, np.sum(centred**2) * inputs + (vocab - 1) * hiddens, rtol=1e-10)
    held = logits(linear_hidden, params["head"])
    inner = {"inner": params["inner"]}
    np.testing.assert_allclose(trace_ntk(held, inner, x, backend="spectral"), np.sum(weight**2) * inputs, rtol=1e-10)


HEADS = {
    "scaled": lambda params: 2 * params["head"],
    "transposed": lambda params: params["square"].T,
    "a sum": lambda params: params["head"] + params["square"],
    "a part": lambda params: params["twice"][:5],
}


@pytest.mark.parametrize("which", HEADS)
def test_a_head_computed_from_parameters_needs_the_jacobian(x64, which):
    params, x = deficient(5, 5)
    rng = np.random.default_rng(0)
    params |= {"square": jnp.asarray(rng.normal(size=(5, 5))), "twice": jnp.asarray(rng.normal(size=(10, 5)))}
    fn = logits(linear_hidden, HEADS[which])
    with pytest.raises(ConfigError, match='backend="jacobian"'):
        trace_ntk(fn, params, x, backend="spectral")
    inner = {"inner": params["inner"]}
    assert trace_ntk(fn, params, x).shape == (3, 3)
    held = logits(linear_hidden, HEADS[which](params))
    np.testing.assert_allclose(trace_ntk(held, inner, x, backend="spectral"), trace_ntk(held, inner, x), rtol=1e-10)
