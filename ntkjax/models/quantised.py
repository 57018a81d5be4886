"""Frozen weights in 8 or 4 bits: the kernel of a linear layer as small integers, and one scale for each output and TILE
of its inputs.

The arrays, their rounding and its inverse are qwix's. A kernel is made floating-point again layer by layer, inside the
scan over layers, so that no second copy of the model is ever held.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ntkjax.types import at_least_float32

FORMATS: dict[str, Any] = {"int8": jnp.int8, "nf4": jnp.uint4}
"""Format: what its integers are stored as.

``int8``: w = s q, q from -128 to 127, s = max |w| / 127.5 over the tile. ``nf4``: w = s b_q, b the 16 quantiles of a
normal distribution that QLoRA gives (arXiv 2305.14314, section 3 and appendix E), s = max |w| over the tile.
"""
COMPUTED_IN = "bfloat16"
"""Dtype of the embedding, of the head and of what products take and give in a model in such a format."""
TILE = 64


def tiles(inputs: int) -> int:
    """How many scales an output has: one for each TILE inputs, or for the largest divisor of TILE that divides them."""
    return inputs // math.gcd(inputs, TILE)


@functools.partial(jax.jit, static_argnums=1)
def quantised(kernel: Float[Array, "*S I O"], name: str) -> tuple[Array, Float[Array, "*S K O"]]:
    """(integers, scales) of a kernel in the format ``name``, one of FORMATS; the scales in float32 or better."""
    own = kernel.ndim - 2
    wide = at_least_float32(kernel)
    # One scale for each entry of every axis but the inputs', and of these for each tile.
    kept = tuple(axis for axis in range(kernel.ndim) if axis != own)
    tiled = {own: kernel.shape[own] // tiles(kernel.shape[own])}
    array = _library().quantize(wide, _logical(name), channelwise_axes=kept, tiled_axes=tiled)
    return array.qvalue, array.scale


def restored(integers: Array, scales: Float[Array, "*S K O"], name: str) -> Float[Array, "*S I O"]:
    """The kernel that ``quantised`` keeps, in the dtype of ``scales``."""
    library = _library()
    return library.dequantize(library.QArray(integers, scales, qtype=_logical(name)))


def bytes_of(leaf: Any) -> int:
    """Bytes that an array takes on its device, where two integers of 4 bits share a byte."""
    bits = 4 if np.dtype(leaf.dtype) == np.dtype(jnp.uint4) else 8 * np.dtype(leaf.dtype).itemsize
    return math.prod(leaf.shape) * bits // 8


def _logical(name: str) -> Any:
    return "nf4" if name == "nf4" else FORMATS[name]


def _library() -> Any:
    import qwix  # a second, which only models in these formats pay

    return qwix


def scale_path(path: str) -> str:
    """Where the scales of the kernel at ``path`` are: "layers/mlp/up/kernel" -> "layers/mlp/up/kernel_scale"."""
    return f"{path}_scale"


def is_scale(path: str) -> bool:
    """Whether a parameter's path is that of scales."""
    return path.endswith("/kernel_scale")
