"""Fixed batch shapes: few padded lengths, and as many micro-batches as the memory needs at each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from ntkjax.data.buckets import bucket_lengths
from ntkjax.errors import ConfigError
from ntkjax.training.config import TrainConfig
from ntkjax.training.manifest import TrainingData
from ntkjax.types import Batch


@dataclasses.dataclass(frozen=True)
class Padding:
    """Padded lengths (ascending) of one dataset and the rows of a micro-batch at each."""

    buckets: tuple[int, ...]
    batch_size: int
    accumulation: int
    micro_batch_tokens: int | None
    row_multiple: int = 1

    @classmethod
    def of(cls, lengths: np.ndarray, config: TrainConfig, row_multiple: int = 1) -> Padding:
        """The padding of ``lengths`` under ``config``; micro-batches get a multiple of ``row_multiple`` rows.

        Raises:
          ConfigError: ``buckets`` or ``micro_batch_tokens`` cannot hold the longest example.
        """
        lengths = np.asarray(lengths)
        buckets = config.buckets or tuple(int(b) for b in bucket_lengths(lengths, config.max_buckets))
        if buckets[-1] < lengths.max():
            raise ConfigError(
                f"training option buckets = {list(buckets)}: the longest example has {lengths.max()} tokens;"
                " make the last bucket as long, or leave the option out"
            )
        bound = config.micro_batch_tokens
        if bound is not None and bound < buckets[-1] * row_multiple:
            raise ConfigError(
                f"training option micro_batch_tokens = {bound}: the longest example pads to {buckets[-1]}"
                f" tokens in {row_multiple} rows; give at least {buckets[-1] * row_multiple}, or a smaller"
                " max_length"
            )
        return cls(buckets, config.batch_size, config.accumulation, bound, row_multiple)

    def bucket(self, length: int) -> int:
        """The smallest padded length that holds ``length`` tokens."""
        return self.buckets[int(np.searchsorted(self.buckets, length))]

    def micro_rows(self, bucket: int) -> int:
        """Rows of one micro-batch: batch_size / accumulation, fewer where micro_batch_tokens asks for it."""
        rows = -(-self.batch_size // self.accumulation)
        rows = -(-rows // self.row_multiple) * self.row_multiple
        if self.micro_batch_tokens is not None:
            fitting = self.micro_batch_tokens // bucket
            rows = min(rows, fitting // self.row_multiple * self.row_multiple)
        return rows

    def collate(self, data: TrainingData, indices: np.ndarray) -> tuple[Batch, int]:
        """(batch of A b rows, A): one global batch in its bucket, filled up with filler rows."""
        bucket = self.bucket(int(np.max(data.lengths[indices])))
        rows = self.micro_rows(bucket)
        micro_batches = -(-self.batch_size // rows)
        return data.collate(indices, rows=micro_batches * rows, length=bucket), micro_batches

    def evaluation_batches(self, data: TrainingData) -> Iterator[tuple[np.ndarray, Batch]]:
        """(rows of the dataset, batch) over every example once, shortest bucket first."""
        lengths = np.asarray(data.lengths)
        which = np.searchsorted(self.buckets, lengths)
        for number, bucket in enumerate(self.buckets):
            members = np.flatnonzero(which == number)
            rows = self.micro_rows(bucket)
            for start in range(0, len(members), rows):
                chosen = members[start : start + rows]
                yield chosen, data.collate(chosen, rows=rows, length=bucket)
