"""k-means, the one grouping that several methods use."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from jaxtyping import Float, Int


def k_means(
    vectors: Float[np.ndarray, "S D"], count: int, *, seed: int, starts: int
) -> tuple[Int[np.ndarray, " S"], Float[np.ndarray, "c D"]]:
    """(group of every vector, int64 in [0, c); centres [c, D] in the dtype of ``vectors``), by scikit-learn: the best
    of so many ``starts`` drawn from ``seed``.

    c is ``count``, or fewer where fewer different vectors are given: no group is empty.
    """
    # Imported here: it takes a second, and few methods need it.
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different vectors than centres: c says so
        model: Any = KMeans(min(count, len(vectors)), n_init=starts, random_state=seed)  # pyright: ignore[reportArgumentType]
        model.fit(vectors)
    used, labels = np.unique(model.labels_, return_inverse=True)
    return labels.astype(np.int64), np.asarray(model.cluster_centers_[used], vectors.dtype)
