"""G2IS (ACL 2025.acl-long.1189): a walk over gradients that agree with one another and with the domain's core."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float, Int

from ntkjax.errors import ConfigError, UserError
from ntkjax.selection.base import Selection, SelectionProblem, ranks_after
from ntkjax.selection.cost import Sizes
from ntkjax.selection.gradients import (
    GradientSelector,
    find_candidates,
    gradient_features,
    in_blocks,
    scatter,
    unit_direction,
)
from ntkjax.selection.options import AdamOptions, GradientOptions
from ntkjax.selection.vote import unit_rows


@dataclasses.dataclass(frozen=True)
class G2isOptions(AdamOptions, GradientOptions):
    """Options of ``g2is``."""

    core_share: float = 0.5
    """Share of the principal components of the domain's gradients that make its core, above 0, at most 1."""
    walk_core: float = 0.8
    """How much of its cosine with the core a walk keeps at each step, above 0, at most 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("core_share", "walk_core"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be above 0 and at most 1, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class G2isSelector(G2isOptions, GradientSelector):
    """A walk over z_j = Pi Gamma(x_j) / |Pi Gamma(x_j)|, Adam's update from the loss gradient of each candidate:

        start     argmax_j cos(z_j, v)                                              (the anchor)
        step      argmax_j cos(z_j, z_last)  over all j not chosen with
                  cos(z_j, z_s) >= 0 for every s of this walk   and   cos(S + z_j, v) >= ``walk_core`` cos(S, v)
        restart   at the next best anchor, with an empty walk, where no j is left

    until n are chosen. S: mean of the walk so far; v, the core knowledge: the mean of the domain's plain gradients
    projected on their leading principal components, ``core_share`` of them, uncentred. score_j = cos(z_j, v); ranks are
    the order of the walk, then the other candidates by score: the highest scores need not be chosen.

    Source: ACL 2025.acl-long.1189 (arXiv 2502.11062), which draws an edge between any two examples of the pool whose
    gradients do not conflict. The graph is never made here: one pass of products with the last node a step keeps, for
    every candidate, its product with S and the lowest cosine to the walk. Open, and chosen by us: theta and Adam's
    moments are those of the warm-up's end; z_j have length 1 in S too; ``core_share`` counts components (half of the
    rank of the domain's gradients, rounded up); constraints hold within a walk, so a restart forgets the walk before
    (else nothing would ever be feasible again); ties go to the lower row.

    Memory: 4 K bytes a candidate, all of them at once; time: n products of [C, K] with a vector.

    Raises:
      ConfigError: options out of range; a problem without checkpoints. UserError: a core knowledge of zero.
    """

    uses_checkpoints: ClassVar[bool] = True

    def forward_tokens(self, sizes: Sizes) -> float:
        """Forward-equivalent tokens, as counted in `ntkjax.selection.cost`."""
        return sizes.stage1(self.stage1) + sizes.gradients

    def __call__(self, problem: SelectionProblem) -> Selection:
        if not problem.checkpoints:
            raise ConfigError("g2is takes Adam's moments from the warm-up and there is none; warm up, with checkpoints")
        candidates = find_candidates(problem, stage1=self.stage1, prefilter_factor=self.prefilter_factor)
        options: dict[str, Any] = {"sketch": self.sketch, "size": self.sketch_size, "adam": self.adam == "on"}
        domain, read = gradient_features(problem, candidates.rows, checkpoint=problem.checkpoints[-1], **options)
        core, components = core_knowledge(domain, self.core_share)
        nodes, zeros = np.empty((len(candidates.rows), self.sketch_size), np.float32), 0
        for at, rows in in_blocks(candidates.rows):
            nodes[at], zero = unit_rows(read(rows))
            zeros += zero
        walked = walk(nodes, core, problem.n, self.walk_core)
        scores = scatter(nodes @ core.astype(np.float32), candidates.rows, len(problem.pool))
        selected = candidates.rows[walked.nodes]
        report = {
            "core_components": components,
            "restarts": len(walked.starts) - 1,
            "longest_walk": int(np.diff([*walked.starts, problem.n]).max()),
            "zero_gradients": zeros,
        }
        ranks = ranks_after(selected, scores)
        return Selection("g2is", scores, ranks, selected, candidates.counts, report | candidates.report())


def core_knowledge(domain: Float[np.ndarray, "M K"], share: float) -> tuple[Float[np.ndarray, " K"], int]:
    """(v of length 1, how many components it lies in): the rows' mean on their leading right singular vectors.

    With G = F F^T = U diag(s^2) U^T of the rows F, the leading right singular vectors are F^T u_i / s_i, and the
    projection of F^T 1 / M on them is F^T (sum_i u_i u_i^T) 1 / M: nothing of size K x K is made.
    """
    rows = np.asarray(domain, np.float64)
    values, vectors = np.linalg.eigh(rows @ rows.T)
    values, vectors = values[::-1], vectors[:, ::-1]
    rank = int(np.sum(values > max(values[0], 0) * len(values) * np.finfo(np.float64).eps))
    if rank == 0:
        raise UserError("every gradient of the domain is zero; check its responses and the model")
    kept = int(np.ceil(share * rank))
    leading = vectors[:, :kept]
    return unit_direction(rows.T @ (leading @ leading.mean(axis=0)), "the domain's core knowledge"), kept


@dataclasses.dataclass(frozen=True)
class Walk:
    """A selection as it was walked.

    Attributes:
      nodes: int64 [n], in the order they were taken.
      starts: places in it where a walk begins; the first is 0.
    """

    nodes: Int[np.ndarray, " n"]
    starts: tuple[int, ...]


def walk(nodes: Float[np.ndarray, "C K"], core: Float[np.ndarray, " K"], n: int, keep: float) -> Walk:
    """The walk of `G2isSelector` over ``nodes`` of length 1 (or 0); float64 sums over float32 products."""
    to_core = (nodes @ core.astype(nodes.dtype)).astype(np.float64)
    squares = np.einsum("ck,ck->c", nodes, nodes).astype(np.float64)
    free, order, starts = np.ones(len(nodes), bool), [], []
    total, lowest = np.zeros(len(nodes)), np.full(len(nodes), np.inf)  # sum_s <z_j, z_s>, min_s cos(z_j, z_s)
    along = np.zeros(len(nodes))
    while len(order) < n:
        # Constraints hold within a walk: those before the last restart do not count.
        walked = order[starts[-1] :] if starts else []
        feasible = free & (lowest >= 0) & _near_core(walked, total, to_core, squares, keep) if walked else free & False
        if feasible.any():
            node = _best(along, feasible)
        else:
            node = _best(to_core, free)
            starts.append(len(order))
            total, lowest = np.zeros(len(nodes)), np.full(len(nodes), np.inf)
        order.append(node)
        free[node] = False
        along = (nodes @ nodes[node]).astype(np.float64)
        total, lowest = total + along, np.minimum(lowest, along)
    return Walk(np.array(order, np.int64), tuple(starts))


def _near_core(
    walked: list[int], total: np.ndarray, to_core: np.ndarray, squares: np.ndarray, keep: float
) -> Bool[np.ndarray, " C"]:
    """cos(S + z_j, v) >= keep cos(S, v), S = 1/k sum of the k walked, from products with it alone."""
    k = len(walked)
    mean_core, mean_square = to_core[walked].mean(), total[walked].sum() / k**2
    if mean_square <= 0:  # nothing but zero gradients: no direction to keep to
        return np.ones(len(total), bool)
    # |S + z_j|^2 = |S|^2 + 2 <S, z_j> + |z_j|^2 with <S, z_j> = total_j / k: no vector of K numbers but the sums.
    length = np.sqrt(np.maximum(mean_square + 2 * total / k + squares, 1e-30))
    return (mean_core + to_core) / length >= keep * mean_core / np.sqrt(mean_square)


def _best(values: Float[np.ndarray, " C"], among: Bool[np.ndarray, " C"]) -> int:
    return int(np.argmax(np.where(among, values, -np.inf)))
