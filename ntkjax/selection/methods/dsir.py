"""DSIR (arXiv 2302.03169): importance resampling on hashed word n-grams. It reads text and runs no model."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from ntkjax.errors import ConfigError
from ntkjax.rng import numpy_rng
from ntkjax.selection.base import Selection, SelectionProblem, Selector, select_top
from ntkjax.selection.ngrams import BucketOptions, bucket_list

SMOOTHING = 1e-8


@dataclasses.dataclass(frozen=True)
class DsirOptions(BucketOptions):
    """Options of ``dsir``."""

    gumbel: bool = True
    """Sample in proportion to the importance weights; without: the highest weights."""


@dataclasses.dataclass(frozen=True)
class DsirSelector(DsirOptions, Selector):
    """log w(x) = sum_b c_b(x) [log(p_b + 1e-8) - log(q_b + 1e-8)]; the n highest log w(x) + Gumbel(0, 1).

    c(x): how many lower-case words and pairs of neighbouring words fall in each of ``buckets`` hash buckets; p, q: the
    shares of the buckets among all those of the domain and of the pool. Gumbel noise and the n highest is sampling n
    rows without replacement with probabilities proportional to w.

    Source: arXiv 2302.03169. It leaves open what a word is and how an empty bucket is smoothed. We take both, and the
    hash (SHA-256 as an integer, modulo ``buckets``: the same on every machine), from the authors' package
    ``data-selection``, so that log weights can be compared number for number: words are runs of word characters or
    of punctuation, 1e-8 is added to p and q. Unlike the package we fit q on the whole pool, not on its first billion
    n-grams, and drop no short examples (the package: below 100 words). A text is prompt, newline, response.

    ``gumbel`` False: the n highest log w itself (the paper's ablation "top-k").

    Cost: two passes over the text; memory: the buckets, 8 bytes a pool row, one block of texts.

    Raises:
      ConfigError: a problem without texts; a side without any word; ``buckets`` below 1.
    """

    uses_model: ClassVar[bool] = False

    def __call__(self, problem: SelectionProblem) -> Selection:
        if problem.domain_texts is None or problem.pool_texts is None:
            raise ConfigError("dsir counts words, and this problem has no texts: give domain_texts and pool_texts")
        weights = log_weights(problem.domain_texts, problem.pool_texts, self.buckets)
        # log w + Gumbel noise: its n largest are a draw of n rows without replacement in proportion to w.
        noise = numpy_rng(problem.seed, "selection", "dsir").gumbel(size=len(weights)) if self.gumbel else 0.0
        chosen = select_top("dsir", weights + noise, problem.n)
        return dataclasses.replace(chosen, diagnostics={"buckets": self.buckets, "gumbel": self.gumbel})


def log_weights(domain: Sequence[str], pool: Sequence[str], buckets: int) -> Float[np.ndarray, " N"]:
    """log w of every pool text, float64 [N], in nats.

    Raises:
      ConfigError: a side without any word.
    """
    p, q = (shares(texts, buckets, side) for texts, side in ((domain, "domain"), (pool, "pool")))
    ratio = np.log(p + SMOOTHING) - np.log(q + SMOOTHING)
    return np.fromiter((ratio[bucket_list(text, buckets)].sum() for text in pool), np.float64, len(pool))


def shares(texts: Iterable[str], buckets: int, side: str) -> Float[np.ndarray, " b"]:
    """The share of every bucket among the n-grams of all ``texts``, [buckets]; sums to 1."""
    counts = np.zeros(buckets, np.int64)
    for text in texts:
        for bucket, count in Counter(bucket_list(text, buckets).tolist()).items():
            counts[bucket] += count
    if not counts.any():
        raise ConfigError(f"dsir: not one word in the texts of the {side}; expected prompts and responses of words")
    return counts / counts.sum()
