"""Rows that hold several examples give what rows of one example give: every output, its tangent and its gradient."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkjax.data import TokenisedDataset
from ntkjax.models import LoraConfig, ModelConfig, functions, init_lm, load_lm
from ntkjax.models.functions import OUTPUTS
from ntkjax.parallel import make_mesh

GOLDEN = Path(__file__).resolve().parents[1] / "golden"

CONFIG = ModelConfig(
    family="qwen2", vocab_size=37, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=4, qkv_bias=True, initializer_range=0.3,
)  # fmt: skip
BUDGET = 64  # one packed row of 64 tokens a batch: a program of its own that many tests share


def model_of(dtype: str = "float32"):
    model = init_lm(CONFIG, seed=0, lora=LoraConfig(rank=2, targets=("q", "down")), dtype=dtype)
    rng = np.random.default_rng(5)
    return model.with_params(jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), model.lora))


def data_of(count: int = 9, vocab: int = 37, longest: int = 24, seed: int = 0) -> TokenisedDataset:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, longest + 1, count)
    tokens = [rng.integers(1, vocab, n).tolist() for n in lengths]
    return TokenisedDataset.from_sequences(tokens, [int(rng.integers(1, n)) for n in lengths])


def by_row(results) -> np.ndarray:
    """Pairs (index [B], values [B, ...]) in the order of the data; every example is there once."""
    found: dict[int, np.ndarray] = {}
    for index, values in results:
        assert len(values) == len(index)
        for i, value in zip(index.tolist(), np.asarray(values)):
            if i >= 0:
                assert i not in found
                found[i] = value
    return np.stack([found[i] for i in range(len(found))])


@jax.jit
def values_and_slopes(fns, params, tangent, batch):
    """Of every function its values and, forward and in reverse, the derivatives along ``tangent``."""
    out = {}
    for name, fn in fns.items():
        value, slope = jax.jvp(lambda p, fn=fn: fn(p, batch), (params,), (tangent,))
        probe = jnp.cos(jnp.arange(value.size, dtype=value.dtype)).reshape(value.shape)
        gradient = jax.grad(lambda p, fn=fn, probe=probe: jnp.vdot(probe, fn(p, batch)))(params)
        dot = sum(jnp.vdot(g, t) for g, t in zip(jax.tree.leaves(gradient), jax.tree.leaves(tangent)))
        out[name] = (value, slope, dot, jnp.vdot(probe, slope))
    return out


def no_layers(spec, weights, tokens, positions=None, cache=None, segments=None, examples=None, extents=None):
    """In the place of the decoder: states that depend on token and position, so that only the pooling is compiled."""
    places = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] if positions is None else positions
    states = jnp.take(weights["embed"]["weight"], tokens, axis=0)
    return states * (1 + 0.1 * places[:, :, None].astype(states.dtype)), None


EVERY = [kind for kind in OUTPUTS if kind not in ("states", "head")]


@pytest.mark.parametrize(
    ("kinds", "cap", "sliced"),
    [(EVERY, None, False), (["nll", "entropy", "margin"], None, True), (["apply", "nll"], 0.5, False)],
)
def test_every_output_pools_by_example(monkeypatch, x64, kinds, cap, sliced):
    monkeypatch.setattr(functions, "forward", no_layers)
    if sliced:
        monkeypatch.setattr(functions, "MAX_LOGITS", 40)
    model = init_lm(dataclasses.replace(CONFIG, logit_cap=cap, hidden_size=8 + sliced), seed=0, dtype="float64")
    params = {name: model.params[name] for name in ("embed", "head")}
    fns = {kind: model.output(kind) for kind in kinds}
    if kinds == EVERY:
        fns |= {"all": model.output("nll", "all"), "last": model.output("hidden", "last")}
    tangent = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)
    data = data_of()
    plan = data.batches(token_budget=BUDGET, packing=True, max_buckets=1)
    assert max(np.bincount(b.places).max() for b in plan.planned) > 2
    packed, padded = (
        [(batch, values_and_slopes(fns, params, tangent, batch)) for batch in batches]
        for batches in (plan, plan.padded)
    )
    for name in fns:
        for part in (0, 1):  # values and tangents
            of = [by_row([(b.index, found[name][part]) for b, found in result]) for result in (packed, padded)]
            np.testing.assert_allclose(of[0], of[1], rtol=1e-10, atol=1e-10, err_msg=f"{name} {part}")
        for _, found in packed:  # the transposed program is the same linear map
            np.testing.assert_allclose(found[name][2], found[name][3], rtol=1e-9, atol=1e-9)


@jax.jit
def run(fn, batch):
    return fn({}, batch)


@pytest.mark.parametrize("case", ["gemma2", "gpt2", "smollm3-window"])
def test_hidden_states_do_not_depend_on_the_neighbours(case):
    """Layers with and without windows, capped scores, and a table of 48 positions that a row of 64 is longer than."""
    model, data = load_lm(GOLDEN / case, lora=None), data_of(vocab=96, seed=1)
    plan = data.batches(token_budget=BUDGET, packing=True, max_buckets=1)
    alone = by_row([(batch.index, run(model.states_fn, batch)) for batch in plan.padded])
    for batch in plan:
        states = np.asarray(run(model.states_fn, batch))
        for row in range(len(states)):
            slots = len(batch.index) // len(states)
            for slot, i in enumerate(batch.index[row * slots : (row + 1) * slots].tolist()):
                if i >= 0:
                    own = states[row, batch.examples[row] == slot]
                    np.testing.assert_allclose(own, alone[i][: len(own)], atol=2e-5 * np.abs(alone).max())


def test_a_model_with_an_adapter_and_its_order_of_examples(x64):
    model, data = model_of("float64"), data_of(seed=2)
    order = np.random.default_rng(1).permutation(len(data))
    for fn in (model.nll_fn, model.embed_fn):
        values = [
            by_row([(batch.index, run(fn, batch)) for batch in plan])
            for plan in (
                data.batches(token_budget=BUDGET, max_buckets=1),
                data.batches(token_budget=BUDGET, packing=True),
                data.subset(order).batches(token_budget=BUDGET, packing=True),
            )
        ]
        np.testing.assert_allclose(values[1], values[0], atol=1e-10)
        np.testing.assert_allclose(values[2], values[0][order], atol=1e-10)


def test_empty_slots_give_exactly_zero(monkeypatch):
    monkeypatch.setattr(functions, "forward", no_layers)
    model, data = model_of(), data_of(3)
    batch = data.batches(token_budget=512, packing=True)[0]
    empty = np.asarray(batch.index) < 0
    assert empty.any()
    for kind in ("apply", "hidden", "nll", "entropy", "margin", "error", "embed", "weighted_embed"):
        found = np.asarray(run(model.output(kind), batch))
        assert np.all(found[empty] == 0) and np.all(np.isfinite(found))


def test_what_stands_behind_an_example_does_not_reach_it(monkeypatch):
    """The last position of an example, whose next token is another's, counts in no output."""
    monkeypatch.setattr(functions, "forward", no_layers)
    model, data = model_of(), data_of(6)
    batch = data.batches(token_budget=128, packing=True)[0]
    last = int(np.flatnonzero(batch.examples[0] == 0)[-1])
    other = batch.tokens.copy()
    other[0, last + 1 :] = (other[0, last + 1 :] + 1) % 37
    for positions in ("all", "response"):
        fn = model.output("nll", positions)
        before, after = (np.asarray(run(fn, b)) for b in (batch, dataclasses.replace(batch, tokens=other)))
        assert before[0] == after[0] and not np.allclose(before[1:], after[1:])


def test_rows_of_a_mesh_are_pooled_where_they_are(monkeypatch):
    monkeypatch.setattr(functions, "forward", no_layers)
    model, data, mesh = model_of(), data_of(30), make_mesh(data=8)
    plan = data.on(mesh).batches(token_budget=BUDGET, packing=True)
    assert plan.shapes == ((8, 64),)
    compiled = run.lower(model.hidden_fn, plan[0]).compile()
    assert not re.search("all-gather|all-reduce|all-to-all|collective-permute", compiled.as_text())
    spread = by_row([(np.asarray(batch.index), run(model.hidden_fn, batch)) for batch in plan])
    alone = by_row([(b.index, run(model.hidden_fn, b)) for b in data.batches(token_budget=BUDGET, packing=True)])
    np.testing.assert_allclose(spread, alone, atol=1e-6)
