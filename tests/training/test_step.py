"""One optimiser step: the objective, accumulation, dtypes, donation, sharding, compilation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkjax.parallel import make_mesh, shard_batch
from ntkjax.training.objective import response_counts, token_mean_weights
from ntkjax.training.optimiser import AdamW
from ntkjax.training.step import eval_step, init_state, leaf_dtypes, train_step

ADAMW = AdamW(b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.0, clip_norm=None)


def one_step(nll_fn, params, batch, accumulation=1, optimiser=ADAMW, rate=0.01):
    state = init_state(params, optimiser)
    dtypes = leaf_dtypes(params)
    return train_step(nll_fn, state, batch, rate, optimiser=optimiser, accumulation=accumulation, dtypes=dtypes)


def batch_of(toy, rows=12, examples=9, seed=3):
    data = toy.make_data(20, seed)
    return data.collate(np.arange(examples), rows=rows, length=24)


def test_loss_is_the_mean_over_response_tokens(toy):
    """Token by token in NumPy: the sum of every response token's NLL over their number, filler rows apart."""
    nll_fn, params = toy.make_model()
    batch = batch_of(toy)
    table = np.asarray(nll_fn.base + params["table"]["kernel"], np.float64) + np.asarray(params["table"]["bias"])
    logp = table - np.log(np.exp(table).sum(1, keepdims=True))
    terms = [
        -logp[batch.tokens[i, t - 1], batch.tokens[i, t]]
        for i in range(9)
        for t in range(24)
        if batch.response_mask[i, t]
    ]
    _, metrics = one_step(nll_fn, params, batch)
    assert float(metrics.loss) == pytest.approx(np.mean(terms), rel=1e-6)
    assert int(metrics.counts.sum()) == len(terms)


def test_weights_sum_to_one_and_no_response_gives_nan():
    weights = token_mean_weights(jnp.array([3, 0, 1], jnp.int32), jnp.float32)
    np.testing.assert_allclose(weights, [0.75, 0.0, 0.25])
    assert np.isnan(token_mean_weights(jnp.array([0, 0], jnp.int32), jnp.float32)).all()


@pytest.mark.parametrize("accumulation", [2, 3, 6])
def test_accumulation_changes_nothing(toy, accumulation):
    nll_fn, params = toy.make_model()
    batch = batch_of(toy)
    # Plain Adam divides by |g|; with a large eps its first step is smooth in g, so gradients are compared.
    smooth = AdamW(b1=0.9, b2=0.99, eps=1.0, weight_decay=0.0, clip_norm=1.0)
    whole, one = one_step(nll_fn, params, batch, 1, smooth, rate=1.0)
    cut, many = one_step(nll_fn, params, batch, accumulation, smooth, rate=1.0)
    assert float(one.loss) == pytest.approx(float(many.loss), abs=1e-6)
    assert float(one.grad_norm) == pytest.approx(float(many.grad_norm), abs=1e-6)
    np.testing.assert_allclose(one.nll, many.nll, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole.params, cut.params)


def test_accumulation_is_exact_in_double(toy, x64):
    nll_fn, params = toy.make_model()
    double = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)
    nll_fn, params, batch = double(nll_fn), double(params), batch_of(toy)
    whole, _ = one_step(nll_fn, params, batch, 1)
    cut, _ = one_step(nll_fn, params, batch, 4)
    assert whole.params["table"]["kernel"].dtype == jnp.float64
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), whole.params, cut.params)


def test_bfloat16_parameters_have_a_float32_master(toy):
    """Steps far below the resolution of bfloat16 add up in the master copy."""
    nll_fn, params = toy.make_model()
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    state, batch, dtypes = init_state(params, ADAMW), batch_of(toy), leaf_dtypes(params)
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float32)}
    before = np.asarray(state.params["table"]["kernel"])
    for _ in range(3):
        state, _ = train_step(nll_fn, state, batch, 1e-6, optimiser=ADAMW, accumulation=1, dtypes=dtypes)
    moved = np.abs(np.asarray(state.params["table"]["kernel"]) - before)
    assert 1e-6 < moved.max() < 1e-5


def test_the_callers_parameters_survive_donation(toy):
    nll_fn, params = toy.make_model()
    before = jax.tree.map(np.array, params)
    one_step(nll_fn, params, batch_of(toy))
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_a_second_step_does_not_compile_again(toy):
    nll_fn, params = toy.make_model()
    traces = []

    def counted(p, batch):
        traces.append(batch.tokens.shape)
        return nll_fn(p, batch)

    fn = jax.tree_util.Partial(counted)
    for seed, rate in ((1, 0.1), (2, 0.01)):
        one_step(fn, params, batch_of(toy, seed=seed), rate=rate)
        first = len(traces) if seed == 1 else first
    assert first == len(traces) > 0


def test_rows_spread_over_devices_give_the_same_step(toy):
    nll_fn, params = toy.make_model()
    batch = batch_of(toy, rows=16)
    mesh = make_mesh(data=4, devices=jax.devices()[:4])
    _, one = one_step(nll_fn, params, batch, 2)
    on_mesh = lambda tree: jax.device_put(tree, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    spread, four = one_step(on_mesh(nll_fn), on_mesh(params), shard_batch(batch, mesh), 2)
    assert float(one.loss) == pytest.approx(float(four.loss), abs=1e-6)
    assert len(jax.tree.leaves(spread.params)[0].sharding.device_set) == 4
    np.testing.assert_allclose(one.nll, four.nll, atol=1e-6)
    np.testing.assert_allclose(one.grad_norm, four.grad_norm, rtol=1e-5)


def test_eval_step_gives_nll_and_counts(toy):
    nll_fn, params = toy.make_model()
    batch = batch_of(toy)
    nll, counts = eval_step(nll_fn, params, batch, dtypes=leaf_dtypes(params))
    np.testing.assert_allclose(nll, nll_fn(params, batch), rtol=1e-6)
    np.testing.assert_array_equal(counts, response_counts(batch))
    assert (np.asarray(counts)[9:] == 0).all() and (np.asarray(counts)[:9] > 0).all()
