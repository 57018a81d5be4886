"""Scores by token, by layer and by leaf: each part by its definition from a Jacobian, and their sums the scores."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkjax.data import TokenisedDataset
from ntkjax.errors import ConfigError
from ntkjax.models import LoraConfig, ModelConfig, init_lm
from ntkjax.ntk import KernelFunctions, NonFiniteError, build, gradient_features
from ntkjax.ntk.precondition import build_preconditioner
from ntkjax.ntk.scores import ProductsByLeaf, kernel_scores, score_directions, scores_along, scores_by_position
from ntkjax.types import before_pooling

CONFIG = ModelConfig(
    family="llama", vocab_size=23, hidden_size=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4,
    intermediate_size=12,
)  # fmt: skip
POOL, DOMAIN = 4, 3


def sequences(count: int, seed: int) -> TokenisedDataset:
    rng = np.random.default_rng(seed)
    rows = [rng.integers(1, 23, length).tolist() for length in rng.choice([6, 9], count)]
    return TokenisedDataset.from_sequences(rows, [int(rng.integers(1, len(row) - 1)) for row in rows])


class Setting:
    """A model in double precision whose adapter is not zero, with a domain and a pool."""

    def __init__(self, which: str, capped: bool = False):
        config = dataclasses.replace(CONFIG, logit_cap=3.0) if capped else CONFIG
        lora = LoraConfig(rank=2) if which == "lora" else None
        self.model = init_lm(config, seed=0, lora=lora, dtype="float64")
        rng = np.random.default_rng(3)
        self.params = jax.tree.map(
            lambda p: p + jnp.asarray(0.3 * rng.standard_normal(p.shape), p.dtype), self.model.select_params(which)
        )
        self.domain, self.pool = sequences(DOMAIN, 1), sequences(POOL, 2)
        head = self.model.head_fn if which == "all" else self.model.head_fn({})
        self.functions = KernelFunctions(self.model.hidden_fn, head, self.model.nll_fn, self.model.sum_logits_fn)

    def kernel(self, name: str):
        return build(name, self.functions, self.params, seed=0)

    def batches(self, data, **options):
        return data.batches(token_budget=40, **options)

    def directions(self, kernel, precondition="none"):
        made = build_preconditioner(
            precondition, self.model.nll_fn, self.params, self.batches(self.domain), damping=0.1, progress=False
        )
        return score_directions(kernel, self.params, [self.batches(self.domain)], precondition=made)[0]

    def by_position(self, kernel, along, **options):
        return dict(scores_by_position(kernel, self.params, along, self.batches(self.pool, **options)))


def logits_of(setting: Setting, params, row: int):
    return setting.model.with_params(params).logits(setting.pool.tokens(row)[0][None])[0]


def loss_parts(setting: Setting, params, row: int):
    """-log p(x_{t+1}) / |S| at the positions of S(x), 0 elsewhere; written anew from the logits."""
    tokens, start = setting.pool.tokens(row)
    log_p = jax.nn.log_softmax(logits_of(setting, params, row))
    count = len(tokens) - start
    parts = [-log_p[t, tokens[t + 1]] / count if start - 1 <= t < len(tokens) - 1 else 0.0 for t in range(len(tokens))]
    return jnp.stack([jnp.asarray(part, jnp.float64) for part in parts])


def sum_parts(setting: Setting, params, row: int):
    tokens, start = setting.pool.tokens(row)
    t = np.arange(len(tokens))
    inside = (t >= start - 1) & (t < len(tokens) - 1)
    return jnp.where(inside, logits_of(setting, params, row).sum(axis=1) / (len(tokens) - start), 0.0)


def expected(setting: Setting, parts, along) -> dict[int, np.ndarray]:
    """<u, grad F_t> from the Jacobian of the parts."""
    found = {}
    for row in range(POOL):
        jacobian = jax.jacobian(lambda p, row=row: parts(setting, p, row))(setting.params)
        terms = jax.tree.map(lambda j, u: jnp.tensordot(j, u[0], axes=u.ndim - 1), jacobian, along.outputs)
        found[row] = np.asarray(sum(jax.tree.leaves(terms)))
    return found


@pytest.mark.parametrize(
    ("name", "parts", "precondition", "capped"),
    [
        ("loss", loss_parts, "none", False),
        ("loss", loss_parts, "kfac", False),
        ("sum_logits", sum_parts, "none", False),
        ("sum_logits", sum_parts, "none", True),
    ],
)
def test_parts_are_the_derivatives_of_each_positions_output(x64, name, parts, precondition, capped):
    setting = Setting("lora", capped)
    kernel = setting.kernel(name)
    along = setting.directions(kernel, precondition)
    found = setting.by_position(kernel, along)
    assert sorted(found) == list(range(POOL))
    for row, values in expected(setting, parts, along[0]).items():
        assert found[row].shape == (setting.pool.lengths[row], 1)
        np.testing.assert_allclose(found[row][:, 0], values, rtol=1e-10, atol=1e-10 * np.abs(values).max())


@pytest.mark.parametrize(
    ("which", "name"),
    [("lora", "loss"), ("lora", "sum_logits"), ("all", "spectral:2")],
)
def test_tokens_and_leaves_add_up_to_the_score(x64, which, name):
    setting = Setting(which)
    kernel = setting.kernel(name)
    along = setting.directions(kernel)
    scores = kernel_scores(
        kernel, setting.params, setting.batches(setting.domain), setting.batches(setting.pool), rows=POOL
    ).scores[:, 0]
    by_position = setting.by_position(kernel, along)
    sums = np.array([by_position[row][:, 0].sum() for row in range(POOL)])
    np.testing.assert_allclose(sums, scores, rtol=1e-10, atol=1e-12 * np.abs(scores).max())

    stacked = tuple(path[0].key == "layers" for path, _ in jax.tree_util.tree_leaves_with_path(setting.params))
    products = ProductsByLeaf(along[0], stacked)
    by_leaf = gradient_features(kernel, setting.params, setting.batches(setting.pool), products, rows=POOL)
    assert by_leaf.shape == (POOL, products.width(setting.params))
    np.testing.assert_allclose(by_leaf.sum(axis=1), scores, rtol=1e-10, atol=1e-12 * np.abs(scores).max())
    # One layer of one leaf: the score along a direction that is zero everywhere else.
    leaves, tree = jax.tree.flatten(along[0].outputs)
    place = stacked.index(True)
    alone = [
        jnp.zeros_like(leaf).at[:, 1].set(leaf[:, 1]) if k == place else jnp.zeros_like(leaf)
        for k, leaf in enumerate(leaves)
    ]
    head = None if along[0].head is None else jnp.zeros_like(along[0].head)
    one = scores_along(
        kernel, setting.params, [type(along[0])(tree.unflatten(alone), head)], setting.batches(setting.pool), rows=POOL
    )
    column = sum(leaf.shape[1] if kept else 1 for leaf, kept in list(zip(leaves, stacked))[:place]) + 1
    np.testing.assert_allclose(by_leaf[:, column], one[:, 0], rtol=1e-9, atol=1e-12 * np.abs(scores).max())


def test_parts_depend_on_no_other_example_and_on_no_packing(x64):
    setting = Setting("lora")
    kernel = setting.kernel("loss")
    along = setting.directions(kernel)
    together = setting.by_position(kernel, along)
    for rows in ([2], [3, 0]):
        for row, values in setting.by_position(kernel, along, indices=np.asarray(rows)).items():
            np.testing.assert_allclose(values, together[row], rtol=1e-10, atol=1e-15)
    setting.pool = setting.pool.packed(True)
    for row, values in setting.by_position(kernel, along).items():
        np.testing.assert_allclose(values, together[row], rtol=1e-10, atol=1e-15)


def test_of_packed_rows_the_parts_before_pooling_add_up_too(x64):
    setting = Setting("lora")
    batch = next(iter(setting.pool.packed(True).batches(token_budget=4096)))
    for fn in (setting.model.nll_fn, setting.model.hidden_fn):
        call = lambda fn: np.asarray(jax.jit(lambda f, p, b: f(p, b))(fn, setting.params, batch))
        pooled, apart = call(fn), call(before_pooling(fn))
        slots = len(batch.index) // len(batch.tokens)
        for place, row in enumerate(np.asarray(batch.index)):
            if row >= 0:
                own = np.asarray(batch.examples)[place // slots] == place % slots
                np.testing.assert_allclose(apart[place // slots][own].sum(axis=0), pooled[place], rtol=1e-10)


def test_what_has_no_parts_is_refused():
    model = init_lm(CONFIG, seed=0)
    with pytest.raises(ConfigError, match="output 'apply' has no values by position; hidden, sum_logits"):
        before_pooling(model.apply_fn)
    with pytest.raises(ConfigError, match=r"expected a function with before_pooling\(\)"):
        before_pooling(lambda params, batch: params)


def test_parts_that_are_not_finite_name_their_row(x64):
    setting = Setting("lora")
    kernel = setting.kernel("loss")
    along = jax.tree.map(lambda leaf: leaf * jnp.nan, setting.directions(kernel))
    with pytest.raises(NonFiniteError, match="score by token not finite for 1 row"):
        setting.by_position(kernel, along)
