"""BETR (arXiv 2507.12466): rank a sample of the pool by closeness to the domain, teach a classifier, score all."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from ntkjax.errors import ConfigError, UserError
from ntkjax.rng import numpy_rng
from ntkjax.selection.base import Selection, SelectionProblem, select_top
from ntkjax.selection.embeddings import EmbeddingMethod, embed_both
from ntkjax.selection.options import Options, check_least
from ntkjax.selection.vote import CHUNK, unit_rows

BLOCK = 64
"""Domain examples ranked at a time: [BLOCK, S] numbers in memory."""
MAX_ITERATIONS = 1000


@dataclasses.dataclass(frozen=True)
class BetrOptions(Options):
    """Options of ``betr``."""

    classifier_sample: int = 20_000
    """S: pool examples, or all, that are ranked by closeness to the domain to teach a classifier."""
    classifier_share: float = 0.1
    """The share of them that is the classifier's first class, between 0 and 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, "classifier_sample", least=2)
        if not 0 < self.classifier_share < 1:
            raise ConfigError(f"classifier_share must lie between 0 and 1, got {self.classifier_share}")


@dataclasses.dataclass(frozen=True)
class BetrSelector(BetrOptions, EmbeddingMethod):
    """On a sample of S pool rows r_j = max_i log2(1 / rank_i(j)), rank_i(j) the place of row j (1: first) in the sample
    by cosine similarity to domain example i; the ``classifier_share`` of the sample with the highest r_j is class 1,
    the rest class 0; score_j = w . z_j + b, the log-odds of class 1 under a logistic regression, for the whole pool.

    Source: arXiv 2507.12466 (maximum over the benchmark examples; top 10% against the rest). It embeds with a separate
    text encoder and classifies text with fastText. We keep to one model: phi(x) is the mean final hidden state, as in
    stage 1 of ``ntk`` (the rows on disk are shared), scaled to length 1 and then standardised by the sample; the
    classifier is scikit-learn's logistic regression, L2, C = 1, no class weights. Open, and chosen by us: the sample is
    drawn uniformly, ``classifier_sample`` rows or the pool; equal r_j (many domain examples put different rows
    first) are ordered by the highest similarity to the domain, then by lower row.

    Raises:
      ConfigError: options out of range; a sample below 2 rows. UserError: a domain example whose embedding is zero.
    """

    def __call__(self, problem: SelectionProblem) -> Selection:
        rows = len(problem.pool)
        if rows < 2:
            raise ConfigError(f"betr tells two classes of pool rows apart and needs at least 2 rows, got {rows}")
        vectors, read_pool = embed_both(problem, problem.embed_fn, "embeddings")
        domain, zero = unit_rows(vectors)
        if zero:
            raise UserError(f"{zero} domain examples have an embedding of zero; check the model and the data")
        rng = numpy_rng(problem.seed, "selection", "betr sample")
        drawn = np.sort(rng.choice(rows, size=min(self.classifier_sample, rows), replace=False))
        sample, _ = unit_rows(np.asarray(read_pool(drawn)))
        positive = best_share(*closeness(domain, sample), self.classifier_share)
        classifier = fit(sample, positive)
        scores = np.empty(rows)
        for start in range(0, rows, CHUNK):
            index = np.arange(start, min(start + CHUNK, rows))
            scores[index] = classifier.decision_function(unit_rows(np.asarray(read_pool(index)))[0].astype(np.float64))
        chosen = select_top("betr", scores, problem.n)
        top = np.argsort(-scores[drawn], kind="stable")[: positive.sum()]
        report = {
            "classifier_sample": len(drawn),
            "classifier_positives": int(positive.sum()),
            "classifier_positives_found": float(positive[top].mean()),
            "classifier_converged": bool(classifier[-1].n_iter_[0] < MAX_ITERATIONS),
        }
        return dataclasses.replace(chosen, diagnostics=report)


def closeness(
    domain: Float[np.ndarray, "M D"], sample: Float[np.ndarray, "S D"]
) -> tuple[Int[np.ndarray, " S"], Float[np.ndarray, " S"]]:
    """(min_i rank_i(j), max_i cos_ij) of every sample row j; r_j = log2(1 / the first). Rows have length 1; equal
    similarities are ranked by lower row."""
    best, highest = np.full(len(sample), len(sample), np.int64), np.full(len(sample), -np.inf, sample.dtype)
    for start in range(0, len(domain), BLOCK):
        similarity = domain[start : start + BLOCK] @ sample.T
        order = np.argsort(-similarity, axis=1, kind="stable")
        ranks = np.empty_like(order)
        # The inverse of the permutation ``order``: the rank of every row from the row of every rank.
        np.put_along_axis(ranks, order, np.arange(1, len(sample) + 1)[None, :], axis=1)
        best, highest = np.minimum(best, ranks.min(axis=0)), np.maximum(highest, similarity.max(axis=0))
    return best, highest


def best_share(ranks: Int[np.ndarray, " S"], highest: Float[np.ndarray, " S"], share: float) -> Bool[np.ndarray, " S"]:
    """Class 1: the ``share`` of rows (at least 1, not all) with the best rank, ties by higher similarity, lower row."""
    count = min(max(1, round(share * len(ranks))), len(ranks) - 1)
    chosen = np.zeros(len(ranks), bool)
    chosen[np.lexsort((np.arange(len(ranks)), -highest, ranks))[:count]] = True
    return chosen


def fit(sample: Float[np.ndarray, "S D"], positive: Bool[np.ndarray, " S"]) -> Any:
    """min_{w, b} 1/2 |w|^2 + sum_j log(1 + exp(-y_j (w . z_j + b))), z the sample standardised, y = +-1."""
    # Imported here: it takes a second, and only this method needs it.
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=MAX_ITERATIONS))
    return model.fit(sample.astype(np.float64), positive)
