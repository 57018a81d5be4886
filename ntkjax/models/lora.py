"""Low-rank adapters (LoRA, arXiv 2106.09685): y = x W + scale (x A) B, A [in, r], B [r, out], kept
in float32 or better.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ntkjax.errors import ConfigError
from ntkjax.models.families import linear_aliases
from ntkjax.types import at_least_float32, float32_or_better, precision_of


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which linear layers get an adapter, and of what rank.

    Attributes:
      rank: r. alpha: scale is alpha / r, or alpha / sqrt(r) with ``rslora`` (arXiv 2312.03732).
      targets: "all-linear" (every linear layer but the head), layer names ("q", "attention/q", "q_proj",
        "c_attn", ...) or regular expressions searched in "attention/q", "attention/k", ..., "mlp/down".
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("all-linear",)
    rslora: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.rank < 1:
            raise ConfigError(
                f"LoRA rank = {self.rank}: expected at least 1 (for no adapter: lora=None, or --parameters all)"
            )
        if not self.targets:
            raise ConfigError(
                "LoRA targets are empty: name at least one layer (for no adapter: lora=None, or --parameters all)"
            )

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r) with rslora."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def matches(self, linears: tuple[str, ...]) -> tuple[str, ...]:
        """The members of ``linears`` ("attention/q", ...) with an adapter; ConfigError for a target that fits none."""
        chosen: set[str] = set()
        for target in self.targets:
            matched = _matching(target, linears)
            if not matched:
                raise ConfigError(
                    f"LoRA target {target!r} matches no linear layer of this model; it has "
                    f"{', '.join(linears)} ('all-linear' takes them all; the head never gets an adapter)"
                )
            chosen.update(matched)
        return tuple(name for name in linears if name in chosen)


def _matching(target: str, linears: tuple[str, ...]) -> list[str]:
    if target == "all-linear":
        return list(linears)
    # Names of the linear layers in Hugging Face checkpoints: a PEFT user's target_modules work here.
    aliases = linear_aliases(target)
    exact = [name for name in linears if target in (name, name.split("/")[-1]) or name in aliases]
    ours, theirs = [name for name in exact if name not in aliases], [name for name in exact if name in aliases]
    if ours and theirs:  # checkpoints call the router of experts "gate", and we one of the layers of each
        raise ConfigError(
            f"LoRA target {target!r} has two meanings in this model: {', '.join(theirs)} in its checkpoint, "
            f"{', '.join(ours)} here; expected one of these longer names"
        )
    if exact:
        return exact
    try:
        return [name for name in linears if re.search(target, name)]
    except re.error as error:
        raise ConfigError(f"LoRA target {target!r} is neither a layer name nor a regular expression: {error}") from None


def _product(x: Float[Array, "*A n"], y: Float[Array, "*B n m"]) -> Float[Array, "*A m"]:
    """x y in their dtype, float32 or wider, and in full precision."""
    return jnp.matmul(x, y, precision=precision_of(x.dtype))


def lora_delta(
    x: Float[Array, "... I"], a: Float[Array, "I R"], b: Float[Array, "R O"], scale: float
) -> Float[Array, "... O"]:
    """scale (x A) B in float32 or better: [..., out]."""
    x = at_least_float32(x)
    return scale * _product(_product(x, a.astype(x.dtype)), b.astype(x.dtype))


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def adapted(
    x: Float[Array, "N I"],
    w: Float[Array, "I O"],
    a: Float[Array, "I R"],
    b: Float[Array, "R O"],
    scale: float,
    joined: bool = False,
) -> Float[Array, "N O"]:
    """x W + scale (x A) B with all four in one dtype of 32 bits or more: [N, out].

    Differentiated, it is x W' with W' = W + scale A B, and its tangent

        dx W' + x dW + scale ((x dA) B + (x A) dB):

    W' takes the place of the thin products (x A) B, dx A and (dx A) B, which run far below the speed of a square one.
    Reverse mode transposes the same rule, and makes W' anew. With ``joined``, for forward mode alone, the sum is one
    product,

        [dx, x dA, x A] [W'; scale B; scale dB],

    which is of no use where tensor parallelism splits W along the axis that is joined.
    """
    return _product(x, w) + lora_delta(x, a, b, scale)


@functools.partial(adapted.defjvp, symbolic_zeros=True)
def _adapted_jvp(scale: float, joined: bool, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    x, w, a, b = primals
    merge = lambda w, a, b: w + scale * _product(a, b)
    # Made anew in the backward pass: kept, W' of every layer would be a second copy of the weights.
    through = jax.checkpoint(lambda x, w, a, b: _product(x, merge(w, a, b)), prevent_cse=False)
    # The tangent by each operand, as the two factors of one product: what `joined` puts side by side.
    factors = {
        0: lambda dx: (dx, merge(w, a, b)),
        1: lambda dw: (x, dw),
        2: lambda da: (_product(x, da), scale * b),
        3: lambda db: (_product(x, a), scale * db),
    }
    # A symbolic zero (weights held fixed, the first layer's input) costs nothing.
    zero = jax.custom_derivatives.SymbolicZero
    moved = {i: tangent for i, tangent in enumerate(tangents) if not isinstance(tangent, zero)}
    value = through(x, w, a, b)
    if not moved:
        return value, jnp.zeros_like(value)
    if joined:
        rows, columns = zip(*(factors[i](tangent) for i, tangent in moved.items()), strict=True)
        return value, _product(jnp.concatenate(rows, axis=1), jnp.concatenate(columns, axis=0))
    terms = [through(tangent, w, a, b) if i == 0 else _product(*factors[i](tangent)) for i, tangent in moved.items()]
    return value, functools.reduce(jnp.add, terms)


def half_product(x: Float[Array, "... I"], w: Float[Array, "I O"]) -> Float[Array, "... O"]:
    """x W of operands of 16 bits, summed in float32 and rounded once, to the dtype of x.

    A derivative has the dtype of what it is a derivative of: with float32 results, as of `ntkjax.models.layers.matmul`,
    the cotangents are float32 too, and the products of a backward pass leave the matrix unit's 16-bit path.
    """
    return jax.lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def adapted_half(
    x: Float[Array, "N I"],
    w: Float[Array, "I O"],
    a: Float[Array, "I R"],
    b: Float[Array, "R O"],
    scale: float,
    joined: bool = False,
) -> Float[Array, "N O"]:
    """x W + scale (x A) B with x and W in 16 bits, A and B in float32: [N, out] in the dtype of x.

    With ``joined``, for forward mode alone, one product, [x, x A] [W; scale B], whose sum is taken in float32 and
    rounded once. x A, scale B and, in derivatives, their tangents are rounded to 16 bits before it, so that an adapter
    keeps its relative precision however small it is beside W (W + scale A B in 16 bits would lose it). The tangent:

        [dx, dx A + x dA, x A] [W; scale B; scale dB].

    Without it, the sums of these products, which reverse mode transposes; the gradients of A and B are summed in
    float32, rounded to 16 bits and given as float32, as those of torch under autocast are. There is no float32 array of
    size N x out, and no product with float32 operands, for which a GPU has no matrix unit.
    """
    low, b = half_product(x, a.astype(x.dtype)), (scale * b).astype(x.dtype)
    if joined:
        return half_product(jnp.concatenate([x, low], axis=1), jnp.concatenate([w, b]))
    return half_product(x, w) + half_product(low, b)


@functools.partial(adapted_half.defjvp, symbolic_zeros=True)
def _adapted_half_jvp(scale: float, joined: bool, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    x, w, a, b = primals
    half, value = x.dtype, adapted_half(*primals, scale, joined)
    zero = jax.custom_derivatives.SymbolicZero
    dx, dw, da, db = (None if isinstance(tangent, zero) else tangent for tangent in tangents)
    # dx A and x dA meet the same scale B: one product of their sum in the place of two.
    low = [] if dx is None else [half_product(dx, a.astype(half))]
    low += [] if da is None else [half_product(x, da.astype(half))]
    terms = [] if dx is None else [(dx, w)]
    terms += [] if dw is None else [(x, dw)]
    terms += [(functools.reduce(jnp.add, low), (scale * b).astype(half))] if low else []
    terms += [] if db is None else [(half_product(x, a.astype(half)), (scale * db).astype(half))]
    if not terms:
        return value, jnp.zeros_like(value)
    if joined:
        rows, columns = zip(*terms, strict=True)
        return value, half_product(jnp.concatenate(rows, axis=1), jnp.concatenate(columns, axis=0))
    return value, functools.reduce(jnp.add, [half_product(*term) for term in terms])


def init_lora_a(random: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> Float[np.ndarray, "..."]:
    """A as in PEFT: Kaiming-uniform with a = sqrt(5), which is U(-1/sqrt(in), 1/sqrt(in)); [..., in, r].

    Drawn on the host: jax.random would compile for every shape, seconds in all for a model of seven layers.
    """
    bound = 1.0 / math.sqrt(shape[-2])
    return random.uniform(-bound, bound, shape).astype(dtype)


def lora_subset(params: dict) -> dict:
    """The adapter leaves (``lora_a``, ``lora_b``) of a parameter tree, and the branches that lead to them."""
    subset = {}
    for name, value in params.items():
        if isinstance(value, dict):
            inner = lora_subset(value)
            if inner:
                subset[name] = inner
        elif name in ("lora_a", "lora_b"):
            subset[name] = value
    return subset


def merge_lora(params: dict, scale: float) -> dict:
    """The tree without adapters: kernel + scale A B, summed in float32 or better, cast back to the kernel's dtype.

    ValueError for kernels held in 8 or 4 bits, which W + scale A B would not fit; `save_merged` writes them.
    """
    if "lora_a" in params and "kernel_scale" in params:
        raise ValueError("kernels in 8 or 4 bits cannot take an adapter up; save_merged writes the sum in 16 bits")
    if "lora_a" in params:
        a, b = at_least_float32(params["lora_a"]), at_least_float32(params["lora_b"])
        kernel = params["kernel"]
        delta = (scale * _product(a, b)).astype(float32_or_better(kernel.dtype))
        merged = (at_least_float32(kernel) + delta).astype(kernel.dtype)
        return {k: v for k, v in params.items() if k not in ("lora_a", "lora_b")} | {"kernel": merged}
    return {k: merge_lora(v, scale) if isinstance(v, dict) else v for k, v in params.items()}
