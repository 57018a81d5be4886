"""The parts of a decoder: linear layers with adapters, norms, rotary positions, attention, the scan over layers.

Every module holds its parameters stacked over layers, [L, ...]; inside the scan the same module sees one
layer's slice. Matrix products accumulate in float32 or better; norms and softmax are computed in float32 or
better.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ntkjax.models.attention import attend
from ntkjax.models.config import ModelConfig, RopeConfig
from ntkjax.models.lora import LoraConfig, adapted, lora_delta
from ntkjax.parallel import ROW_PARALLEL
from ntkjax.tangents import unbatched_tangents
from ntkjax.types import at_least_float32, float32_or_better, forward_mode_only


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """All that decides the structure of a model and the code it runs; hashable, no arrays.

    Attributes:
      dtype: dtype of the weights and of the residual stream. Norm scales and adapters are float32 or better.
      remat: recompute each layer in the backward pass instead of keeping its activations.
      attention: "xla", or "cudnn" for flash attention on GPUs where dtype is 16 bits wide and the mask is
        purely causal. cuDNN has no forward mode (jax.jvp), so it serves embedding and reverse-mode training
        only.
    """

    config: ModelConfig
    lora: LoraConfig | None = None
    dtype: str = "float32"
    remat: bool = False
    attention: str = "xla"

    def linears(self) -> tuple[str, ...]:
        """Paths of the linear layers inside a block: "attention/q", ..., "mlp/down"."""
        mlp = ("mlp/up", "mlp/down") if self.config.family == "gpt2" else ("mlp/gate", "mlp/up", "mlp/down")
        return ("attention/q", "attention/k", "attention/v", "attention/o", *mlp)

    def lora_for(self, name: str) -> LoraConfig | None:
        """The adapter of the linear layer ``name``, or None."""
        return self.lora if self.lora is not None and name in self.lora.matches(self.linears()) else None


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
    """What every layer shares.

    Attributes:
      rope: rotary cos and sin, [B, T, H/2] each; None where positions are learned.
      mask: [B, T, S]; None: causal.
      lengths: int32 [B], tokens in the cache; None without one.
    """

    # Any: inside JAX's transformations the leaves are also tracers, tangents and markers of zero tangents.
    rope: Any
    mask: Any
    lengths: Any


def matmul(x: Float[Array, "... I"], w: Float[Array, "I O"]) -> Float[Array, "... O"]:
    """x W accumulated, and returned, in float32 or better. W is cast to the dtype of x."""
    dims = (((x.ndim - 1,), (0,)), ((), ()))
    accumulate = float32_or_better(x.dtype)
    return jax.lax.dot_general(x, w.astype(x.dtype), dims, preferred_element_type=accumulate)


class Linear(nnx.Module):
    """x W + b + scale (x A) B; kernel [L, in, out], bias [L, out], lora_a [L, in, r], lora_b [L, r, out]."""

    def __init__(self, spec: ModelSpec, name: str, inputs: int, outputs: int, bias: bool):
        layers, lora = spec.config.num_layers, spec.lora_for(name)
        self.kernel = nnx.Param(jnp.zeros((layers, inputs, outputs), spec.dtype))
        self.has_bias, self.scale = bias, lora.scale if lora else None
        self.whole_inputs = name not in ROW_PARALLEL
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
        """rows W + scale (rows A) B in float32 or better."""
        w = self.kernel[...]
        if self.scale is None:
            return matmul(rows, w)
        a, b = self.lora_a[...], self.lora_b[...]
        if rows.dtype == w.dtype == a.dtype == b.dtype and w.dtype.itemsize >= 4:
            return adapted(rows, w, a, b, self.scale, self.whole_inputs)
        # W + scale A B rounded to 16 bits would lose a small adapter.
        return matmul(rows, w) + lora_delta(rows, a, b, self.scale)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, computed and returned in float32 or better."""

    def __init__(self, shape: tuple[int, ...], eps: float, dtype: str):
        self.scale = nnx.Param(jnp.ones(shape, float32_or_better(dtype)))
        self.eps = eps

    def __call__(self, x: Float[Array, "*A D"]) -> Float[Array, "*A D"]:
        x = at_least_float32(x)
        y = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return y * along_last(self.scale[...], y)


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
        "gelu_pytorch_tanh": tanh,
    }
    return named[name]


def rope_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Inverse frequencies, float32 [head_dim / 2], computed as transformers does (modeling_rope_utils)."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    inverse = np.float32(1.0) / np.power(np.float32(rope.theta), exponents, dtype=np.float32)
    if rope.kind == "linear":
        inverse = inverse / np.float32(rope.factor)
    if rope.kind != "llama3":
        return inverse
    low = rope.original_max_positions / rope.low_freq_factor
    high = rope.original_max_positions / rope.high_freq_factor
    # torch divides a number by a tensor through the reciprocal; its last bit turns angles at far positions.
    wavelength = np.float32(1) / inverse * np.float32(2 * math.pi)
    share = (np.float32(1) / wavelength * np.float32(rope.original_max_positions) - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    smooth = (1 - share) * inverse / rope.factor + share * inverse
    bent = np.where(wavelength > low, inverse / rope.factor, np.where(wavelength < high, inverse, smooth))
    return bent.astype(np.float32)


def rope_angles(rope: RopeConfig, head_dim: int, positions: Int[Array, "B T"], dtype: Any) -> tuple[Array, Array]:
    """cos and sin of position * frequency, each [B, T, head_dim / 2] in float32 or better."""
    dtype = float32_or_better(dtype)
    frequencies = jnp.asarray(rope_frequencies(rope, head_dim)).astype(dtype)
    angles = positions.astype(dtype)[:, :, None] * frequencies[None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T h"], sin: Float[Array, "B T h"]
) -> Float[Array, "B T N H"]:
    """Rotate the pairs (x_i, x_{i + H/2}) by the position's angles; the dtype of x is kept."""
    first, second = jnp.split(at_least_float32(x), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def attention_mask(
    rows: int, length: int, segments: Int[Array, "B T"] | None, cache: KVCache | None
) -> Bool[Array, "b T S"] | None:
    """None for plain causal attention; otherwise True where query t may see key s.

    Packed choices: causal and (segments[s] == 0 or segments[s] == segments[t]). With a cache: slot s <= slot
    of t.
    """
    if cache is not None:
        slots = cache.lengths[:, None] + jnp.arange(length, dtype=jnp.int32)[None, :]
        keys = jnp.arange(cache.keys.shape[2], dtype=jnp.int32)
        return keys[None, None, :] <= slots[:, :, None]
    if segments is None:
        return None
    causal = jnp.arange(length)[None, :] <= jnp.arange(length)[:, None]
    keys, queries = segments[:, None, :], segments[:, :, None]
    return causal[None] & ((keys == 0) | (keys == queries))


def _append(slots: Array, new: Array, lengths: Array) -> Array:
    """Write ``new`` [B, T, K, H] into ``slots`` [B, S, K, H] at each row's length."""
    write = lambda row, x, at: jax.lax.dynamic_update_slice(row, x, (at, jnp.zeros_like(at), jnp.zeros_like(at)))
    return jax.vmap(write)(slots, new.astype(slots.dtype), lengths)


class Attention(nnx.Module):
    """Grouped-query self-attention with optional rotary positions, qk-norm and biases."""

    def __init__(self, spec: ModelSpec):
        c = spec.config
        query, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.q = Linear(spec, "attention/q", c.hidden_size, query, c.qkv_bias)
        self.k = Linear(spec, "attention/k", c.hidden_size, kv, c.qkv_bias)
        self.v = Linear(spec, "attention/v", c.hidden_size, kv, c.qkv_bias)
        self.o = Linear(spec, "attention/o", query, c.hidden_size, c.o_bias)
        self.qk_norm, self.head_dim, self.implementation = c.qk_norm, c.head_dim, spec.attention
        if c.qk_norm:
            self.q_norm = RMSNorm((c.num_layers, c.head_dim), c.norm_eps, spec.dtype)
            self.k_norm = RMSNorm((c.num_layers, c.head_dim), c.norm_eps, spec.dtype)

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cached: tuple[Array, Array] | None
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array] | None]:
        """Output [B, T, D] and this layer's updated (keys, values), or None without a cache."""
        heads = lambda y: y.reshape(*y.shape[:2], -1, self.head_dim)
        q, k, v = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
        if self.qk_norm:
            q, k = self.q_norm(q).astype(x.dtype), self.k_norm(k).astype(x.dtype)
        if context.rope is not None:
            q, k = rotate(q, *context.rope), rotate(k, *context.rope)
        if cached is not None:
            assert context.lengths is not None
            k, v = _append(cached[0], k, context.lengths), _append(cached[1], v, context.lengths)
            cached = (k, v)
        y = attend(q, k, v, context.mask, self.implementation)
        return self.o(y.reshape(*y.shape[:2], -1)), cached


class Block(nnx.Module):
    """x + attention(norm_1(x)), then x + mlp(norm_2(x)); ``mlp(spec)`` and ``norm(shape, eps, dtype)`` make parts."""

    def __init__(self, spec: ModelSpec, mlp: Callable[..., Any], norm: Callable[..., Any]):
        c = spec.config
        self.attention = Attention(spec)
        self.mlp = mlp(spec)
        self.norm_1 = norm((c.num_layers, c.hidden_size), c.norm_eps, spec.dtype)
        self.norm_2 = norm((c.num_layers, c.hidden_size), c.norm_eps, spec.dtype)

    def __call__(self, x: Float[Array, "B T D"], context: Context, cached: tuple[Array, Array] | None):
        y, cached = self.attention(self.norm_1(x).astype(x.dtype), context, cached)
        x = x + y
        return x + self.mlp(self.norm_2(x).astype(x.dtype)), cached


def place(
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"] | None,
    cache: KVCache | None,
    segments: Int[Array, "B T"] | None,
) -> tuple[Int[Array, "B T"], Context]:
    """Where each token stands, and what every layer shares but the rotary angles.

    ``positions`` None means 0, 1, ..., T - 1 in every row, after what the cache already holds. ``segments`` as in
    Batch; ValueError together with a cache.
    """
    if cache is not None and segments is not None:
        raise ValueError("segments and cache together are not supported")
    rows, length = tokens.shape
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (rows, length))
        positions = positions if cache is None else positions + cache.lengths[:, None]
    mask = attention_mask(rows, length, segments, cache)
    return positions, Context(None, mask, None if cache is None else cache.lengths)


def scan_layers(
    block: nnx.Module, x: Float[Array, "B T D"], context: Context, cache: KVCache | None, remat: bool
) -> tuple[Float[Array, "B T D"], KVCache | None]:
    """Run ``block``, whose parameters are stacked [L, ...], as L layers: one compiled body, scanned."""
    graph, stacked = nnx.split(block)

    def one(carry, state, cached, context):
        layer: Any = nnx.merge(graph, state)
        return layer(carry, context, cached)

    if forward_mode_only.value:
        one = unbatched_tangents(one)
    elif remat:
        one = jax.checkpoint(one, prevent_cse=False)
    pairs = None if cache is None else (cache.keys, cache.values)
    x, pairs = jax.lax.scan(lambda carry, inputs: one(carry, *inputs, context), x, (stacked, pairs))
    if cache is None or pairs is None:
        return x, None
    return x, KVCache(pairs[0], pairs[1], cache.lengths + x.shape[1])
