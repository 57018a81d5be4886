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
from jaxtyping import Array, Bool, Float, Int, PyTree

from ntkjax.errors import ConfigError

Params = PyTree
"""Trained parameters: a nested dict with string keys, any subset of a model's full tree."""

ArrayLike = Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Right-padded token sequences with their response positions, one example a row or, packed, several.

    Attributes:
      tokens: int32 [B, T]; padding on the right, so causal attention needs no padding mask.
      response_mask: bool [B, T], True where the token *at* t belongs to the response.
      lengths: int32 [B], number of real tokens of each example.
      index: int32 [B], the example's row of the dataset; -1 marks a filler that only keeps the shape fixed.
      segments: int32 [B, T] or None. Packed choices: 0 for the shared prompt, c >= 1 for choice c. Position q
        attends to k <= q iff ``segments[k] == 0 or segments[k] == segments[q]``. None means one segment.
      positions: int32 [B, T] or None. Rotary / learned positions; None means 0, 1, ..., T - 1.
      examples: int32 [R, T] or None. Packed rows: which of the row's S slots the token belongs to, 0 to S - 1 in
        ascending order, whole examples one after another; -1 at padding, behind them all. Then ``tokens``,
        ``response_mask`` and ``positions`` (given, from 0 in every example and in the padding) are [R, T], and
        ``lengths`` and ``index`` are [R S]: slot s of row r is example r S + s, an empty slot a filler of length 0. A
        token attends to its own example alone. None means one example a row.
    """

    # Any: inside JAX's transformations the leaves are also tracers of other ranks, shapes and plain markers.
    tokens: Any
    response_mask: Any
    lengths: Any
    index: Any
    segments: Any = None
    positions: Any = None
    examples: Any = None


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


def logit_cap(fn: Callable) -> float | None:
    """The c of logits c tanh(W h / c) that a function declares as its attribute ``logit_cap``, as those of a language
    model do; None for any other function: its logits are W h.
    """
    return getattr(fn, "logit_cap", None)


def before_pooling(fn: _Fn) -> _Fn:
    """The same output before it is summed over the positions of an example, ``fn.before_pooling()``: ``(params, batch)
    -> [R, T, ...]``, 0 where no position counts. Its sum over the positions of each example is what ``fn`` gives.

    Raises:
      ConfigError: the function has no such form.
    """
    apart = getattr(fn, "before_pooling", None)
    if apart is None:
        raise ConfigError(f"{type(fn).__name__} has no values by position; expected a function with before_pooling()")
    return apart()


def predict_mask(batch: Batch) -> Bool[Array, "B T"]:
    """S(x): positions t whose *next* token belongs to the response, of the same example, bool [B, T]."""
    shifted = jnp.asarray(batch.response_mask)[:, 1:]
    if batch.examples is not None:
        owner = jnp.asarray(batch.examples)
        shifted = shifted & (owner[:, 1:] == owner[:, :-1])
    return jnp.pad(shifted, ((0, 0), (0, 1)))


def valid_mask(batch: Batch) -> Bool[Array, "B T"]:
    """True at real tokens, False at padding, bool [B, T]."""
    if batch.examples is not None:
        return jnp.asarray(batch.examples) >= 0
    steps = jnp.arange(batch.tokens.shape[1], dtype=jnp.int32)
    return steps[None, :] < jnp.asarray(batch.lengths)[:, None]


def owned(batch: Batch) -> Bool[Array, "R S T"] | None:
    """Whether position t of row r belongs to slot s of the row, bool [R, S, T]; None where a row is one example."""
    if batch.examples is None:
        return None
    owner, slots = jnp.asarray(batch.examples), batch.index.shape[0] // batch.tokens.shape[0]
    return owner[:, None, :] == jnp.arange(slots, dtype=owner.dtype)[None, :, None]


def sequence_lengths(batch: Batch) -> Int[Array, "R T"]:
    """How many tokens the example has that each token belongs to, int32 [R, T]; in packed choices the prompt with the
    longest choice. At padding any number.
    """
    shape = batch.tokens.shape
    if batch.positions is None:
        return jnp.broadcast_to(jnp.asarray(batch.lengths)[:, None], shape)
    positions, owners = jnp.asarray(batch.positions), owned(batch)
    if owners is None:
        return jnp.broadcast_to(jnp.max(positions, axis=1, keepdims=True) + 1, shape)
    of_slot = jnp.max(jnp.where(owners, positions[:, None, :] + 1, 0), axis=2)
    return jnp.take_along_axis(of_slot, jnp.maximum(jnp.asarray(batch.examples), 0), axis=1)


def count_positions(batch: Batch, mask: Bool[Array, "R T"]) -> Int[Array, " B"]:
    """How many positions of each example are True in ``mask``, int32 [B]; 0 for an empty slot."""
    owners = owned(batch)
    if owners is None:
        return jnp.sum(mask, axis=1, dtype=jnp.int32)
    return jnp.sum(owners & mask[:, None, :], axis=2, dtype=jnp.int32).reshape(-1)


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
