"""What every selection method takes, gives and says of itself."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int

from ntkjax.ahead import Program
from ntkjax.errors import ConfigError
from ntkjax.ntk.rows import Bar, Told
from ntkjax.parallel import spans_processes
from ntkjax.selection.cost import Sizes
from ntkjax.selection.directional import Directional
from ntkjax.types import Params

GRADIENT_TOKENS = 8192
"""Tokens in a batch at most where a mean gradient is taken: its backward pass keeps the activations of the whole batch,
which a forward pass drops layer by layer. On an 80 GB H100 16,384 tokens of a 0.6 B model took 49 GiB, and 65,536 of a
135 M one were too many (experiments/README.md)."""


@runtime_checkable
class Batches(Protocol):
    """What selection asks of batches (``ntkjax.data.BatchPlan`` is one): they can be iterated any number of times."""

    def __iter__(self) -> Iterator[Any]: ...

    def __len__(self) -> int: ...

    def only(self, rows: np.ndarray) -> Batches:
        """The examples among ``rows`` (bool [N]) alone, in batches of the same shapes."""
        ...

    def without(self, done: np.ndarray) -> Batches:
        """The batches that hold an example that is not ``done`` (bool [N]), as they are."""
        ...


@runtime_checkable
class Dataset(Protocol):
    """What selection asks of tokenised examples (``ntkjax.data.TokenisedDataset`` is one)."""

    @property
    def response_lengths(self) -> np.ndarray:
        """int32 [N], tokens of each response."""
        ...

    @property
    def sources(self) -> Sequence[str]:
        """Where each example comes from."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes when the content does."""
        ...

    def __len__(self) -> int: ...

    def batches(self, *, token_budget: int, indices: np.ndarray | None = None) -> Batches:
        """Batches of the given rows (all by default), each row exactly once."""
        ...


def check_size(n: int, pool: int) -> None:
    """Raise ConfigError unless 1 <= n <= pool."""
    if n < 1:
        raise ConfigError(f"n must be at least 1, got {n}")
    if n > pool:
        raise ConfigError(f"n = {n} is more than the pool holds ({pool} examples); ask for fewer or add pool files")


@dataclasses.dataclass(frozen=True)
class WarmupCheckpoint:
    """The warm-up at the end of one of its epochs.

    Attributes:
      params: theta_t, like the problem's ``params``.
      first, second: Adam's moments m_t, v_t after that step, pytrees like ``params``, at least float32, not
        bias-corrected.
      learning_rate: mean learning rate over the epoch's steps.
      step: optimiser steps taken so far.
    """

    params: Params
    first: Params
    second: Params
    learning_rate: float
    step: int


@dataclasses.dataclass(frozen=True)
class SelectionProblem:
    """Choose ``n`` rows of ``pool`` for ``domain``, seen through a model's functions.

    Attributes:
      hidden_fn: ``(params, batch) -> [B, D]`` pooled final hidden state over S(x).
      head: W [V, D]; or ``(params) -> W`` where the head is among the trained parameters.
      nll_fn: ``(params, batch) -> [B]`` mean NLL over S(x), nats.
      embed_fn: ``(params, batch) -> [B, D]`` mean final hidden state over all real tokens.
      params: theta, warmed up on the domain or not.
      domain, pool: tokenised examples.
      n: how many pool rows are wanted.
      token_budget: tokens in a batch, padding included.
      seed: of whatever the method draws.
      work_dir: where finished rows are kept so that a killed run goes on; None keeps all in memory.
      manifest: what the rows in ``work_dir`` depend on besides the method's own options (model, weights, data).
      progress: show progress bars.
      told: is told the numbers of every pass over batches while it goes on (`ntkjax.ntk.rows.Bar`); None: nobody is.
      domain_texts, pool_texts: text (prompt and response) of every example, read when asked for; None where there are
        only tokens. Methods that read text raise ConfigError then.
      weighted_embed_fn: ``(params, batch) -> [B, D]`` final hidden state averaged over all real tokens with weight i
        for the i-th; None where the model offers no such function.
      shared_dir: where rows that do not depend on the method (embeddings, gradient features) are kept, in folders named
        from what they depend on, so that many methods over one problem, and many problems, compute them once; None:
        in ``work_dir``.
      checkpoints: the warm-up at the end of each of its epochs, oldest first; empty where there was none or it was not
        kept. Methods that need them raise ConfigError then.
      entropy_fn: ``(params, batch) -> [B]`` mean entropy of the model's prediction over S(x), nats; None where there is
        none.
      sample_fn: ``(rows [b], samples=k, max_new_tokens=, seed=) -> [[text, ...], ...]``: k continuations of the prompt
        of each pool row, sampled under ``params``; the same call gives the same texts. None where there is none.
      sum_logits_fn: as in `ntkjax.ntk.KernelFunctions`; None where the outputs are W h.
      states_fn: ``(params, batch) -> [R, T, D]`` final hidden state of every token, R rows of tokens; None where there
        is none.
      margin_fn, error_fn: ``(params, batch) -> [B]`` mean over S(x) of log(p / (1 - p)) and of 1 - p, p the probability
        of the next token; None where there are none.
      start_params: theta before the warm-up; None where there was none.
    """

    hidden_fn: Callable
    head: Any
    nll_fn: Callable
    embed_fn: Callable
    params: Params
    domain: Dataset
    pool: Dataset
    n: int
    token_budget: int
    seed: int = 0
    work_dir: Path | None = None
    manifest: dict[str, Any] = dataclasses.field(default_factory=dict)
    progress: bool = False
    domain_texts: Sequence[str] | None = None
    pool_texts: Sequence[str] | None = None
    weighted_embed_fn: Callable | None = None
    shared_dir: Path | None = None
    checkpoints: tuple[WarmupCheckpoint, ...] = ()
    entropy_fn: Callable | None = None
    sample_fn: Callable | None = None
    sum_logits_fn: Callable | None = None
    states_fn: Callable | None = None
    start_params: Params | None = None
    margin_fn: Callable | None = None
    error_fn: Callable | None = None
    told: Told | None = None

    def __post_init__(self) -> None:
        check_size(self.n, len(self.pool))

    def bar(self, title: str | None = None) -> Bar:
        """How a pass over batches is watched, under that title or its own."""
        return Bar(title, self.progress, self.told)

    @property
    def together(self) -> bool:
        """Whether the processes of a job compute every row of the pool together, on a mesh over all of them, and do not
        divide the rows."""
        return spans_processes(getattr(self.pool, "mesh", None))

    @property
    def gradient_budget(self) -> int:
        """Tokens in a batch where a mean gradient is taken: ``token_budget``, and at most `GRADIENT_TOKENS`."""
        return min(self.token_budget, GRADIENT_TOKENS)


@dataclasses.dataclass(frozen=True)
class Selection:
    """What a method chose, and what it thought of every pool row.

    Attributes:
      method: its name in ``METHODS``.
      scores: float64 [N]; higher is better; NaN where the method did not score the row (see ``scored``).
      ranks: int64 [N]; 1 is the best score; 0 where not scored.
      selected: int64 [n], rows of the pool, best first.
      votes: int64 [N], domain points that voted for the row in stage 1, or None.
      diagnostics: plain JSON values: what the method reports of its own; `ntkjax.selection.diagnostics.described` adds
        what is reported of every selection.
      pool_mean_scores: float64 [N], the score of each row with the pool's own mean gradient, NaN where not scored; None
        where the method has no such thing.
    """

    method: str
    scores: Float[np.ndarray, " N"]
    ranks: Int[np.ndarray, " N"]
    selected: Int[np.ndarray, " n"]
    votes: Int[np.ndarray, " N"] | None = None
    diagnostics: dict[str, Any] = dataclasses.field(default_factory=dict)
    pool_mean_scores: Float[np.ndarray, " N"] | None = None

    @property
    def scored(self) -> Bool[np.ndarray, " N"]:
        """Rows that the method scored."""
        return self.ranks > 0


class Selector(abc.ABC):
    """A method with its options bound. A subclass is a frozen dataclass in ``ntkjax/selection/methods/``, which
    inherits from the dataclass of its options (see `ntkjax.selection.options`) and then from this class::

        @dataclasses.dataclass(frozen=True)
        class LengthSelector(LengthOptions, Selector): ...

    What the pipeline, the forecast and the study ask of a method stands here with its default; a method overrides what
    is different.
    """

    uses_model: ClassVar[bool] = True
    """Whether the method looks at the model, and so at the warm-up. ``forward_tokens`` of one that does not is 0."""
    uses_checkpoints: ClassVar[bool] = False
    """Whether it looks at the epochs of the warm-up (``SelectionProblem.checkpoints``): they are then kept."""
    uses_start: ClassVar[bool] = False
    """Whether it looks at the model before the warm-up (``SelectionProblem.start_params``): there must then be one."""
    stage1: str = "off"
    """``on``: the embedding vote leaves M_pre rows, which alone are scored. An option of the methods that have it."""

    @abc.abstractmethod
    def __call__(self, problem: SelectionProblem) -> Selection:
        """The n rows it selects, with the scores of all that it scored.

        Raises:
          ConfigError: the problem lacks something that the method needs. UserError: data that it cannot work with.
        """

    def forward_tokens(self, sizes: Sizes) -> float | None:
        """What it asks of the model, in forward-equivalent tokens as counted in `ntkjax.selection.cost`; None: it does
        not say, and is left out of forecasts and of the study's costs."""
        return None if self.uses_model else 0.0

    def used_options(self) -> set[str]:
        """The names of its options that count, the others being what they are: all, unless it says otherwise."""
        return {field.name for field in dataclasses.fields(self)}  # type: ignore[arg-type]

    def check_installed(self) -> None:
        """Asked before the warm-up, which takes time. ConfigError: a package that it needs is not installed."""
        return None

    def programs(self, problem: SelectionProblem) -> Iterator[Program]:
        """Programs of its long passes, in their order, to be compiled before they begin (`ntkjax.ahead`): none, unless
        it says otherwise. Of ``problem`` only shapes and dtypes count; it is asked in another thread."""
        yield from ()

    @property
    def no_parts(self) -> str | None:
        """Why its scores have no parts by token, in a few words; None: `directional` gives what they are made of."""
        return "its scores are not derivatives along a direction"

    def directional(self, problem: SelectionProblem, rows: Int[np.ndarray, " C"]) -> Directional:
        """The directions of its scores, computed again; ``rows``: the pool rows whose scores are to be taken apart.

        Raises:
          ConfigError: there are none (see ``no_parts``).
        """
        raise ConfigError(f"{type(self).__name__}: {self.no_parts}")

    def scored_rows(self, n: int, rows: int) -> int:
        """How many of ``rows`` pool rows it scores to select n: all, unless it says otherwise."""
        return rows

    @property
    def embeds_pool(self) -> bool:
        """Whether an embedding of every pool row is kept on disk."""
        return self.stage1 == "on"

    @property
    def feature_size(self) -> int:
        """Numbers of a gradient feature that is kept on disk of the domain and of every row that is scored; 0: none."""
        return 0

    @property
    def forward_kernel(self) -> str | None:
        """The kernel whose scores, by one forward-mode pass with two tangents (the domain's direction and the pool's),
        are all that is asked after stage 1; None: more is asked, or something else."""
        return None


def rank(scores: Float[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    """Ranks from 1 (the highest), ties by lower row; 0 where the score is NaN."""
    order = ranked_rows(scores)
    ranks = np.zeros(len(scores), np.int64)
    ranks[order] = np.arange(1, len(order) + 1)
    return ranks


def ranked_rows(scores: Float[np.ndarray, " N"]) -> Int[np.ndarray, " S"]:
    """Rows with a score, best first, ties by lower row: the same on every machine and for every batch split."""
    scored = np.flatnonzero(~np.isnan(scores))
    return scored[np.argsort(-scores[scored], kind="stable")]


def ranks_after(selected: Int[np.ndarray, " n"], scores: Float[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    """Ranks 1 to n for the rows ``selected`` in their order, then every other row with a score by score, ties by lower
    row; 0 for rows without one."""
    order = ranked_rows(scores)
    order = np.concatenate([selected, order[~np.isin(order, selected)]])
    ranks = np.zeros(len(scores), np.int64)
    ranks[order] = np.arange(1, len(order) + 1)
    return ranks


def select_top(
    method: str,
    scores: Float[np.ndarray, " N"],
    n: int,
    *,
    votes: Int[np.ndarray, " N"] | None = None,
    diagnostics: dict[str, Any] | None = None,
    pool_mean_scores: Float[np.ndarray, " N"] | None = None,
) -> Selection:
    """The n rows with the highest scores; the other arguments as in `Selection`.

    Raises:
      ConfigError: fewer than n rows have a score.
    """
    order = ranked_rows(scores)
    if len(order) < n:
        raise ConfigError(
            f"{method}: n = {n}, but only {len(order)} pool examples were scored; raise the prefilter factor"
        )
    scores = np.asarray(scores, np.float64)
    return Selection(method, scores, rank(scores), order[:n], votes, diagnostics or {}, pool_mean_scores)
