"""Attention: the fused kernel, run by Pallas' interpreter, against the plain formula and its derivatives by JAX."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkjax.errors import ConfigError
from ntkjax.models.attention import attend, resolve
from ntkjax.models.attention.blocks import attend_blocks
from ntkjax.models.attention.dual import Blocks, dual_attention, fused
from ntkjax.models.config import ModelConfig
from ntkjax.models.lm import init_lm
from ntkjax.models.lora import LoraConfig
from ntkjax.ntk.outputs import sum_logits
from ntkjax.ntk.scores import directional_derivatives, stack_tangents
from ntkjax.types import Batch


def formula(q, k, v, starts, scale, soft_cap):
    """softmax(scale q k^T) v over starts[t] <= s <= t, 0 where nothing is seen; written out in float32 or better."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    q, k, v = (x.astype(wide) for x in (q, k, v))
    groups = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest") * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    row = jnp.arange(q.shape[1])
    seen = row[None, None, :] <= row[None, :, None]
    if starts is not None:
        seen = seen & (row[None, None, :] >= starts[:, :, None])
    weights = jnp.where(seen[:, None], jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True)), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total == 0, jnp.ones_like(total), total)
    return jnp.einsum("bnts,bsnh->btnh", weights, v, precision="highest")


def draw(rows, length, heads, kv_heads, size, dtype="float32", tangents=1, seed=0):
    """(q, k, v) and their ``tangents`` tangents, leaves [m, ...]."""
    rng = np.random.default_rng(seed)
    make = lambda n, *lead: jnp.asarray(rng.standard_normal((*lead, rows, length, n, size), np.float32)).astype(dtype)
    three = (heads, kv_heads, kv_heads)
    return tuple(make(n) for n in three), tuple(make(n, tangents) for n in three)


def packed_starts(rows, lengths):
    """starts [rows, T] of examples of these lengths, one after another; row r turns the lengths by r."""
    out = []
    for r in range(rows):
        turned = [*lengths[r % len(lengths) :], *lengths[: r % len(lengths)]]
        ends = np.cumsum(turned)
        out.append(np.repeat(ends - turned, turned))
    return jnp.asarray(np.stack(out), jnp.int32)


CASES = {  # (rows, tokens, heads, key/value heads, head size), lengths of the examples in a row, soft cap
    "causal": ((2, 40, 4, 2, 16), None, None),
    "packed": ((2, 70, 2, 2, 32), (33, 5, 32), None),
    "soft cap": ((1, 33, 2, 1, 16), None, 1.5),
    "ragged head of 80": ((1, 20, 2, 1, 80), (13, 7), None),
    "ragged head of 96, soft cap": ((1, 17, 2, 2, 96), None, 3.0),
    "one token": ((2, 1, 2, 1, 16), None, None),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tangents", (1, 2, 4))
def test_the_kernel_is_the_formula_and_its_tangents(name, tangents):
    """Several blocks of queries and keys, so that the running maximum moves and whole blocks are skipped."""
    shape, lengths, soft_cap = CASES[name]
    primals, moved = draw(*shape, tangents=tangents)
    starts = None if lengths is None else packed_starts(shape[0], lengths)
    value, along = fused(
        *primals, starts, moved, scale=0.7, soft_cap=soft_cap, interpret=True, blocks=Blocks(32, 16, 4)
    )
    plain = lambda *x: formula(*x, starts, 0.7, soft_cap)
    np.testing.assert_allclose(value, plain(*primals), rtol=1e-5, atol=1e-5)
    expected = jax.vmap(lambda *t: jax.jvp(plain, primals, t)[1])(*moved)
    np.testing.assert_allclose(along, expected, rtol=1e-5, atol=2e-5)


def test_a_query_that_sees_no_key_is_zero_and_so_is_its_tangent():
    primals, moved = draw(1, 24, 2, 1, 16)
    starts = jnp.asarray([[0] * 8 + [24] * 8 + [16] * 8], jnp.int32)
    value, along = fused(*primals, starts, moved, scale=0.5, soft_cap=None, interpret=True, blocks=Blocks(16, 16, 4))
    assert not np.any(value[:, 8:16]) and not np.any(along[0][:, 8:16])
    plain = lambda *x: formula(*x, starts, 0.5, None)
    expected = jax.jvp(plain, primals, tuple(t[0] for t in moved))
    np.testing.assert_allclose(value, expected[0], atol=1e-5)
    np.testing.assert_allclose(along[0], expected[1], atol=2e-5)


def test_bfloat16_differs_by_its_rounding():
    primals, moved = draw(1, 64, 4, 2, 16, "bfloat16")
    value, along = fused(*primals, None, moved, scale=0.25, soft_cap=None, interpret=True)
    assert value.dtype == along.dtype == jnp.bfloat16
    plain = lambda *x: formula(*x, None, 0.25, None)
    with jax.numpy_dtype_promotion("standard"):
        exact = jax.jvp(plain, *(tuple(x.astype(jnp.float32) for x in y) for y in (primals, [t[0] for t in moved])))
    for got, wanted in zip((value, along[0]), exact):
        error = np.linalg.norm(np.asarray(got, np.float32) - wanted) / np.linalg.norm(wanted)
        assert error < 2**-7  # one rounding of the weights, one of the result, 2^-9 each at most


@pytest.mark.parametrize("tangents", (1, 2, 3))
def test_jvp_and_vmap_of_the_tangents_reach_the_kernel(tangents):
    """Under jax.jvp alone, and under jax.vmap of the tangents, of which one launch holds two of 32 float32 numbers."""
    primals, moved = draw(1, 20, 2, 1, 32, tangents=tangents)
    run = lambda *x: dual_attention(*x, None, 0.5, forward_mode=True, interpret=True)
    push = lambda *t: jax.jvp(run, primals, t)
    plain = lambda *x: formula(*x, None, 0.5, None)
    program = jax.make_jaxpr(jax.vmap(push, out_axes=(None, 0)))(*moved)
    assert str(program).count("pallas_call[") == -(-tangents // 2)
    value, along = jax.vmap(push, out_axes=(None, 0))(*moved)
    np.testing.assert_allclose(value, plain(*primals), atol=1e-5)
    expected = jax.vmap(lambda *t: jax.jvp(plain, primals, t)[1])(*moved)
    np.testing.assert_allclose(along, expected, atol=2e-5)


def test_jvp_under_vmap_of_the_primals_too():
    """Then each row has primals of its own, and nothing to share."""
    primals, moved = draw(3, 12, 2, 1, 16)
    one = lambda *x: dual_attention(*x, None, 0.5, forward_mode=True, interpret=True)
    run = lambda *x: one(*(each[None] for each in x))[0]
    got = jax.vmap(lambda p, t: jax.jvp(run, p, t)[1])(primals, tuple(t[0] for t in moved))
    plain = lambda *x: formula(*x, None, 0.5, None)
    np.testing.assert_allclose(got, jax.jvp(plain, primals, tuple(t[0] for t in moved))[1], atol=2e-5)


@pytest.mark.parametrize("soft_cap", (None, 2.0))
def test_any_mode_has_the_kernels_value_and_derivatives_that_transpose(soft_cap):
    primals, moved = draw(2, 40, 4, 2, 16)
    starts = packed_starts(2, (25, 15))
    run = lambda *x: dual_attention(*x, starts, 0.5, soft_cap, forward_mode=False, interpret=True)
    plain = lambda *x: formula(*x, starts, 0.5, soft_cap)
    value, pull = jax.vjp(run, *primals)
    expected, pull_plain = jax.vjp(plain, *primals)
    np.testing.assert_allclose(value, expected, atol=1e-5)
    for got, wanted in zip(pull(value), pull_plain(value)):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=2e-5)
    tangents = tuple(t[0] for t in moved)
    np.testing.assert_allclose(jax.jvp(run, primals, tangents)[1], jax.jvp(plain, primals, tangents)[1], atol=2e-5)


@pytest.mark.parametrize("window", (None, 5, np.iinfo(np.int32).max))
@pytest.mark.parametrize("packed", (False, True))
def test_windows_and_packed_rows_are_the_same_in_every_implementation(window, packed):
    (q, k, v), _ = draw(2, 40, 2, 1, 16)
    starts = packed_starts(2, (11, 29)) if packed else None
    options = {"window": None if window is None else jnp.int32(window), "starts": starts, "forward_mode": True}
    row = np.arange(40)
    first = np.zeros((2, 40), np.int64) if starts is None else np.asarray(starts)
    if window is not None:
        first = np.maximum(first, row[None] - (int(window) - 1))
    expected = formula(q, k, v, jnp.asarray(first, jnp.int32), 0.25, None)
    for implementation in ("xla", "interpreted"):
        np.testing.assert_allclose(attend(q, k, v, None, implementation, **options), expected, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_the_cotangents_of_blocks_are_those_of_the_formula(name, dtype):
    """In bfloat16 the weights, the cotangents of the scores and the results are rounded, 2^-9 each at most."""
    shape, lengths, soft_cap = CASES[name]
    primals, ((moved,), *_) = draw(*shape, dtype=dtype)
    starts = None if lengths is None else packed_starts(shape[0], lengths)
    pull = jax.vjp(lambda *x: attend_blocks(*x, None, starts, 0.2, soft_cap, False), *primals)[1]
    exact = tuple(x.astype(jnp.float32) for x in primals)
    pull_plain = jax.vjp(lambda *x: formula(*x, starts, 0.2, soft_cap), *exact)[1]
    for got, wanted in zip(pull(moved), pull_plain(moved.astype(jnp.float32))):
        if dtype == "float32":
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=2e-5)
        else:
            error = np.linalg.norm(np.asarray(got, np.float32) - wanted)
            assert got.dtype == jnp.bfloat16 and error <= 2**-7 * np.linalg.norm(wanted) + 1e-6


@pytest.mark.parametrize("implementation", ("xla", "interpreted"))
def test_the_backward_pass_of_sixteen_bits_has_products_of_sixteen_bits_alone(implementation):
    """q k^T again, and those that give the cotangents of P, q, k and v: five, as in FlashAttention."""
    (q, k, v), _ = draw(1, 24, 2, 1, 16, "bfloat16")
    starts = packed_starts(1, (14, 10))
    run = lambda q, k, v: attend(q, k, v, None, implementation, starts=starts)
    backward = lambda q, k, v, moved: jax.vjp(run, q, k, v)[1](moved)
    text = jax.jit(backward).lower(q, k, v, q).as_text()
    found = [line.split(" : ")[-1].split(" -> ")[0] for line in text.splitlines() if "dot_general" in line]
    assert len(found) == 5 and not [operands for operands in found if "f32" in operands], found


@contextlib.contextmanager
def cuda():
    """A mesh of one imagined CUDA device, which Pallas asks for its properties on jax 0.11 and newer."""
    device = getattr(jax.sharding, "AbstractDevice", None)
    if device is None or "platform" not in device.__init__.__annotations__:
        yield
        return
    imagined = device("NVIDIA H100 80GB HBM3", None, "cuda")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("one",), abstract_device=imagined)):
        yield


@pytest.mark.parametrize("dtype", ("bfloat16", "float32"))
@pytest.mark.parametrize("size", (64, 80, 96, 128, 256))
def test_every_variant_lowers_for_cuda(size, dtype):
    of = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)
    q, k, starts = of(2, 300, 4, size), of(2, 300, 2, size), jax.ShapeDtypeStruct((2, 300), "int32")
    variants = [(0, None, None), (1, starts, 50.0), (1, None, None), (2, starts, None), (4, None, None)]
    for m, first, soft_cap in variants:
        run = lambda *x, cap=soft_cap: fused(*x, scale=0.1, soft_cap=cap, interpret=False)
        tangents = (of(m, *q.shape), of(m, *k.shape), of(m, *k.shape)) if m else ()
        with cuda():
            text = jax.jit(run).trace(q, k, k, first, tangents).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count(f"dual_attention_{m}") >= 1 and "triton" in text


def test_scores_of_a_model_are_the_same_through_the_kernel():
    """Two directions, so that the tangents share a launch inside the scan over layers."""
    rng, shape = np.random.default_rng(0), (2, 24)
    batch = Batch(
        tokens=rng.integers(0, 40, shape, dtype=np.int32),
        response_mask=np.broadcast_to(np.arange(24) >= 10, shape),
        lengths=np.full(2, 24, np.int32),
        index=np.arange(2, dtype=np.int32),
    )
    config = ModelConfig(
        family="qwen3", vocab_size=40, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4,
        num_kv_heads=2, head_dim=16, qk_norm=True, tied=True,
    )  # fmt: skip
    scores = []
    for attention in ("xla", "interpreted"):
        model = init_lm(config, seed=1, lora=LoraConfig(rank=2), attention=attention)
        output = sum_logits(model.hidden_fn, model.head_fn)
        draws = [np.random.default_rng(seed) for seed in (1, 2)]
        moved = [
            jax.tree.map(lambda x, r=r: jnp.asarray(r.standard_normal(x.shape, np.float32)), model.lora) for r in draws
        ]
        scores.append(directional_derivatives(output, model.lora, stack_tangents(model.lora, moved), batch))
    np.testing.assert_allclose(scores[1], scores[0], rtol=2e-5, atol=1e-5)


def test_names_are_checked_and_auto_is_what_the_device_has():
    assert resolve("auto", None) == ("dual" if jax.devices()[0].platform == "gpu" else "xla")
    assert resolve("dual", None) == "dual"
    with pytest.raises(ConfigError, match="flash"):
        resolve("flash", None)
