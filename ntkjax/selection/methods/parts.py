"""Any representation with any algorithm: what an example is, and which rows follow from the similarities."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Annotated, Any, Literal

from tyro.conf import arg

from ntkjax.errors import ConfigError
from ntkjax.selection.algorithms import ALGORITHMS
from ntkjax.selection.base import Selection, SelectionProblem, Selector
from ntkjax.selection.cost import Sizes
from ntkjax.selection.options import Options, check_choice
from ntkjax.selection.parts import Algorithm, Representation, named_parts, options_of
from ntkjax.selection.representations import REPRESENTATIONS

SimilarityName = Literal["cosine", "product"]
RepresentationName = Annotated[str, arg(help=f"What an example is: {', '.join(REPRESENTATIONS)}.")]
"""A name of `ntkjax.selection.representations.REPRESENTATIONS`."""
AlgorithmName = Annotated[str, arg(help=f"From similarities to rows: {', '.join(ALGORITHMS)}.")]
"""A name of `ntkjax.selection.algorithms.ALGORITHMS`."""


def part_option_classes() -> list[type[Options]]:
    """The dataclasses of the options of all representations and algorithms; of those that inherit, the last alone."""
    every = [*REPRESENTATIONS.values(), *ALGORITHMS.values()]
    classes = dict.fromkeys(cls for part in every for cls in options_of(part))
    inherited = {base for cls in classes for base in cls.__mro__[1:]}
    return [cls for cls in classes if cls not in inherited]


@dataclasses.dataclass(frozen=True)
class PartsOptions(*part_option_classes()):  # pyright: ignore
    """Options of ``parts``, besides those of the representation and of the algorithm."""

    representation: RepresentationName = "gradients"
    """What an example is: gradients, hidden states, words or a sentence encoder's embedding."""
    algorithm: AlgorithmName = "round-robin"
    """Which rows follow from the similarities of domain and pool examples."""
    similarity: SimilarityName = "cosine"
    """cosine of two examples' vectors, or their product."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("similarity", self.similarity, SimilarityName)
        self.made_representation()
        if self.made_algorithm().of_cosines and self.similarity != "cosine":
            raise ConfigError(
                f"algorithm {self.algorithm} takes similarities for cosines: it needs similarity cosine, got "
                f"{self.similarity}; or use algorithm mean, max, clusters or round-robin"
            )

    def made_representation(self) -> Representation:
        """The representation with its options."""
        return self._made("representation", REPRESENTATIONS)

    def made_algorithm(self) -> Algorithm:
        """The algorithm with its options."""
        return self._made("algorithm", ALGORITHMS)

    def _made(self, name: str, table: dict[str, type[Any]]) -> Any:
        chosen = getattr(self, name)
        if chosen not in table:
            raise ConfigError(f"unknown {name} {chosen!r}; expected one of {', '.join(table)}")
        return table[chosen](**{f.name: getattr(self, f.name) for f in dataclasses.fields(table[chosen])})


@dataclasses.dataclass(frozen=True)
class PartsSelector(PartsOptions, Selector):
    """s_ij = cos(phi(x_i), phi(x_j)) (``similarity`` product: <phi(x_i), phi(x_j)>) with phi the ``representation``;
    scores and ranks are those of the ``algorithm`` over the domain examples i and the pool rows j.

    Source: the division is that of arXiv 2602.14696, whose best pair at small budgets is the default: gradients, taking
    turns. (Its gradients are those of LESS: ``trajectory`` adam, ``kernel`` loss.) `ntkjax.selection.representations`
    and `ntkjax.selection.algorithms` hold a file for each, with its formula and source. The same pairs under other
    names, with options of their own: ``embedding`` (embeddings, knn-uniform), ``rds`` (weighted-embeddings,
    round-robin), ``tsds`` (embeddings, knn-kde), ``less`` (gradients, clusters), ``gradient-cosine`` (gradients, mean)
    and ``ntk`` (gradients as products, mean; exact, without a sketch).

    Similarities are read a block of pool rows at a time and never held.

    Raises:
      ConfigError: options out of range, or that do not go together; a problem that lacks what the representation needs.
    """

    def used_options(self) -> set[str]:
        """Its own, and those of the representation and the algorithm that are chosen."""
        own = {"representation", "algorithm", "similarity"}
        parts = (self.made_representation(), self.made_algorithm())
        return own | {field.name for part in parts for field in dataclasses.fields(part)}  # type: ignore[arg-type]

    def check_installed(self) -> None:
        """That of its representation."""
        self.made_representation().check_installed()

    @property
    def uses_model(self) -> bool:
        """Whether its representation does."""
        return self.made_representation().uses_model

    @property
    def uses_checkpoints(self) -> bool:
        """Whether its representation does."""
        return self.made_representation().uses_checkpoints

    def forward_tokens(self, sizes: Sizes) -> float:
        """Those of its representation."""
        return self.made_representation().forward_tokens(sizes)

    def scored_rows(self, n: int, rows: int) -> int:
        """Those of its representation."""
        return self.made_representation().scored_rows(n, rows)

    @property
    def embeds_pool(self) -> bool:
        """Whether its representation does."""
        return self.made_representation().embeds_pool

    @property
    def feature_size(self) -> int:
        """That of its representation."""
        return self.made_representation().feature_size

    def __call__(self, problem: SelectionProblem) -> Selection:
        representation = self.made_representation()
        candidates = representation.candidates(problem)
        similarities = representation.similarities(problem, candidates.rows, cosine=self.similarity == "cosine")
        choice = self.made_algorithm()(similarities, problem)
        names = named_parts(self.representation, self.algorithm, self.similarity)
        zeros = {"zero_vectors": choice.zeros, "zero_domain_vectors": similarities.zero_domain}
        reports = [part.report for part in similarities.parts]
        report = dict(itertools.chain(*(each.items() for each in (names, zeros, *reports, choice.report))))
        return choice.selection("parts", candidates, problem, report)
