"""TSDS (arXiv 2410.11303): optimal transport from the domain to the pool, with mass kept off near-duplicates."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Float, Int

from ntkjax.errors import ConfigError
from ntkjax.rng import numpy_rng
from ntkjax.selection.base import SelectionProblem
from ntkjax.selection.options import Options, check_choice, check_least
from ntkjax.selection.parts import Algorithm, Choice, Similarities

BLOCK = 1024
RowsName = Literal["draw", "top"]


@dataclasses.dataclass(frozen=True)
class TransportOptions(Options):
    """Options of transport to nearest neighbours."""

    transport_alpha: float = 0.5
    """alpha. Up to 1: closeness to the domain; towards 0: mass spread over more examples."""
    transport_scale: float = 5.0
    """C, what a distance between embeddings of length 1 is divided by."""
    neighbours: int = 5000
    """Nearest pool examples that may serve a domain example; rho counts among all of these."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.transport_alpha <= 1:
            raise ConfigError(f"transport_alpha must be above 0 and at most 1, got {self.transport_alpha}")
        if not self.transport_scale > 0:
            raise ConfigError(f"transport_scale must be above 0, got {self.transport_scale}")
        check_least(self, "neighbours")

    @property
    def price(self) -> float:
        """alpha / C, of a distance."""
        return self.transport_alpha / self.transport_scale

    @property
    def weight(self) -> float:
        """1 - alpha, of the largest mass on one example."""
        return 1 - self.transport_alpha


@dataclasses.dataclass(frozen=True)
class TsdsOptions(TransportOptions):
    """Options of ``tsds`` (algorithm=knn-kde)."""

    transport_sigma: float = 0.75
    """sigma: distance within which examples count as near-duplicates; 0: none do, every rho is 1."""

    transport_rows: RowsName = "draw"
    """draw: n rows in proportion to their mass, as TSDS does; top: the n with the most mass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("transport_rows", self.transport_rows, RowsName)
        if not self.transport_sigma >= 0:
            raise ConfigError(f"transport_sigma must be at least 0, got {self.transport_sigma}")


@dataclasses.dataclass(frozen=True)
class KnnKde(TsdsOptions, Algorithm):
    """min over gamma [M, N] >= 0 with sum_j gamma_ij = 1/M of
    alpha/C sum_ij gamma_ij d_ij + (1 - alpha) M max_ij rho_j gamma_ij;
    n rows are drawn in proportion to the mass p_j = sum_i gamma_ij, or (``transport_rows`` top) those with the most.

    d_ij = sqrt(2 - 2 s_ij): Euclidean distance between vectors of length 1; rho_j = sum_j' max(0, 1 - d_jj'^2 /
    sigma^2) >= 1: how many near-duplicates row j has, itself included. score_j = p_j; ranks are the order of the draw
    (of the mass, ties by similarity), then rows without mass by similarity to the domain.

    Source: arXiv 2410.11303 (the KDE-regularised problem; its maximum is over |gamma_ij - uniform|, of which we keep
    the side above, as the authors' program does; alpha, C, sigma are that program's defaults). Chosen by us: the search
    is exact; the draw is without replacement (Gumbel noise on log p), since a selection holds every row once
    (``top`` is what the program of arXiv 2602.14696 does, at alpha = 0.01); where fewer than n rows have mass
    the nearest others fill up, counted in the report.

    Cost: besides the search, |U|^2 K for rho, U the rows among the neighbours of any domain example.
    """

    of_cosines: ClassVar[bool] = True

    def __call__(self, similarities: Similarities, problem: SelectionProblem) -> Choice:
        rows = len(similarities.rows)
        nearby = similarities.nearest(self.neighbours)
        used, position = np.unique(nearby.rows, return_inverse=True)
        position = position.reshape(nearby.rows.shape)
        density = density_of(similarities.pool_vectors(used), self.transport_sigma)
        moved = transport(distances(nearby.similarity), density[position], self.price, self.weight)
        mass = np.zeros(rows)
        np.add.at(mass, nearby.rows.ravel(), moved.ravel())
        drawn = self.transport_rows == "draw"
        rng = numpy_rng(problem.seed, "selection", "tsds") if drawn else None
        order = in_order(mass, nearby.highest, rng)
        report = {
            "rows_with_mass": int(np.sum(mass > 0)),
            "filled_without_mass": int(np.sum(mass[order[: problem.n]] == 0)),
            "mean_density": float(density.mean()),
        }
        return Choice(mass, order, zeros=nearby.zero_norm, report=report)


def distances(similarity: Float[np.ndarray, "M k"]) -> Float[np.ndarray, "M k"]:
    """sqrt(2 - 2 s), float64; s above 1 is rounding."""
    return np.sqrt(np.maximum(2 - 2 * similarity.astype(np.float64), 0))


def density_of(unit: Float[np.ndarray, "U D"], sigma: float) -> Float[np.ndarray, " U"]:
    """rho_j = sum_j' max(0, 1 - |x_j - x_j'|^2 / sigma^2) of rows of length 1, the row itself counting 1; float64."""
    if sigma == 0:
        return np.ones(len(unit))
    density = np.ones(len(unit))
    for start in range(0, len(unit), BLOCK):
        squares = np.maximum(2 - 2 * (unit[start : start + BLOCK] @ unit.T).astype(np.float64), 0)
        near = np.maximum(0, 1 - squares / sigma**2)
        own = np.arange(len(near))
        # 1 - |x - x|^2 / sigma^2 is 1 but for rounding, which a small sigma would enlarge: the row itself counts
        # exactly 1.
        near[own, start + own] = 0
        density[start : start + BLOCK] += near.sum(axis=1)
    return density


def spread(distance: Float[np.ndarray, "M k"], density: Float[np.ndarray, "M k"], price: float, weight: float) -> float:
    """s = 1/t, t = M max rho gamma of the best gamma (see `transport`): where all rho are 1, how many candidates each
    domain example's mass is spread over, a whole number.

    With t given, every row fills its nearest candidates up to t / (M rho) each and the next one with the rest. The best
    s is where the cost of spreading further, sum_i [d_i,k+1 S_ik - D_ik] (S, D: running sums of 1/rho and d/rho, k =
    those with S_ik <= s), reaches M weight / price: a sum of jumps (d_i,k+1 - d_ik) S_ik at s = S_ik.
    """
    room = np.cumsum(1 / density, axis=1)
    jumps = (np.diff(distance, axis=1) * room[:, :-1]).ravel()
    at = room[:, :-1].ravel()
    order = np.argsort(at, kind="stable")
    reached = np.flatnonzero(np.cumsum(jumps[order]) >= len(distance) * weight / price)
    most = room[:, -1].min()  # beyond, some domain example's candidates cannot hold its mass
    return float(min(at[order][reached[0]], most) if len(reached) else most)


def transport(
    distance: Float[np.ndarray, "M k"], density: Float[np.ndarray, "M k"], price: float, weight: float
) -> Float[np.ndarray, "M k"]:
    """gamma [M, k] minimising price sum gamma d + weight M max rho gamma with rows that sum to 1/M; exact.

    ``distance``: of each domain example's candidates, ascending.
    """
    s = spread(distance, density, price, weight)
    before = np.cumsum(1 / density, axis=1) - 1 / density
    return np.clip(1 - before / s, 0, 1 / (density * s)) / len(distance)


def in_order(
    mass: Float[np.ndarray, " N"], similarity: np.ndarray, rng: np.random.Generator | None
) -> Int[np.ndarray, " N"]:
    """All rows: those with mass in the order of a draw without replacement in proportion to it (without ``rng`` in the
    order of the mass), then the others; ties by similarity, then by lower row."""
    with np.errstate(divide="ignore"):
        # Gumbel noise on log p: the order of the largest keys is a draw without replacement in proportion to p. Rows
        # without mass have the key -inf and come last.
        keys = np.log(mass) + (np.zeros(len(mass)) if rng is None else rng.gumbel(size=len(mass)))
    return np.lexsort((np.arange(len(mass)), -similarity, -keys))
