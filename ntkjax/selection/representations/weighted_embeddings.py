"""Hidden states weighted by position, as in RDS+ (arXiv 2503.01807)."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Int

from ntkjax.errors import ConfigError
from ntkjax.selection.base import SelectionProblem
from ntkjax.selection.embeddings import embed_both
from ntkjax.selection.options import Options
from ntkjax.selection.parts import Part, Representation


@dataclasses.dataclass(frozen=True)
class WeightedEmbeddings(Options, Representation):
    """phi(x) = sum_t (t / sum_t' t') h_t(x), t = 1, 2, ...: later tokens, which have seen more, count for more."""

    def parts(self, problem: SelectionProblem, rows: Int[np.ndarray, " C"]) -> tuple[Part, ...]:
        """One part; those of the pool are kept."""
        if problem.weighted_embed_fn is None:
            raise ConfigError("position-weighted hidden states are needed: give the problem a weighted_embed_fn")
        return (Part(*embed_both(problem, problem.weighted_embed_fn, "weighted embeddings")),)
