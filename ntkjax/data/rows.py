"""Rows of one fixed length, each filled with several whole examples: one compiled program a pass, hardly any padding.

First-fit decreasing: the longest example first, ties in the given order, each into the first row that has room, else
into a new one. Rows have fixed lengths that hardly depend on the data (`RowLayout`), and a batch as many as the budget
holds, fewer only where all examples need fewer: passes over other data are mostly the same program.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from typing import Literal

import jax
import numpy as np
from jaxtyping import Int

from ntkjax.errors import ConfigError

Packing = Literal["auto", "on", "off"]
ROW_LENGTH = 2048
"""Tokens of a row where the longest example fits."""
TOKENS_A_SLOT = 32
"""A row has a slot for every so many tokens; data of shorter examples get more where they would need more batches."""
MIN_SLOTS = 16
FEWEST_TOKENS = 8192
"""Tokens of a batch at least, as far as the budget goes, however few the examples are."""
MAX_LENGTHS = 3
"""Fixed lengths at most, whatever the longest example."""


def packs(packing: Packing) -> bool:
    """Whether passes are packed: ``auto`` is on for an accelerator, where every padded length is another program to
    compile, and off for a CPU.

    A CPU makes a number for every pair of tokens of a row before it, whichever example they belong to. Measured there
    (two shared cores, a 7 M model, 240 chains of thought of 100 tokens, 4,096 tokens a batch, scores with two
    directions, one round in turns): padded 70 s, rows of 512 tokens 85 s, of 2,048 219 s; with compilation 125, 109 and
    253 s. Packing wins there only where a pass is so short that compiling several lengths is most of it, and rows are
    short.
    """
    return jax.default_backend() != "cpu" if packing == "auto" else packing == "on"


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """The shapes of packed batches.

    Attributes:
      lengths: fixed lengths of rows, ascending, at most `MAX_LENGTHS`.
      rows: rows of a batch at each length.
      slots: S, examples in a row at most.
    """

    lengths: tuple[int, ...]
    rows: tuple[int, ...]
    slots: int


@dataclasses.dataclass(frozen=True, slots=True)
class FilledBatch:
    """One batch of packed rows before it is made.

    Attributes:
      length, rows, slots: its shape.
      members: int64 [k], which of the given examples it holds, row after row.
      places: int64 [k], ascending, the row of each.
    """

    length: int
    rows: int
    slots: int
    members: np.ndarray
    places: np.ndarray


def lay_out(
    lengths: Int[np.ndarray, " n"], token_budget: int, *, row_multiple: int = 1, row_length: int = ROW_LENGTH
) -> tuple[RowLayout, list[FilledBatch]]:
    """The layout for these examples, and all of them filled into its batches.

    Rows of ``row_length`` tokens, or of the power of two of which ``token_budget`` holds ``row_multiple``; as many as
    the budget holds, a multiple of ``row_multiple``; longer rows only where an example needs them. Where fewer rows
    hold all examples of that length, a power of two of them is enough, but at least `FEWEST_TOKENS` as far as the
    budget goes: small data share one shape, and a large budget is not spent on empty rows. S is the row's length over
    `TOKENS_A_SLOT` (at least `MIN_SLOTS`), doubled as long as that may save a batch.

    Raises:
      ConfigError: a budget or a multiple below 1.
    """
    if token_budget < 1 or row_multiple < 1:
        raise ConfigError(
            f"token_budget is {token_budget} and row_multiple {row_multiple}; expected at least 1 of both"
        )
    base = min(row_length, 1 << (max(token_budget // row_multiple, 2).bit_length() - 1))
    fixed = fixed_lengths(int(np.max(lengths, initial=1)), base)
    rows = tuple(max(1, token_budget // length // row_multiple) * row_multiple for length in fixed)
    slots = max(MIN_SLOTS, base // TOKENS_A_SLOT)
    while True:
        layout = RowLayout(fixed, rows, slots)
        fitted = first_fit(lengths, fixed, slots)
        if slots >= base or not _starved(lengths, layout, *fitted):
            layout = dataclasses.replace(layout, rows=_enough(layout, fitted[1], row_multiple))
            return layout, _batches(layout, *fitted)
        # Short examples: rows run out of slots before they run out of tokens. Doubled, so that few values occur, as
        # each is a program of its own.
        slots *= 2


def fill(lengths: Int[np.ndarray, " n"], layout: RowLayout) -> list[FilledBatch]:
    """Every example once in batches of the layout's shapes, those of the longest rows first.

    A batch may have empty rows at its end, so that every batch of one length has one shape.
    """
    return _batches(layout, *first_fit(lengths, layout.lengths, layout.slots))


def _enough(layout: RowLayout, capacity: Int[np.ndarray, " R"], row_multiple: int) -> tuple[int, ...]:
    """Rows of a batch at each length, no more than rows of these capacities need: see `lay_out`."""
    enough = []
    for length, rows in zip(layout.lengths, layout.rows):
        needed = -(-int(np.sum(capacity == length)) // row_multiple)
        fewest = max(1, FEWEST_TOKENS // length // row_multiple)
        enough.append(min(rows, row_multiple * max(fewest, 1 << max(needed - 1, 0).bit_length())))
    return tuple(enough)


def _starved(
    lengths: Int[np.ndarray, " n"], layout: RowLayout, where: Int[np.ndarray, " n"], capacity: Int[np.ndarray, " R"]
) -> bool:
    """Whether more slots might save a batch: rows are out of slots, and there are more batches than tokens need."""
    used = np.bincount(where, minlength=len(capacity))
    empty = capacity - np.bincount(where, weights=lengths, minlength=len(capacity)).astype(np.int64)
    held = int(empty[used >= layout.slots].sum())
    short = int(capacity[capacity == layout.lengths[0]].sum())
    batches = lambda tokens: math.ceil(tokens / (layout.lengths[0] * layout.rows[0]))
    return held > 0.005 * int(capacity.sum()) and batches(short - held) < batches(short)


def fixed_lengths(longest: int, base: int) -> tuple[int, ...]:
    """``base`` and, where ``longest`` does not fit, powers of two times base: at most `MAX_LENGTHS` in all, the last of
    which holds it."""
    doublings = max(0, math.ceil(math.log2(longest / base)))
    middle = () if doublings < 2 else (base << -(-doublings // 2),)
    return (base,) if doublings == 0 else (base, *middle, base << doublings)


def first_fit(
    lengths: Int[np.ndarray, " n"], capacities: tuple[int, ...], slots: int
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " R"]]:
    """First-fit decreasing: (row of each example int64 [n], capacity of each row int64 [R]), O(n log n).

    A new row gets the smallest of ``capacities`` (ascending) that holds the example; a row takes ``slots`` examples at
    most.

    Raises:
      ConfigError: an example longer than every capacity.
    """
    lengths = np.asarray(lengths, np.int64)
    where = np.empty(len(lengths), np.int64)
    order = np.argsort(-lengths, kind="stable")
    distinct, starts = np.unique(-lengths[order], return_index=True)
    if len(lengths) and lengths[order[0]] > capacities[-1]:
        raise ConfigError(f"an example of {lengths[order[0]]} tokens does not fit into rows of {capacities[-1]}")
    free: list[int] = []  # of each row: tokens, slots, its capacity
    left: list[int] = []
    capacity: list[int] = []
    # Examples get shorter, so a row that has room keeps it: ``open_rows`` is a heap of the rows that hold the present
    # length, and ``waiting[f]`` the rows with f free tokens, which is less.
    open_rows: list[int] = []
    waiting: list[list[int]] = [[] for _ in range(capacities[-1] + 1)]
    above = capacities[-1] + 1
    for length, start, end in zip((-distinct).tolist(), starts.tolist(), [*starts[1:].tolist(), len(order)]):
        for room in range(length, above):
            for row in waiting[room]:
                heapq.heappush(open_rows, row)
            waiting[room] = []
        above, todo = length, end - start
        rows, counts = [], []
        while todo:
            if open_rows:
                # The lowest number of the rows with room: first fit.
                row = heapq.heappop(open_rows)
            else:
                row = len(free)
                capacity.append(next(c for c in capacities if c >= length))
                free.append(capacity[-1])
                left.append(slots)
            # Examples of one length are alike, so a row takes as many at once as it has room for: the loop runs over
            # rows and lengths, not over examples.
            fitting = min(free[row] // length, left[row], todo)
            free[row] -= fitting * length
            left[row] -= fitting
            todo -= fitting
            rows.append(row)
            counts.append(fitting)
            if left[row] and free[row] >= length:
                heapq.heappush(open_rows, row)
            elif left[row]:
                waiting[free[row]].append(row)
        where[order[start:end]] = np.repeat(rows, counts)
    return where, np.asarray(capacity, np.int64)


def _batches(layout: RowLayout, where: Int[np.ndarray, " n"], capacity: Int[np.ndarray, " R"]) -> list[FilledBatch]:
    # Members row after row, in each row in the given order: row r has members[ends[r] - held[r] : ends[r]].
    members = np.argsort(where, kind="stable")
    held = np.bincount(where, minlength=len(capacity))
    ends = np.cumsum(held)
    batches = []
    for length, rows in sorted(zip(layout.lengths, layout.rows), reverse=True):
        chosen = np.flatnonzero(capacity == length)
        for k in range(0, len(chosen), rows):
            part = chosen[k : k + rows]
            own = [members[ends[row] - held[row] : ends[row]] for row in part]
            places = np.repeat(np.arange(len(part)), held[part])
            batches.append(FilledBatch(length, rows, layout.slots, np.concatenate(own), places))
    return batches
