"""Inner products of per-example gradients; blocks of examples of one shape; the bytes that a gradient takes.

The gradients of n examples and c outputs are a pytree with leaves [n, c, ...], the axes behind c being a parameter's.
With g_ic the gradient of output c of example i, all its leaves taken as one vector, `contract` computes

    sum     K_ij   = sum_c <a_ic, b_jc>     [n1, n2]           a kernel matrix, the outputs summed over
    each    K_cij  = <a_ic, b_jc>           [c, n1, n2]        one kernel matrix for each output
    pairs   K_icjd = <a_ic, b_jd>           [n1, c1, n2, c2]   every output with every other

Each is a matrix product for each leaf, added up over the leaves: in float32 or wider, whatever the gradients' dtype,
and in `jax.lax.Precision.HIGHEST`, because accelerators otherwise round the factors to fewer bits.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ntkjax.errors import ConfigError
from ntkjax.types import Params, at_least_float32


@functools.partial(jax.jit, static_argnames="outputs")
def contract(a: Params, b: Params, *, outputs: Literal["sum", "each", "pairs"] = "sum") -> Float[Array, "..."]:
    """Inner products of the gradients ``a`` and ``b``, summed over their leaves; the equations are above.

    Args:
      a, b: pytrees of one structure, leaves [n1, c1, ...] and [n2, c2, ...]. For ``sum`` and ``each`` c1 = c2; ``sum``
        also takes leaves [n, D] without an axis of outputs.
      outputs: what becomes of the axes of outputs.
    """

    def product(x: Array, y: Array) -> Array:
        dtype = np.promote_types(at_least_float32(x).dtype, at_least_float32(y).dtype)  # float32 or float64
        x, y = x.astype(dtype), y.astype(dtype)
        if outputs == "sum":  # [n, c, ...] -> [n, c p]
            return _matmul(x.reshape(len(x), -1), y.reshape(len(y), -1))
        flat_x, flat_y = (z.reshape(*z.shape[:2], -1) for z in (x, y))  # [n, c, p]
        if outputs == "each":  # [c, n, p], a matrix product for each c
            return _matmul(jnp.swapaxes(flat_x, 0, 1), jnp.swapaxes(flat_y, 0, 1))
        rows = [z.reshape(z.shape[0] * z.shape[1], z.shape[2]) for z in (flat_x, flat_y)]  # [n c, p]
        return _matmul(*rows).reshape(*x.shape[:2], *y.shape[:2])

    return functools.reduce(jnp.add, jax.tree.leaves(jax.tree.map(product, a, b)))


def _matmul(x: Float[Array, "*c n1 p"], y: Float[Array, "*c n2 p"]) -> Float[Array, "*c n1 n2"]:
    """x y^T in full precision."""
    return jnp.matmul(x, jnp.swapaxes(y, -1, -2), precision=jax.lax.Precision.HIGHEST)


def gradient_bytes(params: Params) -> int:
    """Bytes of the gradient of one output of one example, in float32 or wider."""
    return sum(math.prod(p.shape) * max(4, p.dtype.itemsize) for p in jax.tree.leaves(params))


def count_rows(x: Any) -> int:
    """n: the common leading axis of the leaves of ``x``; ConfigError where they differ."""
    sizes = {np.shape(leaf)[0] for leaf in jax.tree.leaves(x)}
    if len(sizes) != 1:
        raise ConfigError(f"every leaf of x must have one row per example; leading axes found: {sorted(sizes)}")
    return sizes.pop()


def rows_of(x: Any, rows: slice | np.ndarray) -> Any:
    """The given rows of every leaf."""
    return jax.tree.map(lambda leaf: leaf[rows], x)


def row_blocks(x: Any, size: int) -> list[tuple[slice, Any]]:
    """``x`` [n, ...] in blocks [min(size, n), ...] of equal shapes, so that each program compiles once.

    Returns:
      (rows, block) for each: the rows of ``x`` that it begins with. The last block is filled up with the last row of
      ``x``, which ``rows`` does not count.
    """
    count = count_rows(x)
    size = min(size, count)
    filled = lambda start: np.minimum(np.arange(start, start + size), count - 1)
    return [(slice(start, min(start + size, count)), rows_of(x, filled(start))) for start in range(0, count, size)]
