"""(F + lambda I)^-1 u without factors: conjugate gradients on products with the whole Fisher of a domain's loss.

F = 1/M sum_i g_i g_i^T = J^T J / M  [P, P],  J [M, P] the Jacobian of the M examples' losses, is never formed:

    F v = 1/M sum_i g_i (g_i^T v):    J v by one forward-mode product (jax.jvp), J^T (J v) by one reverse (jax.vjp)

It is the Gauss-Newton matrix of the vector of losses, the matrix whose blocks ``kfac`` and ``ekfac`` approximate
(`ntkjax.ntk.precondition`), here with what is between the leaves and without Kronecker products: what they are measured
against. An iteration costs a pass over the domain for every direction. In exact arithmetic at most M + 1 of them are
needed, the number of different eigenvalues of F + lambda I.

Source: Hestenes and Stiefel (1952), by jax.scipy.sparse.linalg.cg; for influence functions Koh and Liang (2017,
arXiv 1703.04730, section 3).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.sparse.linalg import cg
from jaxtyping import Array, Float

from ntkjax.parallel import to_host
from ntkjax.types import Params, as_pytree_fn, at_least_float32, forward_mode


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConjugateGradients:
    """u -> (F + lambda I)^-1 u, to a residual of ``tolerance`` |u| or in ``iterations`` steps, whichever comes first.

    Vectors and sums are in float32 or better; a tangent has the dtype of its parameter. The steps stop by CG's own
    estimate of the residual; what was reached, `residual` says. With unit roundoff e no more than about e (largest
    eigenvalue) |x| / |u| can be reached, which is e P / damping at worst: a direction far from the domain's gradients,
    many parameters and a small damping ask for more than float32 has.

    Attributes:
      loss_fn: ``loss(params, batch) -> [B]``, a pytree.
      params: theta.
      batches: the domain's, those of one shape stacked: lists of leaves [n, ...], one list for each of ``structures``.
      count: M.
      damping: lambda.
    """

    loss_fn: Any
    params: Any
    batches: Any
    count: Any
    damping: Any
    structures: tuple[Any, ...] = dataclasses.field(metadata={"static": True})
    iterations: int = dataclasses.field(metadata={"static": True})
    tolerance: float = dataclasses.field(metadata={"static": True})

    def __call__(self, direction: Params) -> Params:
        """(F + lambda I)^-1 u for a tree of leaves [c, ...], one direction after the other."""
        # One direction after the other: solved together they would all take as many steps as the slowest.
        solve = lambda u: cg(self.product, u, tol=self.tolerance, maxiter=self.iterations)[0]
        return jax.lax.map(solve, direction)

    def product(self, v: Params) -> Params:
        """(F + lambda I) v for one vector, a tree like the parameters."""
        pushed, tangent = forward_mode(self.loss_fn), jax.tree.map(lambda x, p: x.astype(p.dtype), v, self.params)
        total = jax.tree.map(jnp.zeros_like, v)
        for stack, structure in zip(self.batches, self.structures, strict=True):

            def add(total: Params, leaves: list[Array], structure: Any = structure) -> tuple[Params, None]:
                batch = structure.unflatten(leaves)
                real = jnp.asarray(batch.index) >= 0

                def losses(fn: Callable) -> Callable[[Params], Float[Array, " B"]]:
                    values = lambda p: at_least_float32(fn(p, batch))
                    # Fillers are masked in both products: their losses neither move nor are pulled back.
                    return lambda p: jnp.where(real, values(p), jnp.zeros((), values(p).dtype))

                moved = jax.jvp(losses(pushed), (self.params,), (tangent,))[1]
                pulled = jax.vjp(losses(self.loss_fn), self.params)[1](moved)[0]
                return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, pulled), None

            # Batches of one shape are one scan: the program, which CG runs in every step, has one body a shape.
            total = jax.lax.scan(add, total, stack)[0]
        scaled = lambda t, x: t / self.count.astype(t.dtype) + self.damping.astype(x.dtype) * x
        return jax.tree.map(scaled, total, v)

    def residual(self, direction: Params, solution: Params) -> Float[np.ndarray, " c"]:
        """|(F + lambda I) x - u| / |u| for each of the c directions, 0 where u = 0: measured, not CG's own estimate."""
        return to_host(_residual(self, direction, solution)).astype(np.float64)


@jax.jit
def _residual(solver: ConjugateGradients, direction: Params, solution: Params) -> Float[Array, " c"]:
    def of_one(pair: tuple[Params, Params]) -> Float[Array, ""]:
        u, x = pair
        square = lambda tree: sum(jnp.sum(leaf * leaf) for leaf in jax.tree.leaves(tree))
        off, size = square(jax.tree.map(jnp.subtract, solver.product(x), u)), square(u)
        return jnp.where(size > 0, jnp.sqrt(off / jnp.where(size > 0, size, jnp.ones_like(size))), jnp.zeros_like(size))

    return jax.lax.map(of_one, (direction, solution))


def conjugate_gradients(
    loss_fn: Callable,
    params: Params,
    batches: Iterable,
    *,
    count: int,
    damping: float,
    iterations: int,
    tolerance: float,
) -> ConjugateGradients:
    """The solver of the M = ``count`` real rows of ``batches``, which it holds on the device; ``damping``: lambda."""
    stacks: dict[Any, list[list[np.ndarray]]] = {}
    for batch in batches:
        leaves, structure = jax.tree.flatten(batch)
        leaves = [to_host(leaf) for leaf in leaves]
        stacks.setdefault((structure, tuple((leaf.shape, leaf.dtype.name) for leaf in leaves)), []).append(leaves)
    stacked = [[jnp.asarray(np.stack(leaf)) for leaf in zip(*alike)] for alike in stacks.values()]
    return ConjugateGradients(
        as_pytree_fn(loss_fn),
        params,
        stacked,
        jnp.asarray(count),
        jnp.asarray(damping),
        tuple(structure for structure, _ in stacks),
        iterations,
        tolerance,
    )
