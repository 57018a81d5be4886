"""Passes over packed rows: scores, mean gradients, embeddings and entropies are those of rows of one example."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkjax.data import TokenisedDataset
from ntkjax.models import LoraConfig, ModelConfig, init_lm
from ntkjax.ntk import gradient_features, kernel_scores, sum_logits
from ntkjax.ntk.kernel import Kernel, feature_vector
from ntkjax.ntk.rows import NonFiniteError, Pass
from ntkjax.ntk.scores import MANY, add_direction, mean_direction, score_batch, scores_along
from ntkjax.ntk.sketch import RademacherSketch
from ntkjax.selection.methods.euds import entropy_batch
from ntkjax.selection.methods.for_value import Tokens, fold
from ntkjax.selection.methods.ifd import nll_without_prompt
from ntkjax.selection.vote import embed, embed_batch
from ntkjax.store import RowStore

CONFIG = ModelConfig(
    family="llama", vocab_size=23, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2, num_kv_heads=1,
    head_dim=4, initializer_range=0.3,
)  # fmt: skip
BUDGET = 64


def model_of(dtype: str):
    model = init_lm(CONFIG, seed=0, lora=LoraConfig(rank=1, targets=("q", "down")), dtype=dtype)
    rng = np.random.default_rng(5)
    return model.with_params(jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), model.lora))


def data_of(count: int = 12, seed: int = 0, longest: int = 24) -> TokenisedDataset:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, longest + 1, count)
    tokens = [rng.integers(1, 23, n).tolist() for n in lengths]
    return TokenisedDataset.from_sequences(tokens, [int(rng.integers(1, n)) for n in lengths])


def plan_of(data: TokenisedDataset, packing: bool, **options):
    return data.batches(token_budget=BUDGET, packing=packing, max_buckets=1, **options)


@pytest.mark.parametrize(("output", "dtype", "tolerance"), [("loss", "float64", 1e-10), ("sum", "float32", 1e-6)])
def test_scores_and_mean_gradients(output, dtype, tolerance):
    """Forward and in reverse; a reference set on the same pass."""
    with jax.enable_x64(dtype == "float64"):
        model, pool, domain = model_of(dtype), data_of(), data_of(5, seed=1)
        fn = model.nll_fn if output == "loss" else sum_logits(model.hidden_fn, model.head_fn({}))
        found = [
            kernel_scores(
                fn, model.lora, plan_of(domain, packing), plan_of(pool, packing), rows=12,
                references=[plan_of(pool, packing, indices=[1, 4, 7])],
            )
            for packing in (False, True)
        ]  # fmt: skip
        scale = np.abs(found[0].scores).max()
        np.testing.assert_allclose(found[1].scores, found[0].scores, rtol=0, atol=tolerance * scale)
        np.testing.assert_allclose(found[1].gram, found[0].gram, rtol=100 * tolerance)


def test_one_program_a_pass_whatever_the_data():
    model = model_of("float32")
    kernel, passes = Kernel(model.nll_fn), (add_direction, score_batch, embed_batch)

    def programs(count: int, longest: int, seed: int) -> list[int]:
        """Compiled so far, after all passes over such data."""
        data = data_of(count, seed=seed, longest=longest)
        plan = data.batches(token_budget=BUDGET, packing=True)
        direction = mean_direction(kernel, model.lora, plan)
        scores_along(kernel, model.lora, [direction], plan, rows=count)
        embed(model.embed_fn, model.lora, plan, rows=count)
        return [fn._cache_size() for fn in passes]

    first = programs(40, 24, 0)
    assert [programs(*of) for of in ((30, 8, 1), (50, 64, 2), (7, 40, 3), (90, 30, 4))] == [first] * 4
    assert len(data_of(50, seed=2, longest=64).batches(token_budget=BUDGET).shapes) > 4  # padded: a program for each


def test_passes_that_take_examples_one_by_one_get_padded_batches():
    """Gradient features and many directions: the same numbers, and packed rows alone are refused."""
    model, data = model_of("float32"), data_of()
    kernel, plans = Kernel(model.nll_fn), [plan_of(data, packing) for packing in (False, True)]
    direction = mean_direction(kernel, model.lora, plans[0])
    run = lambda plan: (
        gradient_features(kernel, model.lora, plan, RademacherSketch(32), rows=12),
        scores_along(kernel, model.lora, [direction] * MANY, plan, rows=12),
    )
    for padded, packed in zip(*map(run, plans)):
        np.testing.assert_array_equal(packed, padded)
    with pytest.raises(ValueError, match="one example a row"):
        feature_vector(kernel, model.lora, plans[1][0])


def test_entropies_of_packed_rows():
    model, data = model_of("float32"), data_of(seed=3)
    found = []
    for packing in (False, True):
        values = np.full((12, 2), np.nan)
        for batch in plan_of(data, packing):
            real = batch.index >= 0
            values[batch.index[real]] = np.asarray(entropy_batch(model.entropy_fn, model.lora, batch))[real]
        found.append(values)
    np.testing.assert_allclose(found[1], found[0], atol=1e-6)


def test_forward_methods_of_packed_rows():
    """A model of its own: the NLL without prompts is that of examples made without one, and the folded head is the
    gradient of the head."""
    model, data = model_of("float32"), data_of(seed=3)
    head = model.head_fn({})
    tokens = Tokens(model.states_fn, head)
    loss = lambda w, batch: model.nll_fn(model.lora | {"head": {"kernel": w}}, batch)
    bare, along = [], []
    for packing in (False, True):
        plan, values = plan_of(data, packing), np.full((12, 2), np.nan)
        folded = fold(tokens, model.lora, plan, 12)
        for batch in plan:
            real = batch.index >= 0
            found = nll_without_prompt(model.nll_fn, model.lora, batch), tokens.along(folded, model.lora, batch)
            values[batch.index[real]] = np.stack(found, axis=1)[real]
        bare.append(values[:, 0])
        along.append(values[:, 1])
    np.testing.assert_allclose(bare[1], bare[0], atol=1e-6)
    np.testing.assert_allclose(along[1], along[0], atol=1e-6)
    rows = np.full(12, -1.0)
    for batch in plan_of(data, False):
        for i in np.flatnonzero(batch.index >= 0):
            answer = batch.tokens[i][: batch.lengths[i]][batch.response_mask[i][: batch.lengths[i]]]
            own = TokenisedDataset.from_sequences([[int(batch.tokens[i][0]), *answer.tolist()]], [1])
            [one] = own.batches(token_budget=BUDGET)
            rows[batch.index[i]] = model.nll_fn(model.lora, one)[0]
    np.testing.assert_allclose(bare[0], rows, atol=1e-5)
    [whole] = data.batches(token_budget=4096, max_buckets=1)
    real = whole.index >= 0
    mean = jax.grad(lambda w: jnp.mean(loss(w, whole)[real]))(head)
    np.testing.assert_allclose(folded, mean, atol=1e-6)
    expected = jax.jvp(lambda w: loss(w, whole), (head,), (mean,))[1]
    np.testing.assert_allclose(along[0][whole.index[real]], expected[real], atol=1e-6)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Broken:
    """An output that is not finite for a whole row of tokens where one token of it is 22."""

    inner: Any

    def __call__(self, params, batch):
        values = self.inner(params, batch)
        hit = jnp.any(jnp.asarray(batch.tokens) == 22, axis=1)
        hit = jnp.repeat(hit, len(values) // len(hit))
        return jnp.where(hit.reshape(-1, *(1,) * (values.ndim - 1)), jnp.nan, values)


@pytest.mark.parametrize("kept", [True, False])
def test_what_is_not_finite_takes_no_neighbour_with_it(tmp_path, kept):
    model, data = model_of("float32"), data_of(60, seed=4)
    culprits = [i for i in range(60) if 22 in data.tokens(i)[0]]
    assert 0 < len(culprits) < 60
    fn = Broken(model.embed_fn)
    store = RowStore.open(tmp_path / "s", rows=60, width=8, dtype=np.float32, manifest={}) if kept else None
    with pytest.raises(NonFiniteError) as error:
        embed(fn, model.lora, plan_of(data, True), rows=Pass(60, store))
    assert sorted(error.value.rows) == culprits
    if store is not None:  # and the others are there
        assert np.flatnonzero(~store.done()).tolist() == culprits
        good = np.flatnonzero(store.done())
        alone = embed(model.embed_fn, model.lora, plan_of(data, False), rows=60)
        np.testing.assert_allclose(store.read(good), alone(good), atol=1e-6)
