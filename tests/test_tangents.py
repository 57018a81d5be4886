"""Stacked tangents equal jax.vmap, whatever the program holds, and the primal pass is computed once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkjax.tangents import stacked_jvp, unbatched_tangents

W = np.random.default_rng(0).normal(size=(4, 4))
X = np.random.default_rng(1).normal(size=(3, 4))
FEEDS = np.random.default_rng(2).normal(size=(5, 3, 4))
ROWS = np.arange(3)
STACKED = np.stack([W, -0.5 * W, W.T])


def over_layers(layer, weights):
    """``layer`` over FEEDS, one carried value and one stacked."""
    return jax.lax.scan(lambda x, feed: layer(x, feed, weights, ROWS > 0), jnp.asarray(X), jnp.asarray(FEEDS))


def plain(x, feed, weights, mask):
    x = jnp.tanh(x @ weights + feed)
    return x, jnp.sum(jnp.where(mask[:, None], x, jnp.zeros_like(x)), axis=-1)


def late(c, feed, w, mask):
    """What is carried depends on the weights from the second step on, and on no weight in the first."""
    return jnp.sin(c) + feed, (c @ w, feed)


@jax.custom_jvp
def cubed(x):
    return x**3


cubed.defjvp(lambda primals, tangents: (cubed(primals[0]), 3.0 * primals[0] ** 2 * tangents[0]))

LAYERS = {
    "products and nonlinearities": plain,
    "carries that do not depend": late,
    "checkpointed": jax.checkpoint(plain),
    "jitted": jax.jit(plain),
    "integers among the arguments": lambda x, feed, w, mask: (x @ w, {"a": jnp.take(x, ROWS, axis=0), "b": feed}),
    "branches": lambda x, feed, w, mask: (jax.lax.cond(feed[0, 0] > 0, lambda: x @ w, lambda: x - 1.0), x),
    "branches that depend": lambda x, feed, w, mask: (jax.lax.cond(w[0, 0] > 0, lambda: x @ w, lambda: -x), w),
    "while": lambda x, feed, w, mask: (
        jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ w)), (0, x))[1],
        feed,
    ),
    "own rule": lambda x, feed, w, mask: (jnp.sin(cubed(x @ w)), x),
    "an inner loop": lambda x, feed, w, mask: (jax.lax.scan(lambda c, r: (c * r[None], c), x, w)[0], x),
}


def close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10), found, expected)


@pytest.mark.parametrize("name", LAYERS)
def test_stacked_tangents_equal_vmap(name, x64):
    layer, weights = LAYERS[name], jnp.asarray(W)
    along = lambda layer: lambda t: jax.jvp(lambda w: over_layers(layer, w), (weights,), (t,))
    apart = along(unbatched_tangents(layer))

    @jax.jit
    def run(stacked):
        return jax.vmap(along(layer))(stacked), stacked_jvp(apart, (stacked,)), stacked_jvp(apart, (stacked[:1],))

    expected, three, one = run(STACKED)
    close(three, expected)
    close(one, jax.tree.map(lambda leaf: leaf[:1], expected))


def test_a_wrapped_function_is_the_function_under_every_other_map(x64):
    layer, weights, t = unbatched_tangents(plain), jnp.asarray(W), jnp.asarray(STACKED)
    along = lambda layer: lambda w, t: jax.jvp(lambda w: over_layers(layer, w), (w,), (t,))[1]
    close(over_layers(layer, weights), over_layers(plain, weights))
    maps = {
        "of the weights": lambda push: jax.vmap(push, in_axes=(0, None))(t, weights),
        "of both": lambda push: jax.vmap(push)(t, t),
        "within a map": lambda push: jax.vmap(lambda s: jax.vmap(push, in_axes=(None, 0))(weights, s[None] * t))(t),
        "in turns": lambda push: jax.lax.map(lambda s: push(weights, s), t, batch_size=2),
        "a second derivative": lambda push: jax.jvp(lambda w: jax.vmap(push, (None, 0))(w, t), (weights,), (t[2],)),
    }
    found, expected = jax.jit(lambda: [[run(along(of)) for run in maps.values()] for of in (layer, plain)])()
    close(found, expected)


def cost(run, *args) -> dict:
    return jax.jit(run).lower(*args).compile().cost_analysis()


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_the_primal_pass_of_a_loop_is_computed_once(wrap):
    rows, width = 64, 32
    x, weights, stacked = jnp.ones((rows, width)), jnp.eye(width), jnp.ones((3, width, width))
    layer = unbatched_tangents(wrap(lambda x, w: jnp.tanh(x @ w)))
    fn = lambda w: jax.lax.scan(lambda x, _: (layer(x, w), None), x, None, length=5)[0]
    along = lambda t: jax.jvp(fn, (weights,), (t,))[1]
    one, two, three = (cost(lambda s: stacked_jvp(along, (s,)), stacked[:m]) for m in (1, 2, 3))
    loops = cost(lambda s: [along(s[0]), along(s[1])], stacked)  # which the compiler cannot join
    assert one["transcendentals"] == two["transcendentals"] == three["transcendentals"] > 0
    assert loops["transcendentals"] == 2 * one["transcendentals"]
    # x W; dx W + x dW for each tangent
    assert two["flops"] / one["flops"] == pytest.approx(5 / 3, rel=0.1)
    assert three["flops"] / one["flops"] == pytest.approx(7 / 3, rel=0.1)
    assert loops["flops"] == pytest.approx(2 * one["flops"], rel=0.1)


def test_another_call_traces_nothing_anew():
    traced = []

    def layer(*args):
        traced.append(None)
        return plain(*args)

    apart = unbatched_tangents(layer)
    push = lambda t: jax.jvp(lambda w: over_layers(apart, w), (jnp.asarray(W, jnp.float32),), (t,))[1]
    run = jax.jit(lambda s: stacked_jvp(push, (s,)))
    first = run(jnp.asarray(STACKED, jnp.float32))
    count = len(traced)
    again = run(2 * jnp.asarray(STACKED, jnp.float32))
    assert count > 0 and len(traced) == count
    jax.tree.map(lambda a, b: np.testing.assert_allclose(2 * a, b, rtol=1e-5, atol=1e-5), first, again)


def test_arguments_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match="expected one length"):
        stacked_jvp(lambda a, b: a + b, (jnp.zeros((2, 3)), jnp.zeros((3, 3))))
