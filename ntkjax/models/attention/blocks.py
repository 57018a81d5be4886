"""Attention as matrix products, in blocks of queries where the mask is causal: any device, dtype and derivative."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ntkjax.types import float32_or_better, precision_of

MIN_BLOCK, MAX_BLOCK = 32, 256  # queries of a causal block: below 32 the products are too small to be fast


def attend_blocks(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "b T S"] | None,
    starts: Int[Array, "B T"] | None,
    scale: float,
    soft_cap: float | None,
    forward_mode: bool,
) -> Float[Array, "B T N H"]:
    """softmax(scale q k^T) v over the keys that ``mask`` names; without one, over starts[t] <= s <= t (None: s <= t).

    ``forward_mode``: differentiated by ``jax.jvp`` alone, so nothing is made again for a backward pass, and in bfloat16
    nothing is rounded for one. The sum is written out: jax.nn.dot_product_attention takes its softmax in float32 even
    for float64 inputs.
    """
    b, t, n, h = q.shape
    groups, settings = k.shape[2], (scale, soft_cap, forward_mode)
    # [B, T, N, H] -> [B, K, G, T, H]: query heads that share a key/value head are neighbours, head n uses n // G.
    q = q.reshape(b, t, groups, n // groups, h).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    block = _attend_block if forward_mode else _attend_block_again
    if mask is not None:
        out = block(q, k, v, mask[:, None, None], *settings)
    else:
        # A block of queries sees no key behind its last one: at 256 tokens that spares a third of the products, and the
        # smaller weights a third of the tangents' time on a CPU.
        size = min(max(MIN_BLOCK, -(-t // 4)), MAX_BLOCK)
        ends = [*range(size, t, size), t]
        row = jnp.arange(t, dtype=jnp.int32)
        pieces = []
        for begin, end in zip([0, *ends[:-1]], ends):
            queries, keys = row[None, begin:end, None], row[None, None, :end]
            # Keys before ``starts`` are multiplied and masked: starts are data, and a shape must not depend on data.
            seen = keys <= queries
            if starts is not None:
                seen = seen & (keys >= starts[:, begin:end, None])
            pieces.append(block(q[:, :, :, begin:end], k[:, :, :end], v[:, :, :end], seen[:, None, None], *settings))
        out = jnp.concatenate(pieces, axis=3)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h).astype(v.dtype)


def _attend_block(
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "b c d T S"],
    scale: float,
    soft_cap: float | None,
    forward_mode: bool,
) -> Float[Array, "B K G T H"]:
    """One block of queries; K key/value heads with G query heads each, in float32 or better."""
    # One plain matrix product for each key/value head: einsum over five axes takes more than twice as long on a CPU.
    rows = q.reshape(*k.shape[:2], -1, q.shape[-1])
    return _weighted_sum(rows, k, v, mask, scale, soft_cap, forward_mode).reshape(q.shape)


# The weights are made again in the backward pass: keeping those of every layer takes twice the memory, and on a CPU
# twice the time, at 512 tokens. There is none in forward mode, where several tangents share them.
_attend_block_again = jax.checkpoint(_attend_block, prevent_cse=False, static_argnums=(4, 5, 6))


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5, 6))
def _weighted_sum(
    q: Float[Array, "B K Q H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "b c d T S"],
    scale: float,
    soft_cap: float | None,
    forward_mode: bool,
) -> Float[Array, "B K Q H"]:
    """W v with W = softmax(s), s = scale q k^T or its soft cap c tanh(scale q k^T / c), Q = G T queries of a key/value
    head; every query sees a key at least.

    Its tangent, with U = W * ds elementwise, ds = scale (dq k^T + q dk^T), times 1 - tanh^2 under a soft cap, is

        U v + W dv - (U 1) W v:

    dW = U - W * (U 1) itself would be one more pass over [Q, S]. Reverse mode transposes the same rule.

    In bfloat16, without ``forward_mode``, it is dW v + W dv, and the products that tangents meet are rounded to
    bfloat16: so are, in the transposed ones, the cotangents of the result, of W and of s. That of W is dO v^T; that of
    s, W * (dO v^T - (W * dO v^T) 1), computed in float32, stays 0 where a query sees one key, as it would not if W v
    took the place of the sum.
    """
    return _product(_weights(_scores(q, k, scale), mask, soft_cap)[0], v)


@_weighted_sum.defjvp
def _weighted_sum_jvp(
    scale: float, soft_cap: float | None, forward_mode: bool, primals: tuple, tangents: tuple
) -> tuple[Array, Array]:
    q, k, v, mask = primals
    dq, dk, dv, _ = tangents
    rounded = v.dtype == jnp.bfloat16 and not forward_mode
    product = _half_product if rounded else _product
    weights, slope = _weights(_scores(q, k, scale), mask, soft_cap)
    out = _product(weights, v)
    # No mask here: a key that is not seen has weight 0.
    moved = weights * (_scores(dq, k, scale, product) + _scores(q, dk, scale, product))
    moved = moved if slope is None else moved * slope
    drift = jnp.sum(moved, axis=-1, keepdims=True)
    if rounded:
        return out, product(moved - weights * drift, v) + product(weights, dv)
    return out, product(moved, v) + product(weights, dv) - drift * out


def _weights(
    scores: Float[Array, "B K Q S"], mask: Bool[Array, "b c d T S"], soft_cap: float | None
) -> tuple[Float[Array, "B K Q S"], Float[Array, "B K Q S"] | None]:
    """softmax of the masked scores, soft-capped before; and the soft cap's slope, None where there is none."""
    slope = None
    if soft_cap is not None:
        turned = jnp.tanh(scores * (1.0 / soft_cap))
        scores, slope = soft_cap * turned, 1.0 - turned * turned
    apart = scores.reshape(*scores.shape[:2], -1, *mask.shape[-2:])
    # The lowest finite number in the place of -inf: softmax subtracts the row's largest score, and -inf - (-inf), in a
    # row of padding that sees nothing, is NaN.
    masked = jnp.where(mask, apart, jnp.finfo(scores.dtype).min)
    return jax.nn.softmax(masked, axis=-1).reshape(scores.shape), slope


def _product(x: Float[Array, "B K Q n"], y: Float[Array, "B K n m"]) -> Float[Array, "B K Q m"]:
    """x y in the dtype of y, accumulated and returned in float32 or better."""
    # Weights and their tangents are rounded to the dtype of v: a product of two 16-bit operands with float32 sums is
    # what matrix units do at full speed, one with a float32 operand is not.
    accumulate, precision = float32_or_better(y.dtype), precision_of(y.dtype)
    return jnp.matmul(x.astype(y.dtype), y, precision=precision, preferred_element_type=accumulate)


def _half_product(x: Float[Array, "B K Q n"], y: Float[Array, "B K n m"]) -> Float[Array, "B K Q m"]:
    """`_product`, its sums rounded once to the dtype of y. A cotangent has the dtype of what it belongs to: of float32,
    it would be a float32 operand, for which a GPU has no matrix unit."""
    return jnp.matmul(x.astype(y.dtype), y, preferred_element_type=y.dtype).astype(jnp.float32)


def _scores(
    q: Float[Array, "B K Q H"], k: Float[Array, "B K S H"], scale: float, product: Callable = _product
) -> Float[Array, "B K Q S"]:
    """scale q k^T."""
    return product(q, k.swapaxes(2, 3)) * scale
