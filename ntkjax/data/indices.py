"""Positions of rows, given as a list, an array or a boolean mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Positions = Sequence[int | np.integer] | np.ndarray


def as_indices(indices: Positions, size: int) -> np.ndarray:
    """Positions as int64 in [0, size); a boolean mask of ``size`` gives the positions where it is True.

    Raises:
      IndexError: a position outside [-size, size), a mask of another length, or something that is no position.
    """
    given: Any = np.asarray(indices)
    if given.dtype == bool:
        if given.shape != (size,):
            raise IndexError(f"a mask of shape {given.shape} for {size} rows")
        return np.flatnonzero(given)
    if given.size == 0:
        return np.zeros(0, np.int64)
    if given.ndim != 1 or not np.issubdtype(given.dtype, np.integer):
        raise IndexError(f"positions of type {given.dtype}, shape {given.shape}; expected a list of integers")
    if given.min() < -size or given.max() >= size:
        raise IndexError(f"positions from {given.min()} to {given.max()} for {size} rows")
    return given.astype(np.int64) % size
