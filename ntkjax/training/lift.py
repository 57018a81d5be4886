"""LIFT: train only the entries of each weight matrix that are largest after its rank is reduced.

Source: Liu et al., LIFT the Veil for the Truth: Principal Weights Emerge after Rank Reduction for Reasoning-Focused
Supervised Fine-Tuning, ICML 2025 (arXiv 2506.00772).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from ntkjax.errors import ConfigError
from ntkjax.types import Params


class LiftState(NamedTuple):
    """count: steps taken. mask: bool, one leaf for each of the parameters. inner: state of the optimiser inside."""

    count: Int[Array, ""]
    mask: Any
    inner: Any


@dataclasses.dataclass(frozen=True)
class Lift:
    """An optimiser that only moves the principal weights: for every linear layer W [m, n],

        W_r = sum_{i <= r} s_i u_i v_i^T,   mask = the k entries of largest |W_r|,   k = min(r (m + n), m n)

    so that as many numbers are trained as LoRA of rank r would. Gradients are masked before anything else sees them
    (clipping too), the updates after; all that is no linear layer (embeddings, head, norms, biases) stays as it is. The
    mask is made anew from the present W every ``interval`` steps, the first included; Adam's moments are kept where
    the old mask and the new one meet and start from 0 elsewhere, while the count of its bias correction goes on.

    The source stores the moments of the trained entries alone, which is where its saving of memory comes from. Here
    they are dense, with zeros: the numbers are LIFT's, the memory is full fine-tuning's. Of entries with equal
    |W_r| the first in row order are taken.

    Attributes:
      rank: r >= 1.
      interval: steps >= 1 between two masks (source: 200).
    """

    rank: int
    interval: int

    def wrap(self, inner: optax.GradientTransformation) -> optax.GradientTransformation:
        """``inner`` on the principal weights."""
        return optax.GradientTransformation(
            functools.partial(self._init, inner), functools.partial(self._update, inner)
        )

    def _init(self, inner: optax.GradientTransformation, params: Params) -> LiftState:
        """State before the first step; the mask is made by the first step, from the parameters it is given."""
        check_trainable(params)
        mask = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, bool), params)
        return LiftState(jnp.zeros((), jnp.int32), mask, inner.init(params))

    def _update(
        self, inner: optax.GradientTransformation, updates: Params, state: Any, params: Params | None = None
    ) -> tuple[Params, LiftState]:
        due = state.count % self.interval == 0
        mask = jax.lax.cond(due, lambda: principal_mask(params, self.rank), lambda: state.mask)
        # The moments have the parameters' own structure inside the optimiser's state: the mask is laid over each.
        # Cleared in every step, not only when the mask is new: a masked gradient leaves the moments outside it at 0
        # anyway.
        inside = optax.tree.map_params(inner, _keep, state.inner, mask)
        updates, inside = inner.update(jax.tree.map(_keep, updates, mask), inside, params)
        return jax.tree.map(_keep, updates, mask), LiftState(state.count + 1, mask, inside)


def _keep(x: Array, mask: Bool[Array, "..."]) -> Array:
    return jnp.where(mask, x, jnp.zeros_like(x))


def is_linear(path: tuple, leaf: Any) -> bool:
    """Whether a leaf holds the matrices of linear layers: called ``kernel``, with an input and an output axis."""
    return bool(path) and getattr(path[-1], "key", None) == "kernel" and leaf.ndim >= 2


def check_trainable(params: Params) -> None:
    """Raise ConfigError where no leaf of ``params`` is a linear layer (LoRA factors are none)."""
    if not any(is_linear(path, leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]):
        raise ConfigError(
            "LIFT trains entries of the model's own linear layers, and none is among the trained parameters (LoRA "
            "factors are not); train all parameters (--parameters all), or leave lift_rank out"
        )


def principal_mask(params: Params, rank: int) -> Params:
    """bool, shaped like ``params``: True at the principal weights of every linear layer, False elsewhere.

    Leading axes of a kernel (layers that are scanned over) are separate matrices.
    """

    def mask(path: tuple, leaf: Array) -> Array:
        if not is_linear(path, leaf):
            return jnp.zeros(leaf.shape, bool)
        # One matrix at a time: the factors of all layers together would be a second model in memory.
        matrices = leaf.reshape(-1, *leaf.shape[-2:])
        return jax.lax.map(functools.partial(principal_weights, rank=rank), matrices).reshape(leaf.shape)

    return jax.tree_util.tree_map_with_path(mask, params)


def principal_weights(matrix: Float[Array, "m n"], *, rank: int) -> Bool[Array, "m n"]:
    """True at the k = min(r (m + n), m n) entries of largest |W_r|."""
    m, n = matrix.shape
    count = min(rank * (m + n), m * n)
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    reduced = jnp.matmul(u[:, :rank] * s[None, :rank], vt[:rank], precision=jax.lax.Precision.HIGHEST)
    chosen = jax.lax.top_k(jnp.abs(reduced).ravel(), count)[1]
    return jnp.zeros(m * n, bool).at[chosen].set(True).reshape(m, n)
