"""The best of the means of groups of domain examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from ntkjax.job import broadcast
from ntkjax.rng import numpy_rng
from ntkjax.selection.base import SelectionProblem
from ntkjax.selection.clusters import k_means
from ntkjax.selection.options import ClusterOptions, check_choice
from ntkjax.selection.parts import Algorithm, Choice, Similarities
from ntkjax.selection.vote import unit_rows
from ntkjax.store import RowStore

STARTS = 10  # of k-means; the best is kept
GroupName = Literal["k-means", "sources"]


@dataclasses.dataclass(frozen=True)
class GroupOptions(ClusterOptions):
    """Options of algorithm=clusters."""

    domain_groups: GroupName = "k-means"
    """How domain examples are grouped. k-means: by their vectors; sources: by file or field of origin, as less does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("domain_groups", self.domain_groups, GroupName)


@dataclasses.dataclass(frozen=True)
class Clusters(GroupOptions, Algorithm):
    """score_j = max_c 1/|D_c| sum_{i in D_c} s_ij over groups D_c of domain examples; the n highest.

    Groups are those of k-means over the domain's vectors, each scaled to length 1: what a group shall have in common is
    a direction, since that is what its mean stands for in the score. Of several parts the vectors are joined. Or they
    are the sources, as the subtasks of LESS (arXiv 2402.04333).

    One product a row and group.
    """

    def __call__(self, similarities: Similarities, problem: SelectionProblem) -> Choice:
        labels, names = self.groups(similarities, problem)
        sizes = np.bincount(labels)
        # [c, M], row c averages over group c: similarities are linear in the domain's vectors, so a group costs one
        # product however large it is.
        weights = (labels[None] == np.arange(len(sizes))[:, None]) / sizes[:, None]
        scores, groups, zeros = np.empty(len(similarities.rows)), np.empty(len(similarities.rows), np.int64), 0
        for at, products, zero in similarities.blocks(weights):
            groups[at] = products.argmax(axis=1)
            scores[at], zeros = products.max(axis=1), zeros + zero
        report = {"domain_cluster_sizes": sizes.tolist()} | ({"domain_clusters": names} if names else {})
        return Choice(scores, zeros=int(np.max(zeros)), groups=groups, report=report)

    def groups(self, similarities: Similarities, problem: SelectionProblem) -> tuple[Int[np.ndarray, " M"], list[str]]:
        """(the group of every domain example, names of the groups where they have any)."""
        if self.domain_groups == "sources":
            names, labels = np.unique(np.asarray(problem.domain.sources, dtype=str), return_inverse=True)
            return labels.astype(np.int64), names.tolist()
        joined = lambda: np.concatenate([unit_rows(np.asarray(part.domain))[0] for part in similarities.parts], axis=1)
        return domain_groups(problem, joined, self.domain_clusters, similarities.depends), []


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
    options = {"manifest": manifest, "together": problem.together}
    with RowStore.open(path, rows=members, width=1, dtype=np.int32, **options) as store:
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
