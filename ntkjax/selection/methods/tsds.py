"""TSDS (arXiv 2410.11303): optimal transport from the domain to the pool, with mass kept off near-duplicates."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from ntkjax.errors import ConfigError
from ntkjax.rng import numpy_rng
from ntkjax.selection.base import Selection, SelectionProblem
from ntkjax.selection.embeddings import EmbeddingMethod, embed_both
from ntkjax.selection.options import Options, check_least
from ntkjax.selection.vote import nearest, unit_rows

BLOCK = 1024


@dataclasses.dataclass(frozen=True)
class TsdsOptions(Options):
    """Options of ``tsds``."""

    transport_alpha: float = 0.5
    """alpha. Up to 1: closeness to the domain; towards 0: mass spread over more examples."""
    transport_scale: float = 5.0
    """C, what a distance between embeddings of length 1 is divided by."""
    transport_sigma: float = 0.75
    """sigma: distance within which examples count as near-duplicates; 0: none do, every rho is 1."""
    neighbours: int = 5000
    """Nearest pool examples that may serve a domain example; rho counts among all of these."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.transport_alpha <= 1:
            raise ConfigError(f"transport_alpha must be above 0 and at most 1, got {self.transport_alpha}")
        if not self.transport_scale > 0:
            raise ConfigError(f"transport_scale must be above 0, got {self.transport_scale}")
        if not self.transport_sigma >= 0:
            raise ConfigError(f"transport_sigma must be at least 0, got {self.transport_sigma}")
        check_least(self, "neighbours")


@dataclasses.dataclass(frozen=True)
class TsdsSelector(TsdsOptions, EmbeddingMethod):
    """min over gamma [M, N] >= 0 with sum_j gamma_ij = 1/M of
    alpha/C sum_ij gamma_ij d_ij + (1 - alpha) M max_ij rho_j gamma_ij;
    n rows are drawn in proportion to the mass p_j = sum_i gamma_ij.

    d_ij: Euclidean distance between embeddings; rho_j = sum_j' max(0, 1 - d_jj'^2 / sigma^2) >= 1: how many
    near-duplicates row j has, itself included. score_j = p_j; ranks are the order of the draw, then rows without mass
    by similarity to the domain.

    Source: arXiv 2410.11303 (the KDE-regularised problem; its maximum is over |gamma_ij - uniform|, of which we keep
    the side above, as the authors' program does; alpha, C, sigma are that program's defaults). Chosen by us:
    embeddings are those of stage 1 of ``ntk`` scaled to length 1; the search is exact; the draw is without
    replacement (Gumbel noise on log p), since a selection holds every row once; where fewer than n rows have mass the
    nearest others fill up, counted in the report.

    Cost: besides the search, |U|^2 D for rho, U the rows among the neighbours of any domain example.

    Raises:
      ConfigError: options out of range. UserError: a domain example whose embedding is zero.
    """

    def __call__(self, problem: SelectionProblem) -> Selection:
        rows = len(problem.pool)
        domain, read_pool = embed_both(problem, problem.embed_fn, "embeddings")
        nearby = nearest(domain, read_pool, rows=rows, k=self.neighbours)
        used, position = np.unique(nearby.rows, return_inverse=True)
        position = position.reshape(nearby.rows.shape)
        density = density_of(unit_rows(np.asarray(read_pool(used)))[0], self.transport_sigma)
        distance = np.sqrt(np.maximum(2 - 2 * nearby.similarity.astype(np.float64), 0))

        price, weight = self.transport_alpha / self.transport_scale, 1 - self.transport_alpha
        moved = transport(distance, density[position], price, weight)
        mass = np.zeros(rows)
        np.add.at(mass, nearby.rows.ravel(), moved.ravel())
        order = draw(mass, nearby.highest, numpy_rng(problem.seed, "selection", "tsds"))
        ranks = np.zeros(rows, np.int64)
        ranks[order] = np.arange(1, rows + 1)
        selected = order[: problem.n]
        report = {
            "rows_with_mass": int(np.sum(mass > 0)),
            "filled_without_mass": int(np.sum(mass[selected] == 0)),
            "mean_density": float(density.mean()),
        }
        return Selection("tsds", mass, ranks, selected, diagnostics=report)


def density_of(unit: Float[np.ndarray, "U D"], sigma: float) -> Float[np.ndarray, " U"]:
    """rho_j = sum_j' max(0, 1 - |x_j - x_j'|^2 / sigma^2) of rows of length 1, the row itself counting 1; float64."""
    if sigma == 0:
        return np.ones(len(unit))
    found = np.ones(len(unit))
    for start in range(0, len(unit), BLOCK):
        squares = np.maximum(2 - 2 * (unit[start : start + BLOCK] @ unit.T).astype(np.float64), 0)
        near = np.maximum(0, 1 - squares / sigma**2)
        own = np.arange(len(near))
        near[own, start + own] = 0
        found[start : start + BLOCK] += near.sum(axis=1)
    return found


def transport(
    distance: Float[np.ndarray, "M k"], density: Float[np.ndarray, "M k"], price: float, weight: float
) -> Float[np.ndarray, "M k"]:
    """gamma [M, k] minimising price sum gamma d + weight M max rho gamma with rows that sum to 1/M; exact.

    ``distance``: of each domain example's candidates, ascending. With t = M max rho gamma given, every row fills its
    nearest candidates up to t / (M rho) each and the next one with the rest. With s = 1/t the best s is where the cost
    of spreading further, sum_i [d_i,k+1 S_ik - D_ik] (S, D: running sums of 1/rho and d/rho, k = those with S_ik <= s),
    reaches M weight / price: a sum of jumps (d_i,k+1 - d_ik) S_ik at s = S_ik.
    """
    members = len(distance)
    room = np.cumsum(1 / density, axis=1)
    jumps = (np.diff(distance, axis=1) * room[:, :-1]).ravel()
    at = room[:, :-1].ravel()
    order = np.argsort(at, kind="stable")
    reached = np.flatnonzero(np.cumsum(jumps[order]) >= members * weight / price)
    most = room[:, -1].min()  # beyond, some domain example's candidates cannot hold its mass
    s = min(at[order][reached[0]], most) if len(reached) else most
    before = room - 1 / density
    return np.clip(1 - before / s, 0, 1 / (density * s)) / members


def draw(mass: Float[np.ndarray, " N"], similarity: np.ndarray, rng: np.random.Generator) -> Int[np.ndarray, " N"]:
    """All rows: those with mass in the order of a draw without replacement in proportion to it, then the others by
    similarity, ties by lower row."""
    with np.errstate(divide="ignore"):
        keys = np.log(mass) + rng.gumbel(size=len(mass))
    return np.lexsort((np.arange(len(mass)), -similarity, -keys))
