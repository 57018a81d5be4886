"""Rotary positions: frequencies of every kind, the angles of tokens, and the rotation of queries and keys."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ntkjax.models.config import ModelConfig, RopeConfig
from ntkjax.types import at_least_float32, float32_or_better


def rope_kinds(config: ModelConfig) -> tuple[RopeConfig | None, ...]:
    """The rotary positions that the layers have, each once."""
    return tuple(dict.fromkeys(layer.rope for layer in config.layers))


def rope_frequencies(rope: RopeConfig, head_dim: int, *, long: bool = False) -> np.ndarray:
    """Inverse frequencies, float32 [R / 2] for R rotated dimensions, computed as transformers does
    (modeling_rope_utils). ``long``: with the long factors of longrope. Of dynamic ones, those up to max_positions.
    """
    dims = rope.dims(head_dim)
    exponents = np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)
    powers = np.power(np.float32(rope.theta), exponents, dtype=np.float32)
    inverse = np.float32(1.0) / powers
    if rope.kind == "linear":
        inverse = inverse / np.float32(rope.factor)
    if rope.kind == "longrope":
        inverse = np.float32(1.0) / (np.asarray(rope.long_factors if long else rope.short_factors, np.float32) * powers)
    if rope.kind == "yarn":
        return _yarn_frequencies(rope, powers)
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


def _yarn_frequencies(rope: RopeConfig, powers: Float[np.ndarray, " h"]) -> Float[np.ndarray, " h"]:
    """1 / powers: those of few turns divided by the factor, those of many kept, a linear ramp over those between."""
    half = len(powers)

    def dimension(turns: float) -> float:
        """The place of the frequency that turns so often in the original context."""
        return half * math.log(rope.original_max_positions / (turns * 2 * math.pi)) / math.log(rope.theta)

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    width = high - low or 0.001
    ramp = np.clip((np.arange(half, dtype=np.float32) - np.float32(low)) / np.float32(width), 0, 1)
    kept = np.float32(1) - ramp
    divided = np.float32(1) / (np.float32(rope.factor) * powers)
    return (divided * (np.float32(1) - kept) + np.float32(1) / powers * kept).astype(np.float32)


def frequencies_by_length(
    rope: RopeConfig, config: ModelConfig, extents: Int[Array, "B T"], dtype: Any
) -> Float[Array, "b t h"]:
    """Inverse frequencies [B, T, R / 2] of tokens whose sequences have ``extents`` tokens, by the equations of
    RopeConfig, in float32 or better; [1, 1, R / 2] where they depend on no length.
    """
    usual = jnp.asarray(rope_frequencies(rope, config.head_dim)).astype(dtype)[None, None, :]
    if rope.kind == "longrope":
        long = jnp.asarray(rope_frequencies(rope, config.head_dim, long=True)).astype(dtype)
        return jnp.where((extents > rope.original_max_positions)[:, :, None], long[None, None, :], usual)
    if rope.kind == "dynamic":
        dims, most = rope.dims(config.head_dim), config.max_positions
        length = jnp.maximum(extents, most).astype(dtype)[:, :, None]
        theta = rope.theta * (rope.factor * length / most - (rope.factor - 1)) ** (dims / (dims - 2))
        exponents = jnp.asarray(np.arange(0, dims, 2) / dims, dtype)[None, None, :]
        return jnp.where((extents > most)[:, :, None], theta**-exponents, usual)
    return usual


def rope_angles(
    rope: RopeConfig, config: ModelConfig, positions: Int[Array, "B T"], extents: Int[Array, "B T"], dtype: Any
) -> tuple[Array, Array]:
    """cos and sin of position * frequency, times ``attention_factor``, each [B, T, R / 2] in float32 or better.
    ``extents``: see frequencies_by_length.
    """
    dtype = float32_or_better(dtype)
    angles = positions.astype(dtype)[:, :, None] * frequencies_by_length(rope, config, extents, dtype)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return (cos, sin) if rope.attention_factor == 1 else (rope.attention_factor * cos, rope.attention_factor * sin)


def all_angles(
    config: ModelConfig, positions: Int[Array, "B T"], extents: Int[Array, "B T"], dtype: Any
) -> tuple[Array, Array] | None:
    """The ``rope`` of a Context for all layers. A layer without rotary positions among others turns by no angle."""
    kinds = rope_kinds(config)
    if not config.rotary_dims:
        return None
    still = (*positions.shape, config.rotary_dims[0] // 2)
    wide = float32_or_better(dtype)
    angles = [
        (jnp.ones(still, wide), jnp.zeros(still, wide))
        if rope is None
        else rope_angles(rope, config, positions, extents, dtype)
        for rope in kinds
    ]
    if len(angles) == 1:
        return angles[0]
    return jnp.stack([cos for cos, _ in angles]), jnp.stack([sin for _, sin in angles])


def rotate(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T h"], sin: Float[Array, "B T h"]
) -> Float[Array, "B T N H"]:
    """Rotate the pairs (x_i, x_{i + R/2}), i < R/2, by the position's angles [B, T, R/2]; the dtype of x is kept.

    The dimensions from R on stay as they are.
    """
    dims = 2 * cos.shape[-1]
    turned, rest = (x, None) if dims == x.shape[-1] else (x[..., :dims], x[..., dims:])
    # Halves, not neighbours: the order in which Hugging Face's checkpoints have the rows of q and k.
    first, second = jnp.split(at_least_float32(turned), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return turned if rest is None else jnp.concatenate([turned, rest], axis=-1)
