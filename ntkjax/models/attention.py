"""softmax(q k^T / sqrt(H)) v, in blocks of queries where the mask is causal; every derivative is plain products."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ntkjax.types import float32_or_better

MIN_BLOCK, MAX_BLOCK = 32, 256  # queries of a causal block: below 32 the products are too small to be fast


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "b T S"] | None,
    implementation: str,
) -> Float[Array, "B T N H"]:
    """softmax(q k^T / sqrt(H)) v with N / K query heads per key/value head; ``mask`` None means causal.

    cuDNN flash attention through jax.nn.dot_product_attention where it can serve. Elsewhere the sum is
    written out: jax.nn.dot_product_attention takes its softmax in float32 even for float64 inputs.
    """
    if implementation == "cudnn" and mask is None and q.dtype.itemsize == 2:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    b, t, n, h = q.shape
    groups = k.shape[2]
    q = q.reshape(b, t, groups, n // groups, h).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    if mask is not None:
        out = _attend_block(q, k, v, mask[:, None, None])
    else:
        # A block of queries sees no key behind its last one: at 256 tokens that spares a third of the products, and the
        # smaller weights a third of the tangents' time on a CPU.
        size = min(max(MIN_BLOCK, -(-t // 4)), MAX_BLOCK)
        ends = [*range(size, t, size), t]
        starts = [0, *ends[:-1]]
        row = jnp.arange(t)
        seen = [(row[None, :end] <= row[start:end, None])[None, None, None] for start, end in zip(starts, ends)]
        pieces = [
            _attend_block(q[:, :, :, start:end], k[:, :, :end], v[:, :, :end], visible)
            for start, end, visible in zip(starts, ends, seen)
        ]
        out = jnp.concatenate(pieces, axis=3)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h).astype(v.dtype)


# The weights are made again in the backward pass: keeping those of every layer takes twice the memory, and on a CPU
# twice the time, at 512 tokens.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _attend_block(
    q: Float[Array, "B K G T H"], k: Float[Array, "B K S H"], v: Float[Array, "B K S H"], mask: Bool[Array, "b c d T S"]
) -> Float[Array, "B K G T H"]:
    """One block of queries; K key/value heads with G query heads each, in float32 or better."""
    b, groups, per, t, h = q.shape
    s, accumulate = k.shape[2], float32_or_better(q.dtype)
    # One plain matrix product for each key/value head: einsum over five axes takes more than twice as long on a CPU.
    rows = q.reshape(b, groups, per * t, h)
    scores = jnp.matmul(rows, k.swapaxes(2, 3), preferred_element_type=accumulate) * (1.0 / math.sqrt(h))
    scores = jnp.where(mask, scores.reshape(b, groups, per, t, s), jnp.finfo(accumulate).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(b, groups, per * t, s)
    return jnp.matmul(weights, v, preferred_element_type=accumulate).reshape(q.shape)
