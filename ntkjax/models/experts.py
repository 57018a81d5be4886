"""Routed experts: which experts a token goes to, and products of tokens with the weights of theirs alone.

Nothing is dropped: a token is multiplied with each of its k experts, however many tokens went to the same one. Tokens
are sorted by expert into blocks of equal length, each of one expert (``dispatch``), and a product is one batched
product over blocks with the weights that the blocks ask for (``block_product``). All of it is gathers, scatters and
products, so it has forward mode, reverse mode and batching. ``jax.lax.ragged_dot`` has no batching rule where one
operand alone is batched (jax 0.10 to 0.12), and on a CPU multiplies every token with every expert.

Cost, for N tokens, E experts, k of them a token: a block has ceil(N k / E) rows, and there are fewer than 2 E blocks,
so that about 2 N k rows are multiplied (N k is the least), whatever the routing. The blocks' weights are copied: for
the time of one product they take the memory of 2 E experts' of one layer, and that again for each example where
examples are batched by ``jax.vmap`` (gradients of single examples). On a mesh each expert is split as an MLP is, and
the axis of experts is whole on every device; tokens are sorted across the devices that the batch is spread over, which
gathers them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ntkjax.types import at_least_float32, float32_or_better, precision_of


def route(logits: Float[Array, "N E"], per_token: int, normed: bool) -> tuple[Int[Array, "N K"], Float[Array, "N K"]]:
    """The experts of each token and their weights, [N, K] each, K = ``per_token``.

    Weights are the K largest of softmax(logits) over all experts, in float32 or better; ``normed``: divided by their
    sum. Under differentiation the weights move, and which experts are chosen does not.
    """
    shares = jax.nn.softmax(at_least_float32(logits), axis=-1)
    chosen = jax.lax.top_k(jax.lax.stop_gradient(shares), per_token)[1]
    weights = jnp.take_along_axis(shares, chosen, axis=-1)
    return chosen, weights / jnp.sum(weights, axis=-1, keepdims=True) if normed else weights


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dispatch:
    """Where tokens go: C blocks of M rows, each of one expert.

    Attributes:
      tokens: the token in each row of each block, int32 [C, M]; N, one past the last, where the row is empty.
      expert: the expert of each block, int32 [C].
      rows: the row, of all C M, that holds each token's j-th expert, int32 [N, K].
    """

    tokens: Int[Array, "C M"]
    expert: Int[Array, " C"]
    rows: Int[Array, "N K"]

    def gather(self, x: Float[Array, "N D"]) -> Float[Array, "C M D"]:
        """The rows of ``x`` in their blocks; zeros where a row is empty."""
        return jnp.take(x, self.tokens, axis=0, mode="fill", fill_value=0)

    def combine(self, y: Float[Array, "C M D"], weights: Float[Array, "N K"]) -> Float[Array, "N D"]:
        """sum_j weights[n, j] y_j, y_j the row of token n's j-th expert, in float32 or better."""
        routed = at_least_float32(y).reshape(-1, y.shape[-1])[self.rows]
        return jnp.einsum("nkd,nk->nd", routed, weights.astype(routed.dtype), precision=precision_of(routed.dtype))


def block_shape(pairs: int, experts: int) -> tuple[int, int]:
    """How many blocks there are, and of how many rows, for ``pairs`` pairs of a token and an expert.

    Blocks of M = ceil(pairs / experts) rows. An expert with n pairs fills ceil(n / M) <= (n - 1) / M + 1 blocks, so the
    g experts that have any fill (pairs - g) / M + g at most, which is largest for g = min(pairs, experts).
    """
    rows = -(-pairs // experts)
    busy = min(pairs, experts)
    return (pairs - busy) // rows + busy, rows


def dispatch(chosen: Int[Array, "N K"], experts: int) -> Dispatch:
    """Sort the pairs of tokens and ``chosen`` experts, numbers below ``experts``, into blocks."""
    tokens, per_token = chosen.shape
    count, rows = block_shape(pairs := tokens * per_token, experts)
    flat = chosen.reshape(-1).astype(jnp.int32)
    # Pair p is token p // K with its choice p % K. ``order``: the pairs sorted by expert; ``starts`` and ``sizes``:
    # where an expert's pairs begin among them, and how many they are; ``ends - blocks``: its first block.
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    sizes = jnp.zeros(experts, jnp.int32).at[flat].add(jnp.int32(1))
    blocks = -(-sizes // jnp.int32(rows))
    ends, starts = jnp.cumsum(blocks, dtype=jnp.int32), jnp.cumsum(sizes, dtype=jnp.int32) - sizes
    expert = flat[order]
    # The q-th pair of an expert lies q rows behind the beginning of the expert's first block: blocks of one expert are
    # neighbours, and only the last of them has empty rows.
    row = (ends - blocks)[expert] * jnp.int32(rows) + jnp.arange(pairs, dtype=jnp.int32) - starts[expert]
    held = jnp.full(count * rows, tokens, jnp.int32).at[row].set(order // jnp.int32(per_token))
    # The expert of block c is the number of experts whose blocks all lie before it.
    ended = ends[None, :] <= jnp.arange(count, dtype=jnp.int32)[:, None]
    of_block = jnp.minimum(jnp.sum(ended, axis=1, dtype=jnp.int32), jnp.int32(experts - 1))  # the last ones are empty
    where = jnp.zeros(pairs, jnp.int32).at[order].set(row)
    return Dispatch(held.reshape(count, rows), of_block, where.reshape(tokens, per_token))


def block_product(
    x: Float[Array, "C M I"],
    w: Any,
    expert: Int[Array, " C"],
    read: Callable[[Any], Array] = lambda w: w,
) -> Float[Array, "C M O"]:
    """x_c W_e for each block c and its expert e, accumulated and returned in float32 or better. W is cast to
    the dtype of x.

    Args:
      w: the experts' weights [experts, in, out], or the arrays [experts, ...] of which ``read`` makes those of some
        (`ntkjax.models.quantised`).

    The blocks' weights are picked anew in the backward pass: kept, they would be a second copy of the model.
    """

    def product(x: Float[Array, "C M I"], w: Any) -> Float[Array, "C M O"]:
        dims = (((2,), (1,)), ((0,), (0,)))
        picked = read(jax.tree.map(lambda leaf: leaf[expert], w)).astype(x.dtype)
        wide = float32_or_better(x.dtype)
        return jax.lax.dot_general(x, picked, dims, precision_of(x.dtype), preferred_element_type=wide)

    return jax.checkpoint(product, prevent_cse=False)(x, w)
