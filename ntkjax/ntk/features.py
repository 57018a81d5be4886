"""Gradient features phi_j = Pi g_j, and the one interface over both ways to a kernel score."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ntkjax.errors import ConfigError, UserError
from ntkjax.ntk.scores import (
    KernelScores,
    NonFiniteError,
    collect_rows,
    directional_scores,
    iterate,
    mean_gradient,
    tree_dot,
)
from ntkjax.ntk.sketch import RademacherSketch, Sketch
from ntkjax.types import ArrayLike, Params, as_pytree_fn, at_least_float32

METHODS = ("forward", "sketch")
MAX_GROUP = 1024  # rows: by then the cost of the signs is spread thin enough


@functools.partial(jax.jit, static_argnames="microbatch")
def per_example_gradients(output_fn: Callable, params: Params, batch: Any, *, microbatch: int | None = None) -> Params:
    """g_j = dF(x_j)/dtheta for each row: a pytree like ``params`` with leaves [B, ...], at least float32.

    Each row is differentiated as a batch of one, so a gradient depends on no other row. ``microbatch``
    rows at a time are in work (None: all), which bounds the memory of the backward pass.
    """
    # Rows travel as bare leaves: a Batch with one axis less would not be a Batch.
    leaves, structure = jax.tree.flatten(batch)

    def gradient(row: list[Array]) -> Params:
        single = structure.unflatten([leaf[None] for leaf in row])
        return jax.tree.map(at_least_float32, jax.grad(lambda p: at_least_float32(output_fn(p, single))[0])(params))

    leaves = [jnp.asarray(leaf) for leaf in leaves]
    if microbatch is None:
        return jax.vmap(gradient)(leaves)
    return jax.lax.map(gradient, leaves, batch_size=microbatch)


@functools.partial(jax.jit, static_argnames="rows")
def _empty_buffer(params: Params, rows: int) -> Params:
    return jax.tree.map(lambda p: jnp.zeros((rows, *p.shape), at_least_float32(p).dtype), params)


@functools.partial(jax.jit, donate_argnums=0)
def _insert(buffer: Params, gradients: Params, start: Array) -> Params:
    return jax.tree.map(lambda b, g: jax.lax.dynamic_update_slice_in_dim(b, g, start, axis=0), buffer, gradients)


@functools.partial(jax.jit, static_argnames="rows")
def _apply_sketch(sketch: Sketch, gradients: Params, rows: int) -> Float[Array, "B K"]:
    return sketch(jax.tree.map(lambda g: g[:rows], gradients))


def group_rows(params: Params, memory_budget: int) -> int:
    """Rows whose gradients (at least float32) fit in ``memory_budget`` bytes, from 1 to `MAX_GROUP`."""
    row = sum(math.prod(p.shape) * max(4, p.dtype.itemsize) for p in jax.tree.leaves(params))
    return min(max(1, memory_budget // max(row, 1)), MAX_GROUP)


def _feature_groups(
    output_fn: Callable,
    params: Params,
    batches: Iterable,
    sketch: Sketch,
    *,
    group: int,
    microbatch: int | None,
) -> Iterator[tuple[np.ndarray, Array]]:
    """(index [G], features [G, K]) per group: the gradients of many batches meet one generation of signs."""
    output_fn = as_pytree_fn(output_fn)
    buffer, index, used = _empty_buffer(params, group), np.full(group, -1), 0
    for batch in batches:
        for piece in _pieces(batch, group):
            rows = np.asarray(piece.index)
            if used + len(rows) > group:
                yield index, _apply_sketch(sketch, buffer, group)
                index, used = np.full(group, -1), 0
            gradients = per_example_gradients(output_fn, params, piece, microbatch=microbatch)
            buffer = _insert(buffer, gradients, jnp.asarray(used, jnp.int32))
            index[used : used + len(rows)] = rows
            used += len(rows)
    if used:  # the last group: a power of two, so that odd sizes do not each compile
        rows = min(group, 1 << (used - 1).bit_length())
        yield index[:rows], _apply_sketch(sketch, buffer, rows)


def _pieces(batch: Any, rows: int) -> Iterator[Any]:
    """The batch in pieces of at most ``rows`` rows."""
    count = len(batch.index)
    if count <= rows:
        yield batch
        return
    for start in range(0, count, rows):
        yield jax.tree.map(lambda leaf, a=start: leaf[a : a + rows], batch)


def gradient_features(
    output_fn: Callable,
    params: Params,
    batches: Iterable,
    sketch: Sketch,
    *,
    rows: int,
    store: Any = None,
    microbatch: int | None = None,
    memory_budget: int = 1 << 30,
    progress: bool | str = False,
) -> Float[np.ndarray, "rows K"]:
    """phi_j = Pi dF(x_j)/dtheta for every row of ``batches``: [rows, K]; rows that no batch holds are NaN.

    Args:
      output_fn: ``F(params, batch) -> [B]``.
      params: theta.
      batches: batches with ``index`` [B]; -1 is a filler.
      sketch: the map Pi.
      rows: size of the dataset that ``index`` counts in.
      store: a `RowStore` of width K, or None. Batches whose rows it already holds are skipped.
      microbatch: rows differentiated at a time (None: a whole batch).
      memory_budget: bytes of gradients gathered before one application of the sketch.
      progress: show a progress bar; a string is its description.

    Raises:
      NonFiniteError: see `ntkjax.ntk.scores.collect_rows`.
    """
    done = None if store is None else np.asarray(store.done())
    groups = _feature_groups(
        output_fn,
        params,
        iterate(batches, progress, "gradient features", done),
        sketch,
        group=group_rows(params, memory_budget),
        microbatch=microbatch,
    )
    return collect_rows(groups, rows=rows, store=store, what="gradient feature")


def mean_features(
    output_fn: Callable,
    params: Params,
    batches: Iterable,
    sketch: Sketch,
    *,
    microbatch: int | None = None,
    memory_budget: int = 1 << 30,
    progress: bool | str = False,
) -> Float[np.ndarray, " K"]:
    """1/M sum_i phi_i over the real rows, float64 [K], without keeping the features."""
    total, count, bad = 0.0, 0, []
    groups = _feature_groups(
        output_fn,
        params,
        iterate(batches, progress, "mean features"),
        sketch,
        group=group_rows(params, memory_budget),
        microbatch=microbatch,
    )
    for index, features in groups:
        values = np.asarray(features)[index >= 0]
        bad += index[index >= 0][~np.isfinite(values).all(axis=1)].tolist()
        total, count = total + values.sum(axis=0, dtype=np.float64), count + len(values)
    if bad:
        raise NonFiniteError("gradient feature", bad)
    if count == 0:
        raise UserError("mean features of no examples: expected at least one row with index >= 0")
    return np.asarray(total / count)


def kernel_scores(
    output_fn: Callable,
    params: Params,
    domain_batches: Iterable,
    pool_batches: Iterable,
    *,
    rows: int,
    method: str = "forward",
    references: Sequence[Iterable] = (),
    sketch: Sketch | None = None,
    store: Any = None,
    microbatch: int | None = None,
    memory_budget: int = 1 << 30,
    progress: bool | str = False,
) -> KernelScores:
    """s_j = 1/M sum_i <dF(x_i), dF(x_j)> for every pool row, by either path.

    Args:
      output_fn: ``F(params, batch) -> [B]``.
      params: theta.
      domain_batches: re-iterable batches of the M domain examples.
      pool_batches: batches of the pool (or the part of it to score); ``index`` names the row.
      rows: size of the pool.
      method: ``forward``: exact, by directional derivatives. ``sketch``: the paper's path, per-example
        gradients and a random projection; unbiased, with the projection's variance.
      references: further example sets; each adds a column of scores on the same pass.
      sketch: for ``sketch``; default ``RademacherSketch()`` (K = 8192, seed 0).
      store: a `RowStore` of width ``1 + len(references)``, or None; a second run skips what it holds.
      microbatch, memory_budget: see `gradient_features`; the forward path has no use for them.
      progress: show progress bars; a string is the description of the pass over the pool.

    Raises:
      ConfigError: unknown method.
      NonFiniteError: naming the rows whose score is NaN or infinite.
    """
    sets = [domain_batches, *references]
    if method == "forward":
        means = [mean_gradient(output_fn, params, s, progress=progress is not False) for s in sets]
        scores = directional_scores(output_fn, params, means, pool_batches, rows=rows, store=store, progress=progress)
        return KernelScores(scores, np.array([[tree_dot(a, b) for b in means] for a in means]))
    if method != "sketch":
        raise ConfigError(f"scores: unknown method {method!r}; expected one of {', '.join(METHODS)}")
    sketch = RademacherSketch() if sketch is None else sketch
    options = {"microbatch": microbatch, "memory_budget": memory_budget}
    means = np.stack(
        [mean_features(output_fn, params, s, sketch, progress=progress is not False, **options) for s in sets]
    )
    done = None if store is None else np.asarray(store.done())
    groups = _feature_groups(
        output_fn,
        params,
        iterate(pool_batches, progress, "sketched scores", done),
        sketch,
        group=group_rows(params, memory_budget),
        microbatch=microbatch,
    )
    products = ((index, _product(features, np.asarray(means.T, features.dtype))) for index, features in groups)
    return KernelScores(collect_rows(products, rows=rows, store=store, what="score"), means @ means.T)


@jax.jit
def _product(features: Float[Array, "B K"], means: Float[ArrayLike, "K m"]) -> Float[Array, "B m"]:
    """<phi_j, phi_bar_c> [B, m]."""
    return jnp.matmul(features, means, precision=jax.lax.Precision.HIGHEST)
