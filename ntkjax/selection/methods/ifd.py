"""IFD (arXiv 2308.12032): how little the prompt helps the model to predict the response."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ntkjax.selection.base import Selection, SelectionProblem, select_top
from ntkjax.selection.cost import FORWARD, Sizes
from ntkjax.selection.forward import ForwardMethod, pool_nll, row_values
from ntkjax.selection.options import Options
from ntkjax.types import Batch, Params, as_pytree_fn, owned, valid_mask


@dataclasses.dataclass(frozen=True)
class IfdSelector(Options, ForwardMethod):
    """IFD_j = L(response | prompt) / L(response), L the mean NLL of the response's tokens; score_j = IFD_j where it is
    at most 1, and -IFD_j where it is more (there the prompt makes the response harder: it does not belong to it); the n
    highest. The domain is looked at by the warm-up alone.

    Source: arXiv 2308.12032 (instruction-following difficulty; values above 1 are left out there and come last here,
    counted in the report; the model is one trained on a small part of the pool, here theta after the warm-up). Chosen
    by us: L(response) is over the same tokens as L(response | prompt). Its text is the first token of the example (a
    start token in most templates), which the first response token is predicted from, and then the response's own
    tokens, end tokens included, earlier turns' responses before later ones.

    Cost: two forward passes over the pool.
    """

    def forward_tokens(self, sizes: Sizes) -> float:
        """The pool twice."""
        return 2 * FORWARD * sizes.pool

    def __call__(self, problem: SelectionProblem) -> Selection:
        given = pool_nll(problem, problem.params)
        bare = jax.tree_util.Partial(nll_without_prompt, as_pytree_fn(problem.nll_fn))
        alone = row_values(problem, bare, problem.params, kind="nll-without-prompt", what="NLL without prompts")[:, 0]
        ifd = given / np.where(alone == 0, 1, alone)  # a response that is certain alone is certain given its prompt
        chosen = select_top("ifd", np.where(ifd <= 1, ifd, -ifd), problem.n)
        report = {
            "ifd_above_one": int(np.sum(ifd > 1)),
            "chosen_above_one": int(np.sum(ifd[chosen.selected] > 1)),
            "mean_ifd_offered": float(ifd.mean()),
            "mean_ifd_chosen": float(ifd[chosen.selected].mean()),
        }
        return dataclasses.replace(chosen, diagnostics=report)


def nll_without_prompt(nll_fn: Callable, params: Params, batch: Any) -> Float[Array, " B"]:
    """Mean NLL of the response's tokens where the first token of the example is all that stands before them."""
    return nll_fn(params, without_prompt(batch))


def without_prompt(batch: Batch) -> Batch:
    """The batch with the first token of every example and its response tokens alone, moved to the front of its row, in
    a batch of the same shape."""
    tokens, real = jnp.asarray(batch.tokens), valid_mask(batch)
    response, length = jnp.asarray(batch.response_mask) & real, tokens.shape[1]
    places = jnp.arange(length, dtype=jnp.int32)[None, :]
    if batch.examples is None:
        first = jnp.broadcast_to(places == 0, tokens.shape) & real
    else:
        owner = jnp.asarray(batch.examples)
        first = real & jnp.pad(owner[:, 1:] != owner[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    keep = first | response
    order = jnp.argsort(~keep, axis=1, stable=True)  # what is kept comes first, in order
    move = lambda x: jnp.take_along_axis(x, order, axis=1)
    kept, starts, owners = move(keep), move(first), owned(batch)
    changes: dict[str, Any] = {
        "tokens": jnp.where(kept, move(tokens), jnp.zeros((), tokens.dtype)),
        "response_mask": kept & move(response) & ~starts,
    }
    if owners is None:
        changes["lengths"] = jnp.sum(keep, axis=1, dtype=jnp.int32)
        changes["positions"] = None
    else:
        changes["lengths"] = jnp.sum(owners & keep[:, None, :], axis=2, dtype=jnp.int32).reshape(-1)
        changes["examples"] = jnp.where(kept, move(jnp.asarray(batch.examples)), -1)
        begun = jax.lax.cummax(jnp.where(starts, places, 0), axis=1)
        changes["positions"] = jnp.where(kept, places - begun, 0)
    return dataclasses.replace(batch, **changes)
