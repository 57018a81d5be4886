"""The two compiled functions of training: one optimiser step, one evaluation batch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from ntkjax.parallel import keep_shardings, spread
from ntkjax.training.loss_reweighting import LossReweighting
from ntkjax.training.objective import response_counts, token_mean_weights
from ntkjax.training.optimiser import AdamW
from ntkjax.types import Batch, Params, at_least_float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Parameters in at least float32 (the master copy) and the optimiser's state."""

    params: Params
    opt_state: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """Of one step: loss (nats per response token, whatever the examples weigh), gradient norm before clipping, NLL
    [B], response tokens [B], and the weights of the examples [B], which sum to 1."""

    loss: Array
    grad_norm: Array
    nll: Array
    counts: Array
    weights: Array


def init_state(params: Params, optimiser: AdamW) -> TrainState:
    """A state that owns its buffers (the step donates them), so that the caller's ``params`` stay usable."""
    with jax.numpy_dtype_promotion("standard"):
        master = jax.tree.map(lambda leaf: jnp.array(at_least_float32(leaf), copy=True), params)
    return TrainState(master, optimiser.init(master))


def on_mesh(state: TrainState, mesh: jax.sharding.Mesh | None) -> tuple[TrainState, tuple | None]:
    """(state, shardings of its leaves): what does not lie on ``mesh`` yet is copied to all of its devices.

    Left to itself the compiler would give the new state another layout than the old one had, and every second step of
    a run would be another program.
    """
    if mesh is None:
        return state, None
    everywhere = NamedSharding(mesh, PartitionSpec())
    placed = lambda x: x if isinstance(x.sharding, NamedSharding) else spread(x, everywhere)
    state = jax.tree.map(placed, state)
    return state, tuple(leaf.sharding for leaf in jax.tree.leaves(state))


def master_dtype(params: Params) -> jnp.dtype:
    """The widest dtype of the master copy: float32, or float64 where double precision is on."""
    return max((leaf.dtype for leaf in jax.tree.leaves(params)), key=lambda dtype: dtype.itemsize)


def cast_like(params: Params, dtypes: tuple[str, ...]) -> Params:
    """The parameters in the dtypes the model was given in, leaf by leaf in tree order."""
    leaves, treedef = jax.tree.flatten(params)
    return treedef.unflatten([leaf.astype(dtype) for leaf, dtype in zip(leaves, dtypes, strict=True)])


def leaf_dtypes(params: Params) -> tuple[str, ...]:
    """Names of the dtypes of the leaves, in tree order: what :func:`cast_like` takes."""
    return tuple(jnp.asarray(leaf).dtype.name for leaf in jax.tree.leaves(params))


_STATIC = ("optimiser", "accumulation", "dtypes", "shardings", "reweighting")


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames=("state",))
def train_step(
    nll_fn: Callable,
    state: TrainState,
    batch: Batch,
    learning_rate: float | Array,
    *,
    optimiser: AdamW,
    accumulation: int,
    dtypes: tuple[str, ...],
    shardings: tuple | None = None,
    reweighting: LossReweighting | None = None,
    used: Array | np.integer | None = None,
) -> tuple[TrainState, StepMetrics]:
    """theta <- AdamW(theta, grad sum_i w_i nll_i(theta)), w_i = |S_i| / sum_j |S_j| over the whole batch, or the
    weights of ``reweighting``.

    ``batch`` holds ``accumulation * b`` rows; micro-batch i is rows i, i + accumulation, ..., so that a batch
    sharded over devices needs no exchange of rows; of packed rows each brings its slots. Gradients are summed in the
    dtype of the master copy. ``used``: so many micro-batches, the first ones, hold examples, and are computed (None:
    all); a number that changes from step to step without another program.
    ``shardings``: of the state's leaves, in tree order; the new state keeps them (see `on_mesh`).
    """
    counts, dtype = response_counts(batch), master_dtype(state.params)
    token_mean = token_mean_weights(counts, dtype)

    def nll_of(master: Params, micro: Batch) -> Array:
        # Cast inside the differentiated function: the model computes in its own dtype, and its gradient comes back in
        # that of the master copy.
        return nll_fn(cast_like(master, dtypes), micro).astype(dtype)

    def loss_fn(master: Params, rows: tuple[Batch, Array]) -> tuple[Array, tuple[Array, Array]]:
        micro, w = rows
        nll = nll_of(master, micro)
        if reweighting is not None and accumulation == 1:
            w = reweighting.weights(nll, counts)  # the whole batch is here: its losses need no pass of their own
        return jnp.sum(w * nll), (nll, w)

    weights = token_mean
    # The weights of an example depend on all losses of the batch: with several micro-batches these come first.
    if reweighting is not None and accumulation > 1:
        weights = reweighting.weights(_in_pieces(nll_of, state.params, batch, accumulation, used), counts)
    (_, (nll, weights)), grads = _accumulate(loss_fn, state.params, (batch, weights), accumulation, used)
    metrics = StepMetrics(jnp.sum(token_mean * nll), optax.global_norm(grads), nll, counts, weights)
    # The weights w sum to 1 over the whole batch, so the sum of the micro-batches' gradients is its gradient; a mean
    # over micro-batches would weigh tokens by how long the other examples of theirs are.
    new = TrainState(*optimiser.step(state.params, grads, state.opt_state, learning_rate))
    return keep_shardings(new, shardings), metrics


def _accumulate(
    loss_fn: Callable, params: Params, rows: tuple[Batch, Array], accumulation: int, used: Any = None
) -> tuple:
    """((sum of losses, what ``loss_fn`` gives for each example), sum of gradients) over the micro-batches, the examples
    back in their order."""
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    if accumulation == 1:
        return value_and_grad(params, rows)

    def one(micro: tuple[Batch, Array]) -> tuple:
        (loss, by_row), grads = value_and_grad(params, micro)
        return (loss, grads), by_row

    (loss, grads), by_row = _over_micro_batches(one, rows, rows[0], accumulation, used)
    return (loss, by_row), grads


def _in_pieces(row_fn: Callable, params: Params, batch: Batch, accumulation: int, used: Any = None) -> Array:
    """``row_fn(params, batch) -> [B]`` computed micro-batch after micro-batch."""
    return _over_micro_batches(lambda micro: ((), row_fn(params, micro)), batch, batch, accumulation, used)[1]


def _over_micro_batches(fn: Callable, tree: Any, batch: Batch, accumulation: int, used: Any) -> tuple[Any, Any]:
    """``fn(micro-batch of the tree) -> (terms, by example)``: the sum of the terms, and the others [B] in the order of
    the batch; of micro-batches beyond ``used`` they are 0."""
    # As a list of leaves: cut into micro-batches they are no batch, which is [B, ...].
    leaves, treedef = jax.tree.flatten(tree)
    rows = batch.tokens.shape[0]
    split = [_split(leaf, accumulation, rows) for leaf in leaves]
    of = lambda i: treedef.unflatten([jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False) for leaf in split])
    zero, shapes = jax.eval_shape(lambda: fn(of(0)))
    zeros = lambda leaf, *more: jnp.zeros((*more, *leaf.shape), leaf.dtype)
    start = (jax.tree.map(zeros, zero), jax.tree.map(lambda leaf: zeros(leaf, accumulation), shapes))

    def add(i: Array, carry: tuple) -> tuple:
        total, kept = carry
        terms, by_row = fn(of(i))
        put = lambda all_of, own: jax.lax.dynamic_update_index_in_dim(all_of, own, i, 0)
        return jax.tree.map(jnp.add, total, terms), jax.tree.map(put, kept, by_row)

    # The bound may be traced (``used``): reverse mode could not go through such a loop, and need not, as gradients are
    # taken inside it.
    total, kept = jax.lax.fori_loop(0, accumulation if used is None else used, add, start)
    return total, jax.tree.map(lambda leaf: _join(leaf, rows), kept)


def _split(x: Array, accumulation: int, rows: int) -> Array:
    """[rows s, ...] -> [A, rows s / A, ...], micro-batch i being rows i, i + A, ... with the s examples of each."""
    x = x.reshape(rows // accumulation, accumulation, x.shape[0] // rows, *x.shape[1:])
    x = jnp.swapaxes(x, 0, 1)
    return x.reshape(accumulation, -1, *x.shape[3:])


def _join(x: Array, rows: int) -> Array:
    """[A, rows s / A] -> [rows s]: the inverse of :func:`_split`."""
    accumulation = x.shape[0]
    return jnp.swapaxes(x.reshape(accumulation, rows // accumulation, -1), 0, 1).reshape(-1)


def used_micro_batches(batch: Batch, accumulation: int) -> np.int32 | None:
    """How many micro-batches, the first ones, hold the examples of a packed batch; None where rows are padded."""
    if batch.examples is None:
        return None
    held = np.asarray(batch.index).reshape(-1, accumulation, len(batch.index) // len(batch.tokens)) >= 0
    return np.int32(1 + np.flatnonzero(held.any(axis=(0, 2))).max(initial=0))


@functools.partial(jax.jit, static_argnames=("dtypes",))
def eval_step(
    nll_fn: Callable, params: Params, batch: Batch, *, dtypes: tuple[str, ...]
) -> tuple[Float[Array, " B"], Int[Array, " B"]]:
    """(NLL [B] in at least float32, response tokens [B]) of one batch under the master parameters."""
    nll = nll_fn(cast_like(params, dtypes), batch).astype(master_dtype(params))
    return nll, response_counts(batch)
