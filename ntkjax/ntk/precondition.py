"""Preconditioned directions: s_j = <P^-1 g_bar, g_j>, from the same forward-mode pass.

Whatever is linear in g_j is one directional derivative, so an influence function or an Adam-weighted alignment changes
the direction and nothing else: P is estimated once on the domain, P^-1 g_bar takes the place of g_bar. Every P here is
made of the gradients g_i of the domain's loss, one for each of the M examples (mean NLL of its response), so it
depends neither on how the examples are batched nor on any layer's structure:

``adam``   P = diag(sqrt(v)) + eps,  v = g_bar^2 + (1/M sum_i g_i^2 - g_bar^2) / n        (elementwise)

           v is the expected square of the mean gradient of n examples drawn with replacement: what Adam's second moment
           settles at, at fixed theta, when training in batches of n. (n = 1: the diagonal of the empirical Fisher.)

``kfac``   P = H + lambda I,  H = block diagonal of (L x R) / t over the matrices G [m, n] of theta,
           L = 1/M sum_i G_i G_i^T,  R = 1/M sum_i G_i^T G_i,  t = 1/M sum_i |G_i|^2

           a Kronecker-factored empirical Fisher (Gauss-Newton for a likelihood) 1/M sum_i g_i g_i^T. Where a block of
           that is some A x S, then L = A tr S, R = S tr A, t = tr A tr S, and H is the block itself; elsewhere it is
           one step of the power iteration to the nearest Kronecker product (the factors of Shampoo; Morwani et al.,
           2024, arXiv 2406.17748). K-FAC proper takes A from a layer's inputs and S from its output gradients, token
           by token; these factors need only per-example gradients, which any function (params, batch) has, and count
           what the tokens of an example have in common. A vector is a matrix of one row: its block is exact.

``ekfac``  P = H + lambda I,  H = block diagonal of (U_L x U_R) diag(s) (U_L x U_R)^T,  U_L [m, m], U_R [n, n] the
           eigenvectors of the same L and R,  s_ab = 1/M sum_i (U_L^T G_i U_R)_ab^2  [m, n]

           the eigenvalues l_a r_b / t of ``kfac`` measured anew in its own eigenbasis, from one more pass over the
           gradients (EK-FAC: George et al., 2018, arXiv 1806.03884, section 3; U there of K-FAC's A and S). s is the
           diagonal of the Fisher's block in that basis, so H is, of all matrices that are diagonal in it, the nearest
           to the block in Frobenius norm, K-FAC's among them; it is the block itself where that is diagonal in it. Its
           trace is that of ``kfac``: 1/M sum_i |G_i|^2.

``cg``     P = F + lambda I,  F = 1/M sum_i g_i g_i^T, whole, by conjugate gradients (`ntkjax.ntk.conjugate`): what
           the two above are measured against, at a pass over the domain for each iteration and direction

The inverse is that of H + lambda I itself, in the eigenbasis of both factors: (U_L x U_R) diag(1 / (l r / t + lambda))
(U_L x U_R)^T, not of the factored damping (A + pi sqrt(lambda) I) x (S + sqrt(lambda) / pi I) that K-FAC inverts.
lambda = ``damping`` x tr H / P, the mean curvature over all P trained parameters.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ntkjax.errors import ConfigError, UserError
from ntkjax.ntk.conjugate import ConjugateGradients, conjugate_gradients
from ntkjax.ntk.features import group_rows, per_example_gradients, pieces
from ntkjax.ntk.rows import NonFiniteError, Progress, iterate, one_a_row, real_rows
from ntkjax.parallel import to_host
from ntkjax.types import Params, as_pytree_fn

PreconditionerName = Literal["none", "adam", "kfac", "ekfac", "cg"]
PASSES: dict[str, int] = {"none": 0, "adam": 1, "kfac": 1, "ekfac": 2, "cg": 1}
"""How often each of them takes the gradients of the domain's examples, before any direction is solved for."""
CG_ITERATIONS = 100
CG_TOLERANCE = 1e-3
ADAM_BATCH, ADAM_EPS = 16, 1e-8  # the batch size of training; Adam's own epsilon
DAMPING = 0.1
MAX_SIDE = 4096  # a longer side of a matrix (a vocabulary, say) has a diagonal factor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdamPreconditioner:
    """u -> u / (sqrt(v) + eps) elementwise.

    Attributes:
      second: v, a pytree like the parameters.
    """

    second: Any
    eps: Any = ADAM_EPS

    def __call__(self, direction: Params) -> Params:
        """P^-1 u for a tree of leaves [c, ...], c directions at a time."""
        return jax.tree.map(lambda u, v: u / (jnp.sqrt(v) + self.eps)[None].astype(u.dtype), direction, self.second)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KroneckerPreconditioner:
    """u -> (H + lambda I)^-1 u, H block diagonal, each block held as eigenvalues and eigenvectors.

    Attributes:
      blocks: one `Block` for each leaf of the parameters, in tree order.
      damping: lambda.
    """

    blocks: Any
    damping: Any

    def __call__(self, direction: Params) -> Params:
        """P^-1 u for a tree of leaves [c, ...], c directions at a time."""
        leaves, structure = jax.tree.flatten(direction)
        return structure.unflatten([block.solve(leaf, self.damping) for block, leaf in zip(self.blocks, leaves)])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Block:
    """H of the s matrices [m, n] of a leaf.

    Attributes:
      curvature: its eigenvalues [s, m, n], l_a r_b / t or those of ``ekfac``.
      vectors: U_L [s, m, m] and U_R [s, n, n], columns; None for a side with a diagonal factor (U = I).
    """

    curvature: Any
    vectors: tuple[Any, Any]

    def solve(self, u: Float[Array, "c ..."], damping: Float[Array, ""]) -> Float[Array, "c ..."]:
        """(H + lambda I)^-1 u."""
        turned = _turn(u.reshape(u.shape[0], *self.curvature.shape), *self.vectors, inverse=False)
        # Into the eigenbasis, where H + lambda I is diagonal, divided, and back.
        turned = turned / (self.curvature + damping)[None].astype(u.dtype)
        return _turn(turned, *self.vectors, inverse=True).reshape(u.shape)


def _turn(u: Float[Array, "c s m n"], a: Any, b: Any, *, inverse: bool) -> Float[Array, "c s m n"]:
    """A^T u B, or A u B^T; a side that is None stays."""
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    if a is not None:
        u = product("smk,cskn->csmn" if inverse else "skm,cskn->csmn", a.astype(u.dtype), u)
    if b is not None:
        u = product("csmk,snk->csmn" if inverse else "csmk,skn->csmn", u, b.astype(u.dtype))
    return u


def _as_matrices(leaf: Float[Array, "B ..."]) -> Float[Array, "B s m n"]:
    return leaf.reshape(leaf.shape[0], -1, *(1, 1, *leaf.shape[1:])[-2:])


def _factor(matrices: Float[Array, "B s m n"], side: int, max_side: int) -> Float[Array, "..."]:
    """sum_i G_i G_i^T [s, m, m] (side 0) or sum_i G_i^T G_i [s, n, n] (side 1); only its diagonal where it is long."""
    if matrices.shape[2 + side] > max_side:
        # The diagonal: squares summed over the examples and the other side, [B, s, m, n] without axis 0 and 3 (2).
        return jnp.sum(matrices * matrices, axis=(0, 3 - side))
    equation = ("bsmk,bsnk->smn", "bskm,bskn->smn")[side]
    return jnp.einsum(equation, matrices, matrices, precision=jax.lax.Precision.HIGHEST)


def _adam_sums(gradients: Params, basis: None) -> dict[str, Params]:
    over = lambda f: jax.tree.map(lambda g: jnp.sum(f(g), axis=0), gradients)
    return {"first": over(lambda g: g), "second": over(lambda g: g * g)}


def _cg_sums(gradients: Params, basis: None) -> list[Float[Array, ""]]:
    return [jnp.sum(g * g) for g in jax.tree.leaves(gradients)]


def _kfac_sums(gradients: Params, basis: None, max_side: int) -> list[list[Array]]:
    matrices = [_as_matrices(leaf) for leaf in jax.tree.leaves(gradients)]
    return [[_factor(g, side, max_side) for side in (0, 1)] for g in matrices]


def _ekfac_sums(gradients: Params, basis: list[tuple[Any, Any]]) -> list[Float[Array, "s m n"]]:
    """sum_i (U_L^T G_i U_R)^2 of every leaf."""
    matrices = [_as_matrices(leaf) for leaf in jax.tree.leaves(gradients)]
    turned = [_turn(g, *vectors, inverse=False) for g, vectors in zip(matrices, basis, strict=True)]
    return [jnp.sum(g * g, axis=0) for g in turned]


@functools.partial(jax.jit, static_argnames="sums")
def _sum_batch(sums: Callable, basis: Any, loss_fn: Callable, params: Params, batch: Any) -> tuple[Any, Array]:
    """(sums over the real rows' gradients, whether all of them are finite)."""
    gradients, real = per_example_gradients(loss_fn, params, batch), jnp.asarray(batch.index) >= 0
    # By where, not by a factor: a filler row's gradient may be NaN, and 0 times NaN is NaN.
    mask = lambda g: jnp.where(real.reshape(-1, *(1,) * (g.ndim - 1)), g, jnp.zeros((), g.dtype))
    total = sums(jax.tree.map(mask, gradients), basis)
    return total, jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(total)]).all()


@jax.jit
def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


@functools.cache
def _kfac_sums_up_to(max_side: int) -> Callable:
    return functools.partial(_kfac_sums, max_side=max_side)


def _mean_over(
    sums: Callable,
    loss_fn: Callable,
    params: Params,
    batches: Iterable,
    memory_budget: int,
    progress: Progress,
    basis: Any = None,
) -> Any:
    """1/M of ``sums(gradients, basis)`` over all real rows, the gradients of ``memory_budget`` bytes at a time."""
    loss_fn, total, count, checks = as_pytree_fn(loss_fn), None, 0, []
    for piece in _cut(loss_fn, params, iterate(one_a_row(batches), progress, "curvature"), memory_budget):
        of_piece, finite = _sum_batch(sums, basis, loss_fn, params, piece)
        total = of_piece if total is None else _add(total, of_piece)
        rows = real_rows(piece)
        checks.append((rows[rows >= 0], finite))
        count += len(checks[-1][0])
        if len(checks) > 1:
            jax.block_until_ready(checks[-2][1])  # one batch in flight: what is told of the pass is not ahead of it
    if count == 0:
        raise UserError("curvature of no examples: expected at least one row with index >= 0")
    bad = [row for rows, finite in checks if not finite for row in rows.tolist()]
    if bad:
        raise NonFiniteError("gradient of the loss (in the batches that hold them)", bad)
    return jax.tree.map(lambda leaf: leaf / jnp.asarray(count, leaf.dtype), total)


def _cut(loss_fn: Callable, params: Params, batches: Iterable, memory_budget: int) -> Iterator[Any]:
    for batch in batches:
        shapes = jax.eval_shape(per_example_gradients, loss_fn, params, batch)
        yield from pieces(batch, group_rows(shapes, memory_budget))


def adam(
    loss_fn: Callable,
    params: Params,
    batches: Iterable,
    *,
    batch_size: int = ADAM_BATCH,
    eps: float = ADAM_EPS,
    memory_budget: int = 1 << 30,
    progress: Progress = False,
) -> AdamPreconditioner:
    """The Adam preconditioner (see the module) of ``loss_fn(params, batch) -> [B]`` on ``batches`` with ``index``.

    Args:
      batch_size: n.

    Raises:
      ConfigError: ``batch_size`` below 1.
      NonFiniteError: naming the rows of batches with a gradient that is NaN or infinite.
      UserError: there is no example at all.
    """
    if batch_size < 1:
        raise ConfigError(f"adam: the batch size must be at least 1, got {batch_size}")
    mean = _mean_over(_adam_sums, loss_fn, params, batches, memory_budget, progress)
    # max: a variance of 0 may come out below it by rounding
    variance = jax.tree.map(lambda f, s: jnp.maximum(s - f * f, 0), mean["first"], mean["second"])
    return AdamPreconditioner(jax.tree.map(lambda f, v: f * f + v / batch_size, mean["first"], variance), eps)


def kfac(
    loss_fn: Callable,
    params: Params,
    batches: Iterable,
    *,
    damping: float = DAMPING,
    max_side: int = MAX_SIDE,
    memory_budget: int = 1 << 30,
    progress: Progress = False,
) -> KroneckerPreconditioner:
    """The Kronecker-factored Fisher (see the module) of ``loss_fn(params, batch) -> [B]`` on ``batches``.

    Its factors take 4 (m^2 + n^2) bytes for each m x n matrix, twice that while they are decomposed.

    Args:
      damping: lambda over the mean curvature tr H / P.
      max_side: a longer side of a matrix has a diagonal factor.

    Raises:
      ConfigError: ``damping`` not above 0; no curvature at all (every gradient is 0).
      NonFiniteError, UserError: as for `adam`.
    """
    if not damping > 0:
        raise ConfigError(f"damping must be above 0, got {damping}")
    factors_by_leaf = _mean_over(_kfac_sums_up_to(max_side), loss_fn, params, batches, memory_budget, progress)
    trace = float(sum(np.sum(to_host(_traces(factors[0])).astype(np.float64)) for factors in factors_by_leaf))
    lam = _damping(trace, damping, params)
    return KroneckerPreconditioner([_block(*factors) for factors in factors_by_leaf], jnp.asarray(lam))


def ekfac(
    loss_fn: Callable,
    params: Params,
    batches: Iterable,
    *,
    damping: float = DAMPING,
    max_side: int = MAX_SIDE,
    memory_budget: int = 1 << 30,
    progress: Progress = False,
) -> KroneckerPreconditioner:
    """`kfac` with its eigenvalues measured in its eigenbasis (see the module), from a second pass over ``batches``.

    Source: arXiv 1806.03884, section 3. Open there and chosen by us: damping is relative to the mean curvature, as for
    `kfac`, and lambda is the same number. Both passes are over the same examples.

    Args:
      batches: re-iterable.
      damping, max_side: as for `kfac`; along a side without eigenvectors U is the identity.

    Raises:
      ConfigError, NonFiniteError, UserError: as for `kfac`.
    """
    options = {"memory_budget": memory_budget, "progress": progress}
    first = kfac(loss_fn, params, batches, damping=damping, max_side=max_side, **options)
    basis = [block.vectors for block in first.blocks]
    eigenvalues = _mean_over(_ekfac_sums, loss_fn, params, batches, basis=basis, **options)
    return dataclasses.replace(first, blocks=[Block(s, vectors) for s, vectors in zip(eigenvalues, basis)])


def cg(
    loss_fn: Callable,
    params: Params,
    batches: Iterable,
    *,
    damping: float = DAMPING,
    iterations: int = CG_ITERATIONS,
    tolerance: float = CG_TOLERANCE,
    memory_budget: int = 1 << 30,
    progress: Progress = False,
) -> ConjugateGradients:
    """The whole Fisher (see `ntkjax.ntk.conjugate`) of ``loss_fn(params, batch) -> [B]`` on ``batches``.

    lambda = ``damping`` x tr F / P is the number that it is for `kfac` and `ekfac`; tr F takes a pass of its own.

    Args:
      batches: re-iterable; they are held on the device.
      iterations, tolerance: of each solve: it stops at a residual of ``tolerance`` |u|, or after ``iterations`` steps.

    Raises:
      ConfigError: an option out of range; no curvature at all (every gradient is 0).
      NonFiniteError, UserError: as for `adam`.
    """
    if not (damping > 0 and iterations >= 1 and 0 < tolerance < 1):
        raise ConfigError(
            "cg: expected damping above 0, at least one iteration and a tolerance between 0 and 1; got damping "
            f"{damping}, iterations {iterations}, tolerance {tolerance}"
        )
    batches = list(one_a_row(batches))
    mean = _mean_over(_cg_sums, loss_fn, params, batches, memory_budget, progress)
    lam = _damping(float(sum(float(square) for square in mean)), damping, params)
    count = sum(int((real_rows(batch) >= 0).sum()) for batch in batches)
    return conjugate_gradients(
        loss_fn, params, batches, count=count, damping=lam, iterations=iterations, tolerance=tolerance
    )


def _damping(trace: float, damping: float, params: Params) -> float:
    """lambda = ``damping`` x tr H / P."""
    return _lambda(trace, damping, sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)))


def _lambda(trace: float, damping: float, parameters: int) -> float:
    if trace == 0:
        raise ConfigError("the gradient of the loss is 0 for every example, so there is no curvature to invert")
    return damping * trace / parameters


def _traces(factor: Float[Array, "s ..."]) -> Float[Array, " s"]:
    return jnp.sum(factor if factor.ndim == 2 else jnp.diagonal(factor, axis1=1, axis2=2), axis=1)


@jax.jit
def _block(left: Float[Array, "s ..."], right: Float[Array, "s ..."]) -> Block:
    """Both factors over sqrt(t), decomposed; H = 0 where no gradient ever reached the matrix."""
    trace = _traces(left)
    root = jnp.sqrt(jnp.where(trace > 0, trace, jnp.ones_like(trace)))
    (rows, a), (columns, b) = (_decompose(factor, root) for factor in (left, right))
    # Both factors were divided by sqrt(t), so the products of their eigenvalues are l_a r_b / t.
    return Block(rows[:, :, None] * columns[:, None, :], (a, b))


def _decompose(factor: Float[Array, "s ..."], root: Float[Array, " s"]) -> tuple[Array, Array | None]:
    if factor.ndim == 2:
        return factor / root[:, None], None
    values, vectors = jnp.linalg.eigh(factor / root[:, None, None])
    return jnp.maximum(values, 0), vectors  # a factor is positive semi-definite: below 0 is rounding


def explicit_scores(
    kernel: Float[np.ndarray, "n n"], domain_rows: Int[np.ndarray, " M"], *, damping: float, parameters: int
) -> tuple[Float[np.ndarray, " scored"], float]:
    """(<(F + lambda I)^-1 g_bar, g_j> for every row outside the domain, in order; lambda): what ``cg`` solves for.

    From the kernel matrix of the loss alone, K_ij = <g_i, g_j>, in float64 and without iterations: as
    (J^T J / M + lambda I)^-1 J^T = J^T (J J^T / M + lambda I)^-1 for the Jacobian J [M, P] of the domain,

        s_j = K_jD (K_DD + M lambda I)^-1 1,    lambda = damping x tr F / P,    tr F = tr K_DD / M

    Args:
      kernel: K, symmetric.
      domain_rows: D, the M rows of the domain.
      damping: lambda over tr F / P.
      parameters: P.

    Raises:
      ConfigError: ``damping`` not above 0, or no curvature at all.
    """
    kernel, domain = np.asarray(kernel, np.float64), np.asarray(domain_rows)
    if not damping > 0:
        raise ConfigError(f"damping must be above 0, got {damping}")
    own = kernel[np.ix_(domain, domain)]
    lam, count = _lambda(float(np.trace(own)) / len(domain), damping, parameters), len(domain)
    # The n x n form of the P x P inverse: exact however many parameters there are.
    weights = np.linalg.solve(own + count * lam * np.eye(count), np.ones(count))
    return np.delete(kernel, domain, axis=0)[:, domain] @ weights, lam


def build_preconditioner(
    name: str,
    loss_fn: Callable,
    params: Params,
    batches: Iterable,
    *,
    damping: float = DAMPING,
    iterations: int = CG_ITERATIONS,
    tolerance: float = CG_TOLERANCE,
    progress: Progress = False,
) -> Callable[[Params], Params] | None:
    """The preconditioner of that name, P^-1 as a function of trees of leaves [c, ...]; None for ``none``.

    Raises:
      ConfigError: another name; see `adam`, `kfac`, `ekfac` and `cg` for the rest.
    """
    if name not in get_args(PreconditionerName):
        raise ConfigError(f"precondition is {name!r}; expected one of {', '.join(get_args(PreconditionerName))}")
    if name == "none":
        return None
    if name == "adam":
        return adam(loss_fn, params, batches, progress=progress)
    if name == "cg":
        options = {"iterations": iterations, "tolerance": tolerance}
        return cg(loss_fn, params, batches, damping=damping, progress=progress, **options)
    fit = {"kfac": kfac, "ekfac": ekfac}[name]
    return fit(loss_fn, params, batches, damping=damping, progress=progress)
