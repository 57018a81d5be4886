"""Results by dataset row: batches in, an array or a store out, and no NaN in either."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array
from tqdm import tqdm

from ntkjax.errors import ConfigError, UserError
from ntkjax.parallel import to_host

MAX_BAD_ROWS = 64


class NonFiniteError(UserError):
    """Some rows gave NaN or infinity: ``rows`` lists them. Nothing stands in their place."""

    def __init__(self, what: str, rows: Sequence[int], *, stopped: bool = False):
        self.rows = [int(row) for row in rows]
        shown = ", ".join(map(str, self.rows[:10])) + (", ..." if len(self.rows) > 10 else "")
        super().__init__(
            f"{what} not finite for {'at least ' if stopped else ''}{len(self.rows)} row(s): {shown}. "
            "Expected finite numbers; the model overflows on these rows or its weights are not finite. "
            "Leave the rows out, or use a wider dtype (float32)."
        )


def real_rows(batch: Any) -> np.ndarray:
    """The dataset row of each example of the batch, -1 for a filler: int32 [B]."""
    return np.asarray(batch.index)


def one_a_row(batches: Iterable) -> Iterable:
    """The same examples in batches of one example a row, for passes that differentiate each by itself: ``padded`` of a
    plan that has it, any other batches as they are."""
    padded = getattr(batches, "padded", None)
    return batches if padded is None else padded


def alone(batches: Any, of: Callable[[Iterable], Iterable], rows: int) -> Callable[[np.ndarray], Iterable] | None:
    """``again`` for `collect_rows`: ``of`` the batches of the rows asked for, one example a row; None where all batches
    are so. ``rows``: size of the dataset."""
    padded = getattr(batches, "padded", None)
    if padded is None:
        return None

    def again(bad: np.ndarray) -> Iterable:
        wanted = np.zeros(rows, bool)
        wanted[bad] = True
        return of(padded.only(wanted))

    return again


Told = Callable[[str, int, Mapping[str, float]], None]
"""``told(title, new, numbers)``, called every `TELL_SECONDS` or a little later, and at the end of a pass: ``new``
examples are done since the last call. Numbers: ``examples`` done so far (those of a store not counted), ``seconds``
since the pass began, and, where batches say how long their examples are, ``tokens_per_second`` since the last call,
compilation included. A batch counts as done when the pass asks for the next one: the device may still be at work on it,
and not on one before."""


@dataclasses.dataclass(frozen=True)
class Bar:
    """How a pass over batches is watched.

    Attributes:
      title: the description of its progress bar; None: what the pass calls itself.
      shown: whether there is a bar.
      told: see `Told`.
    """

    title: str | None = None
    shown: bool = True
    told: Told | None = None


TELL_SECONDS = 5.0
Progress = bool | str | Bar
"""Whether to show a progress bar; a text is its description."""


def bar_of(progress: Progress, default: str | None = None) -> Bar:
    """``progress`` in full; ``default``: its title where it has none."""
    if not isinstance(progress, Bar):
        progress = Bar(progress if isinstance(progress, str) else None, progress is not False)
    return progress if progress.title is not None else dataclasses.replace(progress, title=default)


def title(progress: bool | str, default: str) -> str:
    """The description of a progress bar: ``progress`` where it is a text, else ``default``."""
    return progress if isinstance(progress, str) else default


class _Meter:
    """Counts what a pass has done, and tells it."""

    def __init__(self, bar: Bar):
        self.bar, self.began = bar, time.perf_counter()
        self.last, self.examples, self.tokens, self.new = self.began, 0, 0, 0

    def add(self, batch: Any) -> None:
        real, lengths = real_rows(batch) >= 0, getattr(batch, "lengths", None)
        self.new += int(real.sum())
        self.tokens += 0 if lengths is None else int(np.asarray(lengths)[real].sum())
        if time.perf_counter() - self.last >= TELL_SECONDS:
            self.tell()

    def tell(self) -> None:
        if self.bar.told is None or not self.new:
            return
        now, new = time.perf_counter(), self.new
        self.examples += new
        numbers = {"examples": float(self.examples), "seconds": now - self.began}
        if self.tokens:
            numbers["tokens_per_second"] = self.tokens / max(now - self.last, 1e-9)
        self.last, self.tokens, self.new = now, 0, 0
        self.bar.told(self.bar.title or "", new, numbers)


def iterate(batches: Iterable, progress: Progress, default: str, store: Any = None) -> Iterator:
    """The batches under a progress bar; with a ``store``, those that are left for this process to do.

    Batches whose real rows the store holds are skipped (a plan of batches that has ``without`` does not even make
    them). Where several processes share the store, each takes the rows that the store says are its own, in batches
    of the same shapes: a plan with ``only`` is needed for that.

    Raises:
      ConfigError: several processes, and batches that cannot be divided.
    """
    done = None if store is None else np.asarray(store.done())
    mine = None if store is None else store.mine()
    if mine is not None:
        if not hasattr(batches, "only"):
            raise ConfigError(
                f"{default}: a job of several processes divides batches that come from TokenisedDataset.batches; got "
                f"{type(batches).__name__}. Run one process, or pass such a plan"
            )
        batches = batches.only(mine)  # type: ignore[attr-defined]
    if done is not None and hasattr(batches, "without"):
        batches = batches.without(done)  # type: ignore[attr-defined]
    total = len(batches) if hasattr(batches, "__len__") else None  # type: ignore[arg-type]
    watched = bar_of(progress, default)
    meter = _Meter(watched)
    bar = tqdm(batches, total=total, desc=watched.title, disable=not watched.shown, unit="batch")
    bar.set_postfix_str("compiling")  # until the caller, who has called the pass's program by then, asks for the second
    for number, batch in enumerate(bar):
        if number == 1:
            bar.set_postfix_str("", refresh=False)
        index = real_rows(batch)
        # A batch is skipped whole or not at all: batches keep their shapes, so that a pass that goes on runs the
        # programs of the one that was stopped, at the price of a few rows computed twice.
        if done is None or not done[index[index >= 0]].all():
            yield batch
            meter.add(batch)
    meter.tell()


@dataclasses.dataclass(frozen=True)
class Pass:
    """How a pass over the rows of a data set runs. Nothing of it changes a result, but for rounding.

    Attributes:
      rows: size of the data set that the ``index`` of a batch counts in.
      store: a `ntkjax.store.RowStore` as wide as the result, or None. Batches whose rows it holds are skipped, so that
        a pass that was stopped goes on.
      microbatch: rows whose gradients are taken at a time where each row has its own (None: a whole batch).
      memory_budget: bytes of such gradients held at a time.
      progress: how it is watched, see `Bar`; a text is the description of its progress bar.
    """

    rows: int
    store: Any = None
    microbatch: int | None = None
    memory_budget: int = 1 << 30
    progress: Progress = False

    @classmethod
    def of(cls, rows: int | Pass) -> Pass:
        """A pass that is given as such, or by the number of its rows alone."""
        return rows if isinstance(rows, Pass) else cls(rows)

    def over(self, batches: Iterable, default: str) -> Iterator:
        """The batches that are left to do, under the progress bar: see `iterate`."""
        return iterate(batches, self.progress, default, self.store)

    def collect(self, results: Iterable[tuple[np.ndarray, Array]], **options: Any) -> np.ndarray:
        """The results by row: `collect_rows`, which takes the same ``options``."""
        return collect_rows(results, rows=self.rows, store=self.store, **options)


class _RowSink:
    """Writes rows by dataset index into an array or a store; keeps what is not finite out of both."""

    def __init__(self, rows: int, store: Any, what: str, again: Callable | None = None):
        self.rows, self.store, self.what, self.again = rows, store, what, again
        self.values: np.ndarray | None = None
        self.bad: list[int] = []
        self.suspects: list[int] = []  # not finite in a packed row; `again` tells which are so by themselves

    def write(self, index: np.ndarray, values: np.ndarray) -> None:
        real = index >= 0
        index, values = index[real], values[real]
        if index.size and index.max() >= self.rows:
            raise ValueError(f"batch holds row {index.max()}, but rows={self.rows}")
        finite = np.isfinite(values).all(axis=1)
        (self.bad if self.again is None else self.suspects).extend(index[~finite].tolist())
        index, values = index[finite], values[finite]
        if self.store is not None:
            self.store.write(index, values)
        else:
            if self.values is None:
                self.values = np.full((self.rows, values.shape[1]), np.nan, values.dtype)
            self.values[index] = values
        # In between, not at the end of the pass alone: a model that overflows on every row is to stop after a few.
        if len(self.suspects) >= MAX_BAD_ROWS:
            self.try_again()
        if len(self.bad) >= MAX_BAD_ROWS:
            raise NonFiniteError(self.what, self.bad, stopped=True)

    def try_again(self) -> None:
        """Compute the suspects once more, each in a row of its own."""
        if not self.suspects:
            return
        suspects, again = np.unique(self.suspects), self.again
        assert again is not None
        # Each is alone in its row now: without ``again`` what is not finite this time is bad.
        self.suspects, self.again = [], None
        for index, values in again(suspects):
            self.write(index, to_host(values))
        self.again = again

    def check(self) -> None:
        if self.bad:
            raise NonFiniteError(self.what, self.bad)

    def result(self) -> np.ndarray:
        if self.store is None:
            if self.values is None:
                raise ValueError(f"no batches to compute the {self.what} of")
            return self.values
        done = np.flatnonzero(self.store.done())
        stored = self.store.read(done)
        # A pass over a part of the data set leaves other rows of the store undone, which reading all would refuse.
        values = np.full((self.rows, stored.shape[1]), np.nan, stored.dtype)
        values[done] = stored
        return values


def collect_rows(
    results: Iterable[tuple[np.ndarray, Array]],
    *,
    rows: int,
    store: Any = None,
    what: str = "score",
    read: bool = True,
    again: Callable[[np.ndarray], Iterable[tuple[np.ndarray, Array]]] | None = None,
) -> np.ndarray:
    """Gather (index [B], values [B, m]) pairs into [rows, m]; rows never visited are NaN.

    One result stays in flight: batch k is written on the host while the device works on k + 1. With ``read`` False the
    values stay in the store, for what does not fit into memory, and the array returned is empty. ``again``: the results
    of the rows given, each example in a row of its own; asked for what was not finite, since in a packed row one
    example that is not makes its neighbours so (see `alone`).

    Raises:
      NonFiniteError: some real row is NaN or infinite. The finite rows reach the store first, so that a
        resumed run repeats only the bad ones. It stops early once `MAX_BAD_ROWS` rows are bad.
    """
    sink = _RowSink(rows, store, what, again)
    in_flight: collections.deque = collections.deque()
    try:
        for index, values in results:
            in_flight.append((index, values))
            if len(in_flight) > 1:
                index, values = in_flight.popleft()
                sink.write(index, to_host(values))
        while in_flight:
            index, values = in_flight.popleft()
            sink.write(index, to_host(values))
        sink.try_again()
    except BaseException:
        if store is not None:  # keep finished work, but let the first error be the one that is seen
            with contextlib.suppress(UserError):
                store.flush()
        raise
    if store is not None:
        store.flush()
    # Before the barrier in `gather`: a process with bad rows then ends, and ends the waiting of the others with it.
    sink.check()
    if store is not None:
        store.gather()
    return sink.result() if read else np.empty((0, 0), np.float32)
