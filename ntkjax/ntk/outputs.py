"""Scalar outputs F(x; theta): the functions whose gradients a kernel compares, one number per example.

Each is a callable pytree (weights are leaves), so jitted functions take it as an argument. The folded head:
``v . (W h) = (W^T v) . h``, so no logit is ever built. The ``loss`` kernel needs nothing from here: its
output is the model's ``nll_fn`` as it stands (the sign drops out of a product of two gradients).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ntkjax.types import ArrayLike, Params, as_pytree_fn, at_least_float32, before_pooling, forward_mode


def _contract(h: Float[Array, "*B D"], w: Float[Array, "D *m"]) -> Float[Array, "..."]:
    """h . w in the wider of the two precisions, never in a reduced matrix-unit format."""
    dtype = jnp.promote_types(h.dtype, w.dtype)
    return jnp.matmul(h.astype(dtype), w.astype(dtype), precision=jax.lax.Precision.HIGHEST)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FoldedOutput:
    """F(x) = w . h(x) with a fixed ``weight`` w = W^T v, [D] -> [B], or [D, m] -> [B, m]."""

    hidden_fn: Any  # Any: inside JAX's transformations leaves are also tracers and plain markers
    weight: Any

    def __call__(self, params: Params, batch) -> Array:
        return _contract(at_least_float32(self.hidden_fn(params, batch)), self.weight)

    def for_forward_mode(self) -> FoldedOutput:
        """See `ntkjax.types.forward_mode`."""
        return dataclasses.replace(self, hidden_fn=forward_mode(self.hidden_fn))

    def before_pooling(self) -> FoldedOutput:
        """See `ntkjax.types.before_pooling`: w . h is linear in h."""
        return dataclasses.replace(self, hidden_fn=before_pooling(self.hidden_fn))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainedHeadOutput:
    """F(x) = (W(params)^T v) . h(x), [B] or [B, m]: the head comes from ``params``, so its own gradient counts."""

    hidden_fn: Any
    head_fn: Any
    probe: Any  # [V] or [V, m]; None: all ones

    def __call__(self, params: Params, batch) -> Float[Array, "..."]:
        hidden = at_least_float32(self.hidden_fn(params, batch))
        return _contract(hidden, fold_head(self.head_fn(params), self.probe))

    def for_forward_mode(self) -> TrainedHeadOutput:
        """See `ntkjax.types.forward_mode`."""
        return dataclasses.replace(self, hidden_fn=forward_mode(self.hidden_fn))

    def before_pooling(self) -> TrainedHeadOutput:
        """See `ntkjax.types.before_pooling`: W h is linear in h."""
        return dataclasses.replace(self, hidden_fn=before_pooling(self.hidden_fn))


def fold_head(head: Float[ArrayLike, "V D"], v: Float[ArrayLike, "V *m"] | None = None) -> Float[Array, "D *m"]:
    """W^T v in at least float32, [D], or [D, m] for m vectors; ``v`` None means all ones (the sum of the rows)."""
    head = at_least_float32(head)
    if v is None:
        return jnp.sum(head, axis=0)
    return jnp.matmul(head.T, jnp.asarray(v).astype(head.dtype), precision=jax.lax.Precision.HIGHEST)


def sum_logits(hidden_fn: Callable, head: Float[ArrayLike, "V D"] | Callable) -> Callable:
    """F(x) = sum_k f_k(x) = (W^T 1) . h(x): the paper's "Jacobian-free" output [arXiv 2511.07380].

    Args:
      hidden_fn: ``hidden_fn(params, batch) -> h [B, D]``, the pooled final hidden state.
      head: W [V, D], folded once here and held fixed; or ``head_fn(params) -> W`` when the head may be
        among the trained parameters (also correct when it is not): folded inside every call, so that its
        gradient counts.

    Returns:
      A callable pytree ``F(params, batch) -> [B]``, at least float32.
    """
    if callable(head):
        return TrainedHeadOutput(as_pytree_fn(hidden_fn), as_pytree_fn(head), None)
    return FoldedOutput(as_pytree_fn(hidden_fn), fold_head(head))


def probe(hidden_fn: Callable, head: Float[ArrayLike, "V D"] | Callable, v: Float[ArrayLike, " V"]) -> Callable:
    """F(x) = v . f(x) = (W^T v) . h(x) for a direction ``v`` [V] of outputs; ``head`` as in `sum_logits`."""
    if callable(head):
        return TrainedHeadOutput(as_pytree_fn(hidden_fn), as_pytree_fn(head), at_least_float32(v))
    return FoldedOutput(as_pytree_fn(hidden_fn), fold_head(head, v))


def directions(hidden_fn: Callable, matrix: Float[ArrayLike, "m D"]) -> Callable:
    """F(x) = U h(x) [B, m] for ``matrix`` U [m, D], directions of hidden space (for spectral kernels)."""
    return FoldedOutput(as_pytree_fn(hidden_fn), at_least_float32(matrix).T)
