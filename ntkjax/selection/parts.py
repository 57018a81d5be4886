"""A selection from parts: what an example is (a representation), how alike two are (a similarity), and which rows
follow from the similarities of M domain examples and N pool rows (an algorithm).

The similarities are never held: an algorithm reads them a block of pool rows at a time, and what it keeps is a number
or two for each pool row, or the k best rows of each domain example. Representations are in
``ntkjax/selection/representations``, algorithms in ``ntkjax/selection/algorithms``, one file each; any pair goes
together (``--method parts``), and several methods are one pair with options of their own.

Source: the division is that of arXiv 2602.14696 ("A Critical Look at Targeted Instruction Selection").
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Int

from ntkjax.errors import ConfigError, UserError
from ntkjax.selection.base import Selection, SelectionProblem, ranks_after
from ntkjax.selection.cost import Sizes
from ntkjax.selection.gradients import BLOCK, Candidates, ReadRows, in_blocks, scatter
from ntkjax.selection.options import Options
from ntkjax.selection.vote import Neighbours, nearest, unit_rows

KEPT_BYTES = 1 << 30
"""Of similarities that are kept between the passes of an algorithm that takes many."""
CHUNK_BLOCKS = 4
"""Blocks in a chunk of the search for nearest rows, which compares in float32 what the sums take in float64."""


# -- similarities --


@dataclasses.dataclass(frozen=True)
class Part:
    """One of the vectors that an example is made of: its gradient at one theta, say.

    Attributes:
      domain: phi(x_i) of the domain, [M, K].
      read: pool rows [b] -> psi(x_j) [b, K].
      weight: w >= 0, of this part in the similarity.
      report: plain JSON values about it.
    """

    domain: Float[np.ndarray, "M K"]
    read: ReadRows
    weight: float = 1.0
    report: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Similarities:
    """s_ij = sum_t w_t <phi_t(x_i), psi_t(x_j)> over the parts t; ``cosine``: of the vectors scaled to length 1. A zero
    vector has no direction: its cosines are 0.

    Attributes:
      parts: at least one.
      rows: int64 [C], the pool rows that are looked at; place c below is ``rows[c]``.
      cosine: see above.
      depends: what they depend on besides the problem, for the manifest of what is kept of them.
      block: pool rows whose vectors are in memory at a time.
    """

    parts: tuple[Part, ...]
    rows: Int[np.ndarray, " C"]
    cosine: bool = True
    depends: dict[str, Any] = dataclasses.field(default_factory=dict)
    block: int = BLOCK

    @property
    def members(self) -> int:
        """M."""
        return len(self.parts[0].domain)

    @property
    def zero_domain(self) -> int:
        """Domain examples that have a part of zeros."""
        return max(int(np.sum(~np.any(part.domain, axis=1))) for part in self.parts)

    def repeated(self, budget: int = KEPT_BYTES) -> KeptBlocks:
        """Those of `blocks`, for an algorithm that goes through them many times."""
        return KeptBlocks(self, budget)

    def blocks(
        self, weights: Float[np.ndarray, "G M"] | None = None, *, start: int = 0
    ) -> Iterator[tuple[slice, Float[np.ndarray, "b G"], Int[np.ndarray, " t"]]]:
        """(places, sum_i weights_gi s_ij as [b, G] float64, zero vectors of the block in each part), block by block.

        ``weights``: None takes every domain example for itself, G = M. A sum over domain examples costs one product
        for each of the G sums, however many examples there are: s_ij is linear in phi(x_i). ``start``: the first place,
        a multiple of ``block``.
        """
        folded = []
        for part in self.parts:
            vectors = self._scaled(np.asarray(part.domain, np.float64))[0]
            folded.append(part.weight * (vectors if weights is None else weights @ vectors))
        for block, rows in in_blocks(self.rows[start:], self.block):
            at = slice(block.start + start, block.stop + start)
            products, zeros = 0.0, []
            for part, columns in zip(self.parts, folded):
                vectors, zero = self._scaled(np.asarray(part.read(rows), np.float64))
                products, zeros = products + vectors @ columns.T, [*zeros, zero]
            yield at, np.asarray(products), np.asarray(zeros)

    def nearest(self, k: int) -> Neighbours:
        """The k places with the highest s_ij of each domain example, by exact streamed top-k (`ntkjax.selection.vote`).

        Raises:
          UserError: a domain example all of whose vectors are zero.
        """
        options = {"rows": len(self.rows), "k": k, "chunk": CHUNK_BLOCKS * self.block}
        empty = np.flatnonzero(~np.any([np.any(part.domain, axis=1) for part in self.parts], axis=0))
        if len(empty):
            raise UserError(
                f"the vectors of {len(empty)} domain examples are zero (first: row {empty[0]}): nothing in the pool is "
                "nearer to them than another; check their texts, their responses and the model"
            )
        if len(self.parts) == 1:
            [part] = self.parts
            read = lambda places: np.asarray(part.read(self.rows[places]))
            return nearest(np.asarray(part.domain), read, cosine=self.cosine, **options)
        zeros = np.zeros(len(self.parts), np.int64)

        def read_all(places: np.ndarray) -> np.ndarray:
            joined, zero = self._joined([part.read(self.rows[places]) for part in self.parts])
            zeros[:] += zero
            return joined

        neighbours = nearest(self.domain_vectors(), read_all, cosine=False, **options)
        return dataclasses.replace(neighbours, zero_norm=int(zeros.max()))

    def pool_vectors(self, places: Int[np.ndarray, " b"]) -> Float[np.ndarray, "b K"]:
        """Vectors of pool rows whose inner products are sum_t w_t <psi_t(x_j), psi_t(x_j')>, scaled as in s_ij."""
        return self._joined([part.read(self.rows[places]) for part in self.parts])[0]

    def domain_vectors(self) -> Float[np.ndarray, "M K"]:
        """Vectors of the domain whose inner products with those of `pool_vectors` are s_ij."""
        return self._joined([part.domain for part in self.parts])[0]

    def _scaled(self, vectors: Float[np.ndarray, "n K"]) -> tuple[Float[np.ndarray, "n K"], int]:
        return unit_rows(vectors) if self.cosine else (vectors, int(np.sum(~np.any(vectors, axis=1))))

    def _joined(self, vectors: Sequence[np.ndarray]) -> tuple[np.ndarray, list[int]]:
        scaled = [self._scaled(np.asarray(each)) for each in vectors]
        zeros = [zero for _, zero in scaled]
        if len(scaled) == 1 and self.parts[0].weight == 1:
            return scaled[0][0], zeros
        roots = [each * each.dtype.type(np.sqrt(part.weight)) for (each, _), part in zip(scaled, self.parts)]
        return np.concatenate(roots, axis=1), zeros


@dataclasses.dataclass(frozen=True)
class KeptBlocks:
    """The blocks of similarities s_ij, any number of times: the first that ``budget`` bytes hold are made once, the
    others in each pass; either way the same numbers.

    Attributes:
      kept: the blocks that are held, in order, once a pass has made them.
    """

    similarities: Similarities
    budget: int
    kept: list[tuple[slice, np.ndarray, np.ndarray]] = dataclasses.field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[slice, Float[np.ndarray, "b M"], Int[np.ndarray, " t"]]]:
        yield from self.kept
        held = sum(block.nbytes for _, block, _ in self.kept)
        whole = True  # so far every block is held
        for at, block, zeros in self.similarities.blocks(start=self.kept[-1][0].stop if self.kept else 0):
            whole = whole and held + block.nbytes <= self.budget
            if whole:
                self.kept.append((at, block, zeros))
                held += block.nbytes
            yield at, block, zeros


# -- algorithms --


@dataclasses.dataclass(frozen=True)
class Choice:
    """What an algorithm made of similarities; places are those of `Similarities`.

    Attributes:
      scores: float64 [C]; higher is better.
      order: int64, the places that come first, in order; the others follow by score, ties by lower row.
      zeros: pool vectors that are zero, in the part that has most of them.
      votes: int64 [C], where domain examples vote.
      groups: int64 [C], the group of domain examples that gave the score, where they are grouped.
      report: plain JSON values.
    """

    scores: Float[np.ndarray, " C"]
    order: Int[np.ndarray, " c"] = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))
    zeros: int = 0
    votes: Int[np.ndarray, " C"] | None = None
    groups: Int[np.ndarray, " C"] | None = None
    report: dict[str, Any] = dataclasses.field(default_factory=dict)

    def selection(
        self, method: str, candidates: Candidates, problem: SelectionProblem, report: dict[str, Any] | None = None
    ) -> Selection:
        """The first n, as the selection of ``method``; ``report`` in the place of the choice's own.

        Raises:
          ConfigError: fewer than n candidates.
        """
        if len(candidates.rows) < problem.n:
            raise ConfigError(
                f"{method}: n = {problem.n}, but only {len(candidates.rows)} pool examples were scored; raise the "
                "prefilter factor"
            )
        scores = scatter(self.scores, candidates.rows, len(problem.pool))
        ranks = ranks_after(candidates.rows[self.order], scores)
        best = np.argsort(np.where(ranks > 0, ranks, np.iinfo(np.int64).max), kind="stable")
        report = self.report if report is None else report
        return Selection(
            method, scores, ranks, best[: problem.n], candidates.counts, report | candidates.report()
        )  # fmt: skip


class Algorithm(abc.ABC):
    """Which rows follow from the similarities. A subclass is a frozen dataclass that inherits from the dataclass of its
    options and then from this class, as a `ntkjax.selection.base.Selector` does."""

    of_cosines: ClassVar[bool] = False
    """Whether it takes s_ij for a cosine: for distances sqrt(2 - 2 s), say."""

    @abc.abstractmethod
    def __call__(self, similarities: Similarities, problem: SelectionProblem) -> Choice:
        """Scores of all C places, and what comes first for ``problem.n``; ``problem.seed`` is that of any draw.

        Raises:
          UserError: similarities that it cannot work with.
        """


# -- representations --


class Representation(abc.ABC):
    """What an example is. A subclass is a frozen dataclass that inherits from the dataclass of its options and then
    from this class. What the pipeline asks of a method is asked of its representation: see
    `ntkjax.selection.base.Selector` for all but ``parts``."""

    uses_model: ClassVar[bool] = True

    @property
    def uses_checkpoints(self) -> bool:
        """Whether it looks at the epochs of the warm-up."""
        return False

    def check_installed(self) -> None:
        """Raise ConfigError where a package that it needs is not installed."""
        return None

    def candidates(self, problem: SelectionProblem) -> Candidates:
        """The pool rows that it is asked for: all, unless it says otherwise."""
        return Candidates(np.arange(len(problem.pool)))

    @abc.abstractmethod
    def parts(self, problem: SelectionProblem, rows: Int[np.ndarray, " C"]) -> tuple[Part, ...]:
        """The vectors of the domain, and readers of those of the pool rows ``rows``.

        Raises:
          ConfigError: the problem lacks something that it needs.
        """

    def similarities(
        self, problem: SelectionProblem, rows: Int[np.ndarray, " C"], *, cosine: bool = True
    ) -> Similarities:
        """Those of the domain and the pool rows ``rows``."""
        depends = {"representation": type(self).__name__, "cosine": cosine}
        if dataclasses.is_dataclass(self):
            depends |= dataclasses.asdict(self)
        return Similarities(self.parts(problem, rows), rows, cosine, depends)

    def forward_tokens(self, sizes: Sizes) -> float:
        """Forward-equivalent tokens, as counted in `ntkjax.selection.cost`."""
        return sizes.embeddings if self.uses_model else 0.0

    def scored_rows(self, n: int, rows: int) -> int:
        """How many of ``rows`` pool rows it is asked for to select n."""
        return rows

    @property
    def embeds_pool(self) -> bool:
        """Whether an embedding of every pool row is kept on disk."""
        return self.uses_model

    @property
    def feature_size(self) -> int:
        """Numbers that are kept on disk of the domain and of every candidate besides; 0: none."""
        return 0


def named_parts(representation: str, algorithm: str, similarity: str = "cosine") -> dict[str, str]:
    """What a selection made of parts says of itself in its diagnostics; the names are those of ``--method parts``."""
    return {"representation": representation, "similarity": similarity, "algorithm": algorithm}


def options_of(cls: type) -> list[type[Options]]:
    """The dataclasses that hold the options of a representation or an algorithm, most derived first."""
    return [
        base for base in cls.__mro__ if issubclass(base, Options) and not issubclass(base, Algorithm | Representation)
    ]


def texts_of(problem: SelectionProblem, what: str) -> tuple[Sequence[str], Sequence[str]]:
    """The texts of domain and pool. ConfigError where there are only tokens."""
    if problem.domain_texts is None or problem.pool_texts is None:
        raise ConfigError(f"{what}, and this problem has no texts: give domain_texts and pool_texts")
    return problem.domain_texts, problem.pool_texts


def read_texts(texts: Sequence[str], of: Callable[[str], Any]) -> ReadRows:
    """Rows [b] -> ``of`` each of their texts, stacked."""
    return lambda rows: np.stack([of(texts[int(row)]) for row in rows])
