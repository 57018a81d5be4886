"""Which padded lengths to use, and which examples share a training step."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from ntkjax.errors import ConfigError
from ntkjax.rng import numpy_rng


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``value``."""
    return -(-int(value) // multiple) * multiple


def bucket_lengths(
    lengths: Int[np.ndarray, " N"], max_buckets: int, multiple: int = 8, bucket_cost: float | int = 0
) -> list[int]:
    """At most ``max_buckets`` padded lengths, ascending multiples of ``multiple``, with the fewest padded tokens.

    Minimises ``sum_i L(i) + bucket_cost * (number of buckets)`` exactly, where L(i) is the smallest chosen
    length that holds example i, by dynamic programming on the histogram of lengths: O(max_buckets * C^2) for C distinct
    rounded lengths. ``bucket_cost`` (in tokens) is what one more compiled shape costs.
    """
    if max_buckets < 1 or multiple < 1:
        raise ConfigError(f"max_buckets is {max_buckets} and multiple {multiple}; expected at least 1 of both")
    if len(lengths) == 0:
        return []
    rounded = -(-np.asarray(lengths, np.int64) // multiple) * multiple
    candidates, counts = np.unique(rounded, return_counts=True)
    total = np.concatenate([[0], np.cumsum(counts)])
    size = len(candidates)
    # best[j]: fewest tokens for all examples of the first j candidates, with k buckets, the last one
    # candidate j - 1.
    best = np.concatenate([[0.0], np.full(size, np.inf)])
    choices, costs = [], []
    for _ in range(min(max_buckets, size)):
        new, arg = np.full(size + 1, np.inf), np.zeros(size + 1, np.int64)
        for j in range(1, size + 1):
            # The last bucket holds candidates i, ..., j - 1, all padded to candidate j - 1; those before i are solved
            # already.
            cost = best[:j] + (total[j] - total[:j]) * float(candidates[j - 1])
            arg[j] = np.argmin(cost)
            new[j] = cost[arg[j]]
        best = new
        choices.append(arg)
        costs.append(best[size] + bucket_cost * len(choices))
    chosen, j = [], size
    for k in range(int(np.argmin(costs)), -1, -1):
        chosen.append(int(candidates[j - 1]))
        j = int(choices[k][j])
    return chosen[::-1]


def epoch_batches(
    lengths: Int[np.ndarray, " N"],
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    window: int = 8,
    drop_last: bool = False,
) -> list[np.ndarray]:
    """Indices (int64) of every training batch of one epoch, a pure function of its arguments.

    Shuffle; sort by length within windows of ``window`` batches, so that a batch holds similar lengths;
    shuffle the batches. Every index occurs once; the last ``N % batch_size`` of the shuffled order form a
    smaller batch, or are left out with ``drop_last`` (different ones every epoch).
    """
    if batch_size < 1 or window < 1:
        raise ConfigError(f"batch_size is {batch_size} and window {window}; expected at least 1 of both")
    lengths = np.asarray(lengths)
    rng = numpy_rng(seed, "epoch", epoch)
    order = rng.permutation(len(lengths))
    whole = len(order) // batch_size * batch_size
    batches = []
    for start in range(0, whole, batch_size * window):
        part = order[start : min(start + batch_size * window, whole)]
        # Sorted within a window and not in the whole epoch: a batch has few lengths, and which examples share one still
        # changes from epoch to epoch.
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += list(part.reshape(-1, batch_size))
    if whole < len(order) and not drop_last:
        batches.append(order[whole:])
    return [batches[k] for k in rng.permutation(len(batches))]
