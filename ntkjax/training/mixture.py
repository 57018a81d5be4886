"""Which examples each step sees: a pure function of the seed and the step, so a resumed run sees the same."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from ntkjax.data.buckets import epoch_batches
from ntkjax.errors import ConfigError
from ntkjax.rng import numpy_rng


def mixture_indices(total: int, domain: np.ndarray, share: float | None, *, seed: int, epoch: int) -> np.ndarray:
    """Rows of one epoch, int64: every example once, and domain examples again until they make ``share``.

    With d domain and a other examples, D = max(d, ceil(share a / (1 - share))) domain rows: every domain
    example floor(D / d) times, and a random D mod d of them (drawn anew each epoch) once more. The length is
    the same in every epoch. Nothing is ever left out: a domain that already makes its share is not repeated.

    Raises:
      ConfigError: a share was asked for but no domain examples were named.
    """
    rows = np.arange(total, dtype=np.int64)
    if share is None:
        return rows
    domain = np.unique(np.asarray(domain, np.int64))
    if domain.size == 0 or domain[0] < 0 or domain[-1] >= total:
        raise ConfigError(
            f"training option domain_share = {share}: needs the rows of the domain examples, each in"
            f" [0, {total}), got {domain.size} rows"
        )
    others = total - domain.size
    # The small slack keeps ceil from adding a row when the quotient is whole but for rounding.
    wanted = math.ceil(share * others / (1 - share) - 1e-9)
    copies, rest = divmod(max(wanted, domain.size), domain.size)
    again = numpy_rng(seed, "mixture", epoch).permutation(domain)[:rest]
    return np.concatenate([rows, np.tile(domain, copies - 1), np.sort(again)])


@dataclasses.dataclass(frozen=True)
class EpochPlan:
    """The rows of every step. ``lengths``: tokens of each example [n]; ``domain``: rows."""

    lengths: np.ndarray
    batch_size: int
    seed: int
    domain: np.ndarray
    domain_share: float | None = None

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """The batches of one epoch, each an array of at most ``batch_size`` rows of the dataset."""
        rows = mixture_indices(len(self.lengths), self.domain, self.domain_share, seed=self.seed, epoch=epoch)
        batches = epoch_batches(self.lengths[rows], batch_size=self.batch_size, seed=self.seed, epoch=epoch)
        return [rows[np.asarray(batch, np.int64)] for batch in batches]

    @property
    def steps_per_epoch(self) -> int:
        rows = mixture_indices(len(self.lengths), self.domain, self.domain_share, seed=self.seed, epoch=0)
        return math.ceil(len(rows) / self.batch_size)

    def batches(self, first: int, last: int) -> Iterator[np.ndarray]:
        """The batches of steps first, ..., last - 1."""
        per_epoch = self.steps_per_epoch
        step = first
        while step < last:
            epoch, offset = divmod(step, per_epoch)
            # A resume in the middle of an epoch draws the epoch again and skips what was done: the order depends on
            # seed and epoch alone, never on where a run was stopped.
            for rows in self.epoch(epoch)[offset : offset + last - step]:
                yield rows
                step += 1
