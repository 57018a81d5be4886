"""Array and pytree aliases, the batch of tokens, functions for forward mode, and the letters in shapes.

N pool, M domain, B batch, T tokens, D width (hidden size), V vocabulary, P trained parameters, K sketch size,
R rank, L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

Params = PyTree
"""Trained parameters: a nested dict with string keys, any subset of a model's full tree."""

ArrayLike = Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Right-padded token sequences with their response positions.

    Attributes:
      tokens: int32 [B, T]; padding on the right, so causal attention needs no padding mask.
      response_mask: bool [B, T], True where the token *at* t belongs to the response.
      lengths: int32 [B], number of real tokens in each row.
      index: int32 [B], row of the dataset; -1 marks a filler row that only keeps the shape fixed.
      segments: int32 [B, T] or None. Packed choices: 0 for the shared prompt, c >= 1 for choice c. Position q
        attends to k <= q iff ``segments[k] == 0 or segments[k] == segments[q]``. None means one segment.
      positions: int32 [B, T] or None. Rotary / learned positions; None means 0, 1, ..., T - 1.
    """

    # Any: inside JAX's transformations the leaves are also tracers of other ranks, shapes and plain markers.
    tokens: Any
    response_mask: Any
    lengths: Any
    index: Any
    segments: Any = None
    positions: Any = None


def capped(logits: Float[Array, "*A"], cap: float | None) -> Float[Array, "*A"]:
    """cap tanh(logits / cap), or the logits themselves where ``cap`` is None (Gemma 2's final_logit_softcapping)."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


ApplyFn = Callable[[Params, Any], Array]
"""``apply_fn(params, batch) -> outputs [B, O]``."""

ScalarFn = Callable[[Params, Any], Array]
"""``output_fn(params, batch) -> [B]``: one number per example, the function whose gradient a kernel compares."""

_Fn = TypeVar("_Fn")


def forward_mode(fn: _Fn) -> _Fn:
    """The same function, for ``jax.jvp`` alone: ``fn.for_forward_mode()`` where it has that method, else ``fn`` itself.

    A custom rule may then give its tangent by a cheaper program, which JAX cannot transpose: ``jax.grad`` of what is
    returned may stop with an AssertionError. The scores differentiate this form of every output. A function that takes
    a gradient inside has no such method, and is left as it is.
    """
    special = getattr(fn, "for_forward_mode", None)
    return fn if special is None else special()


def predict_mask(batch: Batch) -> Bool[Array, "B T"]:
    """S(x): positions t whose *next* token belongs to the response, bool [B, T]."""
    shifted = jnp.asarray(batch.response_mask)[:, 1:]
    return jnp.pad(shifted, ((0, 0), (0, 1)))


def valid_mask(batch: Batch) -> Bool[Array, "B T"]:
    """True at real tokens, False at padding, bool [B, T]."""
    steps = jnp.arange(batch.tokens.shape[1], dtype=jnp.int32)
    return steps[None, :] < jnp.asarray(batch.lengths)[:, None]


def float32_or_better(dtype: Any) -> np.dtype:
    """float32 for a floating dtype narrower than that, else the dtype itself.

    (jnp.promote_types raises when dtype promotion is strict.)
    """
    return np.dtype(jnp.float32) if jnp.dtype(dtype).itemsize < 4 else jnp.dtype(dtype)


def at_least_float32(x: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
    """Raise bfloat16 and float16 to float32; leave float32 and float64 as they are."""
    x = jnp.asarray(x)
    return x.astype(float32_or_better(x.dtype))


def precision_of(dtype: Any) -> jax.lax.Precision | None:
    """What a matrix product of operands of this dtype asks of the device: HIGHEST for 32 bits or more, else None.

    Without it accelerators round float32 operands to fewer bits (GPUs to TensorFloat-32, 11 bits of significand for 24;
    TPUs to bfloat16, 8 bits): whoever asks for float32 weights asks for float32 products. Operands of 16 bits are
    multiplied exactly and summed in float32 whatever is asked; None leaves them to ``jax_default_matmul_precision``.
    """
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype).itemsize >= 4 else None


def as_pytree_fn(fn: Callable) -> Callable:
    """A function that can be an argument of a jitted function.

    Model functions are pytrees (their weights are leaves) and pass through; a plain Python function is wrapped
    in ``jax.tree_util.Partial``, whose only content is the function itself.
    """
    leaves = jax.tree_util.tree_leaves(fn)
    is_pytree = not (len(leaves) == 1 and leaves[0] is fn)
    return fn if is_pytree else jax.tree_util.Partial(fn)
