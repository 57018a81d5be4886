"""Tokenised examples, memory-mapped, and the batches made of them, padded or packed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from hashlib import blake2b
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ntkjax.data.buckets import bucket_lengths, round_up
from ntkjax.data.indices import Positions, as_indices
from ntkjax.data.records import Records, concat_records
from ntkjax.data.rows import FilledBatch, RowLayout, fill, lay_out
from ntkjax.errors import ConfigError
from ntkjax.fingerprint import digest
from ntkjax.parallel import data_parallel, rows_here, shard_batch
from ntkjax.types import Batch

MAX_BUCKETS = 12  # padded lengths: below 10% of padding on a pool of mixed sources, where six leave 16%
MAX_BUCKETS_COMPILED = 4  # on an accelerator, where another program costs more than padding


def most_buckets(wanted: int = MAX_BUCKETS) -> int:
    """Padded lengths of a pass: ``wanted`` on a CPU, at most `MAX_BUCKETS_COMPILED` on an accelerator."""
    return wanted if jax.default_backend() == "cpu" else min(wanted, MAX_BUCKETS_COMPILED)


@dataclasses.dataclass(frozen=True, eq=False)
class TokenisedDataset:
    """A view of tokenised examples.

    Attributes:
      stores: flat int32 token arrays (memory-mapped where they come from ``tokenise``).
      part: int16 [N], which of ``stores``; start: int64 [N], where in it the example starts.
      masks: flat bool arrays, laid out as ``stores``: True at the tokens that are to be learned. Positions S(x) are
        those whose next token is one of them.
      lengths: int32 [N], tokens of each example, at least 2.
      response_starts: int32 [N], first token of the response (of the last assistant turn), at least 1.
      response_lengths: int32 [N], how many are: the tokens of the response with its end token, of every assistant turn
        where several are trained.
      pad_id: token in padded positions.
      report: what tokenising found: examples, tokens, prompt_truncated, response_truncated, ...
      records: where the examples come from, in the same order; None for ``from_sequences``.
      labels: (ids, sources) where there are no records.
      recipe: digest of the tokenizer and the maximal length, None for ``from_sequences``.
      mesh: the devices that ``batches`` are spread over; None: they stay on the host.
      packing: whether ``batches`` are packed where nothing else is said.
    """

    stores: tuple[np.ndarray, ...]
    masks: tuple[np.ndarray, ...]
    part: np.ndarray
    start: np.ndarray
    lengths: np.ndarray
    response_starts: np.ndarray
    response_lengths: np.ndarray
    pad_id: int
    report: dict[str, Any]
    records: Records | None = None
    labels: tuple[Sequence[str], Sequence[str]] | None = None
    recipe: str | None = None
    mesh: Mesh | None = None
    packing: bool = False

    @classmethod
    def from_sequences(
        cls,
        tokens: Sequence[Sequence[int]],
        response_starts: Sequence[int],
        *,
        ids: Sequence[str] | None = None,
        sources: Sequence[str] | None = None,
        pad_id: int = 0,
    ) -> TokenisedDataset:
        """A data set from token lists in memory. Each needs a prompt and a response token at least."""
        for i, (row, start) in enumerate(zip(tokens, response_starts, strict=True)):
            if not 1 <= start < len(row):
                raise ConfigError(
                    f"example {i}: response_start is {start} of {len(row)} tokens; expected 1 <= it < length"
                )
        lengths, starts = np.asarray([len(row) for row in tokens], np.int32), np.asarray(response_starts, np.int32)
        steps = [np.arange(len(row)) >= start for row, start in zip(tokens, starts)]
        return cls(
            stores=(np.asarray([token for row in tokens for token in row], np.int32),),
            masks=(np.concatenate([np.zeros(0, bool), *steps]),),
            part=np.zeros(len(tokens), np.int16),
            start=np.cumsum(lengths, dtype=np.int64) - lengths,
            lengths=lengths,
            response_starts=starts,
            response_lengths=lengths - starts,
            pad_id=pad_id,
            report={"examples": len(tokens), "tokens": int(lengths.sum())},
            labels=(
                list(ids) if ids is not None else [str(i) for i in range(len(tokens))],
                list(sources) if sources is not None else ["tokens"] * len(tokens),
            ),
        )

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def ids(self) -> Sequence[str]:
        """Id of each example."""
        return self.records.ids if self.records is not None else self._labels[0]

    @property
    def sources(self) -> Sequence[str]:
        """Source of each example."""
        return self.records.sources if self.records is not None else self._labels[1]

    @property
    def _labels(self) -> tuple[Sequence[str], Sequence[str]]:
        return self.labels if self.labels is not None else ([], [])

    def tokens(self, i: int | np.integer) -> tuple[np.ndarray, int]:
        """(int32 tokens [T_i], position of the first response token) of example ``i``."""
        start = self.start[i]
        return self.stores[self.part[i]][start : start + self.lengths[i]], int(self.response_starts[i])

    def trained(self, i: int | np.integer) -> np.ndarray:
        """bool [T_i]: which tokens of example ``i`` are to be learned."""
        start = self.start[i]
        return self.masks[self.part[i]][start : start + self.lengths[i]]

    @property
    def fingerprint(self) -> str:
        """32 hex digits of the content: records, tokenizer and maximal length, or the tokens themselves."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        if self.records is not None and self.recipe is not None:
            return digest(self.records.fingerprint, self.recipe)
        content = blake2b(digest_size=16)
        content.update(self.lengths.astype("<i4").tobytes())
        for i in range(len(self)):
            content.update(self.tokens(i)[0].astype("<i4").tobytes())
            content.update(self.trained(i).tobytes())
        return content.hexdigest()

    def subset(self, indices: Positions) -> TokenisedDataset:
        """The examples at ``indices``, in that order: row k of the result is ``indices[k]`` here. Copies no tokens."""
        chosen = as_indices(indices, len(self))
        labels = self.labels and tuple([column[i] for i in chosen] for column in self.labels)
        return dataclasses.replace(
            self,
            part=self.part[chosen],
            start=self.start[chosen],
            lengths=self.lengths[chosen],
            response_starts=self.response_starts[chosen],
            response_lengths=self.response_lengths[chosen],
            records=self.records.subset(chosen) if self.records is not None else None,
            labels=labels,
        )

    def collate(self, indices: Positions, *, rows: int | None = None, length: int | None = None) -> Batch:
        """One padded batch (NumPy leaves) of the examples at ``indices``, in that order.

        Args:
          rows: rows of the batch; those beyond ``indices`` are filler (index -1, length 1, the pad token,
            no response).
          length: tokens per row; by default the longest example, rounded up to a multiple of 8.

        Raises:
          ConfigError: more examples than rows, or an example longer than ``length``.
        """
        chosen = as_indices(indices, len(self))
        rows = max(1, len(chosen)) if rows is None else rows
        longest = int(self.lengths[chosen].max(initial=1))
        length = round_up(longest, 8) if length is None else length
        if len(chosen) > rows or longest > length:
            raise ConfigError(
                f"a batch of {rows} rows and {length} tokens cannot hold {len(chosen)} examples of up to "
                f"{longest} tokens; expected enough rows and length; raise them or pass fewer examples"
            )
        tokens = np.full((rows, length), self.pad_id, np.int32)
        lengths, index = np.ones(rows, np.int32), np.full(rows, -1, np.int32)
        mask = np.zeros((rows, length), bool)
        for row, i in enumerate(chosen):
            sequence = self.tokens(i)[0]
            lengths[row] = len(sequence)
            tokens[row, : len(sequence)], mask[row, : len(sequence)] = sequence, self.trained(i)
        index[: len(chosen)] = chosen
        return Batch(tokens=tokens, response_mask=mask, lengths=lengths, index=index)

    def collate_rows(
        self, indices: Positions, places: Sequence[int] | np.ndarray, *, rows: int, length: int, slots: int
    ) -> Batch:
        """One packed batch (NumPy leaves, see ``Batch.examples``): example ``indices[k]`` in row ``places[k]``, in the
        given order.

        Args:
          places: ascending.
          rows, length, slots: the batch's shape: tokens [rows, length], index [rows * slots].

        Raises:
          ConfigError: a row that has not the tokens or the slots for its examples.
        """
        chosen, places = as_indices(indices, len(self)), np.asarray(places, np.int64)
        sizes = self.lengths[chosen].astype(np.int64)
        held, used = (np.bincount(places, weights=w, minlength=rows).astype(np.int64) for w in (None, sizes))
        if len(held) > rows or used.max(initial=0) > length or held.max(initial=0) > slots:
            raise ConfigError(
                f"packed rows of {rows} x {length} tokens and {slots} slots cannot hold {held.max()} examples of "
                f"{used.max()} tokens in a row of {len(held)}; expected enough rows, tokens and slots; raise them or "
                "pack fewer examples"
            )
        slot = slots_of(places)
        # Where each example begins in its row: what lies before it in all rows, less what lies in the rows before.
        begin = np.cumsum(sizes) - sizes - (np.cumsum(used) - used)[places]
        tokens = np.full((rows, length), self.pad_id, np.int32)
        examples = np.full((rows, length), -1, np.int32)
        positions, mask = np.zeros((rows, length), np.int32), np.zeros((rows, length), bool)
        lengths, index = np.zeros(rows * slots, np.int32), np.full(rows * slots, -1, np.int32)
        steps = np.arange(length, dtype=np.int32)
        for i, row, s, at, size in zip(chosen, places.tolist(), slot.tolist(), begin.tolist(), sizes.tolist()):
            here = slice(at, at + size)
            tokens[row, here], mask[row, here] = self.tokens(i)[0], self.trained(i)
            examples[row, here], positions[row, here] = s, steps[:size]
        for row, end in enumerate(used.tolist()):  # positions count from 0 in the padding, too
            positions[row, end:] = steps[: length - end]
        lengths[places * slots + slot], index[places * slots + slot] = sizes, chosen
        return Batch(tokens, mask, lengths, index, positions=positions, examples=examples)

    def batches(
        self,
        *,
        token_budget: int,
        indices: Positions | None = None,
        max_buckets: int | None = None,
        row_multiple: int = 1,
        packing: bool | None = None,
    ) -> BatchPlan:
        """Every example (of ``indices``) once, in batches of at most ``token_budget`` tokens: see ``BatchPlan``. On a
        mesh (see ``on``) that is the budget of each of the devices that rows are split over, and the rows of every
        batch divide by their number.

        Args:
          max_buckets: padded lengths at most; None: `most_buckets` of the device.
          packing: several examples a row, in rows of a fixed length (``ntkjax.data.rows``); the plan's ``padded`` then
            holds the same examples one a row. None: as the data set says.
        """
        chosen = np.arange(len(self)) if indices is None else as_indices(indices, len(self))
        # The budget bounds the memory of a device, and rows are spread over ``parts`` of them.
        parts = data_parallel(self.mesh)
        multiple, budget = math.lcm(row_multiple, parts), token_budget * parts
        buckets = most_buckets() if max_buckets is None else max_buckets
        padded = BatchPlan(self, tuple(plan_batches(self.lengths, chosen, budget, buckets, multiple)))
        if not (self.packing if packing is None else packing):
            return padded
        layout, filled = lay_out(self.lengths[chosen], budget, row_multiple=multiple)
        return BatchPlan(self, _planned(filled, chosen), layout, padded)

    def on(self, mesh: Mesh | None) -> TokenisedDataset:
        """The same examples, whose ``batches`` lie on ``mesh``, rows split over "data"; None: left on the host."""
        return dataclasses.replace(self, mesh=mesh)

    def packed(self, packing: bool) -> TokenisedDataset:
        """The same examples, whose ``batches`` are packed or not where nothing else is said."""
        return dataclasses.replace(self, packing=packing)


@dataclasses.dataclass(frozen=True, slots=True)
class PlannedBatch:
    """One batch before it is filled.

    Attributes:
      length, rows: its shape.
      indices: int64, the examples in it: at most ``rows``, or where it is packed row after row.
      places: int64, the row of each, ascending; None where every row is one example.
      slots: examples in a row at most.
    """

    length: int
    rows: int
    indices: np.ndarray
    places: np.ndarray | None = None
    slots: int = 1


def slots_of(places: np.ndarray) -> np.ndarray:
    """Of examples in the rows ``places``, ascending, the slot of each in its row, from 0."""
    return np.arange(len(places)) - np.searchsorted(places, places)


def _planned(filled: Sequence[FilledBatch], indices: np.ndarray) -> tuple[PlannedBatch, ...]:
    return tuple(PlannedBatch(b.length, b.rows, indices[b.members], b.places, b.slots) for b in filled)


def plan_batches(
    lengths: np.ndarray, indices: np.ndarray, token_budget: int, max_buckets: int = MAX_BUCKETS, row_multiple: int = 1
) -> list[PlannedBatch]:
    """Group ``indices`` by padded length, longest first, in the given order within a length.

    All batches of one length have the same number of rows, at most ``max(1, token_budget // length)``,
    evened out so that the last one is not left mostly empty. A bucket is only added where it saves more
    tokens than one batch holds.
    """
    if token_budget < 1 or row_multiple < 1:
        raise ConfigError(
            f"token_budget is {token_budget} and row_multiple {row_multiple}; expected at least 1 of both"
        )
    edges = np.asarray(bucket_lengths(lengths[indices], max_buckets, bucket_cost=token_budget), np.int64)
    bucket = np.searchsorted(edges, lengths[indices])
    planned = []
    for number in reversed(range(len(edges))):
        members = indices[bucket == number]
        most = max(1, token_budget // int(edges[number]))
        most = max(row_multiple, most // row_multiple * row_multiple)
        # Evened out: 9 examples in batches of at most 8 rows are 5 and 4 of 5 rows, not 8 and 1 of 8.
        count = -(-len(members) // most)
        rows = round_up(-(-len(members) // count), row_multiple)
        parts = [members[k : k + rows] for k in range(0, len(members), rows)]
        planned += [PlannedBatch(int(edges[number]), rows, part) for part in parts]
    return planned


@dataclasses.dataclass(frozen=True, eq=False)
class BatchPlan:
    """A sized sequence of batches that can be iterated any number of times, always the same.

    One shape per bucket, or per fixed length of packed rows, so that a jitted function compiles once for each.
    ``plan[k]`` makes one batch; iteration makes the next one in the background. Fillers have index -1.

    Attributes:
      layout: the shapes of packed batches; None where every row is one example.
      padded: of a packed plan, the same examples one a row, for passes that look at one example at a time.
    """

    dataset: TokenisedDataset
    planned: tuple[PlannedBatch, ...]
    layout: RowLayout | None = None
    padded: BatchPlan | None = None

    def __len__(self) -> int:
        return len(self.planned)

    def __getitem__(self, k: int) -> Batch:
        planned, data = self.planned[k], self.dataset
        here = rows_here(data.mesh, planned.rows)  # on a mesh over several processes each reads its own rows
        shape = {"rows": here.stop - here.start, "length": planned.length}
        index = np.full(planned.rows * planned.slots, -1, np.int32)
        if planned.places is None:
            index[: len(planned.indices)] = planned.indices
            batch = data.collate(planned.indices[here], **shape)
        else:
            index[planned.places * planned.slots + slots_of(planned.places)] = planned.indices
            first, last = np.searchsorted(planned.places, [here.start, here.stop])
            held, places = planned.indices[first:last], planned.places[first:last] - here.start
            batch = data.collate_rows(held, places, **shape, slots=planned.slots)
        filler = np.int32(1 if planned.places is None else 0)
        lengths = np.where(index >= 0, data.lengths[index], filler).astype(np.int32)
        return shard_batch(batch, data.mesh, rows=planned.rows, whole={"index": index, "lengths": lengths})

    def __iter__(self) -> Iterator[Batch]:
        if not self.planned:
            return
        # The next batch is made while the device works on this one. One thread: batches come in order, and at most two
        # are in memory.
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as pool:
            ahead = pool.submit(self.__getitem__, 0)
            for k in range(1, len(self)):
                ready, ahead = ahead.result(), pool.submit(self.__getitem__, k)
                yield ready
            yield ahead.result()

    def only(self, rows: np.ndarray) -> BatchPlan:
        """The examples among ``rows`` (bool [N]) alone, in batches of the same shapes: for one process of several."""
        if self.layout is not None:
            members = np.concatenate([np.empty(0, np.int64), *(batch.indices for batch in self.planned)])
            members = members[rows[members]]
            planned = _planned(fill(self.dataset.lengths[members], self.layout), members)
            padded = None if self.padded is None else self.padded.only(rows)
            return dataclasses.replace(self, planned=planned, padded=padded)
        kept = []
        # Shape by shape: the rows that are kept close ranks, so that a process with a third of the rows has a third of
        # the batches, in programs that all processes have.
        for length, size in dict.fromkeys((batch.length, batch.rows) for batch in self.planned):
            members = [b.indices for b in self.planned if (b.length, b.rows) == (length, size)]
            members = np.concatenate(members)
            members = members[rows[members]]
            kept += [PlannedBatch(length, size, members[k : k + size]) for k in range(0, len(members), size)]
        return dataclasses.replace(self, planned=tuple(kept))

    def without(self, done: np.ndarray) -> BatchPlan:
        """The batches that hold an example that is not ``done`` (bool [N]), as they are."""
        # Batches stay as they are, done rows included: a row that is computed after a stop shares its batch with the
        # same others as without the stop, and comes out to the same bits.
        kept = tuple(b for b in self.planned if not done[b.indices].all())
        padded = None if self.padded is None else self.padded.without(done)
        return dataclasses.replace(self, planned=kept, padded=padded)

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """The distinct (rows, length), longest first: what a jitted function compiles for."""
        return tuple(dict.fromkeys((batch.rows, batch.length) for batch in self.planned))

    @property
    def examples(self) -> int:
        """Examples in the plan, filler rows not counted."""
        return sum(len(batch.indices) for batch in self.planned)

    @property
    def padded_tokens(self) -> int:
        """Tokens in all batches, padding and filler rows included."""
        return sum(batch.rows * batch.length for batch in self.planned)

    @property
    def padding_waste(self) -> float:
        """Share of ``padded_tokens`` that is padding or filler, between 0 and 1."""
        real = sum(int(self.dataset.lengths[batch.indices].sum()) for batch in self.planned)
        return 1.0 - real / self.padded_tokens if self.planned else 0.0


def concat(first: TokenisedDataset, second: TokenisedDataset) -> TokenisedDataset:
    """The examples of ``first``, then those of ``second``. Copies no tokens; the reports are added up.

    Raises:
      ConfigError: they were made with different tokenizers or settings.
    """
    if first.pad_id != second.pad_id or (first.recipe and second.recipe and first.recipe != second.recipe):
        raise ConfigError(
            "two data sets tokenised differently cannot be joined; expected the same tokenizer and maximal "
            "length; tokenise both with the same settings"
        )
    records = labels = None
    if first.records is not None and second.records is not None:
        records = concat_records(first.records, second.records)
    else:
        labels = ([*first.ids, *second.ids], [*first.sources, *second.sources])
    return TokenisedDataset(
        stores=first.stores + second.stores,
        masks=first.masks + second.masks,
        part=np.concatenate([first.part, second.part + np.int16(len(first.stores))]),
        start=np.concatenate([first.start, second.start]),
        lengths=np.concatenate([first.lengths, second.lengths]),
        response_starts=np.concatenate([first.response_starts, second.response_starts]),
        response_lengths=np.concatenate([first.response_lengths, second.response_lengths]),
        pad_id=first.pad_id,
        report=_added(first.report, second.report),
        records=records,
        labels=labels,
        recipe=first.recipe if first.recipe == second.recipe else None,
        mesh=first.mesh,
        packing=first.packing,
    )


def _added(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Counts, lists and tables of counts, added up by name."""
    total = dict(first)
    for name, value in second.items():
        if name not in total:
            total[name] = value
        elif isinstance(value, dict):
            total[name] = _added(total[name], value)
        else:
            total[name] = total[name] + value
    return dict(sorted(total.items()))
