"""Aggregation over the domain: from the kernel values of a pool example with all domain examples to its score or rank.

``mean``         s_j = 1/M sum_i k(x_i, x_j)                       one direction g_bar [the paper's]
``clusters``     s_j = max_c 1/|D_c| sum_{i in D_c} k(x_i, x_j)    one direction for each group D_c of domain examples
``max``          s_j = max_i k(x_i, x_j)
``round-robin``  the domain examples take turns, each taking the row with the highest k(x_i, x_j) that is not taken

A mean over examples is linear in the gradients, so ``mean`` and ``clusters`` are directional derivatives, exact without
a sketch (`ntkjax.ntk.scores.scores_along`). The other two need every k(x_i, x_j): products of gradient features, a
block of candidates at a time.

Groups are those of k-means over the domain's gradient features of the same kernel, each scaled to length 1: what a
group shall have in common is the direction of its gradients, since that is what its mean stands for in the score.
(Embeddings would need no gradients, but M per-example gradients cost little beside a pass over the pool, and two
examples may be close in wording and pull the parameters apart.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from ntkjax.errors import ConfigError, UserError
from ntkjax.parallel import broadcast
from ntkjax.rng import numpy_rng
from ntkjax.selection.base import SelectionProblem
from ntkjax.selection.clusters import k_means
from ntkjax.selection.gradients import gradient_features, in_blocks
from ntkjax.selection.options import check_choice
from ntkjax.selection.vote import Neighbours, nearest, unit_rows
from ntkjax.store import RowStore

AggregationName = Literal["mean", "max", "clusters", "round-robin"]
STARTS = 10  # of k-means; the best is kept
BY_EXAMPLE = ("max", "round-robin")


def check_aggregation(aggregation: str, scores: str, domain_clusters: int) -> None:
    """Raise ConfigError where the aggregation cannot be had with the other options."""
    check_choice("aggregation", aggregation, AggregationName)
    if domain_clusters < 1:
        raise ConfigError(f"domain_clusters must be at least 1, got {domain_clusters}")
    if aggregation in BY_EXAMPLE and scores != "sketch":
        raise ConfigError(
            f"aggregation {aggregation} compares every domain example with every candidate, which takes gradients and "
            f"not a mean direction: it needs scores sketch, got {scores}; or use aggregation mean or clusters"
        )


# -- clusters --


def domain_groups(
    problem: SelectionProblem, features: Callable[[], Float[np.ndarray, "M K"]], count: int, options: dict[str, Any]
) -> Int[np.ndarray, " M"]:
    """The group of every domain example, int64 from 0, at most ``count`` of them, none empty: k-means (scikit-learn,
    `STARTS` from the seed) over ``features()`` scaled to length 1.

    Kept in ``work_dir``, since sums of threads may round otherwise the next time; ``options``: what they depend on
    besides the problem. In a job of several processes all take those of the first.
    """
    if problem.work_dir is None:
        return _groups(features(), count, problem.seed)
    manifest = {**problem.manifest, **options, "seed": problem.seed, "rows": "domain groups", "groups": count}
    path, members = problem.work_dir / "domain groups", len(problem.domain)
    with RowStore.open(path, rows=members, width=1, dtype=np.int32, manifest=manifest) as store:
        if not store.done().all():
            groups = _groups(features(), count, problem.seed).astype(np.int32)
            groups = np.asarray(broadcast(jnp.asarray(groups)))
            mine = store.mine()
            rows = np.arange(members) if mine is None else np.flatnonzero(mine)
            store.write(rows, groups[rows])
            store.gather()
        return store.read()[:, 0].astype(np.int64)


def _groups(features: Float[np.ndarray, "M K"], count: int, seed: int) -> Int[np.ndarray, " M"]:
    unit, _ = unit_rows(features)
    state = int(numpy_rng(seed, "selection", "domain clusters").integers(2**31))
    return k_means(unit, count, seed=state, starts=STARTS)[0]


# -- example by example --


def compare_examples(
    problem: SelectionProblem,
    candidates: Int[np.ndarray, " C"],
    sample: Int[np.ndarray, " S"],
    *,
    kernel: str,
    sketch: str,
    size: int,
    direction: str,
    nearest_rows: int,
) -> tuple[Neighbours, Float[np.ndarray, " C"]]:
    """(every domain example's nearest candidates by <u_i, phi_j>, as positions in ``candidates``; <p, phi_j> [C],
    float64).

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
    cosine, read_candidates = direction == "cosine", lambda index: read(candidates[index])
    neighbours = nearest(domain, read_candidates, rows=len(candidates), k=nearest_rows, cosine=cosine)
    if neighbours.zero_norm:
        raise ConfigError(
            f"direction cosine: the gradients of {neighbours.zero_norm} pool examples are zero, so their cosines are "
            "undefined; leave them out of the pool, or use direction raw or contrast"
        )
    reference = np.empty(len(candidates))
    for at, rows in in_blocks(candidates):
        reference[at] = read(rows).astype(np.float64) @ pool_mean
    return neighbours, reference
