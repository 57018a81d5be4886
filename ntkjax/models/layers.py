"""The parts of a decoder: linear layers with adapters, norms, attention, the block, the scan over layers.

Every module holds its parameters stacked over layers, [L, ...]; inside the scan the same module sees one
layer's slice. Matrix products accumulate in float32 or better; norms and softmax are computed in float32 or
better.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from ntkjax.models.attention import attend, shares_tangents
from ntkjax.models.config import LayerSpec, ModelConfig
from ntkjax.models.experts import Dispatch, block_product, dispatch, route
from ntkjax.models.lora import LoraConfig, adapted, adapted_half, half_product, lora_delta
from ntkjax.models.quantised import FORMATS, restored, tiles
from ntkjax.models.rotary import all_angles, rope_kinds, rotate
from ntkjax.parallel import split_rows, weight_sharding
from ntkjax.tangents import unbatched_tangents
from ntkjax.types import at_least_float32, float32_or_better, precision_of


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """All that decides the structure of a model and the code it runs; hashable, no arrays.

    Attributes:
      dtype: dtype of the weights and of what their products take and give. The residual stream, norm scales and
        adapters are float32 or better: the stream's rounding after every layer would be most of the error of a score.
      remat: recompute each layer in the backward pass instead of keeping its activations.
      attention: one of `ntkjax.models.attention.IMPLEMENTATIONS` but "auto".
      forward_mode: the code is differentiated by ``jax.jvp`` alone (`ntkjax.types.forward_mode`).
      quantised: one of `ntkjax.models.quantised.FORMATS`, in which the kernels of the blocks are held; None: ``dtype``.
      gathered_on: the mesh whose axes that split rows split weights too; a layer's weights are gathered over these when
        it is computed. None: they are used as they lie.
    """

    config: ModelConfig
    lora: LoraConfig | None = None
    dtype: str = "float32"
    remat: bool = False
    attention: str = "xla"
    forward_mode: bool = False
    quantised: str | None = None
    gathered_on: Mesh | None = None

    def linears(self) -> tuple[str, ...]:
        """Paths of the linear layers inside a block: "attention/q", ..., "mlp/down"."""
        return tuple(self.config.linears)

    def lora_for(self, name: str) -> LoraConfig | None:
        """The adapter of the linear layer ``name``, or None."""
        return self.lora if self.lora is not None and name in self.lora.matches(self.linears()) else None

    def format_of(self, name: str) -> str | None:
        """The format of the linear layer ``name``, or None: a router chooses by a step, which rounding would move."""
        return None if name == "mlp/router" else self.quantised


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens seen so far.

    Attributes:
      keys, values: [L, B, S, K, H]; slot s of row b is real iff s < lengths[b].
      lengths: int32 [B], the slot the next token of each row is written to. After a prefill of right-padded
        prompts set it to the prompts' real lengths: the padding is then overwritten and never attended to.
    """

    keys: Float[Array, "L B S K H"]
    values: Float[Array, "L B S K H"]
    lengths: Int[Array, " B"]

    @classmethod
    def zeros(cls, spec: ModelSpec, rows: int, size: int) -> KVCache:
        """An empty cache for ``rows`` sequences of at most ``size`` tokens; tokens beyond ``size`` must not be fed."""
        c = spec.config
        empty = jnp.zeros((c.num_layers, rows, size, c.num_kv_heads, c.head_dim), spec.dtype)
        return cls(empty, empty, jnp.zeros((rows,), jnp.int32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What a layer needs beside its input.

    Attributes:
      rope: rotary cos and sin [B, T, R/2]; None for no rotary positions. For all layers, where these differ in their
        rotary positions, [kinds, B, T, R/2].
      mask: True where query t may see key s [B, T, S]; None for causal attention.
      lengths: the cache's lengths [B]; None without a cache.
      distance: how far key s lies behind query t [B, T, S]; None where there is no mask, or no layer has a window.
      window: how many tokens the layer's queries see, int32 []; None where no layer has a window.
      starts: the first key that query t sees [B, T], where rows hold several examples and no mask is needed.
    """

    # Any: inside JAX's transformations the leaves are also tracers, tangents and markers of zero tangents.
    rope: Any
    mask: Any
    lengths: Any
    distance: Any = None
    window: Any = None
    starts: Any = None

    def of_layer(self, own: dict[str, Array]) -> Context:
        """The context of one layer, ``own`` its slice of ``layer_inputs``."""
        context = self
        if "rope" in own:
            assert self.rope is not None
            cos, sin = (jnp.take(kinds, own["rope"], axis=0) for kinds in self.rope)
            context = dataclasses.replace(context, rope=(cos, sin))
        return dataclasses.replace(context, window=own["window"]) if "window" in own else context


def layer_inputs(config: ModelConfig) -> dict[str, Array]:
    """What differs from layer to layer and is no parameter, int32 [L] each; {} where all layers are alike.

    "rope": which of ``rope_kinds``. "window": how many tokens a query sees; a layer without a window sees any number.
    """
    kinds, own = rope_kinds(config), {}
    if len(kinds) > 1:
        own["rope"] = jnp.asarray([kinds.index(layer.rope) for layer in config.layers], jnp.int32)
    if any(layer.window is not None for layer in config.layers):
        every = np.iinfo(np.int32).max
        sizes = [every if layer.window is None else layer.window for layer in config.layers]
        own["window"] = jnp.asarray(sizes, jnp.int32)
    return own


def matmul(x: Float[Array, "... I"], w: Float[Array, "I O"]) -> Float[Array, "... O"]:
    """x W accumulated, and returned, in float32 or better. W is cast to the dtype of x."""
    dims = (((x.ndim - 1,), (0,)), ((), ()))
    accumulate = float32_or_better(x.dtype)
    precision = precision_of(x.dtype)
    return jax.lax.dot_general(x, w.astype(x.dtype), dims, precision, preferred_element_type=accumulate)


def kernel_leaves(spec: ModelSpec, name: str, stack: tuple[int, ...]) -> tuple[nnx.Param, nnx.Param | None]:
    """The kernel [*stack, in, out] of a linear layer, and where it holds integers their scales [*stack, tiles, out]."""
    inputs, outputs, _ = spec.config.linears[name]
    if (held := spec.format_of(name)) is None:
        return nnx.Param(jnp.zeros((*stack, inputs, outputs), spec.dtype)), None
    scales = jnp.zeros((*stack, tiles(inputs), outputs), float32_or_better(spec.dtype))
    return nnx.Param(jnp.zeros((*stack, inputs, outputs), FORMATS[held])), nnx.Param(scales)


class Linear(nnx.Module):
    """x W + b + scale (x A) B; kernel [L, in, out], bias [L, out], lora_a [L, in, r], lora_b [L, r, out]."""

    def __init__(self, spec: ModelSpec, name: str):
        layers, lora = spec.config.num_layers, spec.lora_for(name)
        inputs, outputs, bias = spec.config.linears[name]
        self.kernel, scales = kernel_leaves(spec, name, (layers,))
        self.format = spec.format_of(name)
        if scales is not None:
            self.kernel_scale = scales
        self.has_bias, self.scale, self.forward_mode = bias, lora.scale if lora else None, spec.forward_mode
        # Row-parallel layers (o, down) split the axis that products of `lora.adapted` would be joined along.
        self.whole_inputs = spec.config.split(f"layers/{name}/kernel").model != -2
        if bias:
            self.bias = nnx.Param(jnp.zeros((layers, outputs), spec.dtype))
        if lora:
            dtype = float32_or_better(spec.dtype)
            self.lora_a = nnx.Param(jnp.zeros((layers, inputs, lora.rank), dtype))
            self.lora_b = nnx.Param(jnp.zeros((layers, lora.rank, outputs), dtype))

    def __call__(self, x: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
        # Rows of one matrix: the gradient of a product over [B, T, I] takes almost twice as long on a CPU.
        rows = x.reshape(-1, x.shape[-1])
        y = self.product(rows)
        if self.has_bias:
            y = y + self.bias[...].astype(y.dtype)[None]
        return y.astype(x.dtype).reshape(*x.shape[:-1], -1)

    def product(self, rows: Float[Array, "N I"]) -> Float[Array, "N O"]:
        """rows W + scale (rows A) B, summed in float32 or better; bfloat16 where rows are."""
        held, half = self.kernel[...], rows.dtype == jnp.bfloat16
        if self.format is not None:
            plain = lambda rows, w: (half_product if half else matmul)(rows, w.astype(rows.dtype))
            return self.restored_product(rows, plain if self.scale is None else self.adapted)
        if self.scale is not None:
            return self.adapted(rows, held)
        return half_product(rows, held) if half and held.dtype == rows.dtype else matmul(rows, held)

    def adapted(self, rows: Float[Array, "N I"], w: Float[Array, "I O"]) -> Float[Array, "N O"]:
        """`product` of a layer with an adapter, W in whatever dtype."""
        assert self.scale is not None
        a, b, joined = self.lora_a[...], self.lora_b[...], self.forward_mode and self.whole_inputs
        if rows.dtype == jnp.bfloat16:
            return adapted_half(rows, w.astype(rows.dtype), a, b, self.scale, joined)
        if rows.dtype == w.dtype == a.dtype == b.dtype and w.dtype.itemsize >= 4:
            return adapted(rows, w, a, b, self.scale, joined)
        # W + scale A B rounded to 16 bits would lose a small adapter.
        return matmul(rows, w) + lora_delta(rows, a, b, self.scale)

    def restored_product(
        self, rows: Float[Array, "N I"], product: Callable[[Array, Array], Array]
    ) -> Float[Array, "N O"]:
        """``product(rows, W)``, W the kernel held in the layer's format.

        W is made anew in the backward pass: kept, that of every layer would be the model in 16 bits.
        """
        assert self.format is not None
        name = self.format
        whole = lambda rows, integers, scales: product(rows, restored(integers, scales, name))
        return jax.checkpoint(whole, prevent_cse=False)(rows, self.kernel[...], self.kernel_scale[...])


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * (offset + scale) over the last axis, computed and returned in float32 or better."""

    def __init__(self, shape: tuple[int, ...], eps: float, dtype: str, offset: float = 0.0):
        self.scale = nnx.Param(jnp.ones(shape, float32_or_better(dtype)) - offset)
        self.eps, self.offset = eps, offset

    def __call__(self, x: Float[Array, "*A D"]) -> Float[Array, "*A D"]:
        x = at_least_float32(x)
        y = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        scale = along_last(self.scale[...], y)
        return y * (scale if self.offset == 0 else self.offset + scale)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias over the last axis, in float32 or better."""

    def __init__(self, shape: tuple[int, ...], eps: float, dtype: str):
        self.scale = nnx.Param(jnp.ones(shape, float32_or_better(dtype)))
        self.bias = nnx.Param(jnp.zeros(shape, float32_or_better(dtype)))
        self.eps = eps

    def __call__(self, x: Float[Array, "*A D"]) -> Float[Array, "*A D"]:
        x = at_least_float32(x)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        y = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return y * along_last(self.scale[...], y) + along_last(self.bias[...], y)


def make_norm(spec: ModelSpec, shape: tuple[int, ...]) -> RMSNorm | LayerNorm:
    """The norm that the model's blocks have, over the last axis of ``shape``."""
    c = spec.config
    if c.block.norm == "layer":
        return LayerNorm(shape, c.norm_eps, spec.dtype)
    return RMSNorm(shape, c.norm_eps, spec.dtype, c.block.norm_offset)


def along_last(vector: Float[Array, " D"], x: Float[Array, "*A D"]) -> Float[Array, "*b D"]:
    """``vector`` reshaped to broadcast over the leading axes of ``x``, in its dtype."""
    return vector.astype(x.dtype).reshape((1,) * (x.ndim - 1) + vector.shape)


class Embedding(nnx.Module):
    """A table of rows: weight [N, D]; ids int32 [...] -> [..., D]. Ids must be below N (checked where they enter)."""

    def __init__(self, rows: int, width: int, dtype: str):
        self.weight = nnx.Param(jnp.zeros((rows, width), dtype))
        self.dtype = dtype

    def __call__(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
        return jnp.take(self.weight[...], ids, axis=0).astype(self.dtype)


class Head(nnx.Module):
    """The untied head; kernel [V, D]. It is applied outside the decoder, where the outputs need it."""

    def __init__(self, vocab: int, width: int, dtype: str):
        self.kernel = nnx.Param(jnp.zeros((vocab, width), dtype))


def activation(name: str) -> Callable[[Array], Array]:
    """The pointwise function of that transformers name."""
    exact, tanh = (lambda x: jax.nn.gelu(x, approximate=False)), (lambda x: jax.nn.gelu(x, approximate=True))
    named = {
        "silu": jax.nn.silu,
        "relu": jax.nn.relu,
        "gelu": exact,
        "gelu_new": tanh,
        "gelu_fast": tanh,
        "gelu_pytorch_tanh": tanh,
    }
    return named[name]


def attention_mask(
    rows: int,
    length: int,
    segments: Int[Array, "B T"] | None,
    cache: KVCache | None,
    examples: Int[Array, "B T"] | None = None,
) -> Bool[Array, "b T S"] | None:
    """None for plain causal attention, packed or not; otherwise True where query t may see key s.

    Packed choices: causal, of the same example, and (segments[s] == 0 or segments[s] == segments[t]). With a cache:
    slot s <= slot of t.
    """
    if cache is not None:
        slots = cache.lengths[:, None] + jnp.arange(length, dtype=jnp.int32)[None, :]
        keys = jnp.arange(cache.keys.shape[2], dtype=jnp.int32)
        return keys[None, None, :] <= slots[:, :, None]
    if segments is None:
        return None
    causal = jnp.arange(length)[None, :] <= jnp.arange(length)[:, None]
    keys, queries = segments[:, None, :], segments[:, :, None]
    seen = causal[None] & ((keys == 0) | (keys == queries))
    return seen if examples is None else seen & (examples[:, None, :] == examples[:, :, None])


def key_distance(
    positions: Int[Array, "B T"], segments: Int[Array, "B T"] | None, cache: KVCache | None
) -> Int[Array, "B T S"] | None:
    """How far key s lies behind query t, for windows; None where ``attention_mask`` is None.

    In packed choices by position: a choice's first token stands right behind the prompt, whatever lies between. With
    a cache by slot, which is the position.
    """
    if cache is not None:
        slots = cache.lengths[:, None] + jnp.arange(positions.shape[1], dtype=jnp.int32)[None, :]
        return slots[:, :, None] - jnp.arange(cache.keys.shape[2], dtype=jnp.int32)[None, None, :]
    return None if segments is None else positions[:, :, None] - positions[:, None, :]


def _append(slots: Array, new: Array, lengths: Array) -> Array:
    """Write ``new`` [B, T, K, H] into ``slots`` [B, S, K, H] at each row's length."""
    # Rows have lengths of their own, and a slice has one start: a write for each row, batched by vmap.
    write = lambda row, x, at: jax.lax.dynamic_update_slice(row, x, (at, jnp.zeros_like(at), jnp.zeros_like(at)))
    return jax.vmap(write)(slots, new.astype(slots.dtype), lengths)


class Attention(nnx.Module):
    """Grouped-query self-attention with optional rotary positions, qk-norm, window, soft cap and biases."""

    def __init__(self, spec: ModelSpec):
        c, block = spec.config, spec.config.block
        self.q = Linear(spec, "attention/q")
        self.k = Linear(spec, "attention/k")
        self.v = Linear(spec, "attention/v")
        self.o = Linear(spec, "attention/o")
        self.qk_norm, self.head_dim = block.qk_norm, c.head_dim
        self.implementation, self.forward_mode = spec.attention, spec.forward_mode
        self.query_scale, self.soft_cap = block.query_scale, block.soft_cap
        if block.qk_norm is not None:
            heads = (1, 1) if block.qk_norm == "head" else (c.num_heads, c.num_kv_heads)
            shapes = [(c.num_layers, count * c.head_dim) for count in heads]
            make = lambda shape: RMSNorm(shape, c.norm_eps, spec.dtype, block.norm_offset)
            self.q_norm, self.k_norm = map(make, shapes)

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cached: tuple[Array, Array] | None
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array] | None]:
        """Output [B, T, D] and this layer's updated (keys, values), or None without a cache."""
        heads = lambda y: y.reshape(*y.shape[:2], -1, self.head_dim)
        q, k, v = self.q(x), self.k(x), heads(self.v(x))
        if self.qk_norm == "full":
            q, k = self.q_norm(q).astype(x.dtype), self.k_norm(k).astype(x.dtype)
        q, k = heads(q), heads(k)
        if self.qk_norm == "head":
            q, k = self.q_norm(q).astype(x.dtype), self.k_norm(k).astype(x.dtype)
        if context.rope is not None:
            q, k = rotate(q, *context.rope), rotate(k, *context.rope)
        if cached is not None:
            assert context.lengths is not None
            k, v = _append(cached[0], k, context.lengths), _append(cached[1], v, context.lengths)
            cached = (k, v)
        mask, window = context.mask, context.window
        # Without a mask the window becomes a first key for each query, and no array [T, S] is made; where there is a
        # mask already, for packed choices or a cache, the window is a part of it.
        if mask is not None and window is not None:
            mask, window = mask & (context.distance < window), None
        y = attend(
            q, k, v, mask, self.implementation, scale=self.query_scale, soft_cap=self.soft_cap, window=window,
            starts=context.starts, forward_mode=self.forward_mode,
        )  # fmt: skip
        return self.o(y.reshape(*y.shape[:2], -1)), cached


class GatedMLP(nnx.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, spec: ModelSpec):
        self.gate = Linear(spec, "mlp/gate")
        self.up = Linear(spec, "mlp/up")
        self.down = Linear(spec, "mlp/down")
        self.activation = spec.config.activation

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down(activation(self.activation)(self.gate(x)) * self.up(x))


class MLP(nnx.Module):
    """down(act(up(x)))."""

    def __init__(self, spec: ModelSpec):
        self.up = Linear(spec, "mlp/up")
        self.down = Linear(spec, "mlp/down")
        self.activation = spec.config.activation

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down(activation(self.activation)(self.up(x)))


class ExpertLinear(nnx.Module):
    """x_c W_e + scale (x_c A_e) B_e for blocks c of tokens and their experts e; kernel [L, E, in, out], lora_a
    [L, E, in, r], lora_b [L, E, r, out]: an adapter for each expert.
    """

    def __init__(self, spec: ModelSpec, name: str):
        lora = spec.lora_for(name)
        inputs, outputs, _ = spec.config.linears[name]
        stack = (spec.config.num_layers, spec.config.num_experts)
        self.kernel, scales = kernel_leaves(spec, name, stack)
        self.format, self.scale = spec.format_of(name), lora and lora.scale
        if scales is not None:
            self.kernel_scale = scales
        if lora:
            dtype = float32_or_better(spec.dtype)
            self.lora_a = nnx.Param(jnp.zeros((*stack, inputs, lora.rank), dtype))
            self.lora_b = nnx.Param(jnp.zeros((*stack, lora.rank, outputs), dtype))

    def __call__(self, x: Float[Array, "C M I"], to: Dispatch) -> Float[Array, "C M O"]:
        if self.format is None:
            y = block_product(x, self.kernel[...], to.expert)
        else:
            held, name = (self.kernel[...], self.kernel_scale[...]), self.format
            y = block_product(x, held, to.expert, lambda held: restored(held[0], held[1], name))
        if self.scale is not None:
            low = block_product(at_least_float32(x), self.lora_a[...], to.expert)
            y = y + self.scale * block_product(low, self.lora_b[...], to.expert)
        return y.astype(x.dtype)


class Experts(nnx.Module):
    """sum_e p_e down_e(act(gate_e(x)) * up_e(x)) over the experts e that the token is routed to, p_e the router's
    weights (`ntkjax.models.experts`).
    """

    def __init__(self, spec: ModelSpec):
        c = spec.config
        self.router = Linear(spec, "mlp/router")
        self.gate = ExpertLinear(spec, "mlp/gate")
        self.up = ExpertLinear(spec, "mlp/up")
        self.down = ExpertLinear(spec, "mlp/down")
        self.activation = c.activation
        self.experts, self.per_token, self.normed = c.num_experts, c.experts_per_token, c.norm_topk

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        tokens = x.reshape(-1, x.shape[-1])
        chosen, weights = route(self.router(x).reshape(len(tokens), -1), self.per_token, self.normed)
        to = dispatch(chosen, self.experts)
        inner = to.gather(tokens)
        inner = activation(self.activation)(self.gate(inner, to)) * self.up(inner, to)
        return to.combine(self.down(inner, to), weights).astype(x.dtype).reshape(x.shape)


class Block(nnx.Module):
    """Attention and MLP on a residual stream x, with norms where the layer says.

    norm_1 and norm_2 stand before attention and MLP, post_norm_1 and post_norm_2 after them: with both,

        x = x + post_norm_1(attention(norm_1(x)));  x = x + post_norm_2(mlp(norm_2(x))).

    A parallel block takes both from the same x: x + attention(norm_1(x)) + mlp(norm_2(x)). What is added to x is
    multiplied by ``residual_scale``. x is float32 or better; attention and MLP take and give the model's dtype.
    """

    def __init__(self, spec: ModelSpec):
        layer: LayerSpec = spec.config.block
        self.attention = Attention(spec)
        self.mlp = {"gated": GatedMLP, "plain": MLP, "experts": Experts}[layer.mlp](spec)
        shape = (spec.config.num_layers, spec.config.hidden_size)
        self.before, self.after = layer.norms != "after", layer.norms != "before"
        self.parallel, self.residual_scale, self.dtype = layer.parallel, layer.residual_scale, spec.dtype
        if self.before:
            self.norm_1, self.norm_2 = make_norm(spec, shape), make_norm(spec, shape)
        if self.after:
            self.post_norm_1, self.post_norm_2 = make_norm(spec, shape), make_norm(spec, shape)

    def __call__(self, x: Float[Array, "B T D"], context: Context, cached: tuple[Array, Array] | None):
        y, cached = self.attention((self.norm_1(x) if self.before else x).astype(self.dtype), context, cached)
        after_attention = x + self.scaled(at_least_float32(self.post_norm_1(y) if self.after else y))
        inner = x if self.parallel else after_attention
        z = self.mlp((self.norm_2(inner) if self.before else inner).astype(self.dtype))
        return after_attention + self.scaled(at_least_float32(self.post_norm_2(z) if self.after else z)), cached

    def scaled(self, added: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """``residual_scale`` times what a part adds to the residual stream."""
        return added if self.residual_scale == 1 else added * jnp.asarray(self.residual_scale, added.dtype)


def make_context(
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"] | None,
    cache: KVCache | None,
    segments: Int[Array, "B T"] | None,
    examples: Int[Array, "B T"] | None,
    dtype: Any,
    extents: Int[Array, "B T"] | None = None,
) -> tuple[Int[Array, "B T"], Context]:
    """Where each token stands, and what the layers need beside their input.

    ``positions`` None means 0, 1, ..., T - 1 in every row, after what the cache already holds. ``segments`` and
    ``examples`` as in Batch; ValueError together with a cache, or for examples without positions. ``extents``: how many
    tokens the sequence has that each token belongs to; None means T, and is a ValueError where rotary frequencies
    depend on it (ModelConfig.turns_by_length) and rows hold more or less than one sequence of T tokens for all that is
    known: with positions, segments, examples or a cache.
    """
    if cache is not None and not (segments is None and examples is None):
        raise ValueError("segments or examples and cache together are not supported")
    if examples is not None and positions is None:
        raise ValueError("packed examples need their positions")
    rows, length = tokens.shape
    if extents is None:
        if config.turns_by_length and not (positions is segments is examples is cache is None):
            raise ValueError("rotary positions that depend on a sequence's length need extents")
        extents = jnp.full((rows, length), length, jnp.int32)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (rows, length))
        positions = positions if cache is None else positions + cache.lengths[:, None]
    windows = any(layer.window is not None for layer in config.layers)
    steps = jnp.arange(length, dtype=jnp.int32)[None]
    return positions, Context(
        all_angles(config, positions, extents, dtype),
        attention_mask(rows, length, segments, cache, examples),
        None if cache is None else cache.lengths,
        key_distance(positions, segments, cache) if windows else None,
        # Positions count from the start of the example.
        starts=steps - positions if examples is not None and segments is None else None,
    )


def gathered(state: Any, spec: ModelSpec) -> Any:
    """One layer's parameters, split over "model" alone.

    Where rows of a batch and weights are split over one axis, a product contracts over that axis or leaves it in the
    result: left to itself the compiler moves the activations of every product instead of the weights of a layer, once.
    """
    mesh = spec.gathered_on
    if mesh is None:
        return state

    def whole(path: tuple, leaf: Array) -> Array:
        # A path of an nnx state ends in the field of the parameter's box, ``value``; ours do not.
        names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
        split = spec.config.split("/".join(["layers", *(name for name in names if name != "value")]))
        sharding = weight_sharding("/".join(names), leaf.shape, mesh, dataclasses.replace(split, data=None))
        # Without the split over rows. Held to that inside the scan, the gather is a part of one layer's computation,
        # and the stacked weights of all layers stay split.
        return jax.lax.with_sharding_constraint(leaf, sharding)

    return jax.tree_util.tree_map_with_path(whole, state)


def scan_layers(
    block: nnx.Module,
    x: Float[Array, "B T D"],
    context: Context,
    cache: KVCache | None,
    spec: ModelSpec,
) -> tuple[Float[Array, "B T D"], KVCache | None]:
    """Run ``block``, whose parameters are stacked [L, ...], as L layers: one compiled body, scanned."""
    graph, stacked = nnx.split(block)

    def one(carry, state, cached, own, context):
        layer: Any = nnx.merge(graph, gathered(state, spec))
        return layer(split_rows(carry, spec.gathered_on), context.of_layer(own), cached)

    # The fused kernel takes all tangents in one launch and computes their weights once, which is worth more than plain
    # arrays. In forward mode nothing is kept for a backward pass, so ``remat`` has nothing to save.
    if spec.forward_mode and not shares_tangents(spec.attention):
        one = unbatched_tangents(one)
    elif spec.remat:
        one = jax.checkpoint(one, prevent_cse=False)
    pairs = None if cache is None else (cache.keys, cache.values)
    x, pairs = jax.lax.scan(
        lambda carry, inputs: one(carry, *inputs, context), x, (stacked, pairs, layer_inputs(spec.config))
    )
    if cache is None or pairs is None:
        return x, None
    return x, KVCache(pairs[0], pairs[1], cache.lengths + x.shape[1])
