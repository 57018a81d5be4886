"""Bucket lengths against brute force; epochs as permutations."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from ntkjax.data import bucket_lengths, epoch_batches
from ntkjax.errors import ConfigError


def padded(lengths, buckets):
    return sum(min(b for b in buckets if b >= n) for n in lengths)


@pytest.mark.parametrize("seed", range(30))
def test_optimal_among_all_choices(seed):
    rng = np.random.default_rng(seed)
    multiple = int(rng.choice([1, 4, 8]))
    lengths = rng.integers(1, 12 * multiple, size=rng.integers(1, 40)).astype(np.int32)
    most, price = int(rng.integers(1, 5)), float(rng.choice([0.0, 20.0, 200.0]))
    chosen = bucket_lengths(lengths, most, multiple, price)
    assert chosen == sorted(set(chosen))
    assert len(chosen) <= most
    assert all(b % multiple == 0 for b in chosen)
    candidates = sorted({-(-int(n) // multiple) * multiple for n in lengths})
    best = min(
        padded(lengths, subset) + price * len(subset)
        for k in range(1, min(most, len(candidates)) + 1)
        for subset in combinations(candidates, k)
        if subset[-1] == candidates[-1]
    )
    assert padded(lengths, chosen) + price * len(chosen) == best


def test_few_distinct_lengths_and_none():
    assert bucket_lengths(np.asarray([8, 8, 3], np.int32), 6) == [8]
    assert bucket_lengths(np.asarray([], np.int32), 6) == []
    with pytest.raises(ConfigError, match="max_buckets is 0"):
        bucket_lengths(np.asarray([8], np.int32), 0)


@pytest.mark.parametrize("seed", range(20))
def test_an_epoch_is_a_permutation(seed):
    rng = np.random.default_rng(seed)
    n, size, window = int(rng.integers(1, 200)), int(rng.integers(1, 20)), int(rng.integers(1, 9))
    lengths = rng.integers(1, 500, size=n).astype(np.int32)
    options = {"batch_size": size, "seed": seed, "window": window}
    batches = epoch_batches(lengths, epoch=1, **options)
    assert sorted(np.concatenate(batches).tolist()) == list(range(n))
    assert sorted(len(b) for b in batches)[1:] == [size] * (len(batches) - 1)
    again = epoch_batches(lengths, epoch=1, **options)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))
    whole = epoch_batches(lengths, epoch=1, drop_last=True, **options)
    assert [len(b) for b in whole] == [size] * (n // size)


def test_epochs_and_seeds_differ_and_lengths_are_grouped():
    lengths = np.random.default_rng(0).integers(1, 500, size=640).astype(np.int32)
    first = epoch_batches(lengths, batch_size=8, seed=0, epoch=0)
    for other in ({"seed": 0, "epoch": 1}, {"seed": 1, "epoch": 0}):
        assert not np.array_equal(np.concatenate(first), np.concatenate(epoch_batches(lengths, batch_size=8, **other)))
    plain = epoch_batches(lengths, batch_size=8, seed=0, epoch=0, window=1)

    def spread(batches):
        return np.mean([np.ptp(lengths[batch]) for batch in batches])

    assert spread(first) < spread(plain) / 3
    means = [lengths[batch].mean() for batch in first]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.4  # batches of one length do not come in a row
