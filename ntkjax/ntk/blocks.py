"""Kernels of functions with O outputs in blocks of examples and outputs, so that memory stays within a budget.

A block is a range of rows and a range of outputs: the R x c gradients of S f(x), S being c rows of the identity. A
kernel is made of pairs of blocks. Three ways to compute such a pair, `Backend`, differ in what they hold at a time:

- ``jacobian``: the gradients of both blocks, contracted;
- ``vector_products``: the gradients of one block, pushed forward through the other: no Jacobian is ever in memory;
- neural-tangents, whatever its implementation holds.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ntkjax.ntk import neural_tangents
from ntkjax.ntk.gram import contract, count_rows, gradient_bytes, row_blocks
from ntkjax.ntk.kernel import MAX_PASSES, Kernel, as_kernel, block_sizes, count_outputs, gradients
from ntkjax.types import ArrayLike, Params, at_least_float32

HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Block:
    """Rows and outputs of a kernel, with the data that gives them; both may be filled up beyond what they name."""

    rows: slice
    outputs: slice
    data: Any  # the rows' leaves [R, ...]
    selectors: np.ndarray  # [c, O]


@dataclasses.dataclass(frozen=True)
class Backend:
    """How to compute a pair of blocks.

    Attributes:
      prepare: what of a block is worth keeping for all its pairs, ``(fn, params, block) -> Any``.
      combine: ``(fn, params, a, b, traced) -> [R1, R2, c1, c2]``, or ``[R1, R2]``, the trace over equal outputs;
        ``a`` and ``b`` are prepared, and the same object on the diagonal of a symmetric kernel.
      full_left: the left block has all outputs at once, because they cost no memory there.
      keeps: what ``prepare`` returns has the size of the block's gradients.
      rows_at_once: so many rows of c outputs may be in work that activations stay those of `MAX_PASSES` passes.
    """

    prepare: Callable
    combine: Callable
    full_left: bool = False
    keeps: bool = False
    rows_at_once: Callable[[int], int] = lambda c: max(1, MAX_PASSES // c)


def _jacobian() -> Backend:
    def prepare(fn: Kernel, params: Params, block: Block) -> Params:
        rows = max(1, MAX_PASSES // len(block.selectors))
        microbatch = rows if rows < count_rows(block.data) else None
        return gradients(fn, params, block.data, block.selectors, microbatch=microbatch)

    def combine(fn: Kernel, params: Params, a: Params, b: Params, traced: bool) -> Float[np.ndarray, "R1 R2 c1 c2"]:
        assert not traced  # that is ntkjax.ntk.kernel.kernel_matrix
        return np.swapaxes(np.asarray(contract(a, b, outputs="pairs")), 1, 2)

    return Backend(prepare, combine, keeps=True, rows_at_once=lambda c: sys.maxsize)  # ``prepare`` bounds them itself


def _single(fn: Kernel, x: Any) -> tuple[list[Array], Callable]:
    """The leaves of ``x``, and f of one row of them as a batch of one: ``(params, leaves) -> [O]``."""
    leaves, structure = jax.tree.flatten(x)  # rows travel as bare leaves: a Batch with one axis less is no Batch
    return [jnp.asarray(leaf) for leaf in leaves], lambda params, row: fn.outputs(
        params, structure.unflatten([leaf[None] for leaf in row])
    )[0]


@functools.partial(jax.jit, static_argnames="traced")
def ntk_vector_product(
    fn: Kernel, params: Params, x1: Any, x2: Any, selectors: Float[ArrayLike, "c O"], *, traced: bool
) -> Float[Array, "R1 R2 ..."]:
    """J(x1_i) (J(x2_j)^T S^T): pull each selector back at x2_j, push the gradient forward at x1_i.

    [R1, R2, O, c]; ``traced``: [R1, R2], the sum over c of S_c . that. In memory: the gradients of one x2_j at a time.
    """
    (left, of_left), (right, of_right) = _single(fn, x1), _single(fn, x2)

    def of_row(row: list[Array]) -> Array:
        values, pull = jax.vjp(lambda p: of_right(p, row), params)
        wanted = jnp.asarray(selectors).astype(values.dtype)

        def push(selector: Array) -> Array:
            at_left = lambda p: jax.vmap(lambda r: of_left(p, r))(left)
            pushed = jax.jvp(at_left, (params,), pull(selector))[1]  # [R1, O]
            return jnp.matmul(pushed, selector, precision=HIGHEST) if traced else pushed

        pushed = jax.vmap(push, out_axes=-1)(wanted)  # [R1, c] or [R1, O, c]
        return jnp.sum(pushed, axis=-1) if traced else pushed

    return jnp.moveaxis(jax.lax.map(of_row, right), 0, 1)


def _vector_products() -> Backend:
    def combine(fn: Kernel, params: Params, a: Block, b: Block, traced: bool) -> Array:
        return ntk_vector_product(fn, params, a.data, b.data, b.selectors, traced=traced)

    return Backend(lambda fn, params, block: block, combine, full_left=True)


@functools.partial(jax.jit, static_argnames=("traced", "implementation"))
def _neural_tangents_block(
    fn: Kernel, params: Params, a: tuple, b: tuple | None, *, traced: bool, implementation: str
) -> Array:
    """A pair of (rows, selectors) through neural-tangents; None: the pair of ``a`` with itself."""

    # It contracts in the dtype of the parameters: give it wide ones. The function still sees its own.
    wide = jax.tree.map(at_least_float32, params)

    def selected(wide: Params, pair: tuple) -> Array:
        rows, selectors = pair
        values = fn.outputs(jax.tree.map(lambda w, p: w.astype(p.dtype), wide, params), rows)
        return jnp.einsum("bo,bco->bc", values, selectors.astype(values.dtype), precision=HIGHEST)

    def with_selectors(pair: tuple) -> tuple:
        rows, selectors = jax.tree.map(jnp.asarray, pair)
        return rows, jnp.broadcast_to(selectors, (count_rows(rows), *selectors.shape))

    kernel = neural_tangents.empirical_ntk_fn(selected, traced=traced, implementation=implementation)
    block = kernel(wide, with_selectors(a), None if b is None else with_selectors(b))
    return block * a[1].shape[0] if traced else block  # its trace is a mean over outputs


def _neural_tangents(implementation: str) -> Backend:
    def combine(fn: Kernel, params: Params, a: Block, b: Block, traced: bool) -> Array:
        pair = (a.data, a.selectors), None if a is b else (b.data, b.selectors)
        return _neural_tangents_block(fn, params, *pair, traced=traced, implementation=implementation)

    if implementation == "jacobian_contraction":
        return Backend(lambda fn, params, block: block, combine)
    every_pair = lambda c: max(1, math.isqrt(MAX_PASSES // c))  # R1 R2 c forward passes
    return Backend(lambda fn, params, block: block, combine, rows_at_once=every_pair)


def backend_of(name: str) -> Backend:
    """The backend called ``name``; KeyError for another name."""
    return {
        "jacobian": _jacobian,
        "vector_products": _vector_products,
        "neural-tangents": functools.partial(_neural_tangents, "jacobian_contraction"),
        "neural-tangents-vector-products": functools.partial(_neural_tangents, "ntk_vector_products"),
    }[name]()


def _slices(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _output_blocks(outputs: int, size: int) -> list[tuple[slice, np.ndarray]]:
    """Rows of the identity; the last block is filled up with zeros, which select nothing."""
    eye = np.eye(-(-outputs // size) * size, outputs, dtype=np.float32)
    return [(at, eye[at.start : at.start + size]) for at in _slices(outputs, size)]


def _blocks(rows: list, outputs: list) -> list[Block]:
    return [Block(at, where, data, selectors) for at, data in rows for where, selectors in outputs]


def blockwise(
    how: Backend, apply_fn: Callable, params: Params, x1: Any, x2: Any, *, traced: bool, memory_budget: int
) -> np.ndarray:
    """All pairs of blocks: float64 [n1, n2, O, O], or [n1, n2] where ``traced``.

    ``x2`` None means x1: only pairs on one side of the diagonal are computed.
    """
    fn, same = as_kernel(apply_fn), x2 is None
    n1, n2, m = count_rows(x1), count_rows(x1 if same else x2), count_outputs(fn, params, x1)
    size, width = block_sizes(params, max(n1, n2), m, memory_budget // 2)  # half is for copies within a program
    size = min(size, how.rows_at_once(width))
    # Programs see blocks of one shape, so each backend compiles once; `Block.rows` and `.outputs` say what is real of
    # it.
    left = row_blocks(x1, size)
    right = left if same else row_blocks(x2, size)
    outputs = _output_blocks(m, width)
    if how.keeps and not traced and gradient_bytes(params) * m * (n1 if same else n1 + n2) <= memory_budget // 4:
        # All gradients fit into a quarter of the budget: each is computed once instead of once for each of its pairs.
        how = dataclasses.replace(how, prepare=_remembered(how.prepare))
    total = np.zeros((n1, n2) if traced else (n1, n2, m, m))
    for block in [[o] for o in outputs] if traced else [outputs]:  # the trace needs no pairs of different outputs
        # ``first is second`` where x2 is x1: `_pairing` then knows the pair of a block with itself by identity.
        second = _blocks(right, block)
        first = second if same else _blocks(left, block)
        if how.full_left and not traced:
            # Forward mode gives all O outputs on the left for every gradient on the right, so the left needs no blocks
            # of outputs: one pass takes the place of O / c.
            first = _blocks(left, _output_blocks(m, m))
        _add_pairs(total, functools.partial(_pairing, how, fn, params, traced), first, second, same)
    return (total + _mirrored(total)) / 2 if same else total


def _pairing(how: Backend, fn: Kernel, params: Params, traced: bool, a: Block) -> Callable[[Block], np.ndarray]:
    """``b -> the kernel of a and b``, without what fills the blocks up."""
    ready = how.prepare(fn, params, a)

    def values(b: Block) -> np.ndarray:
        other = ready if a is b else how.prepare(fn, params, b)
        block = np.asarray(how.combine(fn, params, ready, other, traced), np.float64)
        axes = (a.rows, b.rows, a.outputs, b.outputs)[: block.ndim]
        return block[tuple(slice(axis.stop - axis.start) for axis in axes)]

    return values


def _add_pairs(total: np.ndarray, pairing: Callable, left: list[Block], right: list[Block], same: bool) -> None:
    """Add the pairs of blocks to ``total``, and their mirror images where only one side of the diagonal is computed."""
    where = lambda a, b: (a.rows, b.rows, a.outputs, b.outputs)[: total.ndim]
    for a in left:
        with_a = pairing(a)
        for b in right:
            if same and b.rows.start < a.rows.start:
                continue  # its mirror image is computed
            values = with_a(b)
            total[where(a, b)] += values
            if same and b.rows.start > a.rows.start:
                total[where(b, a)] += _mirrored(values)


def _mirrored(values: np.ndarray) -> np.ndarray:
    """K(x', x) from K(x, x'): both the examples and the outputs change sides."""
    return values.T if values.ndim == 2 else values.transpose(1, 0, 3, 2)


def _remembered(prepare: Callable) -> Callable:
    """``prepare`` that computes each block once."""
    # By identity, because arrays have no hash; the block is kept with its result, so that no other takes its id.
    kept: dict[int, tuple[Block, Any]] = {}

    def remembering(fn: Kernel, params: Params, block: Block) -> Any:
        if id(block) not in kept:
            kept[id(block)] = block, prepare(fn, params, block)
        return kept[id(block)][1]

    return remembering
