"""Directional scores against the row means of the explicit kernel, and what they must not depend on."""

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkjax.errors import UserError
from ntkjax.ntk import (
    ForwardScorer,
    IdentitySketch,
    Pass,
    SketchScorer,
    directional_derivatives,
    directional_scores,
    kernel_scores,
    mean_gradient,
)
from ntkjax.ntk.rows import MAX_BAD_ROWS, NonFiniteError, collect_rows, iterate
from ntkjax.ntk.scores import stack_tangents
from ntkjax.store import RowStore
from ntkjax.types import forward_mode

DOMAIN, POOL = 7, 23
SCORERS = {"forward": ForwardScorer(), "sketch": SketchScorer(IdentitySketch())}


@pytest.fixture
def store(tmp_path):
    """Opens (or reopens) a row store of one column."""
    return lambda rows: RowStore.open(tmp_path / "s", rows=rows, width=1, dtype="float32", manifest={})


@pytest.fixture
def writes(monkeypatch):
    """The indices of every write to a row store."""
    seen, write = [], RowStore.write
    monkeypatch.setattr(RowStore, "write", lambda self, i, v: (seen.append(i.tolist()), write(self, i, v))[1])
    return seen


def relative(a, b):
    return np.abs(np.asarray(a) - b).max() / np.abs(b).max()


@pytest.mark.parametrize("which", ["lora", "all"])
@pytest.mark.parametrize("method", ["forward", "sketch"])
def test_scores_equal_row_means_of_the_kernel(toy, which, method):
    output_fn, params = toy.output(which)
    domain, pool = toy.sequences(DOMAIN, 1), toy.sequences(POOL, 2)
    result = kernel_scores(
        output_fn, params, toy.batches(domain, 4), toy.batches(pool, 4), rows=POOL,
        references=[toy.batches(pool[:5], 4)], scorer=SCORERS[method],
    )  # fmt: skip
    expected = toy.jacobian_kernel(output_fn, params, domain, pool).mean(axis=0)
    reference = toy.jacobian_kernel(output_fn, params, pool[:5], pool).mean(axis=0)
    assert result.scores.shape == (POOL, 2) and result.scores.dtype == np.float32
    assert relative(result.scores[:, 0], expected) < 1e-5
    assert relative(result.scores[:, 1], reference) < 1e-5
    cross = toy.jacobian_kernel(output_fn, params, domain, pool[:5]).mean()
    assert abs(result.gram[0, 1] - cross) < 1e-5 * abs(result.gram).max()
    np.testing.assert_allclose(result.gram[0, 1], result.gram[1, 0], rtol=1e-6)


@pytest.mark.parametrize("which", ["lora", "all"])
@pytest.mark.parametrize("method", ["forward", "sketch"])
def test_scores_are_exact_in_double_precision(toy, x64, which, method):
    output_fn, params = toy.output(which, jnp.float64)
    domain, pool = toy.sequences(DOMAIN, 1), toy.sequences(POOL, 2)
    result = kernel_scores(
        output_fn,
        params,
        toy.batches(domain, 4),
        toy.batches(pool, 4),
        rows=POOL,
        scorer=SCORERS[method],
    )
    expected = toy.jacobian_kernel(output_fn, params, domain, pool).mean(axis=0)
    assert result.scores.dtype == np.float64
    assert relative(result.scores[:, 0], expected) < 1e-10


def test_several_tangents_equal_one_at_a_time(toy):
    output_fn, params = toy.output("all")
    batch = toy.collate(toy.sequences(4, 5), range(4))
    tangents = [toy.init(seed) for seed in (7, 8, 9)]
    together = directional_derivatives(output_fn, params, stack_tangents(params, tangents), batch)
    for column, tangent in enumerate(tangents):
        alone = directional_derivatives(output_fn, params, stack_tangents(params, [tangent]), batch)
        assert relative(together[:, column], np.asarray(alone[:, 0])) < 1e-6


def test_tangents_share_one_primal_pass(toy):
    output_fn, params = toy.output("all")
    batch = toy.collate(toy.sequences(16, 5, longest=32), range(16))
    flops = lambda f, x: jax.jit(f).lower(x).cost_analysis()["flops"]
    forward = flops(lambda p: output_fn(p, batch), params)

    def cost(m):
        run = lambda tangents: directional_derivatives(output_fn, params, tangents, batch)
        return flops(run, stack_tangents(params, [params] * m))

    per_tangent = (cost(9) - cost(1)) / 8
    shared = cost(1) - per_tangent
    assert 0.8 * forward < shared < 1.6 * forward  # the primal pass is there, and only once


def test_mean_gradient_is_the_gradient_of_the_mean(toy):
    output_fn, params = toy.output("all")
    rows = toy.sequences(DOMAIN, 1)
    jacobians = [toy.jacobian(output_fn, params, toy.collate([row], [i])) for i, row in enumerate(rows)]
    expected = jax.tree.map(lambda *leaves: np.mean(np.concatenate(leaves), axis=0), *jacobians)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for size in (1, 4):
        mean = mean_gradient(output_fn, params, toy.batches(rows, size))
        for a, b in zip(jax.tree.leaves(mean), jax.tree.leaves(expected)):
            np.testing.assert_allclose(a, b, atol=2e-6 * scale)


def test_filler_rows_do_not_count_even_if_their_output_is_not_zero(toy):
    output_fn = lambda params, batch: params["w"] * jnp.asarray(batch.lengths).astype(jnp.float32)
    batch = toy.collate(toy.sequences(3, 1), range(3), fill=2)
    mean = mean_gradient(output_fn, {"w": jnp.float32(1)}, [batch])
    np.testing.assert_allclose(mean["w"], batch.lengths[:3].mean(), rtol=1e-6)


def test_mean_gradient_of_low_precision_parameters_is_float32(toy):
    output_fn, params = toy.output("all", jnp.bfloat16)
    rows = toy.sequences(4, 1)
    mean = mean_gradient(output_fn, params, toy.batches(rows, 4))
    assert {leaf.dtype for leaf in jax.tree.leaves(mean)} == {jnp.dtype(jnp.float32)}
    scores = directional_scores(output_fn, params, [mean], toy.batches(rows, 4), rows=4)
    full = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    exact = directional_scores(output_fn, full, [mean], toy.batches(rows, 4), rows=4)
    assert scores.dtype == np.float32 and relative(scores, exact) < 0.1


@pytest.mark.parametrize("which", ["lora", "all"])
def test_score_and_gradient_do_not_depend_on_company(toy, which):
    output_fn, params = toy.output(which)
    pool = toy.sequences(POOL, 2)
    tangent = mean_gradient(output_fn, params, toy.batches(toy.sequences(DOMAIN, 1), 4))
    score = lambda batches: directional_scores(output_fn, params, [tangent], batches, rows=POOL)
    together = score(toy.batches(pool, 8))
    order = np.random.default_rng(0).permutation(POOL)
    variants = {
        "alone": [toy.collate([row], [i]) for i, row in enumerate(pool)],
        "padded": [toy.collate(pool, range(POOL), length=31, fill=3)],
        "reordered": toy.batches([pool[i] for i in order], 5, index=order),
    }
    for name, batches in variants.items():
        assert relative(score(batches), together) < 1e-6, name
    gradient = mean_gradient(output_fn, params, [toy.collate([pool[0]], [0])])
    padded = mean_gradient(output_fn, params, [toy.collate([pool[0]], [0], length=40, fill=2)])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * np.abs(a).max() + 1e-12), gradient, padded)


def test_each_bucket_compiles_once(toy):
    traces = []

    def counted(params, batch):
        traces.append(batch.tokens.shape)
        return toy.logits_sum(params, batch)

    output_fn, params = jax.tree_util.Partial(counted), toy.init(0)
    rows = toy.sequences(12, 1, longest=6)
    short = [toy.collate(rows[i : i + 2], [i, i + 1], length=6) for i in range(0, 8, 2)]
    long = [toy.collate(rows[i : i + 2], [i, i + 1], length=8) for i in range(8, 12, 2)]
    tangent = mean_gradient(output_fn, params, short)
    assert traces == [(2, 6)] * 2  # the shape of the sum, and the sum
    traces.clear()
    mean_gradient(output_fn, params, short)
    assert traces == []
    directional_scores(output_fn, params, [tangent], short + long, rows=12)
    assert traces == [(2, 6), (2, 8)]
    other = jax.tree.map(lambda p: p + 1, params)
    directional_scores(output_fn, other, [tangent], long + short, rows=12)
    assert len(traces) == 2  # other weights, same program


def test_rows_that_no_batch_holds_stay_nan(toy):
    output_fn, params = toy.output("lora")
    rows = toy.sequences(3, 1)
    scores = directional_scores(output_fn, params, [params], [toy.collate(rows, [5, 0, 2])], rows=7)
    assert np.isfinite(scores[[5, 0, 2]]).all() and np.isnan(scores[[1, 3, 4, 6]]).all()


def test_a_store_resumes_where_it_stopped(toy, store, writes):
    output_fn, params = toy.output("lora")
    rows = toy.sequences(10, 1)
    plan = toy.batches(rows, 3)
    whole = directional_scores(output_fn, params, [params], plan, rows=10)

    def killed():
        yield from plan[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        directional_scores(output_fn, params, [params], killed(), rows=Pass(10, store(10)))
    assert writes == [[0, 1, 2]]  # the second batch was still in flight
    writes.clear()
    resumed = directional_scores(output_fn, params, [params], plan, rows=Pass(10, store(10)))
    np.testing.assert_array_equal(resumed, whole)
    assert writes == [[3, 4, 5], [6, 7, 8], [9]]  # finished batches are not computed again


def test_rows_missing_from_a_store_are_nan_not_its_fill_value(toy, store):
    output_fn, params = toy.output("lora")
    batch = toy.collate(toy.sequences(2, 1), [0, 3])
    scores = directional_scores(output_fn, params, [params], [batch], rows=Pass(4, store(4)))
    assert np.isnan(scores[[1, 2]]).all() and np.isfinite(scores[[0, 3]]).all()


def test_rows_can_stay_in_the_store(store):
    kept, values = store(4), np.arange(3, dtype=np.float32)[:, None]
    pairs = [(np.array([2, -1, 0]), jnp.asarray(values))]
    assert collect_rows(pairs, rows=4, store=kept, read=False).size == 0
    assert kept.read(np.array([0, 2])).ravel().tolist() == [2, 0]
    with pytest.raises(NonFiniteError, match=r": 1\."):
        collect_rows([(np.array([1]), jnp.full((1, 1), jnp.nan))], rows=4, store=kept, read=False)


def test_non_finite_scores_name_their_rows_and_replace_nothing(toy, store):
    def output_fn(params, batch):
        bad = jnp.asarray(batch.index) % 4 == 1
        return params["w"] * jnp.where(bad, jnp.inf, 1.0).astype(jnp.float32)

    params, kept = {"w": jnp.float32(1)}, store(10)
    plan = toy.batches(toy.sequences(10, 1), 3)
    with pytest.raises(NonFiniteError, match=r"3 row\(s\): 1, 5, 9") as error:
        directional_scores(output_fn, params, [params], plan, rows=Pass(10, kept))
    assert error.value.rows == [1, 5, 9]
    assert kept.done().tolist() == [i % 4 != 1 for i in range(10)]
    many = toy.batches(toy.sequences(400, 1), 4)
    with pytest.raises(NonFiniteError, match="at least") as error:
        directional_scores(output_fn, params, [params], many, rows=400)
    assert len(error.value.rows) == MAX_BAD_ROWS


def test_non_finite_gradients_name_the_batch(toy):
    def output_fn(params, batch):
        return jnp.sqrt(params["w"] * jnp.where(jnp.asarray(batch.index) == 4, 0.0, 1.0).astype(jnp.float32))

    with pytest.raises(NonFiniteError, match="gradient") as error:
        mean_gradient(output_fn, {"w": jnp.float32(1)}, toy.batches(toy.sequences(9, 1), 3))
    assert error.value.rows == [3, 4, 5]


def test_wrong_use_is_refused(toy):
    output_fn, params = toy.output("lora")
    plan = toy.batches(toy.sequences(4, 1), 2)
    with pytest.raises(ValueError, match="structure"):
        directional_scores(output_fn, params, [{"other": params["lora_a"]}], plan, rows=4)
    with pytest.raises(ValueError, match="rows=3"):
        directional_scores(output_fn, params, [params], plan, rows=3)
    with pytest.raises(UserError, match="no examples"):
        mean_gradient(output_fn, params, [])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    x: Any
    index: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Product:
    """F(x) = factor theta . x; in its form for forward mode it is ten times as large, to be told apart."""

    factor: float = dataclasses.field(default=1.0, metadata={"static": True})

    def __call__(self, params, batch):
        return self.factor * jnp.matmul(batch.x, params["theta"])

    def for_forward_mode(self):
        return Product(10.0 * self.factor)


def test_pool_examples_are_differentiated_in_the_form_for_forward_mode_and_the_domain_is_not():
    x = np.asarray([[1.0, 2.0], [3.0, -1.0]], np.float32)
    batch, params = Rows(jnp.asarray(x), jnp.arange(2, dtype=jnp.int32)), {"theta": jnp.ones(2)}
    (direction,) = mean_gradient(Product(), params, [batch]).values()
    np.testing.assert_allclose(direction, x.mean(axis=0))
    for scores in (
        kernel_scores(Product(), params, [batch], [batch], rows=2).scores[:, 0],
        directional_scores(Product(), params, [{"theta": direction}], [batch], rows=2)[:, 0],
    ):
        np.testing.assert_allclose(scores, 10 * x @ x.mean(axis=0), rtol=1e-6)
    plain = lambda params, batch: params
    assert forward_mode(plain) is plain


def test_the_first_line_of_a_pass_says_that_it_compiles(capfd):
    batches = [types.SimpleNamespace(index=np.arange(2)) for _ in range(3)]
    for number, _ in enumerate(iterate(batches, "score pool", "scores")):
        shown = capfd.readouterr().err
        assert number == 1 or ("compiling" in shown) == (number == 0), shown  # 1: the bar moves before it is told
    assert [batch.index[1] for batch in iterate(batches, False, "scores")] == [1, 1, 1]


def test_what_is_not_finite_in_a_packed_row_is_computed_again_once():
    """Rows 0 and 1 lie in one packed row, which the second spoils; by itself the first is finite."""
    asked, nan = [], float("nan")
    column = lambda *values: jnp.asarray(values, jnp.float32)[:, None]

    def again(rows):
        asked.append(rows.tolist())
        return [(rows, column(*(nan if row == 1 else 7.0 for row in rows)))]

    packed = [(np.array([0, 1]), column(nan, nan)), (np.array([2]), column(1.0))]
    with pytest.raises(NonFiniteError) as told:
        collect_rows(packed, rows=3, again=again)
    assert told.value.rows == [1] and asked == [[0, 1]]
    good = collect_rows([(np.array([0]), column(nan)), packed[1]], rows=3, again=again)
    np.testing.assert_array_equal(good[[0, 2]], [[7.0], [1.0]])
