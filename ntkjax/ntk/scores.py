"""Kernel scores by directional derivatives: exact, at about twice the cost of a forward pass.

For a kernel k(x, x') = <g(x), g(x')> the mean score of a pool example over M domain examples is

    s_j = 1/M sum_i k(x_i, x_j) = <g_bar, g_j> = d/d eps F(x_j; theta + eps g_bar) at eps = 0   (one output F)

so one reverse pass per domain batch gives g_bar, and one forward-mode pass per pool batch gives the scores. No
per-example gradient, no projection, no approximation. A kernel of m outputs has m tangents on one primal pass.

F is differentiated in its form for forward mode alone, where it has one (`ntkjax.types.forward_mode`).

Every further direction costs a tangent, about a forward pass. From `MANY` directions on, a gradient for
each example and its product with all of them is cheaper: its cost does not grow with their number, and it is as exact.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ntkjax.ahead import Program
from ntkjax.errors import ConfigError, UserError
from ntkjax.ntk.features import feature_products, gradient_features, mean_features
from ntkjax.ntk.gram import contract
from ntkjax.ntk.kernel import Kernel, as_kernel
from ntkjax.ntk.rows import Bar, NonFiniteError, Pass, Progress, alone, bar_of, iterate, one_a_row, real_rows
from ntkjax.ntk.sketch import RademacherSketch, Sketch
from ntkjax.tangents import stacked_jvp
from ntkjax.types import Params, as_pytree_fn, at_least_float32, forward_mode

MANY = 4  # directions: experiments/bench_score.py measures both ways
MAX_TANGENTS = 16  # on one primal pass; more are taken in turns, so that memory does not grow with m


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Direction:
    """A direction u in the feature space of a kernel of m outputs; g_bar is one.

    Attributes:
      outputs: like the parameters, leaves [m, ...]: the part for each output, at least float32.
      head: [D], the part for sqrt(c_h) h; None where the head is held fixed.
    """

    outputs: Any
    head: Any = None


@jax.jit
def add_direction(kernel: Kernel, params: Params, batch: Any, total: Direction) -> Direction:
    """total + sum over real rows of g(x): one forward and m reverse passes."""
    real = jnp.asarray(batch.index) >= 0

    def summed(params: Params) -> Array:
        values = kernel.outputs(params, batch)
        return jnp.sum(jnp.where(real[:, None], values, jnp.zeros_like(values)), axis=0)

    values, pull = jax.vjp(summed, params)
    # One output after the other, from one forward pass: pulled back together (vmap), m outputs would hold m times the
    # cotangents of a backward pass.
    gradients = jax.lax.map(lambda v: pull(v)[0], jnp.eye(len(values), dtype=values.dtype))
    head = kernel.head_features(params, batch)
    if head is not None:
        head = jnp.sum(jnp.where(real[:, None], head, jnp.zeros_like(head)), axis=0)
    return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, Direction(gradients, head))


@jax.jit
def zero_direction(kernel: Kernel, params: Params, batch: Any) -> Direction:
    """0 in the kernel's feature space, whose shape ``batch`` gives."""
    values = jax.eval_shape(kernel.outputs, params, batch)
    leaf = lambda p: jnp.zeros((values.shape[1], *p.shape), at_least_float32(p).dtype)
    head = jax.eval_shape(kernel.head_features, params, batch)
    return Direction(jax.tree.map(leaf, params), None if head is None else jnp.zeros(head.shape[1:], head.dtype))


@jax.jit
def _divide(tree: Any, count: Array) -> Any:
    return jax.tree.map(lambda leaf: leaf / count.astype(leaf.dtype), tree)


@jax.jit
def _all_finite(tree: Any) -> Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def mean_direction(
    kernel: Kernel | Callable, params: Params, batches: Iterable, *, progress: Progress = False
) -> Direction:
    """g_bar = 1/M sum_i g(x_i) over the real rows of ``batches`` (filler rows, index -1, do not count).

    Args:
      kernel: a `Kernel`, or ``F(params, batch) -> [B]`` or ``[B, m]``.
      params: the trained parameters theta.
      batches: re-iterable batches with ``index`` [B].
      progress: show a progress bar; a string is its description.

    Returns:
      A `Direction` in at least float32 (accumulated so, whatever the parameters' dtype).

    Raises:
      NonFiniteError: naming the rows of every batch whose gradient is NaN or infinite.
      UserError: there is no example at all.
    """
    kernel, total, zero, count = as_kernel(kernel), None, None, 0
    for batch in iterate(batches, progress, "mean gradient"):
        if total is None:
            total = zero = zero_direction(kernel, params, batch)
        before, total = total, add_direction(kernel, params, batch, total)
        jax.block_until_ready(before)  # one batch in flight: what is told of the pass is not ahead of it
        count += int((real_rows(batch) >= 0).sum())
    if count == 0:
        raise UserError("mean gradient of no examples: expected at least one row with index >= 0")
    if not _all_finite(total):  # only now look for the rows, batch by batch
        bad = [b for b in batches if not _all_finite(add_direction(kernel, params, b, zero))]
        rows = [int(row) for batch in bad for row in real_rows(batch) if row >= 0]
        raise NonFiniteError("gradient (in the batches that hold them)", rows)
    return _divide(total, jnp.asarray(count))


def mean_gradient(output_fn: Callable, params: Params, batches: Iterable, *, progress: Progress = False) -> Params:
    """g_bar = 1/M sum_i dF(x_i)/dtheta of one output ``F(params, batch) -> [B]``: a pytree like ``params``.

    The case m = 1 of `mean_direction`, which see.
    """
    mean = mean_direction(output_fn, params, batches, progress=progress)
    return jax.tree.map(lambda leaf: leaf[0], mean.outputs)


@jax.jit
def directional_derivatives(output_fn: Callable, params: Params, tangents: Params, batch: Any) -> Float[Array, "B m"]:
    """<dF(x_j)/dtheta, u_c> for m stacked ``tangents`` u (leaves [m, ...]): [B, m], one primal pass for all.

    Nothing is kept for a backward pass. `MAX_TANGENTS` of them share a primal pass.
    """

    output_fn = forward_mode(output_fn)

    def push(tangent: Params) -> Array:
        return jax.jvp(lambda p: at_least_float32(output_fn(p, batch)), (params,), (tangent,))[1]

    return _in_turns(push, (tangents,)).T


@jax.jit
def score_batch(kernel: Kernel, params: Params, stacked: Direction, batch: Any) -> Float[Array, "*B R"]:
    """<u_r, g(x_j)> for R stacked directions: R m tangents, `MAX_TANGENTS` of them on a primal pass.

    Of a kernel by position (`Kernel.before_pooling`) the parts of the scores at every position, [R, T, R].
    """

    pushed = forward_mode(kernel)

    def push(tangent: Params, column: Array) -> Float[Array, "*B"]:
        moved = jax.jvp(lambda p: pushed.outputs(p, batch), (params,), (tangent,))[1]
        return jnp.take(moved, column, axis=-1)

    sets, m = jax.tree.leaves(stacked.outputs)[0].shape[:2]
    # R sets of m parts are R m tangents. Of what the part of u_r for output c moves, only output c counts; the sum over
    # the m parts of a set is the score along it.
    columns = jnp.tile(jnp.arange(m), sets)
    tangents = jax.tree.map(lambda u, p: u.astype(p.dtype).reshape(-1, *p.shape), stacked.outputs, params)
    moved = _in_turns(push, (tangents, columns))
    scores = jnp.moveaxis(moved.reshape(sets, m, *moved.shape[1:]).sum(axis=1), 0, -1)
    head = kernel.head_features(params, batch)
    if head is None:
        return scores
    # The head's own term is an inner product of features that are there already, and needs no tangent.
    return scores + jnp.matmul(head, stacked.head.T, precision=jax.lax.Precision.HIGHEST).astype(scores.dtype)


def _in_turns(push: Callable[..., Array], stacked: tuple) -> Float[Array, "n *B"]:
    """``push`` on n ``stacked`` arguments, `MAX_TANGENTS` at a time."""
    count = len(jax.tree.leaves(stacked)[0])
    turns, rest = divmod(count, MAX_TANGENTS)
    parts = []
    if turns:
        # The turns of full size are one loop, whose body is compiled once; what is left over is compiled beside it.
        whole = jax.tree.map(lambda x: x[: count - rest].reshape(turns, MAX_TANGENTS, *x.shape[1:]), stacked)
        pushed = jax.lax.map(lambda args: stacked_jvp(push, args), whole)
        parts.append(pushed.reshape(count - rest, *pushed.shape[2:]))
    if rest:
        parts.append(stacked_jvp(push, jax.tree.map(lambda x: x[count - rest :], stacked)))
    return jnp.concatenate(parts)


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
    rows: int | Pass,
) -> Float[np.ndarray, "rows m"]:
    """s_jc = <u_c, dF(x_j)/dtheta> for every row of ``batches`` and each of m directions u_c of one output F.

    Args:
      output_fn: ``F(params, batch) -> [B]``.
      params: theta.
      tangents: m pytrees like ``params``; cast to its dtypes.
      batches: batches with ``index`` [B], the row each result is written to; -1 is a filler.
      rows: size of the dataset that ``index`` counts in, or a `Pass`; its store has width m.

    Returns:
      [rows, m], float32 or wider. Rows that no batch holds are NaN.

    Raises:
      NonFiniteError: see `ntkjax.ntk.rows.collect_rows`.
    """
    output_fn, stacked, run = as_pytree_fn(output_fn), stack_tangents(params, tangents), Pass.of(rows)

    def of(batches: Iterable) -> Iterator[tuple[np.ndarray, Array]]:
        return ((real_rows(batch), directional_derivatives(output_fn, params, stacked, batch)) for batch in batches)

    return run.collect(of(run.over(batches, "scores")), what="score", again=alone(batches, of, run.rows))


def scores_along(
    kernel: Kernel | Callable,
    params: Params,
    directions: Sequence[Direction],
    batches: Iterable,
    *,
    rows: int | Pass,
) -> Float[np.ndarray, "rows R"]:
    """s_jr = <u_r, g(x_j)> = sum_c <u_rc, grad F_c(x_j)> + <u_r,head, sqrt(c_h) h(x_j)> for R `Direction` u_r.

    R < `MANY`: forward mode, the R m tangents share their primal pass. Otherwise the gradient of every example, as many
    of them at a time as fit in the memory budget of the `Pass`; its backward pass needs the memory that
    `mean_direction`'s does. See `directional_scores` for the other arguments and the errors.
    """
    kernel, run = as_kernel(kernel), Pass.of(rows)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *directions)
    if len(directions) >= MANY:
        run = dataclasses.replace(run, progress=bar_of(run.progress, "scores"))
        return gradient_features(kernel, params, batches, InnerProducts(stacked), rows=run)

    def of(batches: Iterable) -> Iterator[tuple[np.ndarray, Array]]:
        return ((real_rows(batch), score_batch(kernel, params, stacked, batch)) for batch in batches)

    return run.collect(of(run.over(batches, "scores")), what="score", again=alone(batches, of, run.rows))


def score_programs(
    kernel: Kernel | Callable, params: Params, sets: Sequence[Iterable], pool_batches: Iterable
) -> Iterator[Program]:
    """The programs of `kernel_scores` with a `ForwardScorer` for a few example ``sets``: the mean gradient of each, and
    the scores; of the first batch where they differ in shape. ``params`` and the kernel count by shape alone."""
    kernel = as_kernel(kernel)

    def zero(batch: Any) -> Direction:
        return jax.eval_shape(zero_direction, kernel, params, batch)

    def score() -> jax.stages.Lowered:
        batch = next(iter(pool_batches))
        stacked = lambda leaf: jax.ShapeDtypeStruct((len(sets), *leaf.shape), leaf.dtype)
        return score_batch.lower(kernel, params, jax.tree.map(stacked, zero(batch)), batch)

    def gradient(examples: Iterable) -> jax.stages.Lowered:
        batch = next(iter(examples))
        return add_direction.lower(kernel, params, batch, zero(batch))

    for examples in sets:
        yield Program("mean gradient", functools.partial(gradient, examples))
    yield Program("scores", score)


def scores_by_position(
    kernel: Kernel | Callable,
    params: Params,
    directions: Sequence[Direction],
    batches: Iterable,
    *,
    progress: Progress = False,
) -> Iterator[tuple[int, Float[np.ndarray, "T R"]]]:
    """(row, its scores by position s_jtr [T_j, R]) for every real row of ``batches`` and R `Direction` u_r.

    A score is linear in the output, and the output is a sum over positions F = sum_t F_t, so the pass of `scores_along`
    before that sum gives s_jtr = d/d eps F_t(x_j; theta + eps u_r), and sum_t s_jtr = s_jr. A part moves with every
    weight that acts on positions up to t: it says where the output changes, not which token's weights change it.

    ``kernel`` needs a form before pooling (`ntkjax.types.before_pooling`); ConfigError where it has none. Batches that
    are packed are taken one example a row.

    Raises:
      NonFiniteError: a row whose parts are NaN or infinite.
    """
    apart, lengths = as_kernel(kernel).before_pooling(), lambda batch: np.asarray(batch.lengths)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *directions)
    # One example a row, since a packed row's positions would have to be told apart by example again; and the parts of a
    # row are given out at once, because [T, R] numbers an example are too many to gather.
    for batch in iterate(one_a_row(batches), progress, "scores by token"):
        scores = np.asarray(score_batch(apart, params, stacked, batch))
        for row, length, parts in zip(real_rows(batch).tolist(), lengths(batch).tolist(), scores):
            if row < 0:
                continue
            if not np.isfinite(parts).all():
                raise NonFiniteError("score by token", [row])
            yield row, parts[:length]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ProductsByLeaf:
    """<u, g(x_j)> leaf by leaf, a linear map of gradients like a sketch: for each leaf of theta, in tree order, one
    number, or L where it is ``stacked`` over L layers on axis 0; last the head's own term where the kernel has one.

    Attributes:
      direction: u, leaves [m, ...], head [D].
      stacked: for each leaf whether its axis 0 is kept.
    """

    direction: Direction
    stacked: tuple[bool, ...] = dataclasses.field(metadata={"static": True})

    grouped = False

    def __call__(self, gradients: Params) -> Float[Array, "B K"]:
        def product(g: Array, u: Array, kept: bool) -> Float[Array, "B k"]:
            # Axis 0 of a stacked parameter is the layer; behind the axis of outputs it is axis 1.
            blocks = u.shape[1] if kept else 1
            g, u = (at_least_float32(x) for x in (g, u))
            flat_g, flat_u = g.reshape(*g.shape[:2], blocks, -1), u.astype(g.dtype).reshape(u.shape[0], blocks, -1)
            return jnp.einsum("bmkp,mkp->bk", flat_g, flat_u, precision=jax.lax.Precision.HIGHEST)

        leaves = zip(jax.tree.leaves(gradients["outputs"]), jax.tree.leaves(self.direction.outputs), self.stacked)
        products = [product(*leaf) for leaf in leaves]
        if self.direction.head is not None:
            head = jnp.matmul(gradients["head"], self.direction.head, precision=jax.lax.Precision.HIGHEST)
            products.append(head[:, None].astype(products[0].dtype))
        return jnp.concatenate(products, axis=1)

    def width(self, params: Params) -> int:
        sizes = [leaf.shape[0] if kept else 1 for leaf, kept in zip(jax.tree.leaves(params), self.stacked)]
        return sum(sizes) + (self.direction.head is not None)

    def describe(self) -> dict[str, Any]:
        return {"sketch": "products by leaf"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InnerProducts:
    """Inner products with R given directions, a linear map of gradients like a sketch: K = R.

    Attributes:
      directions: `Direction` with leaves [R, m, ...], head [R, D].
    """

    directions: Direction

    grouped = False

    def __call__(self, gradients: Params) -> Float[Array, "B R"]:
        names = ["outputs"] if self.directions.head is None else ["outputs", "head"]
        return contract([gradients[name] for name in names], [getattr(self.directions, name) for name in names])

    def width(self, params: Params) -> int:
        return len(jax.tree.leaves(self.directions.outputs)[0])

    def describe(self) -> dict[str, Any]:
        return {"sketch": "along directions"}


@dataclasses.dataclass(frozen=True)
class KernelScores:
    """Mean kernel values of every pool row with each of R example sets.

    Attributes:
      scores: [rows, R]; column 0 is the domain, the others the reference sets, NaN where not computed.
      gram: [R, R] inner products of the sets' mean gradients (estimated from features on the sketch path).
      residual: |P x - u| / |u|, the largest over the directions u, where P^-1 u is solved for by iteration; else None.
    """

    scores: np.ndarray
    gram: np.ndarray
    residual: float | None = None

    def contrast(self, reference: int = 1) -> Float[np.ndarray, " rows"]:
        """<g_bar - (<g_bar, p> / <p, p>) p, g_j>: the domain's direction without what it shares with the reference p.

        A projection is linear, so it is a combination of two columns and costs nothing more.
        """
        share = self.gram[0, reference] / self.gram[reference, reference]
        return self.scores[:, 0] - share * self.scores[:, reference]


@runtime_checkable
class Scorer(Protocol):
    """A way from a kernel and example sets to the scores of a pool; frozen, with its own options."""

    def __call__(
        self, kernel: Kernel, params: Params, sets: Sequence[Iterable], pool_batches: Iterable, run: Pass
    ) -> KernelScores:
        """The scores with each of the ``sets``; the store of the `Pass` is as wide as they are many."""
        ...


@dataclasses.dataclass(frozen=True)
class ForwardScorer:
    """Exact: a mean gradient of every set, and one pass in forward mode along all of them (`scores_along`).

    Attributes:
      precondition: P^-1, symmetric, as a function of trees of leaves [c, ...] (see `ntkjax.ntk.precondition`), or None.
        All inner products are then a^T P^-1 b, the Gram matrix's too. One that has ``residual(u, x) -> [c]`` solves by
        iteration, and is asked how well it did.
    """

    precondition: Callable[[Params], Params] | None = None

    def __call__(
        self, kernel: Kernel, params: Params, sets: Sequence[Iterable], pool_batches: Iterable, run: Pass
    ) -> KernelScores:
        """ConfigError: a preconditioner with a trained head whose gradient the kernel does not hold."""
        along, gram, residual = _solved(kernel, params, sets, self.precondition, _of_sets(run))
        return KernelScores(scores_along(kernel, params, along, pool_batches, rows=run), gram, residual)


@dataclasses.dataclass(frozen=True)
class SketchScorer:
    """The paper's: a random projection of every example's gradient; unbiased, with the projection's variance.

    Attributes:
      sketch: the projection.
    """

    sketch: Sketch = RademacherSketch()

    def __call__(
        self, kernel: Kernel, params: Params, sets: Sequence[Iterable], pool_batches: Iterable, run: Pass
    ) -> KernelScores:
        """The Gram matrix is of the sketched means."""
        options = {"microbatch": run.microbatch, "memory_budget": run.memory_budget}
        options |= {"progress": _of_sets(run)}
        means = np.stack([mean_features(kernel, params, examples, self.sketch, **options) for examples in sets])
        scores = feature_products(kernel, params, pool_batches, self.sketch, means, rows=run)
        return KernelScores(scores, means @ means.T)


def _of_sets(run: Pass) -> Bar:
    """How the passes over the sets are watched: as that over the pool, under titles of their own."""
    return dataclasses.replace(bar_of(run.progress), title=None)


def kernel_scores(
    kernel: Kernel | Callable,
    params: Params,
    domain_batches: Iterable,
    pool_batches: Iterable,
    *,
    rows: int | Pass,
    references: Sequence[Iterable] = (),
    scorer: Scorer = ForwardScorer(),
) -> KernelScores:
    """s_j = 1/M sum_i k(x_i, x_j) for every pool row.

    Args:
      kernel: a `Kernel`, or ``F(params, batch) -> [B]`` or ``[B, m]``.
      params: theta.
      domain_batches: re-iterable batches of the M domain examples.
      pool_batches: batches of the pool (or the part of it to score); ``index`` names the row.
      rows: size of the pool, or a `Pass`, which says besides how the pass over the pool runs; its store has width
        ``1 + len(references)``.
      references: further example sets; each adds a column of scores on the same pass.
      scorer: `ForwardScorer` or `SketchScorer`.

    Raises:
      ConfigError: what the scorer cannot do with this kernel.
      NonFiniteError: naming the rows whose score is NaN or infinite.
    """
    return scorer(as_kernel(kernel), params, [domain_batches, *references], pool_batches, Pass.of(rows))


def score_directions(
    kernel: Kernel | Callable,
    params: Params,
    sets: Sequence[Iterable],
    *,
    precondition: Callable[[Params], Params] | None = None,
    progress: Progress = False,
) -> tuple[list[Direction], Float[np.ndarray, "R R"]]:
    """(u_r = P^-1 g_bar_r for each of R example sets, g_bar_r^T P^-1 g_bar_s): along u_r are the scores of set r.

    Arguments and errors as in `kernel_scores` and `ForwardScorer`.
    """
    along, gram, _ = _solved(kernel, params, sets, precondition, progress)
    return along, gram


def _solved(
    kernel: Kernel | Callable, params: Params, sets: Sequence[Iterable], precondition: Any, progress: Progress
) -> tuple[list[Direction], np.ndarray, float | None]:
    """`score_directions`, and the largest residual where they are solved for by iteration (None elsewhere)."""
    means = [mean_direction(kernel, params, examples, progress=progress) for examples in sets]
    along = [_preconditioned(precondition, mean) for mean in means]
    # P^-1 is applied once for each direction; the Gram matrix then costs inner products alone.
    gram = np.array([[tree_dot(a, b) for b in means] for a in along])
    measure = getattr(precondition, "residual", None)
    if measure is None:
        return along, gram, None
    return along, gram, float(max(measure(u.outputs, x.outputs).max() for u, x in zip(means, along)))


def _preconditioned(precondition: Callable[[Params], Params] | None, direction: Direction) -> Direction:
    """P^-1 u."""
    if precondition is None:
        return direction
    if direction.head is not None:
        raise ConfigError(
            "a trained head is part of this kernel in closed form, not as a gradient, so it cannot be preconditioned; "
            "hold the head fixed (lora), or use kernel sum_logits or loss"
        )
    return Direction(_apply(as_pytree_fn(precondition), direction.outputs))


@jax.jit
def _apply(fn: Callable[[Params], Params], tree: Params) -> Params:
    return fn(tree)


@jax.jit
def _dots(a: Any, b: Any) -> list[Array]:
    dot = lambda x, y: jnp.vdot(x, y, precision=jax.lax.Precision.HIGHEST)
    return jax.tree.leaves(jax.tree.map(dot, a, b))


def tree_dot(a: Any, b: Any) -> float:
    """<a, b> over all leaves, the leaves' products summed in float64 on the host."""
    return float(sum(float(dot) for dot in jax.device_get(_dots(a, b))))
