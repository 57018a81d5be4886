"""For-Value (arXiv 2508.10180): alignment of hidden states and prediction errors, by forward passes alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ntkjax.errors import ConfigError
from ntkjax.fingerprint import tree_digest
from ntkjax.selection.base import Selection, SelectionProblem, select_top
from ntkjax.selection.cost import FORWARD, Sizes
from ntkjax.selection.forward import ForwardMethod, row_values
from ntkjax.selection.options import Options
from ntkjax.types import (
    Params,
    as_pytree_fn,
    at_least_float32,
    capped,
    count_positions,
    logit_cap,
    owned,
    precision_of,
    predict_mask,
)

MAX_LOGITS = 1 << 26
"""Logits made at a time (float32: 256 MiB); those of more tokens are made piece by piece."""


@dataclasses.dataclass(frozen=True)
class ForValueSelector(Options, ForwardMethod):
    """score_j = 1/M sum_i 1/(|S_i| |S_j|) sum_{t in S_j} sum_{t' in S_i} <h_t, h_t'> <e_t, e_t'>; the n highest.

    h_t: final hidden state; e_t = softmax(W h_t) - onehot(x_t+1): the error of the prediction at t. Since the gradient
    of -log p(x_t+1) by the head is e_t h_t^T, that is <grad_W L(x_j), grad_W mean_i L(x_i)> of the mean NLLs L: the
    ``loss`` kernel of the head alone, the rest held fixed. (With logits c tanh(W h / c), e_t is the derivative by W h.)

    The domain is folded once into G = 1/M sum_i 1/|S_i| sum_t' e_t' h_t'^T [V, D], so that a pool row costs a forward
    pass and one more product with a matrix of the head's size: score_j = 1/|S_j| sum_t e_t^T G h_t.

    Source: arXiv 2508.10180, which sums over pairs of tokens; we take means, as the loss does, so that a response does
    not score by its length.

    Memory: G, V D numbers of 32 bits.

    Raises:
      ConfigError: a problem without ``states_fn``.
    """

    def forward_tokens(self, sizes: Sizes) -> float:
        """Domain and pool once."""
        return FORWARD * (sizes.domain + sizes.pool)

    def __call__(self, problem: SelectionProblem) -> Selection:
        if problem.states_fn is None:
            raise ConfigError("for-value needs the hidden state of every token: give the problem a states_fn")
        head: Any = problem.head(problem.params) if callable(problem.head) else problem.head
        tokens = Tokens(as_pytree_fn(problem.states_fn), at_least_float32(head), logit_cap(problem.states_fn))
        domain = problem.domain.batches(token_budget=problem.token_budget)
        folded = fold(tokens, problem.params, domain, len(problem.domain))
        along = jax.tree_util.Partial(Tokens.along, tokens, folded)
        depends: dict[str, Any] = {"domain": problem.domain.fingerprint, "head": tree_digest(head)}
        scores = row_values(problem, along, problem.params, kind="for-value", what="for-value scores", **depends)[:, 0]
        return select_top("for-value", scores, problem.n)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """The hidden states and prediction errors of every token.

    Attributes:
      states_fn: ``(params, batch) -> [R, T, D]``.
      head: W [V, D].
      cap: c of capped logits, or None.
    """

    states_fn: Any
    head: Any
    cap: float | None = dataclasses.field(default=None, metadata={"static": True})

    def along(self, folded: Float[Array, "V D"], params: Params, batch: Any) -> Float[Array, " B"]:
        """1/|S| sum_t e_t^T G h_t of each example."""

        def piece(h: Float[Array, "n D"], target: Int[Array, " n"]) -> Float[Array, " n"]:
            product = lambda matrix: jnp.matmul(h, matrix.T, precision=precision_of(h.dtype))
            # e . g is the derivative of -log p along g, where g = G h is a change of W h
            return jax.jvp(lambda z: self.nll(z, target), (product(self.head),), (product(folded),))[1]

        states, targets = self.states(params, batch)
        values = self.by_piece(piece, states.reshape(-1, states.shape[-1]), targets.reshape(-1)).reshape(targets.shape)
        mask, owners = predict_mask(batch), owned(batch)
        kept = jnp.where(mask, values, jnp.zeros((), values.dtype))
        if owners is None:
            sums = jnp.sum(kept, axis=1)
        else:
            spread = jnp.where(owners, kept[:, None, :], jnp.zeros((), values.dtype))
            sums = jnp.sum(spread, axis=2).reshape(-1)
        return sums / jnp.maximum(count_positions(batch, mask), 1).astype(sums.dtype)

    def outer(self, params: Params, batch: Any) -> Float[Array, "V D"]:
        """sum over the real examples of 1/|S| sum_t e_t h_t^T."""
        states, targets = self.states(params, batch)
        mask = predict_mask(batch)
        counts = jnp.maximum(count_positions(batch, mask), 1).astype(states.dtype)
        share = jnp.where(jnp.asarray(batch.index) >= 0, 1 / counts, jnp.zeros((), states.dtype))
        if batch.examples is None:
            weights = jnp.broadcast_to(share[:, None], mask.shape)
        else:
            slot = jnp.maximum(jnp.asarray(batch.examples), 0)
            weights = jnp.take_along_axis(share.reshape(mask.shape[0], -1), slot, axis=1)
        weights = jnp.where(mask, weights, jnp.zeros((), states.dtype))

        def add(total: Array, of: tuple[Array, ...]) -> tuple[Array, None]:
            h, target, weight = of
            logits = jnp.matmul(h, self.head.T, precision=precision_of(h.dtype))
            # e_t is the derivative of -log p by W h; taken by jax.grad it is right under a soft cap as well.
            error = jax.grad(lambda z: jnp.sum(weight * self.nll(z, target)))(logits)
            return total + jnp.matmul(error.T, h, precision=precision_of(h.dtype)), None

        # Of the positions of all rows, a piece at a time: the errors [T, V] of a whole batch are never in memory.
        cut = self.pieces(states.reshape(-1, states.shape[-1]), targets.reshape(-1), weights.reshape(-1))
        return jax.lax.scan(add, jnp.zeros(self.head.shape, states.dtype), cut)[0]

    def states(self, params: Params, batch: Any) -> tuple[Float[Array, "R T D"], Int[Array, "R T"]]:
        """(h_t, the next token) of every position."""
        tokens = jnp.asarray(batch.tokens)
        states = at_least_float32(self.states_fn(params, batch))
        return states, jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))

    def nll(self, products: Float[Array, "n V"], target: Int[Array, " n"]) -> Float[Array, " n"]:
        """-log p(target) from W h."""
        logits = capped(products, self.cap)
        return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]

    def pieces(self, *arrays: Float[Array, "n ..."] | Int[Array, " n"]) -> tuple[Array, ...]:
        """The arrays cut along their first axis into pieces [p, size, ...] whose logits are few enough,
        filled up with zeros."""
        count = arrays[0].shape[0]
        size = max(1, min(count, MAX_LOGITS // self.head.shape[0]))
        fill = -count % size
        padded = (jnp.pad(x, ((0, fill), *((0, 0) for _ in x.shape[1:]))) for x in arrays)
        return tuple(x.reshape(-1, size, *x.shape[1:]) for x in padded)

    def by_piece(self, fn: Callable, *arrays: Float[Array, "n ..."] | Int[Array, " n"]) -> Float[Array, " n"]:
        """``fn`` of the pieces, one after another, put together again."""
        count = arrays[0].shape[0]
        return jax.lax.map(lambda each: fn(*each), self.pieces(*arrays)).reshape(-1)[:count]


@jax.jit
def _add_outer(tokens: Tokens, total: Float[Array, "V D"], params: Params, batch: Any) -> Float[Array, "V D"]:
    return total + tokens.outer(params, batch)


def fold(tokens: Tokens, params: Params, batches: Iterable, members: int) -> Float[Array, "V D"]:
    """G = 1/M sum_i 1/|S_i| sum_t e_t h_t^T over the M = ``members`` examples of ``batches``."""
    total = jnp.zeros(tokens.head.shape, tokens.head.dtype)
    for batch in batches:
        total = _add_outer(tokens, total, params, batch)
    return total / jnp.asarray(members, total.dtype)
