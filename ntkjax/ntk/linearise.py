"""The linearised model f_lin(x; theta) = f(x; theta_0) + J(x; theta_0) (theta - theta_0), and how far it is from f.

If the tangent kernel does not move along fine-tuning, f_lin at the fine-tuned theta is the fine-tuned f: training a
network in the kernel regime is training its first-order Taylor expansion (Jacot et al. 2018, arXiv 1806.07572; Lee et
al. 2019, arXiv 1902.06720). J (theta - theta_0) is one forward-mode pass (``jax.jvp``), never a Jacobian.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ntkjax.types import ArrayLike, Params, as_pytree_fn, at_least_float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Linearised:
    """f_lin as a callable pytree with the signature of f: ``(params, batch) -> [B, ...]``, affine in ``params``.

    Attributes:
      output_fn: f, ``(params, batch) -> [B, ...]``.
      base: theta_0, structured like the params it will be called with.
    """

    output_fn: Any
    base: Any

    def __call__(self, params: Params, batch: Any) -> Float[Array, "B *outputs"]:
        # The dtypes of theta_0, as jax.jvp demands; the difference itself is taken in at least float32.
        move = lambda p, p0: (at_least_float32(p) - at_least_float32(p0)).astype(p0.dtype)
        moved = jax.tree.map(move, params, self.base)
        f0, change = jax.jvp(lambda p: at_least_float32(self.output_fn(p, batch)), (self.base,), (moved,))
        return f0 + change


def linearise(output_fn: Callable, params: Params) -> Linearised:
    """f_lin around theta_0 = ``params`` of ``output_fn``: ``(params, batch) -> [B, ...]``."""
    return Linearised(as_pytree_fn(output_fn), params)


@dataclasses.dataclass(frozen=True)
class LinearisationError:
    """How well f_lin(theta) predicts f(theta), all outputs of all examples taken as one vector.

    With d = f(theta) - f_0 and d_lin = f_lin(theta) - f_0:

    Attributes:
      relative: |d_lin - d| / |d|: the part of the change that the linear model misses; 0 is the kernel regime, and a
        model that predicts no change at all has 1. NaN where d = 0.
      cosine: <d_lin, d> / (|d_lin| |d|): whether it moves the same way, whatever the length. NaN where either is 0.
      scale: |d_lin| / |d|. NaN where d = 0.
    """

    relative: float
    cosine: float
    scale: float


def linearisation_error(f0: ArrayLike, linear: ArrayLike, f: ArrayLike) -> LinearisationError:
    """Compare f_lin with f by their changes from f_0; three arrays of one shape, see `LinearisationError`.

    Raises:
      ValueError: shapes that differ.
    """
    if not np.shape(f0) == np.shape(linear) == np.shape(f):
        raise ValueError(f"expected one shape, got {np.shape(f0)}, {np.shape(linear)} and {np.shape(f)}")
    start = np.asarray(f0, np.float64)
    d, d_lin = np.asarray(f, np.float64) - start, np.asarray(linear, np.float64) - start
    size, size_lin = float(np.linalg.norm(d)), float(np.linalg.norm(d_lin))
    ratio = lambda a, b: float(a / b) if b > 0 else float("nan")
    return LinearisationError(
        relative=ratio(np.linalg.norm(d_lin - d), size),
        cosine=ratio(np.vdot(d_lin, d), size * size_lin),
        scale=ratio(size_lin, size),
    )


@jax.jit
def evaluate(output_fn: Callable, params: Params, batch: Any) -> Float[Array, "B *outputs"]:
    """f(params, batch) compiled, in at least float32; ``output_fn`` is a callable pytree such as `Linearised`."""
    return at_least_float32(output_fn(params, batch))


def parameter_distance(params: Params, base: Params) -> tuple[float, float]:
    """(|theta - theta_0|, |theta - theta_0| / |theta_0|) over all leaves, L2; the second is NaN where theta_0 = 0."""
    pairs = list(zip(jax.tree.leaves(params), jax.tree.leaves(base), strict=True))
    square = lambda x: float(np.sum(np.square(np.asarray(jnp.asarray(x), np.float64))))
    moved = np.sqrt(sum(square(at_least_float32(p) - at_least_float32(p0)) for p, p0 in pairs))
    size = np.sqrt(sum(square(p0) for _, p0 in pairs))
    return float(moved), float(moved / size) if size > 0 else float("nan")
