"""Llama, Qwen2, Qwen3 and every Llama-shaped decoder: RMSNorm, rotary grouped-query attention, gated MLP."""

from __future__ import annotations

import dataclasses

from flax import nnx
from jaxtyping import Array, Float, Int

from ntkjax.models.layers import (
    Block,
    Embedding,
    Head,
    KVCache,
    Linear,
    ModelSpec,
    RMSNorm,
    activation,
    place,
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


class Decoder(nnx.Module):
    """Tokens to hidden states after the last norm. The head is held, not applied."""

    def __init__(self, spec: ModelSpec):
        c = spec.config
        self.spec = spec
        self.embed = Embedding(c.vocab_size, c.hidden_size, spec.dtype)
        self.layers = Block(spec, GatedMLP, RMSNorm)
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
        """Hidden states after the last norm, float32 or better [B, T, D], and the extended cache (None without one).

        ``positions`` None means 0, 1, ... from the start of the sequence, or from ``cache.lengths``.
        ``segments`` as in Batch; not together with a cache.
        """
        c = self.spec.config
        positions, context = place(tokens, positions, cache, segments)
        x = self.embed(tokens)
        context = dataclasses.replace(context, rope=rope_angles(c.rope, c.head_dim, positions, x.dtype))
        x, cache = scan_layers(self.layers, x, context, cache, self.spec.remat)
        return self.norm(x), cache
