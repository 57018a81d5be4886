"""Numbers of every pool row that one forward pass gives, kept where other methods and runs find them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from ntkjax.fingerprint import tree_digest
from ntkjax.ntk.rows import Pass, alone
from ntkjax.selection.base import SelectionProblem, Selector
from ntkjax.selection.cost import FORWARD, Sizes
from ntkjax.selection.shared import open_shared
from ntkjax.types import Params, as_pytree_fn, at_least_float32


class ForwardMethod(Selector):
    """A method that asks the model for one forward pass over the pool, unless it says otherwise."""

    def forward_tokens(self, sizes: Sizes) -> float:
        """The pool once."""
        return FORWARD * sizes.pool


def row_values(
    problem: SelectionProblem, fn: Callable, params: Params, *, kind: str, what: str, width: int = 1, **depends: Any
) -> Float[np.ndarray, "N w"]:
    """``fn(params, batch) -> [B]`` or [B, width] of every pool row, float64 [N, width].

    Args:
      kind: of the rows on disk; what: they are called in progress bars and errors.
      depends: what they depend on besides the problem and ``params``.

    Raises:
      NonFiniteError: rows whose numbers are NaN or infinite; the others are kept.
    """
    rows, fn = len(problem.pool), as_pytree_fn(fn)
    store = open_shared(problem, kind, {"theta": tree_digest(params), **depends}, rows=rows, width=width)
    batches = problem.pool.batches(token_budget=problem.token_budget)

    def of(batches: Iterable) -> Iterator[tuple[np.ndarray, Array]]:
        return ((np.asarray(batch.index), apply(fn, params, batch)) for batch in batches)

    run = Pass(rows, store, progress=problem.bar(what))
    values = run.collect(of(run.over(batches, what)), what=what, again=alone(batches, of, rows))
    return np.asarray(values, np.float64)


@jax.jit
def apply(fn: Callable, params: Params, batch: Any) -> Float[Array, "B w"]:
    """``fn`` of one batch, at least float32, with an axis for its numbers."""
    values = at_least_float32(fn(params, batch))
    return values[:, None] if values.ndim == 1 else values


def pool_nll(problem: SelectionProblem, params: Params) -> Float[np.ndarray, " N"]:
    """Mean NLL over S(x_j) of every pool row, nats, float64."""
    return row_values(problem, problem.nll_fn, params, kind="nll", what="NLL")[:, 0]
