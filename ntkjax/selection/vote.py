"""Stage 1 of NTK-Selector: every domain point votes for its nearest pool points in embedding space.

arXiv 2511.07380: phi(x) = mean final hidden state; each domain point votes for its K = M_pre/4 nearest pool points by
cosine similarity; the M_pre = 4N with the most votes go on to stage 2. The paper leaves ties open: we break them by the
mean similarity to the domain, then by the lower row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ntkjax.ahead import Program
from ntkjax.errors import UserError
from ntkjax.ntk.rows import Pass, alone
from ntkjax.types import Params, as_pytree_fn, at_least_float32

CHUNK = 4096
"""Pool rows compared with the domain at a time (at least k, so that merging costs no more than comparing)."""


@dataclasses.dataclass(frozen=True)
class Votes:
    """Votes of the domain for every pool row.

    Attributes:
      votes: int64 [N], domain points that have the row among their k nearest.
      similarity: float32 [N], mean cosine similarity to the domain.
      zero_norm: pool rows whose embedding is zero (their similarity is 0 by convention).
    """

    votes: Int[np.ndarray, " N"]
    similarity: Float[np.ndarray, " N"]
    zero_norm: int

    @classmethod
    def of(cls, neighbours: Neighbours, rows: int, k: int) -> Votes:
        """Those for the ``k`` nearest of each domain point, among ``rows`` pool rows."""
        votes = np.bincount(neighbours.rows[:, :k].ravel(), minlength=rows).astype(np.int64)
        return cls(votes, neighbours.mean, neighbours.zero_norm)

    def top(self, count: int) -> Int[np.ndarray, " count"]:
        """The ``count`` rows with the most votes (ties: higher mean similarity, then lower row), in row order."""
        # lexsort sorts by its last key first: votes, then similarity, then the lower row.
        order = np.lexsort((np.arange(len(self.votes)), -self.similarity, -self.votes))
        return np.sort(order[:count])


@jax.jit
def embed_batch(embed_fn: Callable, params: Params, batch: Any) -> Float[Array, "B D"]:
    """phi(x) [B, D], at least float32."""
    return at_least_float32(embed_fn(params, batch))


def embed(
    embed_fn: Callable,
    params: Params,
    batches: Iterable,
    *,
    rows: int | Pass,
) -> Callable[[np.ndarray], Float[np.ndarray, "b D"]]:
    """Embed every row of ``batches``; gives a function from row numbers [b] to embeddings [b, D].

    Where ``rows`` is a `Pass` with a ``RowStore`` the embeddings lie on disk (memory does not depend on the pool) and a
    second run goes on where the first was stopped; without one they are kept in memory.

    Raises:
      NonFiniteError: rows whose embedding is NaN or infinite.
    """
    embed_fn, run = as_pytree_fn(embed_fn), Pass.of(rows)

    def of(batches: Iterable) -> Iterator[tuple[np.ndarray, Array]]:
        return ((np.asarray(batch.index), embed_batch(embed_fn, params, batch)) for batch in batches)

    embedded, again, store = of(run.over(batches, "embeddings")), alone(batches, of, run.rows), run.store
    kept = run.collect(embedded, what="embedding", read=store is None, again=again)
    return store.read if store is not None else lambda index: kept[index]


def embed_program(embed_fn: Callable, params: Params, batches: Iterable) -> Program:
    """The program of `embed`, of the first batch where they differ in shape."""
    return Program("embeddings", lambda: embed_batch.lower(as_pytree_fn(embed_fn), params, next(iter(batches))))


@jax.jit
def _compare(
    best: tuple[Float[Array, "M k"], Int[Array, "M k"]],
    domain: Float[Array, "M D"],
    chunk: Float[Array, "C D"],
    first: Int[Array, ""],
    real: Bool[Array, " C"],
) -> tuple[tuple[Float[Array, "M k"], Int[Array, "M k"]], Float[Array, " C"], Float[Array, " C"]]:
    """Merge a chunk of pool rows (numbered from ``first``) into each domain point's k nearest; also their mean and
    highest similarity. Chunks come in row order: top_k prefers earlier entries, so ties go to the lower row."""
    similarity = jnp.matmul(domain, chunk.T, precision=jax.lax.Precision.HIGHEST)
    mean, highest = jnp.mean(similarity, axis=0), jnp.max(similarity, axis=0)
    masked = jnp.where(real[None, :], similarity, -jnp.inf)
    rows = jnp.broadcast_to(first + jnp.arange(chunk.shape[0], dtype=first.dtype)[None, :], masked.shape)
    # The best so far stand before the chunk: top_k takes the earlier of equals, which is the lower row.
    values, columns = jax.lax.top_k(jnp.concatenate([best[0], masked], axis=1), best[0].shape[1])
    rows = jnp.take_along_axis(jnp.concatenate([best[1], rows], axis=1), columns, axis=1)
    return (values, rows), mean, highest


def unit_rows(vectors: Float[np.ndarray, "n D"]) -> tuple[Float[np.ndarray, "n D"], int]:
    """Every row divided by its length, and how many rows are zero (they stay zero)."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms == 0, 1, norms).astype(vectors.dtype), int(np.sum(norms == 0))


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """The nearest pool rows of every domain point, and how near every pool row is to the domain.

    Attributes:
      rows: int32 [M, k], each domain point's nearest pool rows, nearest first, ties by lower row.
      similarity: float32 [M, k], their cosine similarity (inner product, where asked for) to it.
      mean: float32 [N], mean similarity of the pool row to the domain.
      highest: float32 [N], similarity of the pool row to the nearest domain point.
      zero_norm: pool rows whose embedding is zero (their similarity is 0 by convention).
    """

    rows: Int[np.ndarray, "M k"]
    similarity: Float[np.ndarray, "M k"]
    mean: Float[np.ndarray, " N"]
    highest: Float[np.ndarray, " N"]
    zero_norm: int


def nearest(
    domain: Float[np.ndarray, "M D"],
    read_pool: Callable[[np.ndarray], Float[np.ndarray, "b D"]],
    *,
    rows: int,
    k: int,
    chunk: int = CHUNK,
    cosine: bool = True,
) -> Neighbours:
    """The k nearest pool rows of each domain point by cosine similarity: exact, streamed.

    Memory: [M, k] best similarities and rows, and one chunk of the pool; nothing grows with the pool but the two
    numbers a row of the result. One compilation: every chunk has the same shape.

    Args:
      domain: embeddings of the M domain examples.
      read_pool: row numbers [b] -> embeddings [b, D].
      rows: N. k: at most N (more is N).
      cosine: False compares by inner product instead; then ``zero_norm`` is 0.

    Raises:
      UserError: a domain example whose embedding is zero (it has no direction to compare with).
    """
    scale = unit_rows if cosine else lambda vectors: (vectors, 0)
    domain, zero = scale(domain)
    if zero:
        raise UserError(
            f"{zero} domain examples have an embedding of zero and cannot vote; check the model and the data"
        )
    k = min(k, rows)
    chunk = min(max(chunk, k), rows)
    best = (jnp.full((len(domain), k), -jnp.inf, domain.dtype), jnp.full((len(domain), k), -1, jnp.int32))
    means, highest, zeros = np.zeros(rows, np.float32), np.zeros(rows, np.float32), 0
    for start in range(0, rows, chunk):
        index = np.arange(start, min(start + chunk, rows))
        vectors, zero = scale(np.asarray(read_pool(index)))
        zeros += zero
        # The last chunk is filled up with zeros to the shape of the others, one program for all; `real` keeps them out.
        padded = np.zeros((chunk, vectors.shape[1]), vectors.dtype)
        padded[: len(index)] = vectors
        real = jnp.arange(chunk) < len(index)
        first = jnp.asarray(start, jnp.int32)
        best, mean, top = _compare(best, jnp.asarray(domain), jnp.asarray(padded), first, real)
        means[index], highest[index] = np.asarray(mean)[: len(index)], np.asarray(top)[: len(index)]
    return Neighbours(np.asarray(best[1]), np.asarray(best[0]), means, highest, zeros)


def take_turns(preferred: Int[np.ndarray, "M k"], n: int) -> Int[np.ndarray, " n"]:
    """The rows that M domain points take by turns, in order, each its first row that is not taken yet; int64 [n],
    n <= k."""
    selected: dict[int, None] = {}
    next_column = np.zeros(len(preferred), np.int64)
    while len(selected) < n:
        for point, rows in enumerate(preferred[: n - len(selected)]):
            while int(rows[next_column[point]]) in selected:
                next_column[point] += 1
            selected[int(rows[next_column[point]])] = None
    return np.fromiter(selected, np.int64, n)


def vote(
    domain: Float[np.ndarray, "M D"],
    read_pool: Callable[[np.ndarray], Float[np.ndarray, "b D"]],
    *,
    rows: int,
    k: int,
    chunk: int = CHUNK,
) -> Votes:
    """Each domain point votes for its k nearest pool rows; arguments, memory and errors as for ``nearest``."""
    return Votes.of(nearest(domain, read_pool, rows=rows, k=k, chunk=chunk), rows, k)
