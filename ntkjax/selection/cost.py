"""What a selection asks of the model, whatever else the machine does: passes, counted in tokens sent forward once.

One token through one forward pass counts 1, through a forward and a backward pass 3 (the backward pass costs two; with
frozen weights it is a little less), and a forward pass that carries t tangents costs 1 + t, at most 16 of them at a
time. What is counted is what a method asks for when it stands alone: embeddings or gradients that another method has
computed before are counted again. Searches, sketches and classifiers are not counted; they are small beside the passes.

A method says what it costs in its own file: ``forward_tokens(sizes)``, with its options bound (see
`ntkjax.selection.base.Selector`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Bool

FORWARD, TRAIN = 1, 3


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the passes of a selection are counted from.

    Attributes:
      domain, pool, scored: tokens of the domain, of the pool, and of the rows that were scored (after stage 1: its
        candidates).
      rows: rows of the pool.
      width: hidden size of the model, the number of outputs of a trace kernel.
      checkpoints: of the warm-up.
    """

    domain: float
    pool: float
    scored: float
    rows: int
    width: int
    checkpoints: int = 1

    @classmethod
    def of(cls, scored: Bool[np.ndarray, " N"], domain: Any, pool: Any, *, width: int, checkpoints: int = 1) -> Sizes:
        """Those of tokenised examples, of whose pool the rows ``scored`` were scored."""
        lengths = np.asarray(pool.lengths, np.int64)
        of_domain, of_scored = float(np.asarray(domain.lengths, np.int64).sum()), float(lengths[scored].sum())
        return cls(of_domain, float(lengths.sum()), of_scored, len(lengths), width, checkpoints)

    @property
    def embeddings(self) -> float:
        """Domain and pool embedded once."""
        return FORWARD * (self.domain + self.pool)

    @property
    def gradients(self) -> float:
        """The gradient of every domain example and of every row that is scored."""
        return TRAIN * (self.domain + self.scored)

    def stage1(self, switch: str) -> float:
        """The embedding vote before the scores, where it is ``on``."""
        return self.embeddings if switch == "on" else 0.0
