"""Words and pairs of words of a text, hashed into buckets as DSIR does (arXiv 2302.03169)."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from itertools import pairwise

import numpy as np
from jaxtyping import Int

from ntkjax.selection.options import Options, check_least

WORD = re.compile(r"\w+|[^\w\s]+")
"""A run of letters, digits and underscores, or a run of punctuation."""
CACHED = 1 << 18


@dataclasses.dataclass(frozen=True)
class BucketOptions(Options):
    """Options of what counts words."""

    buckets: int = 10_000
    """Hash buckets of words and pairs of words."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, "buckets")


def bucket_list(text: str, buckets: int) -> Int[np.ndarray, " g"]:
    """The bucket of every word and of every pair of neighbouring words of ``text``, repeats included."""
    words = WORD.findall(text.lower())
    pairs = (f"{a} {b}" for a, b in pairwise(words))
    return np.asarray([bucket_of(gram, buckets) for gram in (*words, *pairs)], np.int64)


@functools.lru_cache(maxsize=CACHED)  # words repeat; the bound keeps memory independent of the text
def bucket_of(gram: str, buckets: int) -> int:
    """SHA-256 of ``gram`` in UTF-8, as a big-endian integer, modulo ``buckets``."""
    return int.from_bytes(hashlib.sha256(gram.encode()).digest(), "big") % buckets
