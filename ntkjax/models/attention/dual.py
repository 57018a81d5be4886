"""Fused attention for forward mode: the value and m tangents in one online softmax, a Pallas kernel for CUDA.

For the queries i and the keys j that they see, in blocks of keys, with the running maximum c of the scores s:

    p = exp(s - c),  u = p * ds,  ds = scale (dq k^T + q dk^T), times 1 - tanh^2 under a soft cap
    l = sum p,  o = sum p v,  r = sum u,  t = sum (u v + p dv)
    value = o / l,  tangent = (t - r value) / l

and whatever was summed before is multiplied by exp(c_old - c_new) when a block raises c: the online softmax of
FlashAttention (arXiv 2205.14135), whose tangent obeys the same recurrence. No [T, S] array leaves the chip, and all
tangents share s and p.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from ntkjax.models.attention.blocks import attend_blocks
from ntkjax.types import precision_of

MAX_HEAD_DIM = 256  # a block of queries and its sums no longer fit the registers beyond
HIDDEN = -1e30  # the score of a key that is not seen: finite, so that a row that sees nothing yet stays free of NaN


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Queries and keys of a block, and how many warps of 32 threads and how many stages of its loads work on it."""

    queries: int
    keys: int
    warps: int
    stages: int = 2

    @classmethod
    def of(cls, head_dim: int, itemsize: int, tangents: int) -> Blocks:
        """The fastest of those tried on an H100 with heads of 64 and 128 in 16 bits (experiments/README.md); smaller
        where a query is wider than that, so that they fit."""
        row = pl.next_power_of_2(head_dim) * itemsize
        if row > 256:
            return cls(64, 32, 4) if row <= 512 else cls(32, 16, 4)
        if not tangents:
            return cls(128, 64, 8, 3)
        return cls(64, 64, 4, 3) if row <= 128 and tangents == 1 else cls(128, 64, 8)


def tangents_a_launch(head_dim: int, itemsize: int) -> int:
    """How many tangents share a launch: as many as the registers hold the sums of. On an H100 two tangents of 64
    dimensions in 16 bits take 1.6 times as long as one, and two of 128 dimensions more than three times as long.
    """
    return max(1, 256 // (pl.next_power_of_2(head_dim) * itemsize))


def supports(head_dim: int, dtype: Any) -> bool:
    """Whether the kernel computes attention of this head size and dtype."""
    return head_dim <= MAX_HEAD_DIM and jnp.dtype(dtype).itemsize in (2, 4)


def dual_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    starts: Int[Array, "B T"] | None,
    scale: float,
    soft_cap: float | None = None,
    *,
    forward_mode: bool,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """softmax(scale q k^T) v over the keys starts[t] <= s <= t (None: s <= t), N / K query heads per key/value head.

    Sums are in float32; the weights are rounded to the dtype of ``v`` before they meet it, as in `attend_blocks`.

    Args:
      forward_mode: differentiated by ``jax.jvp`` alone, by the recurrence above; ``jax.vmap`` of the tangents computes
        `tangents_a_launch` of them in one launch, and JAX cannot transpose it. Otherwise the value is one launch, and
        the derivatives are those of `attend_blocks`, which make the weights again, block by block.
      interpret: as JAX operations, on any device, slowly.
    """
    return (_dual if forward_mode else _any_mode)(q, k, v, starts, scale, soft_cap, interpret)


def _value(q: Array, k: Array, v: Array, starts: Any, scale: float, soft_cap: float | None, interpret: bool) -> Array:
    return fused(q, k, v, starts, (), scale=scale, soft_cap=soft_cap, interpret=interpret)[0]


_dual = jax.custom_jvp(_value, nondiff_argnums=(4, 5, 6))
_any_mode = jax.custom_jvp(_value, nondiff_argnums=(4, 5, 6))


@_any_mode.defjvp
def _any_mode_jvp(scale: float, soft_cap: float | None, interpret: bool, primals: tuple, tangents: tuple) -> tuple:
    *of, starts = primals
    # The kernel has no transpose. Its derivative is that of the same function written in operations that have one.
    plain = lambda q, k, v: attend_blocks(q, k, v, None, starts, scale, soft_cap, False)
    return _any_mode(*primals, scale, soft_cap, interpret), jax.jvp(plain, tuple(of), tuple(tangents[:3]))[1]


@_dual.defjvp
def _dual_jvp(scale: float, soft_cap: float | None, interpret: bool, primals: tuple, tangents: tuple) -> tuple:
    return _with_tangent(scale, soft_cap, interpret)(*primals, *tangents[:3])


@functools.lru_cache(maxsize=64)
def _with_tangent(scale: float, soft_cap: float | None, interpret: bool) -> Any:
    """(q, k, v, starts, dq, dk, dv) -> (value, tangent), which jax.vmap of the last three takes to one launch."""
    run = functools.partial(fused, scale=scale, soft_cap=soft_cap, interpret=interpret)

    @jax.custom_batching.custom_vmap
    def one(q, k, v, starts, dq, dk, dv):
        value, moved = run(q, k, v, starts, tuple(x[None] for x in (dq, dk, dv)))
        assert moved is not None
        return value, moved[0]

    @one.def_vmap
    def _(size: int, batched: Sequence[Any], q, k, v, starts, dq, dk, dv):
        if any(jax.tree.leaves(batched[:4])):  # the primal pass has the axis too
            axes = jax.tree.map(lambda yes: 0 if yes else None, tuple(batched))
            return jax.vmap(one.fun, in_axes=axes, axis_size=size)(q, k, v, starts, dq, dk, dv), (True, True)
        every = lambda x, yes: x if yes else jnp.broadcast_to(x[None], (size, *x.shape))
        tangents = tuple(every(x, yes) for x, yes in zip((dq, dk, dv), batched[4:], strict=True))
        value, parts, most = None, [], tangents_a_launch(q.shape[-1], q.dtype.itemsize)
        for begin in range(0, size, most):
            # Every launch computes the value too; they are equal, and the last one is kept.
            value, moved = run(q, k, v, starts, tuple(x[begin : begin + most] for x in tangents))
            parts.append(moved)
        return (value, jnp.concatenate(parts)), (False, True)

    return one


def fused(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    starts: Int[Array, "B T"] | None,
    tangents: tuple[Array, ...],
    *,
    scale: float,
    soft_cap: float | None,
    interpret: bool,
    blocks: Blocks | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "m B T N H"] | None]:
    """The kernel: value and, for ``tangents`` (dq [m, B, T, N, H], dk, dv [m, B, T, K, H]) or (), its m tangents."""
    rows, length, heads, size = q.shape
    groups, m = heads // k.shape[2], len(tangents[0]) if tangents else 0
    blocks = blocks or Blocks.of(size, q.dtype.itemsize, m)
    # Triton's blocks have sides of powers of two, and its products sides of at least 16. What lies beyond the head's
    # size and the row's length is masked where it is loaded and stored.
    width = pl.next_power_of_2(size)
    tile = min(blocks.queries, max(16, pl.next_power_of_2(length)))
    chunk = min(blocks.keys, max(16, pl.next_power_of_2(length)))
    # A program has its own block of queries, and sees all keys of its head: a block spec only sets a pointer, and what
    # is read through it is decided in the loop of `_kernel`.
    whole, own = (None, length, None, width), (None, tile, None, width)
    # Program (i, b, n): block i of the queries of row b and head n, whose key/value head is n // groups. With tangents
    # the same blocks, behind an axis of m.
    of_query, of_key = (lambda i, b, n: (b, i, n, 0)), (lambda i, b, n: (b, 0, n // groups, 0))
    each = lambda index: lambda *at: (0, *index(*at))
    specs = [pl.BlockSpec(own, of_query), pl.BlockSpec(whole, of_key), pl.BlockSpec(whole, of_key)]
    specs += [None if starts is None else pl.BlockSpec((None, tile), lambda i, b, n: (b, i))]
    shapes, out_specs = [jax.ShapeDtypeStruct(q.shape, v.dtype)], [pl.BlockSpec(own, of_query)]
    if tangents:
        specs += [pl.BlockSpec((m, *own), each(of_query))] + 2 * [pl.BlockSpec((m, *whole), each(of_key))]
        shapes += [jax.ShapeDtypeStruct((m, *q.shape), v.dtype)]
        out_specs += [pl.BlockSpec((m, *own), each(of_query))]
    outputs = pl.pallas_call(
        functools.partial(
            _kernel, m=m, length=length, size=size, tile=tile, chunk=chunk, scale=scale, soft_cap=soft_cap
        ),
        grid=(pl.cdiv(length, tile), rows, heads),
        in_specs=specs,
        out_specs=out_specs,
        out_shape=shapes,
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name=f"dual_attention_{m}",
    )(q, k, v, starts, *tangents)
    return outputs[0], outputs[1] if tangents else None


def _kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    starts_ref: Any,
    *refs: Any,
    m: int,
    length: int,
    size: int,
    tile: int,
    chunk: int,
    scale: float,
    soft_cap: float | None,
) -> None:
    """``tile`` queries of one head, over their keys in blocks of ``chunk``; refs: dq, dk, dv, value, tangent."""
    dq_ref, dk_ref, dv_ref = refs[:3] if m else (None, None, None)
    value_ref, moved_ref = (refs[-2], refs[-1]) if m else (refs[0], refs[0])  # not written without tangents
    precision, width = precision_of(q_ref.dtype), q_ref.shape[-1]
    dot = lambda x, y: jnp.matmul(x, y, precision=precision, preferred_element_type=jnp.float32)
    first = pl.program_id(0) * tile
    query, columns = first + jnp.arange(tile), (jnp.arange(width) < size)[None, :]
    inside = (query < length)[:, None] & columns
    of_tangent = [jnp.int32(c) for c in range(m)]  # as arrays: the interpreter takes no Python number
    load = lambda ref, *at: plgpu.load(ref.at[(*at, slice(None), slice(None))], mask=inside, other=0)
    q, dq = load(q_ref), [load(dq_ref, c) for c in of_tangent]
    # A query behind the end gets the first of its block as its start, which does not move the lowest start below.
    start = None if starts_ref is None else plgpu.load(starts_ref.at[:], mask=query < length, other=first)

    def body(number: Any, carry: tuple) -> tuple:
        top, total, out, drift, along = carry
        key = number * chunk + jnp.arange(chunk)
        there = (key < length)[:, None] & columns
        fetch = lambda ref, *at: plgpu.load(
            ref.at[(*at, pl.ds(number * chunk, chunk), slice(None))], mask=there, other=0
        )
        k, v = fetch(k_ref), fetch(v_ref)
        scores, slope = dot(q, k.T) * scale, None
        if soft_cap is not None:
            turned = jnp.tanh(scores * (1.0 / soft_cap))
            scores, slope = soft_cap * turned, 1.0 - turned * turned
        # Causality also hides the keys behind the end from every query that is stored.
        seen = key[None, :] <= query[:, None]
        if start is not None:
            seen = seen & (key[None, :] >= start[:, None])
        scores = jnp.where(seen, scores, HIDDEN)
        higher = jnp.maximum(top, jnp.max(scores, axis=1))
        # c has no tangent: value and tangent are the same whatever is subtracted, so that it may be held fixed, and all
        # four sums shrink by one factor.
        shrink = jnp.exp(top - higher)
        # Masked a second time: in a row that has seen no key yet ``higher`` is HIDDEN too, and exp(0) would count.
        weights = jnp.where(seen, jnp.exp(scores - higher[:, None]), 0.0)
        total = total * shrink + jnp.sum(weights, axis=1)
        narrow = weights.astype(v.dtype)
        out = out * shrink[:, None] + dot(narrow, v)
        drifts, alongs = [], []
        for c, number_of in enumerate(of_tangent):
            moved = (dot(dq[c], k.T) + dot(q, fetch(dk_ref, number_of).T)) * scale
            moved = weights * (moved if slope is None else moved * slope)
            drifts.append(drift[c] * shrink + jnp.sum(moved, axis=1))
            step = dot(moved.astype(v.dtype), v) + dot(narrow, fetch(dv_ref, number_of))
            alongs.append(along[c] * shrink[:, None] + step)
        return higher, total, out, tuple(drifts), tuple(alongs)

    line, plane = jnp.zeros((tile,), jnp.float32), jnp.zeros((tile, width), jnp.float32)
    # Keys before the first that any query of the block sees, and behind its last query, are never loaded.
    low = jnp.int32(0) if start is None else jax.lax.div(jnp.min(start), jnp.int32(chunk))
    high = jax.lax.div(jnp.minimum(first + tile, length) + (chunk - 1), jnp.int32(chunk))
    carry = (line + HIDDEN, line, plane, (line,) * m, (plane,) * m)
    _, total, out, drift, along = jax.lax.fori_loop(low, high, body, carry)
    share = jnp.where(total > 0, 1.0 / jnp.where(total > 0, total, 1.0), 0.0)[:, None]
    out = out * share
    plgpu.store(value_ref.at[:, :], out.astype(value_ref.dtype), mask=inside)
    for c in range(m):
        tangent = (along[c] - drift[c][:, None] * out) * share
        plgpu.store(moved_ref.at[of_tangent[c], :, :], tangent.astype(moved_ref.dtype), mask=inside)
