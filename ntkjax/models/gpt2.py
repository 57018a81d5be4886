"""GPT-2: learned positions, LayerNorm with bias, a two-layer MLP, tied head."""

from __future__ import annotations

from flax import nnx
from jaxtyping import Array, Float, Int

from ntkjax.errors import UserError
from ntkjax.models.layers import (
    Block,
    Embedding,
    Head,
    KVCache,
    LayerNorm,
    Linear,
    ModelSpec,
    activation,
    place,
    scan_layers,
)


class MLP(nnx.Module):
    """down(act(up(x)))."""

    def __init__(self, spec: ModelSpec):
        c = spec.config
        self.up = Linear(spec, "mlp/up", c.hidden_size, c.intermediate_size, c.mlp_bias)
        self.down = Linear(spec, "mlp/down", c.intermediate_size, c.hidden_size, c.mlp_bias)
        self.activation = c.activation

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down(activation(self.activation)(self.up(x)))


class GPT2(nnx.Module):
    """Tokens to hidden states after the last norm; ``wpe`` holds the learned positions [max_positions, D]."""

    def __init__(self, spec: ModelSpec):
        c = spec.config
        self.spec = spec
        self.embed = Embedding(c.vocab_size, c.hidden_size, spec.dtype)
        self.wpe = Embedding(c.max_positions, c.hidden_size, spec.dtype)
        self.layers = Block(spec, MLP, LayerNorm)
        self.norm = LayerNorm((c.hidden_size,), c.norm_eps, spec.dtype)
        if not c.tied:
            self.head = Head(c.vocab_size, c.hidden_size, spec.dtype)

    def forward(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None,
        segments: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """As ``Decoder.forward``; UserError when the sequence or the cache is longer than the learned positions."""
        limit = self.spec.config.max_positions
        needed = tokens.shape[1] if cache is None else cache.keys.shape[2]
        # Given positions (packed choices restart them) are below T; only the default ones reach T - 1.
        if needed > limit and positions is None:
            raise UserError(
                f"a sequence of {needed} tokens is longer than the model's {limit} learned positions "
                "(n_positions): shorten the prompts, the answers or the batch's length"
            )
        positions, context = place(tokens, positions, cache, segments)
        x = self.embed(tokens) + self.wpe(positions)
        x, cache = scan_layers(self.layers, x, context, cache, self.spec.remat)
        return self.norm(x), cache
