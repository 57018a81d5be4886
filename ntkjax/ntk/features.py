"""Gradient features phi_j = Pi g_j, for whatever needs more than a mean score: full kernels, norms, regression."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ntkjax.errors import UserError
from ntkjax.ntk.kernel import Kernel, as_kernel, feature_vector
from ntkjax.ntk.rows import NonFiniteError, Pass, Progress, one_a_row, real_rows
from ntkjax.ntk.sketch import Sketch
from ntkjax.parallel import to_host
from ntkjax.types import ArrayLike, Params

MAX_GROUP = 1024  # rows: by then the cost of the signs is spread thin enough


def per_example_gradients(output_fn: Callable, params: Params, batch: Any, *, microbatch: int | None = None) -> Params:
    """g_j = dF(x_j)/dtheta for each row of one output ``F(params, batch) -> [B]``: leaves [B, ...], at least float32.

    Each row is differentiated as a batch of one, so a gradient depends on no other row. ``microbatch``
    rows at a time are in work (None: all), which bounds the memory of the backward pass.
    """
    features = feature_vector(as_kernel(output_fn), params, batch, microbatch=microbatch)
    return jax.tree.map(lambda leaf: leaf[:, 0], features["outputs"])


@functools.partial(jax.jit, static_argnames="rows")
def _empty_buffer(gradients: Params, rows: int) -> Params:
    return jax.tree.map(lambda g: jnp.zeros((rows, *g.shape[1:]), g.dtype), gradients)


# The buffer is donated, so that a batch is written into it in place; otherwise every batch would copy all of it.
@functools.partial(jax.jit, donate_argnums=0)
def _insert(buffer: Params, gradients: Params, start: Array) -> Params:
    return jax.tree.map(lambda b, g: jax.lax.dynamic_update_slice_in_dim(b, g, start, axis=0), buffer, gradients)


@functools.partial(jax.jit, static_argnames="rows")
def _apply_sketch(sketch: Sketch, gradients: Params, rows: int) -> Float[Array, "B K"]:
    return sketch(jax.tree.map(lambda g: g[:rows], gradients))


@functools.partial(jax.jit, static_argnames="microbatch")
def _sketched(kernel: Kernel, params: Params, sketch: Sketch, x: Any, *, microbatch: int | None) -> Float[Array, "B K"]:
    return sketch(feature_vector(kernel, params, x, microbatch=microbatch))


def group_rows(gradients: Params, memory_budget: int) -> int:
    """Rows of gradients like ``gradients`` (leaves [B, ...]) that fit in ``memory_budget`` bytes: 1 to `MAX_GROUP`."""
    row = sum(math.prod(g.shape[1:]) * g.dtype.itemsize for g in jax.tree.leaves(gradients))
    return min(max(1, memory_budget // max(row, 1)), MAX_GROUP)


def _feature_groups(
    kernel: Kernel, params: Params, batches: Iterable, sketch: Sketch, run: Pass
) -> Iterator[tuple[np.ndarray, Array]]:
    """(index [G], features [G, K]) per group of rows whose gradients fit in the memory budget.

    Where the sketch shares work between rows the gradients of many batches are gathered for one application of it;
    any other sketch is part of the program that makes the gradients, batch by batch.
    """
    if sketch.grouped:
        yield from _gathered(kernel, params, batches, sketch, run)
        return
    for batch in batches:
        group = group_rows(jax.eval_shape(feature_vector, kernel, params, batch), run.memory_budget)
        for piece in pieces(batch, group):
            yield real_rows(piece), _sketched(kernel, params, sketch, piece, microbatch=run.microbatch)


def _gathered(
    kernel: Kernel, params: Params, batches: Iterable, sketch: Sketch, run: Pass
) -> Iterator[tuple[np.ndarray, Array]]:
    """`_feature_groups` where the gradients of many batches share one draw of the sketch's signs."""
    buffer, index, used, group = None, np.empty(0, int), 0, 0
    for batch in batches:
        if buffer is None:
            shapes = jax.eval_shape(feature_vector, kernel, params, batch)
            group = group_rows(shapes, run.memory_budget)
            buffer, index = _empty_buffer(shapes, group), np.full(group, -1)
        for piece in pieces(batch, group):
            rows = real_rows(piece)
            # The buffer is not cleared for the next group: rows behind ``used`` still hold gradients of the one before,
            # and their index of -1 makes them fillers.
            if used + len(rows) > group:
                yield index, _apply_sketch(sketch, buffer, group)
                index, used = np.full(group, -1), 0
            gradients = feature_vector(kernel, params, piece, microbatch=run.microbatch)
            buffer = _insert(buffer, gradients, jnp.asarray(used, jnp.int32))
            index[used : used + len(rows)] = rows
            used += len(rows)
    if used:  # the last group: a power of two, so that odd sizes do not each compile
        rows = min(group, 1 << (used - 1).bit_length())
        yield index[:rows], _apply_sketch(sketch, buffer, rows)


def pieces(batch: Any, rows: int) -> Iterator[Any]:
    """The batch in pieces of at most ``rows`` rows."""
    count = len(batch.index)
    if count <= rows:
        yield batch
        return
    for start in range(0, count, rows):
        yield jax.tree.map(lambda leaf, a=start: leaf[a : a + rows], batch)


def gradient_features(
    kernel: Kernel | Callable,
    params: Params,
    batches: Iterable,
    sketch: Sketch,
    *,
    rows: int | Pass,
    read: bool = True,
) -> Float[np.ndarray, "rows K"]:
    """phi_j = Pi g(x_j) for every row of ``batches``: [rows, K]; rows that no batch holds are NaN.

    With m outputs each has signs of its own and all are summed into the K numbers, so that still
    E <phi, phi'> = k(x, x').

    Args:
      kernel: a `Kernel`, or ``F(params, batch) -> [B]`` or ``[B, m]``.
      params: theta.
      batches: batches with ``index`` [B]; -1 is a filler.
      sketch: the map Pi.
      rows: size of the dataset that ``index`` counts in, or a `Pass`; its store has width K, and a dense sketch is
        applied to as many rows as fit in its memory budget.
      read: False leaves the features in the store, whose rows may be more than memory holds; the result is empty.

    Raises:
      NonFiniteError: see `ntkjax.ntk.rows.collect_rows`.
    """
    run = Pass.of(rows)
    groups = _feature_groups(as_kernel(kernel), params, run.over(one_a_row(batches), "gradient features"), sketch, run)
    return run.collect(groups, what="gradient feature", read=read)


def mean_features(
    kernel: Kernel | Callable,
    params: Params,
    batches: Iterable,
    sketch: Sketch,
    *,
    microbatch: int | None = None,
    memory_budget: int = 1 << 30,
    progress: Progress = False,
) -> Float[np.ndarray, " K"]:
    """1/M sum_i phi_i over the real rows, float64 [K], without keeping the features."""
    total, count, bad = 0.0, 0, []
    run = Pass(0, None, microbatch, memory_budget, progress)
    groups = _feature_groups(as_kernel(kernel), params, run.over(one_a_row(batches), "mean features"), sketch, run)
    for index, features in groups:
        values = to_host(features)[index >= 0]
        bad += index[index >= 0][~np.isfinite(values).all(axis=1)].tolist()
        total, count = total + values.sum(axis=0, dtype=np.float64), count + len(values)
    if bad:
        raise NonFiniteError("gradient feature", bad)
    if count == 0:
        raise UserError("mean features of no examples: expected at least one row with index >= 0")
    return np.asarray(total / count)


def feature_products(
    kernel: Kernel | Callable,
    params: Params,
    batches: Iterable,
    sketch: Sketch,
    directions: Float[np.ndarray, "R K"],
    *,
    rows: int | Pass,
) -> Float[np.ndarray, "rows R"]:
    """<phi_j, d_r> for every row and R sketched ``directions`` [R, K], without keeping the features: [rows, R].

    The other arguments are those of `gradient_features`; a store has width R.
    """
    run = Pass.of(rows)
    groups = _feature_groups(as_kernel(kernel), params, run.over(one_a_row(batches), "sketched scores"), sketch, run)
    products = ((index, _product(features, np.asarray(directions.T, features.dtype))) for index, features in groups)
    return run.collect(products, what="score")


def squared_norms(
    kernel: Kernel | Callable,
    params: Params,
    batches: Iterable,
    *,
    rows: int | Pass,
    sketch: Sketch | None = None,
) -> Float[np.ndarray, " rows"]:
    """|g(x_j)|^2 = k(x_j, x_j) for every row of ``batches``, NaN where no batch holds it; |phi_j|^2 with a ``sketch``.

    The other arguments are those of `gradient_features`; a store has width 1.
    """
    run, of = Pass.of(rows), _Squares() if sketch is None else sketch
    groups = _feature_groups(as_kernel(kernel), params, run.over(one_a_row(batches), "gradient norms"), of, run)
    squares = groups if sketch is None else ((index, _squares(features)) for index, features in groups)
    return run.collect(squares, what="gradient norm")[:, 0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Squares:
    """|g|^2 [B, 1] in the place of a sketch: exact norms without a vector of all entries."""

    grouped = False

    def __call__(self, gradients: Params) -> Float[Array, "B 1"]:
        sums = [jnp.sum(leaf * leaf, axis=tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(gradients)]
        return functools.reduce(jnp.add, sums)[:, None]

    def width(self, params: Params) -> int:
        return 1

    def describe(self) -> dict[str, Any]:
        return {"sketch": "squared norm"}


@jax.jit
def _squares(features: Float[Array, "B K"]) -> Float[Array, "B 1"]:
    return jnp.sum(features * features, axis=1, keepdims=True)


@jax.jit
def _product(features: Float[Array, "B K"], means: Float[ArrayLike, "K m"]) -> Float[Array, "B m"]:
    """<phi_j, phi_bar_c> [B, m]."""
    return jnp.matmul(features, means, precision=jax.lax.Precision.HIGHEST)
