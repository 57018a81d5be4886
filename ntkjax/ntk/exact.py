"""Exact empirical tangent kernels of any function ``apply_fn(params, batch) -> [B, O]``, by several independent ways.

With J(x) = d f(x) / d theta [O, P], theta being exactly the leaves of ``params`` (any subset of a model's):

    empirical_ntk(x, x')     = J(x) J(x')^T                      [O, O]
    trace_ntk(x, x')         = tr J(x) J(x')^T = sum_k <grad f_k(x), grad f_k(x')>
    mean_trace_ntk           = trace_ntk / O                     (what neural-tangents returns for trace_axes=(-1,))
    centred_trace_ntk        = tr H J(x) J(x')^T H,  H = I - 11^T / O

Softmax does not see a shift common to all logits and the gradient of cross-entropy is orthogonal to the all-ones
direction, so of a language model's logits only the centred ones can change the loss.

Every backend gives the same numbers; they differ in what they cost:

- ``jacobian``: per-example Jacobians, contracted.
- ``vector_products``: for each example and output a gradient, pushed forward through the others: no Jacobian in memory.
- ``neural-tangents``, ``neural-tangents-vector-products``: the library's JACOBIAN_CONTRACTION and NTK_VECTOR_PRODUCTS.
- ``spectral``: the trace kernels of `logits`, from D reverse passes through the folded head in the place of V.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ntkjax.errors import ConfigError
from ntkjax.ntk import kernels
from ntkjax.ntk.blocks import backend_of, blockwise
from ntkjax.ntk.kernel import as_kernel, count_outputs, kernel_matrix
from ntkjax.ntk.rows import NonFiniteError
from ntkjax.types import ArrayLike, Params, as_pytree_fn, at_least_float32

BACKENDS = ("jacobian", "vector_products", "neural-tangents", "neural-tangents-vector-products", "spectral")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogitsOutput:
    """f(x) = W h(x) [B, V] in at least float32, with its two factors in sight; made by `logits`.

    Attributes:
      hidden_fn: ``(params, batch) -> h [B, D]``.
      head: W [V, D], held fixed; or ``(params) -> W`` where the head may be among the trained parameters.
    """

    hidden_fn: Any
    head: Any

    def __call__(self, params: Params, batch: Any) -> Float[Array, "B V"]:
        hidden = at_least_float32(self.hidden_fn(params, batch))
        head: Any = self.head
        weight: Any = head(params) if callable(head) else head
        dtype = jnp.promote_types(hidden.dtype, weight.dtype)
        return jnp.matmul(hidden.astype(dtype), weight.astype(dtype).T, precision=jax.lax.Precision.HIGHEST)


def logits(hidden_fn: Callable, head: Float[ArrayLike, "V D"] | Callable) -> LogitsOutput:
    """The pooled logits f(x) = W h(x) of a language model, as every backend takes them; ``spectral`` takes no other.

    Args:
      hidden_fn: ``hidden_fn(params, batch) -> h [B, D]``, the pooled final hidden state (pooling commutes with W).
      head: W [V, D], held fixed; or ``head_fn(params) -> W`` where the head may be among the trained parameters (also
        correct where it is not).

    Returns:
      A callable pytree ``f(params, batch) -> [B, V]``.
    """
    return LogitsOutput(as_pytree_fn(hidden_fn), as_pytree_fn(head) if callable(head) else head)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CentredOutput:
    """f(x) - mean_k f_k(x): the outputs up to the shift that softmax does not see, [B, O]."""

    apply_fn: Any

    def __call__(self, params: Params, batch: Any) -> Float[Array, "B O"]:
        values = at_least_float32(self.apply_fn(params, batch))
        return values - jnp.mean(values, axis=1, keepdims=True)


def empirical_ntk(
    apply_fn: Callable,
    params: Params,
    x1: Any,
    x2: Any = None,
    *,
    backend: str = "jacobian",
    memory_budget: int = 1 << 30,
) -> Float[np.ndarray, "n1 n2 O O"]:
    """K[i, j, k, l] = <grad f_k(x1_i), grad f_l(x2_j)>, float64 sums of products in float32 or wider.

    Args:
      apply_fn: ``apply_fn(params, batch) -> [B, O]``, one example's outputs independent of the others in the batch.
      params: theta, what is differentiated: a pytree of floating leaves, any subset of the model's parameters.
      x1, x2: pytrees whose leaves have a leading axis of examples; ``x2`` None means x1, and about half the work.
      backend: one of `BACKENDS` but ``spectral``.
      memory_budget: bytes for gradients and their copies, down to one gradient at a time; results depend on it in the
        order of summation only. The kernel itself comes on top, and so do the activations of up to 256 passes.

    Raises:
      ConfigError: an unknown backend; ``spectral``; no parameters; leaves of x with different numbers of rows.
      NonFiniteError: some row gives NaN or infinity; it is named.
      UserError: neural-tangents is not installed.
    """
    _check(apply_fn, params, x1, backend)
    if backend == "spectral":
        raise ConfigError(
            'empirical_ntk: backend "spectral" sums over the outputs, so it gives trace_ntk, mean_trace_ntk and '
            'centred_trace_ntk alone; use backend="jacobian" for the O x O kernel'
        )
    return _finite(blockwise(backend_of(backend), apply_fn, params, x1, x2, traced=False, memory_budget=memory_budget))


def trace_ntk(
    apply_fn: Callable,
    params: Params,
    x1: Any,
    x2: Any = None,
    *,
    backend: str = "jacobian",
    memory_budget: int = 1 << 30,
) -> Float[np.ndarray, "n1 n2"]:
    """K[i, j] = sum_k <grad f_k(x1_i), grad f_k(x2_j)>.

    As `empirical_ntk`; ``spectral`` takes a function made by `logits`, and works whether its head is held fixed, a
    parameter of its own or tied to the embedding (`ntkjax.ntk.kernels` derives it).

    Raises:
      ConfigError: also where ``spectral`` gets another function, or a head that depends on ``params`` in another way
        than being one of its leaves.
    """
    _check(apply_fn, params, x1, backend)
    if backend == "spectral":
        return _spectral(apply_fn, params, x1, x2, centred=False, memory_budget=memory_budget)
    return _traced(apply_fn, params, x1, x2, backend, memory_budget)


def mean_trace_ntk(
    apply_fn: Callable,
    params: Params,
    x1: Any,
    x2: Any = None,
    *,
    backend: str = "jacobian",
    memory_budget: int = 1 << 30,
) -> Float[np.ndarray, "n1 n2"]:
    """`trace_ntk` / O: what neural-tangents returns for ``trace_axes=(-1,)``. Arguments and errors as there."""
    total = trace_ntk(apply_fn, params, x1, x2, backend=backend, memory_budget=memory_budget)
    return total / count_outputs(as_kernel(apply_fn), params, x1)


def centred_trace_ntk(
    apply_fn: Callable,
    params: Params,
    x1: Any,
    x2: Any = None,
    *,
    backend: str = "jacobian",
    memory_budget: int = 1 << 30,
) -> Float[np.ndarray, "n1 n2"]:
    """The trace kernel of f - mean_k f_k, that is tr H J(x) J(x')^T H with H = I - 11^T / O. Otherwise `trace_ntk`."""
    _check(apply_fn, params, x1, backend)
    if backend == "spectral":
        return _spectral(apply_fn, params, x1, x2, centred=True, memory_budget=memory_budget)
    return _traced(CentredOutput(as_pytree_fn(apply_fn)), params, x1, x2, backend, memory_budget)


def _traced(apply_fn: Callable, params: Params, x1: Any, x2: Any, backend: str, memory_budget: int) -> np.ndarray:
    if backend == "jacobian":
        return _finite(kernel_matrix(as_pytree_fn(apply_fn), params, x1, x2, memory_budget=memory_budget))
    return _finite(blockwise(backend_of(backend), apply_fn, params, x1, x2, traced=True, memory_budget=memory_budget))


def _spectral(apply_fn: Callable, params: Params, x1: Any, x2: Any, *, centred: bool, memory_budget: int) -> np.ndarray:
    if not isinstance(apply_fn, LogitsOutput):
        raise ConfigError(
            'backend "spectral" needs the two factors of f = W h: make the function with ntkjax.ntk.logits(hidden_fn, '
            'head), or use backend="jacobian"'
        )
    constructor = kernels.centred_trace if centred else kernels.trace
    # One name, so that the trace and the centred trace are one program to the compiler.
    kernel = dataclasses.replace(constructor(apply_fn.hidden_fn, apply_fn.head, params), name="exact")
    return _finite(kernel_matrix(kernel, params, x1, x2, memory_budget=memory_budget))


def _finite(kernel: np.ndarray) -> np.ndarray:
    """``kernel``, if it is finite; else the error names the rows of x1 that spoil it, or those of x2."""
    bad = np.any(~np.isfinite(kernel.reshape(*kernel.shape[:2], -1)), axis=2)
    if bad.any():
        # A row of NaN is the fault of its example in x1, a column of one in x2; what is left is a pair that overflows.
        named = {"x1": bad.all(axis=1), "x2": bad.all(axis=0), "x1 (with some of x2)": bad.any(axis=1)}
        side, rows = next((side, rows) for side, rows in named.items() if rows.any())
        raise NonFiniteError(f"exact kernel: rows of {side}", np.flatnonzero(rows).tolist())
    return kernel


def _check(apply_fn: Callable, params: Params, x1: Any, backend: str) -> None:
    if backend not in BACKENDS:
        raise ConfigError(f"unknown backend {backend!r}; expected one of {', '.join(BACKENDS)}")
    if not jax.tree.leaves(params):
        raise ConfigError("params has no leaves, so there is nothing to differentiate: name the parameters to train")
