"""The decoder of every family: embeddings, blocks, the last norm. What they are made of follows from the shape."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ntkjax.errors import UserError
from ntkjax.models.layers import (
    Block,
    Embedding,
    Head,
    KVCache,
    ModelSpec,
    make_context,
    make_norm,
    scan_layers,
)
from ntkjax.types import at_least_float32


class Decoder(nnx.Module):
    """Tokens to hidden states after the last norm. The head is held, not applied.

    ``wpe`` holds learned positions [max_positions, D] where the family has them.
    """

    def __init__(self, spec: ModelSpec):
        c = spec.config
        self.spec = spec
        self.embed = Embedding(c.vocab_size, c.hidden_size, spec.dtype)
        if c.learned_positions:
            self.wpe = Embedding(c.max_positions, c.hidden_size, spec.dtype)
        self.layers = Block(spec)
        self.norm = make_norm(spec, (c.hidden_size,))
        if not c.tied:
            self.head = Head(c.vocab_size, c.hidden_size, spec.dtype)

    def forward(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None,
        segments: Int[Array, "B T"] | None = None,
        examples: Int[Array, "B T"] | None = None,
        extents: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Hidden states after the last norm, float32 or better [B, T, D], and the extended cache (None without one).

        ``positions`` None means 0, 1, ... from the start of the sequence, or from ``cache.lengths``.
        ``segments`` and ``examples`` as in Batch; not together with a cache. ``extents``: see make_context. UserError
        when the sequence or the cache is longer than positions reach (ModelConfig.position_limit).
        """
        c, limit = self.spec.config, self.spec.config.position_limit
        needed = tokens.shape[1] if cache is None else cache.keys.shape[2]
        # Given positions (packed choices restart them) are below T; only the default ones reach T - 1.
        if limit is not None and needed > limit and positions is None:
            raise UserError(
                f"a sequence of {needed} tokens is longer than the model's {limit} learned positions: "
                "shorten the prompts, the answers or the batch's length"
            )
        x = self.embed(tokens)
        if c.embed_scale is not None:
            x = x * jnp.asarray(c.embed_scale, x.dtype)
        positions, context = make_context(c, tokens, positions, cache, segments, examples, x.dtype, extents)
        x = at_least_float32(x)
        if c.learned_positions:
            x = x + at_least_float32(self.wpe(positions))
        x, cache = scan_layers(self.layers, x, context, cache, self.spec)
        states = self.norm(x)
        return (states if c.state_divisor == 1 else states / c.state_divisor), cache
