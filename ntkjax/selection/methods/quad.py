"""QUAD (arXiv 2409.16986): clusters of the pool as arms of a bandit, whose reward is the influence of their members."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

from ntkjax.errors import ConfigError
from ntkjax.fingerprint import tree_digest
from ntkjax.job import broadcast
from ntkjax.ntk.kernels import KernelFunctions, build
from ntkjax.ntk.precondition import build_preconditioner
from ntkjax.ntk.rows import Pass
from ntkjax.ntk.scores import Direction, mean_direction, scores_along
from ntkjax.rng import numpy_rng
from ntkjax.selection.base import Batches, Selection, SelectionProblem, select_top
from ntkjax.selection.clusters import k_means
from ntkjax.selection.cost import TRAIN, Sizes
from ntkjax.selection.embeddings import EmbeddingMethod, embed_both
from ntkjax.selection.options import DampingOptions, check_least
from ntkjax.selection.shared import open_shared
from ntkjax.selection.vote import CHUNK, unit_rows

SAMPLE = 20_000
"""Pool rows that k-means sees; all others join the nearest centre."""
STARTS = 3  # of k-means; the best is kept
FIRST = 4  # at most one probe in so many goes to the first pull of every arm: the others follow what was learnt
FINER = 4
"""A round's rows fall into many padded lengths: batches of a quarter of the budget leave less of them empty."""


@dataclasses.dataclass(frozen=True)
class QuadOptions(DampingOptions):
    """Options of ``quad``."""

    pool_clusters: int = 64
    """Clusters of the pool's embeddings, the arms of the bandit; fewer where pulling each once would take more than a
    quarter of the rows to probe."""
    probes: int = 8
    """Members whose influence a pull of an arm computes."""
    arms_per_round: int = 8
    """Arms pulled before their bounds are worked out again."""
    probe_factor: int = 4
    """Examples probed for each one wanted."""
    exploration: float = 1.0
    """Weight of what is not known of an arm, in standard deviations of the influences; at least 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, "pool_clusters", "probes", "arms_per_round", "probe_factor")
        if not self.exploration >= 0:
            raise ConfigError(f"exploration must be at least 0, got {self.exploration}")


@dataclasses.dataclass(frozen=True)
class QuadSelector(QuadOptions, EmbeddingMethod):
    """score_j = <(H + lambda I)^-1 g_bar, g_j> of the rows that a bandit probed, none for the others; top n.

    The pool's embeddings are grouped by k-means; a group c is an arm. First every arm is pulled once, then round after
    round the ``arms_per_round`` arms with the highest

        mean_c + exploration * sd * sqrt(2 log T / T_c)

    over the T_c members probed in c so far, T in all, sd the standard deviation of all influences so far. A pull
    probes ``probes`` members not probed before, in an order drawn from the seed; an arm without any left is out. It
    ends when ``probe_factor`` * n rows (or the pool) are probed. g is the gradient of the loss, g_bar the domain's
    mean, H the Kronecker-factored Fisher of `ntkjax.ntk.precondition`: how much the domain's mean loss falls per unit
    weight on x_j (minus the source's influence, which is that of the rise). Probing is one forward-mode pass.

    Source: arXiv 2409.16986 (k-means, an upper confidence bound over clusters, influence with a Kronecker-factored
    curvature in attention and MLP layers, instances above a threshold taken). Open there or chosen by us: the factors
    are those of per-example gradients of all trained matrices; H is the domain's; embeddings are stage 1's, scaled to
    length 1 (there: a text encoder); the bound is in units of sd, since influences have none; the n best of the probed
    rows instead of a threshold, which would have to be tuned; arms are weighed by their mean, not by their size.

    Finished probes are kept, so a killed run repeats the bandit's choices without computing them again.

    Raises:
      ConfigError: options out of range.
    """

    def scored_rows(self, n: int, rows: int) -> int:
        """Those that are probed: ``probe_factor`` * n, or the pool."""
        return min(self.probe_factor * n, rows)

    def forward_tokens(self, sizes: Sizes) -> float:
        """Embeddings; mean gradient and curvature of the domain; a tangent on the rows that were probed."""
        return sizes.embeddings + 2 * TRAIN * sizes.domain + 2 * sizes.scored

    def __call__(self, problem: SelectionProblem) -> Selection:
        rows = len(problem.pool)
        budget = min(self.probe_factor * problem.n, rows)
        count = max(1, min(self.pool_clusters, budget // (FIRST * self.probes)))
        labels = pool_clusters(problem, count)
        probe = Probe.prepare(problem, self)
        rng = numpy_rng(problem.seed, "selection", "quad order")
        members = [rng.permutation(np.flatnonzero(labels == c)) for c in range(count)]
        bandit = Bandit(members, probes=self.probes, exploration=self.exploration)
        scores = np.full(rows, np.nan)
        rounds, bar = 0, tqdm(total=budget, desc="probe clusters", unit="example", disable=not problem.progress)
        with bar:
            while bandit.probed < budget:
                # Every arm once first: the bound of an arm never pulled is infinite, and sd needs rewards.
                arms = bandit.open_arms() if rounds == 0 else bandit.best(self.arms_per_round)
                drawn = bandit.draw(arms, budget - bandit.probed)
                asked = np.concatenate(drawn)
                scores[asked] = probe(asked)
                bandit.learn(arms, [scores[part] for part in drawn])
                rounds += 1
                bar.update(len(asked))
        chosen = select_top("quad", scores, problem.n)
        report = {
            "pool_clusters": len(np.unique(labels)),
            "probed": bandit.probed,
            "rounds": rounds,
            "clusters_chosen_from": len(np.unique(labels[chosen.selected])),
            "probed_in_the_cluster_probed_most": int(bandit.counts.max()),
            "mean_score_probed": float(np.nanmean(scores)),
            "mean_score_chosen": float(scores[chosen.selected].mean()),
        }
        return dataclasses.replace(chosen, diagnostics=report)


class Bandit:
    """Arms with members that can be drawn once: upper confidence bounds over their mean reward.

    Attributes:
      counts: int64 [C], members of each arm drawn so far.
    """

    def __init__(self, members: list[Int[np.ndarray, " _"]], *, probes: int, exploration: float):
        self.members, self.probes, self.exploration = members, probes, exploration
        self.counts = np.zeros(len(members), np.int64)
        self._sums = np.zeros(len(members))
        self._seen: list[np.ndarray] = []

    @property
    def probed(self) -> int:
        """Members drawn in all."""
        return int(self.counts.sum())

    def open_arms(self) -> Int[np.ndarray, " a"]:
        """Arms with members left, in order."""
        return np.flatnonzero(self.counts < [len(m) for m in self.members])

    def bounds(self) -> Float[np.ndarray, " C"]:
        """mean_c + exploration * sd * sqrt(2 log T / T_c); infinite for an arm never drawn from."""
        drawn = np.maximum(self.counts, 1)
        spread = self.exploration * float(np.std(np.concatenate(self._seen)))
        width = spread * np.sqrt(2 * math.log(max(self.probed, 1)) / drawn)
        return np.where(self.counts > 0, self._sums / drawn + width, np.inf)

    def best(self, count: int) -> Int[np.ndarray, " a"]:
        """The open arms with the highest bounds, best first, ties by lower arm."""
        arms = self.open_arms()
        return arms[np.argsort(-self.bounds()[arms], kind="stable")][:count]

    def draw(self, arms: Int[np.ndarray, " a"], most: int) -> list[Int[np.ndarray, " _"]]:
        """The next members of each arm, ``probes`` or what is left, ``most`` in all (later arms go short)."""
        drawn = []
        for arm in arms:
            start = self.counts[arm]
            part = self.members[arm][start : start + min(self.probes, most)]
            drawn.append(part)
            most -= len(part)
        return drawn

    def learn(self, arms: Int[np.ndarray, " a"], rewards: list[Float[np.ndarray, " _"]]) -> None:
        """The rewards of what was drawn."""
        for arm, part in zip(arms, rewards):
            self.counts[arm] += len(part)
            self._sums[arm] += part.sum()
            self._seen.append(part)


@dataclasses.dataclass(frozen=True)
class Probe:
    """Influences of pool rows: rows [b] -> <(H + lambda I)^-1 g_bar, g_j> [b], float64."""

    problem: SelectionProblem
    kernel: Any
    direction: Direction
    store: Any
    plan: Batches

    @classmethod
    def prepare(cls, problem: SelectionProblem, options: QuadSelector) -> Probe:
        """g_bar and H of the domain, and the store of the influences."""
        domain = problem.domain.batches(token_budget=problem.gradient_budget)
        functions = KernelFunctions(problem.hidden_fn, problem.head, problem.nll_fn)
        kernel = build("loss", functions, problem.params, seed=0)
        mean = mean_direction(kernel, problem.params, domain, progress=problem.bar("domain gradient"))
        solve = build_preconditioner(
            "kfac",
            problem.nll_fn,
            problem.params,
            domain,
            damping=options.damping,
            progress=problem.bar("curvature of the domain loss"),
        )
        assert solve is not None
        depends = {
            **{f"quad_{name}": value for name, value in dataclasses.asdict(options).items()},
            "n": problem.n,
            "seed": problem.seed,
            "theta": tree_digest(problem.params),
            "domain": problem.domain.fingerprint,
        }
        store = open_shared(problem, "influences", depends, rows=len(problem.pool), width=1)
        plan = problem.pool.batches(token_budget=max(1, problem.token_budget // FINER))
        return cls(problem, kernel, Direction(_solve(solve, mean.outputs)), store, plan)

    def __call__(self, rows: Int[np.ndarray, " b"]) -> Float[np.ndarray, " b"]:
        influences = scores_along(
            self.kernel,
            self.problem.params,
            [self.direction],
            self.batches(rows),
            rows=Pass(len(self.problem.pool), self.store),
        )
        return np.asarray(influences[rows, 0], np.float64)

    def batches(self, rows: Int[np.ndarray, " b"]) -> Batches:
        """These rows in batches of the shapes that the whole pool has: no round compiles anything."""
        wanted = np.zeros(len(self.problem.pool), bool)
        wanted[rows] = True
        return self.plan.only(wanted)


@jax.jit
def _solve(solve: Callable, tree: Any) -> Any:
    return solve(tree)


def pool_clusters(problem: SelectionProblem, count: int) -> Int[np.ndarray, " N"]:
    """The cluster of every pool row, int64 in [0, count): k-means (scikit-learn) on a sample of the rows' embeddings,
    scaled to length 1, then the nearest centre.

    Kept on disk, since sums of threads may round otherwise the next time; all processes of a job take those of the
    first.
    """
    depends = {"theta": tree_digest(problem.params), "clusters": count, "seed": problem.seed}
    rows = len(problem.pool)
    store = open_shared(problem, "pool-clusters", depends, rows=rows, width=1, dtype=np.int32)
    if store is not None and store.done().all():
        return store.read()[:, 0].astype(np.int64)
    _, read_pool = embed_both(problem, problem.embed_fn, "embeddings")
    rng = numpy_rng(problem.seed, "selection", "quad clusters")
    drawn = np.sort(rng.choice(rows, size=min(SAMPLE, rows), replace=False))
    sample, _ = unit_rows(np.asarray(read_pool(drawn)))
    _, centres = k_means(sample, count, seed=int(rng.integers(2**31)), starts=STARTS)
    labels = np.empty(rows, np.int32)
    for start in range(0, rows, CHUNK):
        index = np.arange(start, min(start + CHUNK, rows))
        # argmin |x - c|^2 = argmax x . c - |c|^2 / 2, as |x| is the same for all centres; a centre is shorter than 1.
        near = unit_rows(np.asarray(read_pool(index)))[0] @ centres.T - np.sum(centres**2, axis=1) / 2
        labels[index] = np.argmax(near, axis=1)
    labels = np.asarray(broadcast(jnp.asarray(labels)))
    if store is not None:
        mine = store.mine()
        index = np.arange(rows) if mine is None else np.flatnonzero(mine)
        store.write(index, labels[index])
        store.gather()
    return labels.astype(np.int64)
