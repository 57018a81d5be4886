"""Batch shapes: few, large enough, and within the bound on tokens."""

from __future__ import annotations

import numpy as np
import pytest

from ntkjax.errors import ConfigError
from ntkjax.training import TrainConfig
from ntkjax.training.padding import Padding


def test_shapes_are_few_and_micro_batches_within_their_bound(toy):
    data = toy.make_data(60, 0, longest=60)
    config = TrainConfig(batch_size=7, micro_batch_tokens=128, max_buckets=3)
    padding = Padding.of(data.lengths, config)
    shapes = set()
    for start in range(0, 60, 7):
        indices = np.arange(start, min(start + 7, 60))
        batch, accumulation = padding.collate(data, indices)
        rows, length = batch.tokens.shape
        assert rows % accumulation == 0 and rows // accumulation * length <= 128
        assert length >= data.lengths[indices].max()
        np.testing.assert_array_equal(batch.index[batch.index >= 0], indices)
        shapes.add((rows, length, accumulation))
    assert len(shapes) <= 3
    assert max(a for _, _, a in shapes) > 1


def test_rows_divide_over_devices(toy):
    data = toy.make_data(20, 0)
    padding = Padding.of(data.lengths, TrainConfig(batch_size=6, accumulation=2), row_multiple=4)
    batch, accumulation = padding.collate(data, np.arange(6))
    assert (batch.tokens.shape[0] // accumulation) % 4 == 0


def test_evaluation_sees_every_example_once(toy):
    data = toy.make_data(45, 0, longest=50)
    padding = Padding.of(data.lengths, TrainConfig(batch_size=8, max_buckets=3))
    seen = []
    for rows, batch in padding.evaluation_batches(data):
        np.testing.assert_array_equal(batch.index[: len(rows)], rows)
        assert (batch.index[len(rows) :] == -1).all()
        seen += list(rows)
    assert sorted(seen) == list(range(45))


def test_bound_below_the_longest_example_is_refused(toy):
    data = toy.make_data(10, 0, longest=50)
    with pytest.raises(ConfigError, match="micro_batch_tokens = 16"):
        Padding.of(data.lengths, TrainConfig(micro_batch_tokens=16))


def test_given_buckets_are_used_and_must_hold_the_longest_example(toy):
    data = toy.make_data(10, 0, longest=50)
    padding = Padding.of(data.lengths, TrainConfig(buckets=(32, 64)))
    assert padding.buckets == (32, 64)
    assert {padding.bucket(length) for length in (3, 32)} == {32} and padding.bucket(33) == 64
    with pytest.raises(ConfigError, match=r"buckets = \[8, 16\]: the longest example has \d+ tokens"):
        Padding.of(data.lengths, TrainConfig(buckets=(8, 16)))
