"""GPT-2: learned positions, LayerNorm with bias, a two-layer MLP, tied head."""

from __future__ import annotations

from flax import nnx
from jaxtyping import Array, Float, Int

from ntkjax.errors import UserError
from ntkjax.models.decoder import default_positions
from ntkjax.models.layers import (
    Attention,
    Context,
    Embedding,
    Head,
    KVCache,
    LayerNorm,
    Linear,
    ModelSpec,
    activation,
    attention_mask,
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


class GPT2Block(nnx.Module):
    """x + attention(norm_1(x)), then x + mlp(norm_2(x))."""

    def __init__(self, spec: ModelSpec):
        c = spec.config
        self.attention = Attention(spec)
        self.mlp = MLP(spec)
        self.norm_1 = LayerNorm((c.num_layers, c.hidden_size), c.norm_eps, spec.dtype)
        self.norm_2 = LayerNorm((c.num_layers, c.hidden_size), c.norm_eps, spec.dtype)

    def __call__(self, x: Float[Array, "B T D"], context: Context, cached: tuple[Array, Array] | None):
        y, cached = self.attention(self.norm_1(x).astype(x.dtype), context, cached)
        x = x + y
        return x + self.mlp(self.norm_2(x).astype(x.dtype)), cached


class GPT2(nnx.Module):
    """Tokens to hidden states after the last norm; ``wpe`` holds the learned positions [max_positions, D]."""

    def __init__(self, spec: ModelSpec):
        c = spec.config
        self.spec = spec
        self.embed = Embedding(c.vocab_size, c.hidden_size, spec.dtype)
        self.wpe = Embedding(c.max_positions, c.hidden_size, spec.dtype)
        self.layers = GPT2Block(spec)
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
        """As ``Decoder.forward``; UserError when the sequence or the cache is longer than the learned
        positions.
        """
        if cache is not None and segments is not None:
            raise ValueError("segments and cache together are not supported")
        rows, length = tokens.shape
        limit, needed = self.spec.config.max_positions, length if cache is None else cache.keys.shape[2]
        # Given positions (packed choices restart them) are below T; only the default ones reach T - 1.
        if needed > limit and positions is None:
            raise UserError(
                f"a sequence of {needed} tokens is longer than the model's {limit} learned positions "
                "(n_positions): shorten the prompts, the answers or the batch's length"
            )
        if positions is None:
            positions = default_positions(rows, length, cache)
        x = self.embed(tokens) + self.wpe(positions)
        lengths = None if cache is None else cache.lengths
        context = Context(None, attention_mask(rows, length, segments, cache), lengths)
        x, cache = scan_layers(self.layers, x, context, cache, self.spec.remat)
        return self.norm(x), cache
