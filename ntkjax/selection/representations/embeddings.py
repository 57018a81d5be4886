"""Mean final hidden states, as in stage 1 of NTK-Selector (arXiv 2511.07380)."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Int

from ntkjax.selection.base import SelectionProblem
from ntkjax.selection.embeddings import embed_both
from ntkjax.selection.options import Options
from ntkjax.selection.parts import Part, Representation


@dataclasses.dataclass(frozen=True)
class Embeddings(Options, Representation):
    """phi(x) = 1/T sum_t h_t(x), the final hidden state over all T tokens of prompt and response."""

    def parts(self, problem: SelectionProblem, rows: Int[np.ndarray, " C"]) -> tuple[Part, ...]:
        """One part; those of the pool are kept."""
        return (Part(*embed_both(problem, problem.embed_fn, "embeddings")),)
