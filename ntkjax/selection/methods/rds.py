"""RDS+ (arXiv 2503.01807): nearest neighbours under position-weighted hidden states, taken in turn."""

from __future__ import annotations

import dataclasses

import numpy as np

from ntkjax.errors import ConfigError
from ntkjax.selection.base import Selection, SelectionProblem, ranks_after
from ntkjax.selection.embeddings import EmbeddingMethod, embed_both
from ntkjax.selection.vote import nearest, take_turns


@dataclasses.dataclass(frozen=True)
class RdsSelector(EmbeddingMethod):
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

    def __call__(self, problem: SelectionProblem) -> Selection:
        if problem.weighted_embed_fn is None:
            raise ConfigError("rds needs position-weighted hidden states: give the problem a weighted_embed_fn")
        domain, read_pool = embed_both(problem, problem.weighted_embed_fn, "weighted embeddings")
        neighbours = nearest(domain, read_pool, rows=len(problem.pool), k=problem.n)
        selected = take_turns(neighbours.rows, problem.n)
        scores = neighbours.highest.astype(np.float64)
        report = {"zero_embeddings": neighbours.zero_norm}
        return Selection("rds", scores, ranks_after(selected, scores), selected, diagnostics=report)
