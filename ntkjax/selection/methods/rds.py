"""RDS+ (arXiv 2503.01807): nearest neighbours under position-weighted hidden states, taken in turn."""

from __future__ import annotations

import dataclasses

from ntkjax.selection.algorithms.round_robin import RoundRobin
from ntkjax.selection.base import Selection, SelectionProblem
from ntkjax.selection.embeddings import EmbeddingMethod
from ntkjax.selection.parts import named_parts
from ntkjax.selection.representations.weighted_embeddings import WeightedEmbeddings


@dataclasses.dataclass(frozen=True)
class RdsSelector(EmbeddingMethod):
    """phi(x) = sum_i (i / sum_i' i') h_i(x) over all tokens, i = 1, 2, ...; the domain examples take turns, each taking
    the pool row with the highest cos(phi(x_j), phi(x_domain)) that is not taken yet, until n are.

    score_j = max over domain examples of that cosine. Ranks are the turns (rank 1 is taken first); the rows that nobody
    took follow by score: the highest scores need not be chosen, since every domain example has its turns.

    Source: arXiv 2503.01807 (RDS+ and its round-robin selection for one task). It leaves open the order of the domain
    examples (we: as they stand in the file), ties (we: lower row), and what is embedded: we take prompt and response as
    the model is trained on them.

    It is ``parts`` with representation ``weighted-embeddings`` and algorithm ``round-robin``.

    Raises:
      ConfigError: a problem without ``weighted_embed_fn``. UserError: a domain example whose embedding is zero.
    """

    def __call__(self, problem: SelectionProblem) -> Selection:
        embeddings = WeightedEmbeddings()
        candidates = embeddings.candidates(problem)
        choice = RoundRobin()(embeddings.similarities(problem, candidates.rows), problem)
        report = named_parts("weighted-embeddings", "round-robin") | {"zero_embeddings": choice.zeros}
        return choice.selection("rds", candidates, problem, report)
