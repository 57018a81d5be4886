"""TSDS (arXiv 2410.11303): optimal transport from the domain to the pool, with mass kept off near-duplicates."""

from __future__ import annotations

import dataclasses

from ntkjax.selection.algorithms.knn_kde import KnnKde, TsdsOptions
from ntkjax.selection.base import Selection, SelectionProblem
from ntkjax.selection.embeddings import EmbeddingMethod
from ntkjax.selection.parts import named_parts
from ntkjax.selection.representations.embeddings import Embeddings


@dataclasses.dataclass(frozen=True)
class TsdsSelector(TsdsOptions, EmbeddingMethod):
    """score_j = the mass of row j under the best transport from the domain to the pool, kept off near-duplicates (see
    `ntkjax.selection.algorithms.knn_kde.KnnKde` for the problem); n rows are drawn in proportion to it.

    It is ``parts`` with representation ``embeddings`` and algorithm ``knn-kde``.

    Source: arXiv 2410.11303. Chosen by us: embeddings are those of stage 1 of ``ntk`` scaled to length 1, where the
    source takes a text encoder's (``parts`` with representation ``sentence`` does).

    Raises:
      ConfigError: options out of range. UserError: a domain example whose embedding is zero.
    """

    def __call__(self, problem: SelectionProblem) -> Selection:
        embeddings = Embeddings()
        candidates = embeddings.candidates(problem)
        choice = KnnKde(**dataclasses.asdict(self))(embeddings.similarities(problem, candidates.rows), problem)
        report = named_parts("embeddings", "knn-kde") | choice.report
        return choice.selection("tsds", candidates, problem, report)
