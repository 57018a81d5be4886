"""Repetition equals jax.vmap, whatever the program holds, and computes once what does not depend on the repetitions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from ntkjax.ntk.repeated import repeated

W = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)), jnp.float32)
X = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4)), jnp.float32)
FEEDS = jnp.asarray(np.random.default_rng(2).normal(size=(5, 3, 4)), jnp.float32)


def layers(weights):
    """A loop over layers: products and nonlinearities, one carried value and one stacked."""

    def layer(x, feed):
        x = jnp.tanh(x @ weights + feed)
        return x, jnp.sum(x, axis=-1)

    return jax.lax.scan(layer, X, FEEDS)


def late(weights):
    """Three carries: the second depends on the weights from the second step on, the third from the third on; the loop
    also has slices that depend on them."""

    def step(carry, feed):
        a, b, c = carry
        return (a + jnp.sum(feed), b + a, jnp.sin(c + b)), c

    zero = jnp.zeros(())
    return jax.lax.scan(step, (zero, zero, zero), FEEDS * weights[0, 0])


@jax.custom_jvp
def cubed(x):
    return x**3


cubed.defjvp(lambda primals, tangents: (cubed(primals[0]), 3.0 * primals[0] ** 2 * tangents[0]))

PROGRAMS = {
    "loop over layers": layers,
    "carries that come to depend": late,
    "backwards": lambda w: jax.lax.scan(lambda c, x: (c * w[0, 0] + x, c), jnp.zeros((3, 4)), FEEDS, reverse=True),
    "checkpointed": jax.checkpoint(lambda w: jnp.sin(X @ w) @ w),
    "jitted": jax.jit(lambda w: {"a": jnp.cos(X @ w), "b": X}),
    "branches": lambda w: jax.lax.cond(X[0, 0] > 0, lambda: X @ w, lambda: X - 1.0),
    "branches that depend": lambda w: jax.lax.cond(w[0, 0] > 0, lambda: X @ w, lambda: X - 2.0 * X @ w),
    "while": lambda w: jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ w)), (0, X))[1],
    "own rule": lambda w: cubed(X @ w),
    "constant": lambda w: (jnp.sum(X), w),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_repetition_equals_vmap_and_so_does_the_tangent(name):
    fn = PROGRAMS[name]
    stacked = jnp.stack([W, -0.5 * W, W.T])
    push = lambda t: jax.jvp(fn, (W,), (t,))
    for program in (fn, push):
        for run in (repeated(program), jax.jit(repeated(program))):
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6),
                run(stacked), jax.vmap(program)(stacked),
            )  # fmt: skip


def count(program: core.Jaxpr, name: str) -> int:
    inner = [getattr(v, "jaxpr", v) for e in program.eqns for v in e.params.values()]
    here = sum(e.primitive.name == name for e in program.eqns)
    return here + sum(count(p, name) for p in inner if isinstance(p, core.Jaxpr))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
@pytest.mark.parametrize("m", [1, 2, 5])
def test_the_primal_pass_of_a_loop_is_there_once(m, wrap):
    layer = wrap(lambda x, w: jnp.tanh(x @ w))
    fn = lambda w: jax.lax.scan(lambda x, _: (layer(x, w), None), X, FEEDS)[0]
    run = repeated(lambda t: jax.jvp(fn, (W,), (t,))[1])
    program = jax.make_jaxpr(run)(jnp.stack([W] * m)).jaxpr
    assert count(program, "tanh") == 1
    assert count(program, "dot_general") == 1 + 2 * m  # x W; dx W + x dW for each tangent


def test_arguments_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match="expected one length"):
        repeated(lambda a, b: a + b)(jnp.zeros((2, 3)), jnp.zeros((3, 3)))
