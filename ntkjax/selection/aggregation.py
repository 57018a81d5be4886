"""Aggregation over the domain in ntk: from the kernel values of a pool example with all domain examples to its score or
rank. The names are those of `ntkjax.selection.algorithms`, which ``max``, ``round-robin`` and the groups are of.

``mean``         s_j = 1/M sum_i k(x_i, x_j)                       one direction g_bar [the paper's]
``clusters``     s_j = max_c 1/|D_c| sum_{i in D_c} k(x_i, x_j)    one direction for each group D_c of domain examples
``max``          s_j = max_i k(x_i, x_j)
``round-robin``  the domain examples take turns, each taking the row with the highest k(x_i, x_j) that is not taken

A mean over examples is linear in the gradients, so ``mean`` and ``clusters`` are directional derivatives, exact without
a sketch (`ntkjax.ntk.scores.scores_along`). The other two need every k(x_i, x_j): products of gradient features, a
block of candidates at a time.

Groups are those of k-means over the domain's gradient features of the same kernel. (Embeddings would need no gradients,
but M per-example gradients cost little beside a pass over the pool, and two examples may be close in wording and pull
the parameters apart.)
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from ntkjax.errors import ConfigError, UserError
from ntkjax.selection.algorithms.maximum import Maximum
from ntkjax.selection.algorithms.round_robin import RoundRobin
from ntkjax.selection.base import SelectionProblem
from ntkjax.selection.gradients import gradient_features, in_blocks
from ntkjax.selection.options import check_choice
from ntkjax.selection.parts import Algorithm, Choice, Part, Similarities

AggregationName = Literal["mean", "max", "clusters", "round-robin"]
BY_EXAMPLE: dict[str, Algorithm] = {"max": Maximum(), "round-robin": RoundRobin()}


def check_aggregation(aggregation: str, scores: str) -> None:
    """Raise ConfigError where the aggregation cannot be had with the other options."""
    check_choice("aggregation", aggregation, AggregationName)
    if aggregation in BY_EXAMPLE and scores != "sketch":
        raise ConfigError(
            f"aggregation {aggregation} compares every domain example with every candidate, which takes gradients and "
            f"not a mean direction: it needs scores sketch, got {scores}; or use aggregation mean or clusters"
        )


def compare_examples(
    problem: SelectionProblem,
    candidates: Int[np.ndarray, " C"],
    sample: Int[np.ndarray, " S"],
    *,
    kernel: str,
    sketch: str,
    size: int,
    direction: str,
    algorithm: Algorithm,
) -> tuple[Choice, Float[np.ndarray, " C"]]:
    """(what the algorithm makes of s_ij = <u_i, phi_j>; <p, phi_j> [C], float64).

    p: mean feature of the rows ``sample`` of the pool. u_i by ``direction``: ``raw`` phi_i; ``contrast`` phi_i minus
    its projection on p; ``cosine`` phi_i, and cosines instead of products.

    Raises:
      ConfigError: a gradient of a candidate that is zero, with ``cosine``. UserError: one of the domain that is zero,
        or that ``contrast`` leaves nothing of.
    """
    rows = np.union1d(candidates, sample)
    domain, read = gradient_features(problem, rows, kernel=kernel, sketch=sketch, size=size)
    sums = [read(rows).sum(axis=0, dtype=np.float64) for _, rows in in_blocks(sample)]
    pool_mean = np.sum(sums, axis=0) / len(sample)
    if direction == "contrast":
        share = domain @ pool_mean / (pool_mean @ pool_mean)
        domain = (domain - share[:, None] * pool_mean).astype(np.float32)
    zero = np.flatnonzero(~domain.any(axis=1))
    if len(zero):
        raise UserError(
            f"the gradients of {len(zero)} domain examples are zero (first: row {zero[0]}): no candidate is nearer to "
            "them than another; check their responses, or use aggregation mean"
        )
    cosine = direction == "cosine"
    choice = algorithm(Similarities((Part(domain, read),), candidates, cosine), problem)
    if cosine and choice.zeros:
        raise ConfigError(
            f"direction cosine: the gradients of {choice.zeros} pool examples are zero, so their cosines are "
            "undefined; leave them out of the pool, or use direction raw or contrast"
        )
    reference = np.empty(len(candidates))
    for at, rows in in_blocks(candidates):
        reference[at] = read(rows).astype(np.float64) @ pool_mean
    return choice, reference
