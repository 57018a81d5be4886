"""``ntkjax select --dry-run``: time, memory and disk of a selection, from a few timed batches."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntkjax.data.sources import count_records, is_hub_id, list_sources, unpacked_size
from ntkjax.models import LanguageModel
from ntkjax.models.quantised import bytes_of
from ntkjax.ntk.kernels import KernelFunctions, build
from ntkjax.ntk.scores import add_direction, score_batch, zero_direction
from ntkjax.pipeline.load import Loaded
from ntkjax.selection.cost import Sizes
from ntkjax.selection.vote import embed_batch
from ntkjax.types import Params

SAMPLE_ROWS = 256
"""Records read of each data set: enough for a few batches, whatever the size of the pool."""
TIMED = 3
SCORE_ROW_BYTES = 76
"""A row of scores.parquet, uncompressed: id, score, votes, rank, selected, source, length, file (a number), line."""


@dataclasses.dataclass(frozen=True)
class Phase:
    """One pass of a selection: what it reads, how fast a timed batch of it was, and its device memory.

    Attributes:
      examples, tokens: of the whole pass, estimated from the sample.
      tokens_per_second: real tokens (padding not counted), median over the timed batches, compilation left out.
      temporary_bytes: the compiled step's working memory, None where the backend does not tell.
    """

    name: str
    examples: int
    tokens: int
    tokens_per_second: float
    temporary_bytes: int | None

    @property
    def seconds(self) -> float:
        """Forecast duration, compilation left out."""
        return self.tokens / self.tokens_per_second


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What a selection would cost. Sizes in bytes, times in seconds, tokens in tokens.

    Attributes:
      exact: whether the pool's size is known (counted), or estimated from the size of its files.
    """

    phases: tuple[Phase, ...]
    pool_examples: int
    exact: bool
    weight_bytes: int
    trained_bytes: int
    disk_bytes: int

    @property
    def seconds(self) -> float:
        """Sum over the phases."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def memory_bytes(self) -> int | None:
        """Weights, four copies of the trained parameters (two moments, gradient, direction) and the largest phase;
        None where the backend does not tell."""
        if not self.phases:
            return self.weight_bytes
        temporary = [p.temporary_bytes for p in self.phases if p.temporary_bytes is not None]
        return self.weight_bytes + 4 * self.trained_bytes + max(temporary) if temporary else None

    def rows(self) -> list[dict]:
        """One row a phase, for a table."""
        return [
            {
                "phase": p.name,
                "examples": p.examples,
                "tokens": p.tokens,
                "tokens/s": round(p.tokens_per_second),
                "time": duration(p.seconds),
            }
            for p in self.phases
        ]

    def text(self) -> str:
        """Totals in a few lines."""
        memory = "unknown on this backend" if self.memory_bytes is None else size(self.memory_bytes)
        counted = "counted" if self.exact else "estimated from the size of its files"
        return (
            f"pool: {self.pool_examples:,} examples ({counted})\n"
            f"time: {duration(self.seconds)}, compilation (up to a minute) and the search for duplicates left out\n"
            f"device memory: {memory} (weights {size(self.weight_bytes)})\n"
            f"disk: {size(self.disk_bytes)} (scores, selection and the cached records and tokens)\n"
            "Nothing was selected and nothing was written but the cache of the sampled records."
        )


def duration(seconds: float) -> str:
    """``42 s``, ``3.5 min``, ``2.1 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(count: int) -> str:
    """``12.3 MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count = count / 1024  # type: ignore[assignment]
    return f"{count:.1f} GiB"


def count_examples(paths: Sequence[str], sample: Loaded) -> tuple[int, bool]:
    """(examples in the files, whether that is a count): counted where the format allows it, else estimated by size."""
    total, exact = 0, True
    lengths = [len(sample.records[i].prompt) + len(sample.records[i].response) for i in range(len(sample))]
    for source in list_sources(list(paths)):
        if is_hub_id(source):
            return len(sample), False
        counted = count_records(source)
        if counted is None:
            counted, exact = math.ceil(unpacked_size(source) / (np.mean(lengths) + 60)), False
        total += counted
    return total, exact


def time_phase(
    name: str,
    step: Callable[..., Any],
    batches: Sequence[Any],
    arguments: Callable[[Any], tuple],
    total: tuple[int, int],
) -> Phase:
    """Compile ``step`` for the first batch's shape, then time it on up to ``TIMED`` batches of that shape.

    Args:
      step: a jitted function; ``arguments(batch)`` are its arguments.
      total: (examples, tokens) of the whole pass.
    """
    shape = batches[0].tokens.shape
    same = [batch for batch in batches if batch.tokens.shape == shape][:TIMED]
    compiled = step.lower(*arguments(same[0])).compile()  # type: ignore[attr-defined]
    rates = []
    for batch in [same[0], *same, *same[: max(0, TIMED - len(same))]]:
        began = time.perf_counter()
        jax.block_until_ready(compiled(*arguments(batch)))
        tokens = int(np.asarray(batch.lengths)[np.asarray(batch.index) >= 0].sum())
        if batch.examples is not None:  # the few records do not fill the rows, as those of the pass will
            tokens = batch.tokens.size
        rates.append(tokens / (time.perf_counter() - began))
    analysis = compiled.memory_analysis()
    temporary = None if analysis is None else int(analysis.temp_size_in_bytes)
    return Phase(name, total[0], total[1], statistics.median(rates[1:]), temporary)


def tree_bytes(tree: Params) -> int:
    """Bytes of all leaves."""
    return sum(bytes_of(leaf) for leaf in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class Timing:
    """Passes over the sampled records, timed, and how many there will be of them.

    Attributes:
      params: theta. domain, sample: the first records of domain and pool.
      domain_rows, pool_rows: how many there are.
      warmup_epochs: passes over the domain before scoring; 0 for none.
    """

    model: LanguageModel
    params: Params
    domain: Loaded
    sample: Loaded
    domain_rows: int
    pool_rows: int
    warmup_epochs: float
    token_budget: int

    def forward_scores(self, kernel: str, *, candidates: int | None) -> tuple[Phase, ...]:
        """Every pass of forward-mode scores, timed.

        Args:
          candidates: rows that stage 1 leaves to score; None where stage 1 is off and every row is scored.
        """
        model, params = self.model, self.params
        head = model.head_fn if {"head", "embed"} & params.keys() else model.head_fn({})
        functions = KernelFunctions(model.hidden_fn, head, model.nll_fn, model.sum_logits_fn)
        built = build(kernel, functions, params, seed=0)
        zero = zero_direction(built, params, self._batches(self.sample)[0])
        pair = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), zero)  # domain and pool mean: only shapes matter
        embedded = 0 if candidates is None else self.pool_rows
        scored = self.pool_rows if candidates is None else candidates
        of_domain, of_pool = self._tokens(self.domain, self.domain_rows), self._tokens(self.sample, scored)
        return (
            *self._warm_up(),
            *self._embed("embed pool", embedded, self._tokens(self.sample, embedded)),
            *self._phase("domain gradient", self.domain_rows, of_domain, self.domain, add_direction,
                         lambda b: (built, params, b, zero)),
            *self._phase("score pool", scored, of_pool, self.sample, score_batch, lambda b: (built, params, pair, b)),
        )  # fmt: skip

    def counted(self, name: str, tokens: float) -> tuple[Phase, ...]:
        """The warm-up, timed, and so many ``tokens`` sent forward (`ntkjax.selection.cost`) at the speed of embedding.

        What a backward pass or a tangent costs is taken from the count, and memory is that of the forward pass.
        """
        return *self._warm_up(), *self._embed(name, self.pool_rows, round(tokens))

    def sizes(self, scored: int, *, width: int) -> Sizes:
        """What passes are counted from, with so many rows scored."""
        return Sizes(
            domain=float(self._tokens(self.domain, self.domain_rows)),
            pool=float(self._tokens(self.sample, self.pool_rows)),
            scored=float(self._tokens(self.sample, scored)),
            rows=self.pool_rows,
            width=width,
            checkpoints=max(1, math.ceil(self.warmup_epochs)),
        )

    def _warm_up(self) -> tuple[Phase, ...]:
        rows, arguments = round(self.domain_rows * self.warmup_epochs), lambda b: (self.model.nll_fn, self.params, b)
        return self._phase("warm up", rows, self._tokens(self.domain, rows), self.domain, _gradient, arguments)

    def _embed(self, name: str, rows: int, tokens: int) -> tuple[Phase, ...]:
        arguments = lambda b: (self.model.embed_fn, self.params, b)
        return self._phase(name, rows, tokens, self.sample, embed_batch, arguments)

    def _phase(
        self, name: str, rows: int, tokens: int, data: Loaded, step: Callable, arguments: Callable
    ) -> tuple[Phase, ...]:
        return (time_phase(name, step, self._batches(data), arguments, (rows, tokens)),) if tokens else ()

    def _batches(self, data: Loaded) -> list[Any]:
        return list(data.tokens.batches(token_budget=self.token_budget))

    @staticmethod
    def _tokens(data: Loaded, rows: int) -> int:
        """Tokens of so many rows as long as the sampled ones."""
        return int(rows * float(np.mean(data.tokens.lengths)))


@jax.jit
def _gradient(fn: Callable, params: Params, batch: Any) -> Params:
    return jax.grad(lambda q: fn(q, batch).sum())(params)


def disk_bytes(
    sample: Loaded, domain_rows: int, pool_rows: int, *, n: int, embedding: int, features: int, scored: int
) -> int:
    """Scores and embeddings on disk, gradient features, the selection, and the cached records and their tokens.

    Args:
      embedding: numbers of an embedding that is kept of every row; 0: none is.
      features: numbers of a gradient that is kept of the domain and of the rows that are ``scored``; 0: none is.
    """
    text = np.mean(
        [len(e.prompt) + len(e.response) + len(e.id) for e in (sample.records[i] for i in range(len(sample)))]
    )
    rows = domain_rows + pool_rows
    cached = rows * (text + 60) + 4 * rows * float(np.mean(sample.tokens.lengths))
    kept = pool_rows * SCORE_ROW_BYTES + 4 * rows * embedding + 4 * (domain_rows + scored) * features + n * (text + 60)
    return int(cached + kept)
