"""Stage 1 of NTK-Selector alone (arXiv 2511.07380): domain points vote for their nearest pool points."""

from __future__ import annotations

import dataclasses

import numpy as np

from ntkjax.selection.base import Selection, SelectionProblem, select_top
from ntkjax.selection.embeddings import EmbeddingMethod, stage1_votes


@dataclasses.dataclass(frozen=True)
class EmbeddingSelector(EmbeddingMethod):
    """score_j = votes_j + (1 + mean cosine similarity_j) / 4: the n rows with the most votes, ties by similarity.

    The second term lies in [0, 1/2], so it orders rows with equal votes and no others.
    """

    def __call__(self, problem: SelectionProblem) -> Selection:
        votes = stage1_votes(problem, problem.n)
        scores = votes.votes + (1 + votes.similarity.astype(np.float64)) / 4
        return select_top("embedding", scores, problem.n, votes=votes.votes)
