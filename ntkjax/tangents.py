"""Several tangents of one function on one primal pass.

``jax.vmap`` of ``jax.jvp`` over the tangent alone computes the primal pass once, and gives every array that depends on
the tangent one more axis. On a CPU the products of such arrays are slower than those of plain ones, and more memory is
in use. A function wrapped by `unbatched_tangents` is linearised once (``jax.linearize``) and its linear part is applied
once for each tangent instead, in plain arrays: for a layer of a decoder inside the loop over layers, so that what
the linear part needs is kept for one layer alone. ``jax.custom_jvp`` and ``jax.custom_batching.custom_vmap`` do it.
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
    """``fn``, linearised once and applied to each tangent where ``jax.vmap`` adds an axis to its tangents alone.

    For forward mode alone (`ntkjax.types.forward_mode`): JAX cannot transpose it. Arguments and results are
    pytrees; every array that is differentiated must be an argument, and the results floating. What ``fn`` marks
    by ``jax.checkpoint`` is computed again for each tangent. The program grows with their number.
    """

    def of_moved(args: tuple, moved: dict[int, Any]) -> tuple[Callable[..., Any], dict[int, Any]]:
        """``fn`` as a function of the leaves of ``args`` that have a tangent, and these leaves, by number."""
        # Leaves that do not move are constants of the function, so that no derivative is taken by them: most weights of
        # a model with LoRA, positions and masks.
        leaves, tree = jax.tree.flatten(args)
        merged = lambda some: fn(*tree.unflatten([some.get(i, leaf) for i, leaf in enumerate(leaves)]))
        return merged, {i: leaves[i] for i in moved}

    def push(args: tuple, moved: dict[int, Any]) -> tuple[Any, Any]:
        """Value and tangent, ``moved`` the tangents of some of the arguments' leaves by number."""
        of_some, values = of_moved(args, moved)
        return jax.jvp(of_some, (values,), (moved,))

    # To the rule of custom_jvp a tangent under vmap is an array like any other. custom_vmap is told which of the
    # arguments have the axis, and that is what the two cases below differ in.
    pushed = jax.custom_batching.custom_vmap(push)

    @pushed.def_vmap
    def _(size: int, batched: Sequence[Any], args: tuple, moved: dict[int, Any]) -> tuple[Any, Any]:
        if any(jax.tree.leaves(batched[0])):  # the primal pass has the axis too
            # Every element is linearised at a point of its own, so there is no common linear part: the plain rule.
            axes = jax.tree.map(lambda yes: 0 if yes else None, tuple(batched))
            both = jax.vmap(push, in_axes=axes, axis_size=size)(args, moved)
            return both, jax.tree.map(lambda _: True, both)
        # The tangents alone have the axis: one linearisation at the primal, and its linear part for each of them. The
        # structure returned says so to vmap: the value has no axis, its tangents have one.
        value, along = jax.linearize(*of_moved(args, moved))
        # A leaf that moves may move alike in all of them; then its tangent has no axis.
        turn = lambda i: jax.tree.map(lambda yes, leaf: leaf[i] if yes else leaf, batched[1], moved)
        tangents = [along(turn(i)) for i in range(size)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *tangents)
        return (value, stacked), (jax.tree.map(lambda _: False, value), jax.tree.map(lambda _: True, stacked))

    def rule(primals: tuple, tangents: tuple) -> tuple[Any, Any]:
        # With symbolic_zeros a leaf that does not move comes as a marker instead of an array of zeros.
        is_zero = lambda tangent: isinstance(tangent, jax.custom_derivatives.SymbolicZero)
        leaves = jax.tree.leaves(tangents, is_leaf=is_zero)
        return pushed(primals, {i: leaf for i, leaf in enumerate(leaves) if not is_zero(leaf)})

    call = jax.custom_jvp(lambda *args: fn(*args))
    call.defjvp(rule, symbolic_zeros=True)
    return call
