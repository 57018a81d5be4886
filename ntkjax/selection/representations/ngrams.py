"""Counts of words and pairs of words, hashed as in DSIR (arXiv 2302.03169). It reads text and runs no model."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Int

from ntkjax.selection.base import SelectionProblem
from ntkjax.selection.ngrams import BucketOptions, bucket_list
from ntkjax.selection.parts import Part, Representation, read_texts, texts_of


@dataclasses.dataclass(frozen=True)
class Ngrams(BucketOptions, Representation):
    """phi(x)_b = how many lower-case words and pairs of neighbouring words of x fall in hash bucket b, b < ``buckets``.

    Words and hash are those of ``dsir`` (`ntkjax.selection.ngrams`). The counts of a pool row are made anew whenever it
    is read, so that nothing is held but a block of them.
    """

    uses_model: ClassVar[bool] = False

    def parts(self, problem: SelectionProblem, rows: Int[np.ndarray, " C"]) -> tuple[Part, ...]:
        """One part, counted when it is read."""
        domain, pool = texts_of(problem, "ngrams counts words")
        of = lambda text: counts(text, self.buckets)
        return (Part(read_texts(domain, of)(np.arange(len(domain))), read_texts(pool, of)),)


def counts(text: str, buckets: int) -> Float[np.ndarray, " b"]:
    """The counts of one text, float32."""
    return np.bincount(bucket_list(text, buckets), minlength=buckets).astype(np.float32)
