"""Response likelihood: how well the model predicts the responses it is tested on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from ntkjax.data.batches import most_buckets
from ntkjax.errors import UserError
from ntkjax.parallel import to_host
from ntkjax.types import Batch, Params, as_pytree_fn, count_positions, predict_mask


@dataclasses.dataclass(frozen=True)
class ResponseNLL:
    """NLL of one response.

    Attributes:
      row: row of the dataset.
      nll: mean over the response tokens, nats per token.
      tokens: response tokens that were predicted (after truncation).
    """

    row: int
    nll: float
    tokens: int


@jax.jit
def _batch_nll(nll_fn: Callable, params: Params, batch: Batch) -> jax.Array:
    return nll_fn(params, batch)


def response_nll(
    model: Any, params: Params, dataset: Any, *, token_budget: int, indices: Any = None, max_buckets: int | None = None
) -> Iterator[list[ResponseNLL]]:
    """Response NLL of every example of a `TokenisedDataset`, one list for each batch.

    nll(x) = -1/|S(x)| sum_{t in S(x)} log p(token_{t+1} | tokens up to t). Compiled once for each bucket, or
    once for packed rows where the data set is ``packed``.

    Args:
      model: anything with the callable pytree ``nll_fn(params, batch) -> [B]``.
      dataset: offers ``batches(token_budget=, indices=, max_buckets=)`` and ``response_lengths``.
      max_buckets: padded lengths; None: 6 on a CPU, fewer where compilation takes long.
    """
    nll_fn = as_pytree_fn(model.nll_fn)
    buckets = most_buckets(6) if max_buckets is None else max_buckets
    for batch in dataset.batches(token_budget=token_budget, indices=indices, max_buckets=buckets):
        values = to_host(_batch_nll(nll_fn, params, batch)).astype(np.float64)
        index = np.asarray(batch.index)
        # The number of predicted tokens is read off the batch, so it is right whatever truncation did.
        tokens = to_host(count_positions(batch, predict_mask(batch)))
        yield [ResponseNLL(int(i), float(values[r]), int(tokens[r])) for r, i in enumerate(index) if i >= 0]


def summarise_nll(nll: Any, tokens: Any) -> dict:
    """Means over examples and over tokens, and the perplexity.

    Args:
      nll: [n] nats per token. tokens: [n] response tokens.

    Returns:
      ``nll_per_example`` (mean of the means), ``nll_per_token`` (sum of NLL over all tokens / number of
      tokens), ``perplexity`` = exp(nll_per_token), ``tokens``, ``n``, and ``without_tokens``: examples whose
      response has no predicted token, which count in no mean.

    Raises:
      UserError: no example with a response token.
    """
    nll, tokens = np.asarray(nll, dtype=np.float64), np.asarray(tokens, dtype=np.int64)
    real = tokens > 0
    if not real.any():
        raise UserError("no example has a response token to predict; check max_length and the response field")
    per_token = float(np.sum(nll[real] * tokens[real]) / tokens[real].sum())
    return {
        "nll_per_example": float(nll[real].mean()),
        "nll_per_token": per_token,
        "perplexity": float(np.exp(per_token)),
        "tokens": int(tokens[real].sum()),
        "n": int(real.sum()),
        "without_tokens": int((~real).sum()),
    }
