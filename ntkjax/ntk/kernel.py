"""Tangent kernels as features: the trace NTK of a function F(params, batch) -> [B, m].

    k(x, x') = sum_c <grad F_c(x), grad F_c(x')> + c_h <h(x), h(x')>

One output (``sum_logits``, ``loss``), m probes, or a rotation of all V logits: they differ in F alone. The last term is
there only where the LM head itself is trained, with coefficient c_h: what is left of the head's own gradient beyond the
m outputs (``ntkjax.ntk.kernels`` derives it). So a kernel has an explicit feature vector g(x) = (grad F_1, ...,
grad F_m, sqrt(c_h) h), and everything linear in g, scores, sketches, contrasts, is written once for all of them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from tqdm import tqdm

from ntkjax.ntk.gram import contract, count_rows, gradient_bytes, row_blocks, rows_of
from ntkjax.ntk.rows import title
from ntkjax.types import ArrayLike, Params, as_pytree_fn, at_least_float32, before_pooling, forward_mode

MAX_OUTPUTS = 32  # reverse passes of one row at a time: their activations need memory that no gradient shows
MAX_PASSES = 256  # reverse passes (rows x outputs) at a time


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kernel:
    """k(x, x') = sum_c <grad F_c(x), grad F_c(x')> + c_h <h(x), h(x')>.

    Attributes:
      output_fn: ``F(params, batch) -> [B]`` or ``[B, m]``, a callable pytree.
      hidden_fn: ``h(params, batch) -> [B, D]``; None where ``head_coefficient`` is 0.
      head_coefficient: c_h, of the head's own term; 0 unless the head is among the trained parameters.
      name: what it is called in results, ``spectral:16`` say.
      by_position: whether ``output_fn`` and ``hidden_fn`` give [R, T, ...], before they are summed over positions.
    """

    output_fn: Any
    hidden_fn: Any = None
    head_coefficient: float = dataclasses.field(default=0.0, metadata={"static": True})
    name: str = dataclasses.field(default="kernel", metadata={"static": True})
    by_position: bool = dataclasses.field(default=False, metadata={"static": True})

    def outputs(self, params: Params, batch: Any) -> Float[Array, "*B m"]:
        """F(x) [B, m] ([R, T, m] by position) in at least float32, also where F has one output and no axis for it."""
        values = at_least_float32(self.output_fn(params, batch))
        return values[..., None] if values.ndim == 1 + self.by_position else values

    def for_forward_mode(self) -> Kernel:
        """The same kernel, its outputs in the form for ``jax.jvp`` alone (`ntkjax.types.forward_mode`)."""
        return dataclasses.replace(self, output_fn=forward_mode(self.output_fn))

    def before_pooling(self) -> Kernel:
        """The same kernel with the parts of its outputs at every position (`ntkjax.types.before_pooling`): its features
        are linear in them, so that what is linear in the features adds up over positions."""
        hidden = None if self.hidden_fn is None else before_pooling(self.hidden_fn)
        return dataclasses.replace(self, output_fn=before_pooling(self.output_fn), hidden_fn=hidden, by_position=True)

    def head_features(self, params: Params, batch: Any) -> Float[Array, "*B D"] | None:
        """sqrt(c_h) h(x) [B, D] ([R, T, D] by position), or None where the head is held fixed."""
        if self.head_coefficient == 0:
            return None
        return math.sqrt(self.head_coefficient) * at_least_float32(self.hidden_fn(params, batch))


def as_kernel(kernel: Kernel | Callable) -> Kernel:
    """``kernel`` itself, or the kernel of a function ``F(params, batch) -> [B]`` or ``[B, m]``."""
    return kernel if isinstance(kernel, Kernel) else Kernel(as_pytree_fn(kernel), name="output")


def count_outputs(kernel: Kernel, params: Params, x: Any) -> int:
    """m, found by shape inference alone."""
    return jax.eval_shape(kernel.outputs, params, rows_of(x, slice(0, 1))).shape[1]


@functools.partial(jax.jit, static_argnames="microbatch")
def gradients(
    kernel: Kernel, params: Params, x: Any, selectors: Float[ArrayLike, "c m"], *, microbatch: int | None = None
) -> Params:
    """``selectors``_c . grad F(x_i) for every row i: leaves [B, c, ...], at least float32.

    Each row is differentiated as a batch of one, so a gradient depends on no other row; the c reverse passes of a row
    share its forward pass. A row of the identity as selector gives one output's gradient. ``microbatch`` rows at a
    time are in work (None: all), which bounds the memory of the backward pass.
    """
    if getattr(x, "examples", None) is not None:
        raise ValueError("a gradient for each example needs one example a row: got packed rows (see `one_a_row`)")
    leaves, structure = jax.tree.flatten(x)  # rows travel as bare leaves: a Batch with one axis less is no Batch

    def of_row(row: list[Array]) -> Params:
        single = structure.unflatten([leaf[None] for leaf in row])
        values, pull = jax.vjp(lambda p: kernel.outputs(p, single)[0], params)
        pulled = jax.vmap(lambda v: pull(v)[0])(jnp.asarray(selectors).astype(values.dtype))
        return jax.tree.map(at_least_float32, pulled)

    leaves = [jnp.asarray(leaf) for leaf in leaves]
    if microbatch is None:
        return jax.vmap(of_row)(leaves)
    return jax.lax.map(of_row, leaves, batch_size=microbatch)


@jax.jit
def compiled_head_features(kernel: Kernel, params: Params, x: Any) -> Float[Array, "B D"]:
    """`Kernel.head_features` of a batch, compiled."""
    features = kernel.head_features(params, x)
    assert features is not None
    return features


@jax.jit
def _squares(a: Params) -> Float[Array, " n"]:
    return functools.reduce(jnp.add, [jnp.sum(x * x, axis=range(1, x.ndim)) for x in jax.tree.leaves(a)])


def block_sizes(params: Params, rows: int, outputs: int, memory_budget: int) -> tuple[int, int]:
    """(rows, outputs) of a block whose gradients take at most ``memory_budget`` bytes.

    All rows and as many outputs as fit, up to `MAX_OUTPUTS`; where one output of all rows does not fit, fewer rows.
    Two blocks of rows are in memory at a time, so each gets half of the budget.
    """
    fit = max(1, memory_budget // max(1, 2 * gradient_bytes(params)))
    if fit >= rows:
        return rows, min(outputs, fit // rows, MAX_OUTPUTS)
    return fit, 1


def _microbatch(rows: int, outputs: int) -> int | None:
    """Rows at a time so that at most `MAX_PASSES` reverse passes are in work; None for all."""
    size = max(1, MAX_PASSES // outputs)
    return None if size >= rows else size


def _selectors(outputs: int, size: int) -> Iterator[np.ndarray]:
    """Blocks [c, m] of the identity, all of one shape (zeros at the end): one compilation."""
    for start in range(0, outputs, size):
        block = np.zeros((size, outputs), np.float32)
        for row, column in enumerate(range(start, min(start + size, outputs))):
            block[row, column] = 1
        yield block


def kernel_matrix(
    kernel: Kernel | Callable,
    params: Params,
    x1: Any,
    x2: Any = None,
    *,
    memory_budget: int = 1 << 30,
    progress: bool | str = False,
) -> Float[np.ndarray, "n1 n2"]:
    """K_ij = k(x1_i, x2_j), exactly, from explicit per-example gradients.

    Args:
      kernel: a `Kernel`, or ``F(params, batch) -> [B]`` or ``[B, m]``.
      params: theta.
      x1, x2: pytrees whose leaves have a leading axis of examples; ``x2`` None means x1, and half the work.
      memory_budget: bytes of gradients held at a time. Results do not depend on it beyond the order of summation.
      progress: show a progress bar over blocks of outputs and rows; a string is its description.

    Returns:
      float64 sums of block products computed in float32 or wider.
    """
    kernel = as_kernel(kernel)
    same, m = x2 is None, count_outputs(kernel, params, x1)
    n1, n2 = count_rows(x1), count_rows(x1 if same else x2)
    rows, outputs = block_sizes(params, max(n1, n2), m, memory_budget)
    left = row_blocks(x1, min(rows, n1))
    right = left if same else row_blocks(x2, min(rows, n2))
    # Sums over blocks of outputs and the result are float64, on the host: a float32 running sum over thousands of
    # outputs would add rounding of its own.
    total, selectors = np.zeros((n1, n2)), list(_selectors(m, outputs))
    pull = functools.partial(gradients, kernel, params, microbatch=_microbatch(rows, outputs))
    bar = tqdm(total=len(selectors) * len(left), desc=title(progress, "kernel"), disable=progress is False)
    # The gradients of a left block are made once for each block of outputs, those of a right block once for each left
    # block that it meets: with b blocks of rows, b^2 / 2 passes in the place of b. A larger memory budget lowers b.
    for selector in selectors:
        for i, (at, block) in enumerate(left):
            g1 = pull(block, selector)
            for j, (to, other) in enumerate(right):
                if same and j < i:
                    continue
                g2 = g1 if same and i == j else pull(other, selector)
                _add(total, at, to, contract(g1, g2), mirror=same and i != j)
            bar.update()
    bar.close()
    if kernel.head_coefficient:
        h1 = _all_head_features(kernel, params, left, n1)
        total += h1 @ (h1 if same else _all_head_features(kernel, params, right, n2)).T
    # A block with itself is symmetric but for rounding; eigh and the bootstrap take the matrix to be symmetric.
    return (total + total.T) / 2 if same else total


def _add(total: np.ndarray, at: slice, to: slice, block: Array, *, mirror: bool) -> None:
    """Add a block without its filler rows, and its transpose across the diagonal where only one half is computed."""
    values = np.asarray(block, np.float64)[: at.stop - at.start, : to.stop - to.start]
    total[at, to] += values
    if mirror:
        total[to, at] += values.T


def _all_head_features(kernel: Kernel, params: Params, blocks: list, count: int) -> np.ndarray:
    features = [np.asarray(compiled_head_features(kernel, params, block), np.float64) for _, block in blocks]
    return np.concatenate(features)[:count]


def kernel_diagonal(
    kernel: Kernel | Callable, params: Params, x: Any, *, memory_budget: int = 1 << 30
) -> Float[np.ndarray, " n"]:
    """k(x_i, x_i) = |g(x_i)|^2 for every row, float64 [n]."""
    kernel = as_kernel(kernel)
    m, n = count_outputs(kernel, params, x), count_rows(x)
    rows, outputs = block_sizes(params, n, m, memory_budget)
    total, blocks, microbatch = np.zeros(n), row_blocks(x, rows), _microbatch(rows, outputs)
    for selector in _selectors(m, outputs):
        for at, block in blocks:
            gradient = gradients(kernel, params, block, selector, microbatch=microbatch)
            squares = np.asarray(_squares(gradient), np.float64)
            total[at] += squares[: at.stop - at.start]
    if kernel.head_coefficient:
        total += np.sum(_all_head_features(kernel, params, blocks, n) ** 2, axis=1)
    return total


@functools.partial(jax.jit, static_argnames="microbatch")
def feature_vector(kernel: Kernel, params: Params, x: Any, *, microbatch: int | None = None) -> dict[str, Params]:
    """g(x) as a pytree: {"outputs": leaves [B, m, ...], "head": sqrt(c_h) h [B, D] where the head is trained}."""
    m = count_outputs(kernel, params, x)
    features: dict[str, Params] = {
        "outputs": gradients(kernel, params, x, np.eye(m, dtype=np.float32), microbatch=microbatch)
    }
    head = kernel.head_features(params, x)
    return features if head is None else features | {"head": head}
