"""jax.vmap by repetition: several tangents on one primal pass, each in arrays of its own.

jax.vmap gives every array that depends on a tangent one more axis. On a CPU the products over it are laid out badly
and a tangent costs half as much again as alone. Here the program of one tangent is traced, what does not depend on the
tangent is taken over once, and what does is written m times, loops over layers included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

_CALLS = ("jit", "remat2")
"""jax.jit and jax.checkpoint: their bodies are taken over in their place. Any other primitive that holds a program is
repeated as a whole: dearer, where it holds a part of the primal pass, and as right."""


@dataclasses.dataclass(frozen=True)
class _Each:
    """A value for each of the m repetitions."""

    values: tuple[Any, ...]


def repeated(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``jax.vmap(fn)`` over axis 0 of every leaf of every argument, the leaves of the result stacked on axis 0.

    What ``fn`` computes from what it closes over alone is computed once. The program grows with the length m of the
    axis. Raises ValueError where the leaves differ in it.
    """

    def run(*args: Any) -> Any:
        leaves, tree = jax.tree.flatten(args)
        if len({len(leaf) for leaf in leaves}) != 1:
            raise ValueError(f"repeated: lengths of axis 0 are {[len(leaf) for leaf in leaves]}: expected one length")
        m = len(leaves[0])
        one = jax.make_jaxpr(lambda *values: fn(*tree.unflatten(values)), return_shape=True)
        program, shape = one(*(leaf[0] for leaf in leaves))
        inputs = [_Each(tuple(leaf[i] for i in range(m))) for leaf in leaves]
        found = _evaluate(program.jaxpr, program.consts, inputs, m)
        return jax.tree.unflatten(jax.tree.structure(shape), [jnp.stack(_spread(value, m).values) for value in found])

    return run


def _spread(value: Any, m: int) -> _Each:
    return value if isinstance(value, _Each) else _Each((value,) * m)


def _evaluate(program: core.Jaxpr, consts: Sequence[Any], inputs: Sequence[Any], m: int) -> list[Any]:
    """The outputs of ``program``, each an `_Each` where it depends on an input that is one."""
    known = dict(zip(program.constvars, consts, strict=True)) | dict(zip(program.invars, inputs, strict=True))
    read = lambda atom: atom.val if isinstance(atom, core.Literal) else known[atom]
    for equation in program.eqns:
        outputs = _apply(equation, [read(atom) for atom in equation.invars], m)
        known.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in program.outvars]


def _apply(equation: core.JaxprEqn, inputs: list[Any], m: int) -> list[Any]:
    name = equation.primitive.name
    if not any(isinstance(value, _Each) for value in inputs):
        return _once(equation, inputs)
    if name in _CALLS:
        body = equation.params["jaxpr"]
        closed = isinstance(body, core.ClosedJaxpr)
        return _evaluate(body.jaxpr if closed else body, body.consts if closed else (), inputs, m)
    if name == "scan":
        return _scan(equation.params, inputs, m)
    turns = [_once(equation, [_spread(value, m).values[i] for value in inputs]) for i in range(m)]
    return [_Each(values) for values in zip(*turns, strict=True)]


def _once(equation: core.JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """One equation as a program of its own."""
    given = {atom: value for atom, value in zip(equation.invars, inputs) if not isinstance(atom, core.Literal)}
    program = core.Jaxpr((), list(given), equation.outvars, [equation], equation.effects)
    return core.jaxpr_as_fun(core.ClosedJaxpr(program, ()))(*given.values())


def _scan(params: dict[str, Any], inputs: list[Any], m: int) -> list[Any]:
    """jax.lax.scan whose carries and slices are repeated where they depend on what is."""
    body, fixed, carried = params["jaxpr"], params["num_consts"], params["num_consts"] + params["num_carry"]
    consts, carry, slices = inputs[:fixed], inputs[fixed:carried], inputs[carried:]

    def step(carry: list[Any], sliced: list[Any]) -> tuple[list[Any], list[Any]]:
        found = _evaluate(body.jaxpr, body.consts, [*consts, *_unpack(carry), *_unpack(sliced)], m)
        # A carry that was repeated stays so.
        kept = [_spread(new, m) if isinstance(old, tuple) else new for old, new in zip(carry, found)]
        return _pack(kept), _pack(found[len(carry) :])

    while True:  # until no carry takes on more repetitions in a step than it came with
        first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), _pack(slices))
        after, _ = jax.eval_shape(step, _pack(carry), first)
        grown = [isinstance(new, tuple) and not isinstance(old, _Each) for old, new in zip(carry, after)]
        if not any(grown):
            break
        carry = [_spread(value, m) if grows else value for value, grows in zip(carry, grown)]
    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    carry, stacked = jax.lax.scan(step, _pack(carry), _pack(slices), **options)
    return _unpack(carry) + _unpack(stacked)


def _pack(values: Sequence[Any]) -> list[Any]:
    """As a pytree: tuples in the place of `_Each`."""
    return [value.values if isinstance(value, _Each) else value for value in values]


def _unpack(values: Sequence[Any]) -> list[Any]:
    return [_Each(value) if isinstance(value, tuple) else value for value in values]
