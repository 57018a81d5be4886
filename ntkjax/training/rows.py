"""Steps over packed rows: one shape for every batch of every run, and only the micro-batches that hold examples run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ntkjax.data.rows import ROW_LENGTH, first_fit, fixed_lengths, lay_out
from ntkjax.errors import ConfigError
from ntkjax.training.config import TrainConfig
from ntkjax.training.manifest import TrainingData
from ntkjax.types import Batch

MAX_SLOTS = 64
EXAMPLES_A_ROW = 16
"""Examples of a batch for each row of a micro-batch: a row of 2,048 tokens holds as many of 128."""
MICRO_ROWS = 4
"""Rows of a micro-batch at most where no option asks for more or less: 8,192 tokens."""


@runtime_checkable
class PackedData(TrainingData, Protocol):
    """What packed training needs of a dataset besides; :class:`ntkjax.data.TokenisedDataset` has it."""

    def collate_rows(self, indices: Any, places: Any, *, rows: int, length: int, slots: int) -> Batch:
        """A packed batch: example ``indices[k]`` in row ``places[k]``."""
        ...


@dataclasses.dataclass(frozen=True)
class RowPadding:
    """Rows of a fixed length that hold the examples of a step, in micro-batches of a fixed number of rows.

    A batch has rows for ``batch_size`` examples that each need one of their own, so that no data change its shape; the
    step computes the micro-batches that are used. Of the data the shapes depend only on whether the longest example
    needs a longer row.

    Attributes:
      lengths: fixed lengths of rows, ascending; a batch has the shortest that holds its longest example.
      rows: rows of a micro-batch at each.
      batch_size: examples of a step. slots: of a row.
      evaluation_tokens: tokens of a batch on which nothing is trained.
    """

    lengths: tuple[int, ...]
    rows: tuple[int, ...]
    batch_size: int
    slots: int
    evaluation_tokens: int
    row_multiple: int = 1

    @classmethod
    def of(cls, lengths: np.ndarray, config: TrainConfig, row_multiple: int = 1) -> RowPadding:
        """The rows for examples of these ``lengths`` under ``config``: ``accumulation`` and ``micro_batch_tokens``
        bound the micro-batch as they do with padding; ``buckets`` and ``max_buckets`` have no use.

        Raises:
          ConfigError: ``micro_batch_tokens`` cannot hold the longest example.
        """
        longest, bound = int(np.max(lengths)), config.micro_batch_tokens
        base = ROW_LENGTH if bound is None else min(ROW_LENGTH, 1 << max(1, (bound // row_multiple).bit_length() - 1))
        fixed = fixed_lengths(longest, base)
        if bound is not None:
            if longest * row_multiple > bound:
                raise ConfigError(
                    f"training option micro_batch_tokens = {bound}: the longest example has {longest} tokens in "
                    f"{row_multiple} rows; give at least {longest * row_multiple}, or a smaller max_length"
                )
            fixed = (*fixed[:-1], min(fixed[-1], bound // row_multiple))
        wanted = min(MICRO_ROWS, -(-config.batch_size // EXAMPLES_A_ROW), -(-config.batch_size // config.accumulation))
        rows = []
        for length in fixed:
            most = max(1, wanted * base // length)
            most = most if bound is None else min(most, bound // length)
            rows.append(max(1, most // row_multiple) * row_multiple)
        tokens = MICRO_ROWS * ROW_LENGTH if bound is None else bound // row_multiple
        slots = min(config.batch_size, MAX_SLOTS)
        return cls(fixed, tuple(rows), config.batch_size, slots, tokens, row_multiple)

    def collate(self, data: PackedData, indices: np.ndarray) -> tuple[Batch, int]:
        """(batch of A b rows, A): one global batch, first-fit decreasing, the rows in use in the first micro-batches
        (micro-batch i is rows i, i + A, ...)."""
        lengths = np.asarray(data.lengths)[indices]
        bucket = int(np.searchsorted(self.lengths, lengths.max()))
        length, micro_rows = self.lengths[bucket], self.rows[bucket]
        micro_batches = -(-self.batch_size // micro_rows)
        row = first_fit(lengths, (length,), self.slots)[0]
        row = row // micro_rows + row % micro_rows * micro_batches
        order = np.argsort(row, kind="stable")
        shape = {"rows": micro_batches * micro_rows, "length": length, "slots": self.slots}
        return data.collate_rows(np.asarray(indices)[order], row[order], **shape), micro_batches

    def evaluation_batches(self, data: PackedData) -> Iterator[tuple[np.ndarray, Batch]]:
        """(rows of the dataset in the order of the batch's examples, batch) over every example once."""
        budget = self.evaluation_tokens * self.row_multiple
        for filled in lay_out(np.asarray(data.lengths), budget, row_multiple=self.row_multiple)[1]:
            shape = {"rows": filled.rows, "length": filled.length, "slots": filled.slots}
            yield filled.members, data.collate_rows(filled.members, filled.places, **shape)
