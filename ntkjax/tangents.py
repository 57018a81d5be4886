"""Several tangents of one function on one primal pass.

``jax.vmap`` of ``jax.jvp`` over the tangent alone computes the primal pass once, and gives every array that depends on
the tangent one more axis. On a CPU the products of such arrays take half as long again as those of plain ones. A
function wrapped by `unbatched_tangents` is pushed forward once for each tangent instead, in plain arrays; the compiler
finds that the primal passes are one and the same computation, and keeps one. Only ``jax.custom_jvp`` and
``jax.custom_batching.custom_vmap`` are used.

An example. ``jax.vmap(lambda u: jax.jvp(f, (x,), (u,)))(us)`` with x [B, D] and us [m, B, D] meets a wrapped ``f`` as
follows. The rule of ``custom_jvp`` turns the jvp of ``f`` into a call of ``pushed`` on x and u; ``vmap`` meets that
call, and since it is a ``custom_vmap`` asks its rule instead of batching the operations inside. The rule sees that u
has the axis m and x has not, calls ``pushed`` on us[0], ..., us[m - 1], and stacks the m tangents [m, B, D]. The value
is reported as unbatched, so what follows ``f`` in the network computes its primal pass once as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def stacked_jvp(push: Callable[..., Any], stacked: tuple) -> Any:
    """``push(*args)`` for each of m arguments, leaves [m, ...] of ``stacked``; the results' leaves are [m, ...].

    ``push`` is a function of tangents, linear or not. What it computes from other arrays is computed once. It is
    ``jax.vmap(push)(*stacked)``, and for m = 1 without an axis that would slow it down. Raises ValueError where the
    leaves differ in m.
    """
    lengths = [len(leaf) for leaf in jax.tree.leaves(stacked)]
    if len(set(lengths)) != 1:
        raise ValueError(f"stacked tangents: lengths of axis 0 are {lengths}: expected one length")
    if lengths[0] == 1:
        return jax.tree.map(lambda leaf: leaf[None], push(*jax.tree.map(lambda leaf: leaf[0], stacked)))
    return jax.vmap(push)(*stacked)


def unbatched_tangents(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn``, pushed forward once for each tangent where ``jax.vmap`` adds an axis to its tangents alone.

    For forward mode only (`ntkjax.types.forward_mode_only`): JAX cannot transpose it. Arguments and results are
    pytrees; every array that is differentiated must be an argument, and the results floating. The program grows with
    the number of tangents.
    """

    def push(args: tuple, moved: dict[int, Any]) -> tuple[Any, Any]:
        """Value and tangent, ``moved`` the tangents of some of the arguments' leaves by number."""
        # Only the leaves that move are arguments of what is differentiated: the others have no tangent at all, rather
        # than one of zeros that would be multiplied.
        leaves, tree = jax.tree.flatten(args)
        of_moved = lambda values: fn(*tree.unflatten([values.get(i, leaf) for i, leaf in enumerate(leaves)]))
        return jax.jvp(of_moved, ({i: leaves[i] for i in moved},), (moved,))

    pushed = jax.custom_batching.custom_vmap(push)

    @pushed.def_vmap
    def _(size: int, batched: Sequence[Any], args: tuple, moved: dict[int, Any]) -> tuple[Any, Any]:
        if any(jax.tree.leaves(batched[0])):  # the primal pass has the axis too
            axes = jax.tree.map(lambda yes: 0 if yes else None, tuple(batched))
            found = jax.vmap(push, in_axes=axes, axis_size=size)(args, moved)
            return found, jax.tree.map(lambda _: True, found)
        # The i-th tangent of those leaves that have the axis; a tangent without it is the same for every i.
        turn = lambda i: jax.tree.map(lambda yes, leaf: leaf[i] if yes else leaf, batched[1], moved)
        values, tangents = zip(*(pushed(args, turn(i)) for i in range(size)), strict=True)
        # The m values are equal, so the first stands for all; the second result says which leaves have the axis m.
        found = values[0], jax.tree.map(lambda *leaves: jnp.stack(leaves), *tangents)
        return found, (jax.tree.map(lambda _: False, found[0]), jax.tree.map(lambda _: True, found[1]))

    def rule(primals: tuple, tangents: tuple) -> tuple[Any, Any]:
        # With symbolic_zeros a leaf that does not move comes as a marker instead of an array of zeros.
        is_zero = lambda tangent: isinstance(tangent, jax.custom_derivatives.SymbolicZero)
        leaves = jax.tree.leaves(tangents, is_leaf=is_zero)
        return pushed(primals, {i: leaf for i, leaf in enumerate(leaves) if not is_zero(leaf)})

    call = jax.custom_jvp(lambda *args: fn(*args))
    call.defjvp(rule, symbolic_zeros=True)
    return call
