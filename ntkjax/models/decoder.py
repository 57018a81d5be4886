"""Llama, Qwen2, Qwen3 and every Llama-shaped decoder: RMSNorm, rotary grouped-query attention, gated MLP."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ntkjax.models.layers import (
    Attention,
    Context,
    Embedding,
    Head,
    KVCache,
    Linear,
    ModelSpec,
    RMSNorm,
    activation,
    attention_mask,
    rope_angles,
    scan_layers,
)


class GatedMLP(nnx.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, spec: ModelSpec):
        c = spec.config
        self.gate = Linear(spec, "mlp/gate", c.hidden_size, c.intermediate_size, c.mlp_bias)
        self.up = Linear(spec, "mlp/up", c.hidden_size, c.intermediate_size, c.mlp_bias)
        self.down = Linear(spec, "mlp/down", c.intermediate_size, c.hidden_size, c.mlp_bias)
        self.activation = c.activation

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down(activation(self.activation)(self.gate(x)) * self.up(x))


class DecoderBlock(nnx.Module):
    """x + attention(norm_1(x)), then x + mlp(norm_2(x))."""

    def __init__(self, spec: ModelSpec):
        c = spec.config
        self.attention = Attention(spec)
        self.mlp = GatedMLP(spec)
        self.norm_1 = RMSNorm((c.num_layers, c.hidden_size), c.norm_eps, spec.dtype)
        self.norm_2 = RMSNorm((c.num_layers, c.hidden_size), c.norm_eps, spec.dtype)

    def __call__(self, x: Float[Array, "B T D"], context: Context, cached: tuple[Array, Array] | None):
        y, cached = self.attention(self.norm_1(x).astype(x.dtype), context, cached)
        x = x + y
        return x + self.mlp(self.norm_2(x).astype(x.dtype)), cached


class Decoder(nnx.Module):
    """Tokens to hidden states after the last norm. The head is held, not applied."""

    def __init__(self, spec: ModelSpec):
        c = spec.config
        self.spec = spec
        self.embed = Embedding(c.vocab_size, c.hidden_size, spec.dtype)
        self.layers = DecoderBlock(spec)
        self.norm = RMSNorm((c.hidden_size,), c.norm_eps, spec.dtype)
        if not c.tied:
            self.head = Head(c.vocab_size, c.hidden_size, spec.dtype)

    def forward(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None,
        segments: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Hidden states after the last norm, float32 or better [B, T, D], and the extended cache (None
        without one).

        ``positions`` None means 0, 1, ... from the start of the sequence, or from ``cache.lengths``.
        ``segments`` as in Batch; not together with a cache.
        """
        if cache is not None and segments is not None:
            raise ValueError("segments and cache together are not supported")
        c, (rows, length) = self.spec.config, tokens.shape
        if positions is None:
            positions = default_positions(rows, length, cache)
        x = self.embed(tokens)
        context = Context(
            rope_angles(c.rope, c.head_dim, positions, x.dtype),
            attention_mask(rows, length, segments, cache),
            None if cache is None else cache.lengths,
        )
        x, cache = scan_layers(self.layers, x, context, cache, self.spec.remat)
        return self.norm(x), cache


def default_positions(rows: int, length: int, cache: KVCache | None) -> Int[Array, "B T"]:
    """0, 1, ..., T - 1 in every row, after what the cache already holds."""
    steps = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (rows, length))
    return steps if cache is None else steps + cache.lengths[:, None]
