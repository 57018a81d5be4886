"""Stage 1 of NTK-Selector alone (arXiv 2511.07380): domain points vote for their nearest pool points."""

from __future__ import annotations

import dataclasses

from ntkjax.selection.algorithms.knn_uniform import KnnUniform
from ntkjax.selection.base import Selection, SelectionProblem
from ntkjax.selection.embeddings import EmbeddingMethod
from ntkjax.selection.parts import named_parts
from ntkjax.selection.representations.embeddings import Embeddings


@dataclasses.dataclass(frozen=True)
class EmbeddingSelector(EmbeddingMethod):
    """score_j = votes_j + (1 + mean cosine similarity_j) / 4: the n rows with the most votes, ties by similarity.

    Every domain point votes for its n nearest: ``parts`` with representation ``embeddings`` and algorithm
    ``knn-uniform`` at ``nearest`` = n.
    """

    def __call__(self, problem: SelectionProblem) -> Selection:
        embeddings = Embeddings()
        candidates = embeddings.candidates(problem)
        choice = KnnUniform(nearest=problem.n)(embeddings.similarities(problem, candidates.rows), problem)
        report = named_parts("embeddings", "knn-uniform")
        return dataclasses.replace(choice.selection("embedding", candidates, problem, report), votes=choice.votes)
