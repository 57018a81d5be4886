"""RDS+ (arXiv 2503.01807): nearest neighbours under position-weighted hidden states, taken in turn."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Int

from ntkjax.errors import ConfigError
from ntkjax.selection.base import Selection, SelectionProblem, ranks_after
from ntkjax.selection.cost import Sizes
from ntkjax.selection.diagnostics import describe
from ntkjax.selection.embedding import embed_both
from ntkjax.selection.vote import nearest


@dataclasses.dataclass(frozen=True)
class RdsSelector:
    """phi(x) = sum_i (i / sum_i' i') h_i(x) over all tokens, i = 1, 2, ...; the domain examples take turns, each taking
    the pool row with the highest cos(phi(x_j), phi(x_domain)) that is not taken yet, until n are.

    score_j = max over domain examples of that cosine. Ranks are the turns (rank 1 is taken first); the rows that nobody
    took follow by score: the highest scores need not be chosen, since every domain example has its turns.

    Source: arXiv 2503.01807 (RDS+ and its round-robin selection for one task). It leaves open the order of the domain
    examples (we: as they stand in the file), ties (we: lower row), and what is embedded: we take prompt and response as
    the model is trained on them.

    Memory: the n nearest rows of every domain example, [M, n]; no domain example can need more.

    Raises:
      ConfigError: a problem without ``weighted_embed_fn``. UserError: a domain example whose embedding is zero.
    """

    def passes(self, sizes: Sizes) -> float:
        """Forward-equivalent tokens, as counted in `ntkjax.selection.cost`."""
        return sizes.embeddings

    def __call__(self, problem: SelectionProblem) -> Selection:
        if problem.weighted_embed_fn is None:
            raise ConfigError("rds needs position-weighted hidden states: give the problem a weighted_embed_fn")
        domain, read_pool = embed_both(problem, problem.weighted_embed_fn, "weighted embeddings")
        found = nearest(domain, read_pool, rows=len(problem.pool), k=problem.n)
        taken = take_turns(found.rows, problem.n)
        scores = found.highest.astype(np.float64)
        chosen = Selection("rds", scores, ranks_after(taken, scores), taken)
        return dataclasses.replace(
            chosen, diagnostics=describe(chosen, problem.pool, None) | {"zero_embeddings": found.zero_norm}
        )


def take_turns(preferred: Int[np.ndarray, "M k"], n: int) -> Int[np.ndarray, " n"]:
    """The rows that M takers take, in order, each its first row not yet taken; int64 [n], n <= k."""
    taken: dict[int, None] = {}
    place = np.zeros(len(preferred), np.int64)
    while len(taken) < n:
        for taker, rows in enumerate(preferred[: n - len(taken)]):
            while int(rows[place[taker]]) in taken:
                place[taker] += 1
            taken[int(rows[place[taker]])] = None
    return np.fromiter(taken, np.int64, n)
