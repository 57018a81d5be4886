"""The loss that fine-tuning minimises: the mean over response tokens of the global batch."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ntkjax.types import Batch, count_positions, predict_mask


def response_counts(batch: Batch) -> Int[Array, " B"]:
    """|S_i|: predicted response tokens of each example, int32 [B]; 0 for a filler."""
    return count_positions(batch, predict_mask(batch))


def token_mean_weights(counts: Int[Array, " B"], dtype: Any) -> Float[Array, " B"]:
    """w_i = |S_i| / sum_j |S_j|, so that sum_i w_i nll_i is the mean NLL per response token of the batch.

    The sum runs over the *global* batch, before it is cut into micro-batches: a micro-batch of short
    responses then weighs as little as its tokens do, and accumulation changes nothing but the order of
    summation. A batch without any response token gives NaN on purpose, which stops the run.
    """
    weights = counts.astype(dtype)
    return weights / jnp.sum(weights)
