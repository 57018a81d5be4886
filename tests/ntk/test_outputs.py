"""Folded heads against outputs that build every logit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkjax.ntk import directions, probe, sum_logits


@pytest.fixture
def case(toy):
    params = toy.init(0)
    return params, toy.collate(toy.sequences(5, 1), range(5), fill=1)


def test_sum_logits_is_the_sum_of_all_logits(toy, case):
    params, batch = case
    folded = sum_logits(toy.hidden_fn, params["head"])
    np.testing.assert_allclose(folded(params, batch), toy.logits_sum(params, batch), rtol=1e-5, atol=1e-5)


def test_probe_is_a_weighted_sum_of_logits(toy, case):
    params, batch = case
    v = jnp.asarray(np.random.default_rng(2).normal(size=toy.vocab), jnp.float32)
    expected = (toy.hidden_fn(params, batch) @ params["head"].T) @ v
    for head in (params["head"], lambda p: p["head"]):
        np.testing.assert_allclose(probe(toy.hidden_fn, head, v)(params, batch), expected, rtol=1e-5, atol=1e-5)


def test_directions_are_rows_of_the_matrix(toy, case):
    params, batch = case
    matrix = jnp.asarray(np.random.default_rng(2).normal(size=(3, toy.width)), jnp.float32)
    values = directions(toy.hidden_fn, matrix)(params, batch)
    np.testing.assert_allclose(values, toy.hidden_fn(params, batch) @ matrix.T, rtol=1e-5, atol=1e-5)


def test_a_trained_head_contributes_its_own_gradient(toy, case):
    params, batch = case
    expected = jax.grad(lambda p: toy.logits_sum(p, batch).sum())(params)
    trained = jax.grad(lambda p: sum_logits(toy.hidden_fn, lambda q: q["head"])(p, batch).sum())(params)
    frozen = jax.grad(lambda p: sum_logits(toy.hidden_fn, params["head"])(p, batch).sum())(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), trained, expected)
    assert np.abs(frozen["head"]).max() == 0 < np.abs(expected["head"]).max()


def test_low_precision_weights_give_float32_outputs(toy):
    params = toy.init(0, jnp.bfloat16)
    output = sum_logits(toy.hidden_fn, params["head"])
    assert output.weight.dtype == jnp.float32
    assert output(params, toy.collate(toy.sequences(2, 1), range(2))).dtype == jnp.float32


def test_outputs_are_arguments_of_jitted_functions(toy, case):
    params, batch = case
    traces = []

    @jax.jit
    def run(output_fn, params, batch):
        traces.append(1)
        return output_fn(params, batch)

    one = sum_logits(toy.hidden_fn, params["head"])
    two = sum_logits(toy.hidden_fn, 2 * params["head"])
    np.testing.assert_allclose(2 * run(one, params, batch), run(two, params, batch), rtol=1e-5)
    assert len(traces) == 1  # the head is data, not a constant
