"""Kernel scores by directional derivatives: exact, at about twice the cost of a forward pass.

For a kernel k(x, x') = <g(x), g(x')> with g = dF/dtheta, the mean score of a pool example over M domain
examples is

    s_j = 1/M sum_i k(x_i, x_j) = <g_bar, g_j> = d/d eps F(x_j; theta + eps g_bar) at eps = 0,

so one reverse pass per domain batch gives g_bar, and one forward-mode pass per pool batch gives the
scores. No per-example gradient, no projection, no approximation.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from tqdm import tqdm

from ntkjax.errors import UserError
from ntkjax.types import Params, as_pytree_fn, at_least_float32

MAX_BAD_ROWS = 64


class NonFiniteError(UserError):
    """Some rows gave NaN or infinity: ``rows`` lists them. Nothing stands in their place."""

    def __init__(self, what: str, rows: Sequence[int], *, stopped: bool = False):
        self.rows = [int(row) for row in rows]
        shown = ", ".join(map(str, self.rows[:10])) + (", ..." if len(self.rows) > 10 else "")
        super().__init__(
            f"{what} not finite for {'at least ' if stopped else ''}{len(self.rows)} row(s): {shown}. "
            "Expected finite numbers; the model overflows on these rows or its weights are not finite. "
            "Leave the rows out, or use a wider dtype (float32)."
        )


def _real_rows(batch: Any) -> np.ndarray:
    return np.asarray(batch.index)


def iterate(batches: Iterable, progress: bool | str, default: str, done: np.ndarray | None = None) -> Iterator:
    """The batches under a progress bar, without those whose real rows are all ``done`` already."""
    total = len(batches) if hasattr(batches, "__len__") else None  # type: ignore[arg-type]
    description = progress if isinstance(progress, str) else default
    for batch in tqdm(batches, total=total, desc=description, disable=progress is False, unit="batch"):
        index = _real_rows(batch)
        if done is None or not done[index[index >= 0]].all():
            yield batch


class _RowSink:
    """Writes rows by dataset index into an array or a store; keeps what is not finite out of both."""

    def __init__(self, rows: int, store: Any, what: str):
        self.rows, self.store, self.what = rows, store, what
        self.values: np.ndarray | None = None
        self.bad: list[int] = []

    def write(self, index: np.ndarray, values: np.ndarray) -> None:
        real = index >= 0
        index, values = index[real], values[real]
        if index.size and index.max() >= self.rows:
            raise ValueError(f"batch holds row {index.max()}, but rows={self.rows}")
        finite = np.isfinite(values).all(axis=1)
        self.bad += index[~finite].tolist()
        index, values = index[finite], values[finite]
        if self.store is not None:
            self.store.write(index, values)
        else:
            if self.values is None:
                self.values = np.full((self.rows, values.shape[1]), np.nan, values.dtype)
            self.values[index] = values
        if len(self.bad) >= MAX_BAD_ROWS:
            raise NonFiniteError(self.what, self.bad, stopped=True)

    def check(self) -> None:
        if self.bad:
            raise NonFiniteError(self.what, self.bad)

    def result(self) -> np.ndarray:
        self.check()
        if self.store is None:
            if self.values is None:
                raise ValueError(f"no batches to compute the {self.what} of")
            return self.values
        done = np.flatnonzero(self.store.done())
        found = self.store.read(done)
        values = np.full((self.rows, found.shape[1]), np.nan, found.dtype)
        values[done] = found
        return values


def collect_rows(
    results: Iterable[tuple[np.ndarray, Array]],
    *,
    rows: int,
    store: Any = None,
    what: str = "score",
    read: bool = True,
) -> np.ndarray:
    """Gather (index [B], values [B, m]) pairs into [rows, m]; rows never visited are NaN.

    One result stays in flight: batch k is written on the host while the device works on k + 1. With ``read`` False
    the values stay in the store, for what does not fit into memory, and the
    array returned is empty.

    Raises:
      NonFiniteError: some real row is NaN or infinite. The finite rows reach the store first, so that a
        resumed run repeats only the bad ones. It stops early once `MAX_BAD_ROWS` rows are bad.
    """
    sink = _RowSink(rows, store, what)
    in_flight: collections.deque = collections.deque()
    try:
        for index, values in results:
            in_flight.append((index, values))
            if len(in_flight) > 1:
                index, values = in_flight.popleft()
                sink.write(index, np.asarray(values))
        while in_flight:
            index, values = in_flight.popleft()
            sink.write(index, np.asarray(values))
    except BaseException:
        if store is not None:  # keep finished work, but let the first error be the one that is seen
            with contextlib.suppress(UserError):
                store.flush()
        raise
    if store is not None:
        store.flush()
    if not read:
        sink.check()
        return np.empty((0, 0), np.float32)
    return sink.result()


@jax.jit
def _add_gradient(output_fn: Callable, params: Params, batch: Any, total: Params) -> Params:
    """total + sum over real rows of dF/dtheta: one reverse pass."""

    def summed(params: Params) -> Array:
        values = at_least_float32(output_fn(params, batch))
        return jnp.sum(jnp.where(jnp.asarray(batch.index) >= 0, values, jnp.zeros_like(values)))

    gradient = jax.grad(summed)(params)
    return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, gradient)


@jax.jit
def _zero_gradient(params: Params) -> Params:
    return jax.tree.map(lambda p: jnp.zeros_like(at_least_float32(p)), params)


@jax.jit
def _divide(tree: Params, count: Array) -> Params:
    return jax.tree.map(lambda leaf: leaf / count.astype(leaf.dtype), tree)


@jax.jit
def _all_finite(tree: Params) -> Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def mean_gradient(output_fn: Callable, params: Params, batches: Iterable, *, progress: bool | str = False) -> Params:
    """g_bar = 1/M sum_i dF(x_i)/dtheta over the real rows of ``batches`` (filler rows, index -1, do not
    count).

    Args:
      output_fn: ``F(params, batch) -> [B]``.
      params: the trained parameters theta.
      batches: re-iterable batches with ``index`` [B].
      progress: show a progress bar; a string is its description.

    Returns:
      A pytree like ``params`` in at least float32 (accumulated so, whatever the parameters' dtype).

    Raises:
      NonFiniteError: naming the rows of every batch whose gradient is NaN or infinite.
      UserError: there is no example at all.
    """
    output_fn = as_pytree_fn(output_fn)
    total, count = _zero_gradient(params), 0
    for batch in iterate(batches, progress, "mean gradient"):
        total = _add_gradient(output_fn, params, batch, total)
        count += int((_real_rows(batch) >= 0).sum())
    if count == 0:
        raise UserError("mean gradient of no examples: expected at least one row with index >= 0")
    if not _all_finite(total):  # only now look for the culprits, batch by batch
        zero = _zero_gradient(params)
        bad = [b for b in batches if not _all_finite(_add_gradient(output_fn, params, b, zero))]
        rows = [int(row) for batch in bad for row in _real_rows(batch) if row >= 0]
        raise NonFiniteError("gradient (in the batches that hold them)", rows)
    return _divide(total, jnp.asarray(count))


@jax.jit
def directional_derivatives(output_fn: Callable, params: Params, tangents: Params, batch: Any) -> Float[Array, "B m"]:
    """<dF(x_j)/dtheta, u_c> for m stacked ``tangents`` u (leaves [m, ...]): [B, m], one primal pass for all.

    vmap reaches only what depends on the tangent, so the primal pass is unbatched and computed once, and
    nothing is kept for a backward pass.
    """

    def push(tangent: Params) -> Array:
        return jax.jvp(lambda p: at_least_float32(output_fn(p, batch)), (params,), (tangent,))[1]

    return jax.vmap(push, out_axes=1)(tangents)


def stack_tangents(params: Params, tangents: Sequence[Params]) -> Params:
    """Stack directions into one pytree, leaves [m, ...], in the dtypes of ``params`` (as jax.jvp demands)."""
    wanted = jax.tree.structure(params)
    for tangent in tangents:
        if jax.tree.structure(tangent) != wanted:
            raise ValueError(f"a tangent must have the structure of params: {jax.tree.structure(tangent)} != {wanted}")
    return _stack(params, list(tangents))


@jax.jit
def _stack(params: Params, tangents: list[Params]) -> Params:
    return jax.tree.map(lambda p, *ts: jnp.stack([t.astype(p.dtype) for t in ts]), params, *tangents)


def directional_scores(
    output_fn: Callable,
    params: Params,
    tangents: Sequence[Params],
    batches: Iterable,
    *,
    rows: int,
    store: Any = None,
    progress: bool | str = False,
) -> Float[np.ndarray, "rows m"]:
    """s_jc = <u_c, dF(x_j)/dtheta> for every row of ``batches`` and each of m directions u_c.

    Args:
      output_fn: ``F(params, batch) -> [B]``.
      params: theta.
      tangents: m pytrees like ``params``; cast to its dtypes.
      batches: batches with ``index`` [B], the row each result is written to; -1 is a filler.
      rows: size of the dataset that ``index`` counts in.
      store: a `ntkjax.store.RowStore` of width m, or None. Batches whose rows it already holds are skipped.
      progress: show a progress bar; a string is its description.

    Returns:
      [rows, m], float32 or wider. Rows that no batch holds are NaN.

    Raises:
      NonFiniteError: see `collect_rows`.
    """
    output_fn, stacked = as_pytree_fn(output_fn), stack_tangents(params, tangents)
    done = None if store is None else np.asarray(store.done())

    def results() -> Iterator[tuple[np.ndarray, Array]]:
        for batch in iterate(batches, progress, "scores", done):
            yield _real_rows(batch), directional_derivatives(output_fn, params, stacked, batch)

    return collect_rows(results(), rows=rows, store=store, what="score")


@dataclasses.dataclass(frozen=True)
class KernelScores:
    """Mean kernel values of every pool row with each of m example sets.

    Attributes:
      scores: [rows, m]; column 0 is the domain, the others the reference sets, NaN where not computed.
      gram: [m, m] inner products of the sets' mean gradients (estimated from features on the sketch path),
        so that a projection of one mean out of another is a linear combination of columns.
    """

    scores: np.ndarray
    gram: np.ndarray


@jax.jit
def _dots(a: Params, b: Params) -> list[Array]:
    dot = lambda x, y: jnp.vdot(x, y, precision=jax.lax.Precision.HIGHEST)
    return jax.tree.leaves(jax.tree.map(dot, a, b))


def tree_dot(a: Params, b: Params) -> float:
    """<a, b> over all leaves, the leaves' products summed in float64 on the host."""
    return float(sum(float(dot) for dot in jax.device_get(_dots(a, b))))
