"""A control for stage 2: n rows drawn at random from those that the embedding vote keeps."""

from __future__ import annotations

import dataclasses

import numpy as np

from ntkjax.rng import numpy_rng
from ntkjax.selection.base import Selection, SelectionProblem, select_top
from ntkjax.selection.embeddings import EmbeddingMethod, stage1_votes
from ntkjax.selection.options import PrefilterOptions


@dataclasses.dataclass(frozen=True)
class RandomFromStage1Selector(PrefilterOptions, EmbeddingMethod):
    """score_j ~ U(0, 1) for the M_pre = ``prefilter_factor`` * n rows with the most votes, none for the others; top n.

    Source: a control of ours; the candidates are those of ``NtkSelector`` with the same
    ``prefilter_factor`` (arXiv 2511.07380: every domain point votes for its M_pre / 4 nearest pool rows). What the
    kernel adds to the vote is the difference between this control and ``ntk``. The number of a row does not depend on
    which other rows are candidates.

    Raises:
      ConfigError: ``prefilter_factor`` below 1.
    """

    def __call__(self, problem: SelectionProblem) -> Selection:
        rows = len(problem.pool)
        kept = min(self.prefilter_factor * problem.n, rows)
        votes = stage1_votes(problem, max(1, self.prefilter_factor * problem.n // 4))
        candidates = votes.top(kept)
        scores = np.full(rows, np.nan)
        scores[candidates] = numpy_rng(problem.seed, "selection", "random from stage 1").random(rows)[candidates]
        chosen = select_top("random-from-stage-1", scores, problem.n, votes=votes.votes)
        return dataclasses.replace(chosen, diagnostics={"stage1_candidates": kept})
