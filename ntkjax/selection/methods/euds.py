"""EUDS-style selection (arXiv 2602.17465): examples that are neither trivial nor noise by their entropies."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from scipy.stats import rankdata
from tqdm import tqdm

from ntkjax.errors import ConfigError
from ntkjax.fingerprint import tree_digest
from ntkjax.ntk.rows import collect_rows
from ntkjax.selection.base import Selection, SelectionProblem, Selector, select_top
from ntkjax.selection.cost import FORWARD, Sizes
from ntkjax.selection.forward import row_values
from ntkjax.selection.options import Options, check_choice, check_least
from ntkjax.selection.shared import open_shared
from ntkjax.types import Params, as_pytree_fn, at_least_float32, owned, valid_mask

Keep = Literal["intersection", "information", "generative", "semantic"]
SAMPLED_ROWS = 32
"""Pool rows whose continuations are sampled together; fixed, since the random stream is that of the block."""


@dataclasses.dataclass(frozen=True)
class EudsOptions(Options):
    """Options of ``euds``."""

    entropy_keep: Keep = "intersection"
    """Which entropies must lie in the interval: all in use, or that one."""
    entropy_low: float = 0.25
    """The interval's lower end, a quantile of the pool; 0 <= low < high <= 1."""
    entropy_high: float = 0.75
    """Its upper end."""
    semantic_samples: int = 0
    """k: sampled continuations of every pool prompt for the semantic entropy, costly, at least 2; 0: leave it out."""
    semantic_tokens: int = 64
    """Longest sampled continuation."""
    semantic_similarity: float = 0.5
    """Share of words in common from which two continuations mean the same, above 0, at most 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("entropy_keep", self.entropy_keep, Keep)
        if not 0 <= self.entropy_low < self.entropy_high <= 1:
            raise ConfigError(
                f"entropy_low = {self.entropy_low}, entropy_high = {self.entropy_high}: expected 0 <= low < high <= 1"
            )
        if self.semantic_samples < 0 or self.semantic_samples == 1:
            raise ConfigError(f"semantic_samples must be 0 (left out) or at least 2, got {self.semantic_samples}")
        if self.entropy_keep == "semantic" and not self.semantic_samples:
            raise ConfigError("entropy_keep semantic needs sampled continuations: give semantic_samples, 8 for example")
        check_least(self, "semantic_tokens")
        if not 0 < self.semantic_similarity <= 1:
            raise ConfigError(f"semantic_similarity must be above 0 and at most 1, got {self.semantic_similarity}")


@dataclasses.dataclass(frozen=True)
class EudsSelector(EudsOptions, Selector):
    """Keep the pool rows whose entropies lie between two quantiles of the pool; the domain is not looked at.

    information  -sum_v f_v log f_v, f_v the share of token v among the tokens of prompt and response
    generative   1/|S| sum_{t in S} -sum_v p_t(v) log p_t(v), p_t the model's prediction at t, S the response
    semantic     -sum_c (n_c / k) log(n_c / k) over the clusters, of n_c members each, of k sampled continuations of
                 the prompt; left out with ``semantic_samples`` 0, the default: k generated answers for every pool row
                 cost far more than all the rest

    All in nats. With u the quantile of an entropy in the pool, (rank - 1/2) / N, ties sharing their mean rank,
    score_j = min over the entropies in use of min(u_j - low, high - u_j): inside the interval of each where it is not
    negative, the better the deeper. The n highest are chosen, ties by lower row; where fewer than n rows are inside,
    those that miss it by least fill up, counted in the report.

    Source: arXiv 2602.17465, of which only the abstract and summaries were available to us: three entropies, examples
    inside an interval of each kept, their combination the best. Open there, and chosen by us: the interval (the middle
    half), the order inside it, natural logarithms, the model's own tokens for the information entropy, and when two
    continuations mean the same: where the Jaccard similarity of their sets of words is ``semantic_similarity`` or more
    with the first member of the cluster, in order (an entailment model would be better, and is none of ours).

    Raises:
      ConfigError: options out of range; a problem without ``entropy_fn``, or without ``sample_fn`` where it is needed.
    """

    def forward_tokens(self, sizes: Sizes) -> float:
        """Entropies of the pool, and the continuations that are sampled."""
        sampled = self.semantic_samples * (sizes.pool + sizes.rows * self.semantic_tokens)
        return FORWARD * (sizes.pool + sampled)

    def __call__(self, problem: SelectionProblem) -> Selection:
        entropies = self.entropies(problem)
        used = list(entropies) if self.entropy_keep == "intersection" else [self.entropy_keep]
        depth = np.min([self.depth(entropies[name]) for name in used], axis=0)
        chosen = select_top("euds", depth, problem.n)
        report: dict[str, Any] = {
            "entropies_used": ", ".join(used),
            "inside_the_interval": int(np.sum(depth >= 0)),
            "filled_from_outside": int(np.sum(depth[chosen.selected] < 0)),
        }
        for name, values in entropies.items():
            edges = np.quantile(values, [self.entropy_low, self.entropy_high])
            report[f"{name}_entropy_interval"] = f"{edges[0]:.4g} to {edges[1]:.4g} nats"
        return dataclasses.replace(chosen, diagnostics=report)

    def entropies(self, problem: SelectionProblem) -> dict[str, Float[np.ndarray, " N"]]:
        """The entropies of every pool row that are in use, float64, nats."""
        wants_samples = self.semantic_samples > 0 and self.entropy_keep in ("intersection", "semantic")
        if problem.entropy_fn is None or (wants_samples and problem.sample_fn is None):
            what = "an entropy_fn" if problem.entropy_fn is None else "a sample_fn (or leave semantic_samples at 0)"
            raise ConfigError(f"euds asks the model for its predictions: give the problem {what}")
        both = token_entropies(problem)
        entropies = {"information": both[:, 0], "generative": both[:, 1]}
        if wants_samples:
            entropies["semantic"] = self.semantic(problem)
        return entropies

    def depth(self, values: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
        """min(u - low, high - u): how far inside the interval; negative outside."""
        # Quantiles, not values: the three entropies have different units and shapes, and only u can be compared.
        u = (rankdata(values) - 0.5) / len(values)
        return np.minimum(u - self.entropy_low, self.entropy_high - u)

    def semantic(self, problem: SelectionProblem) -> Float[np.ndarray, " N"]:
        """The semantic entropy of every pool row, finished blocks kept on disk."""
        options = {"samples": self.semantic_samples, "max_new_tokens": self.semantic_tokens, "seed": problem.seed}
        depends = {**options, "similarity": self.semantic_similarity, "theta": tree_digest(problem.params)}
        rows = len(problem.pool)
        store = open_shared(problem, "semantic-entropy", depends, rows=rows, width=1)
        to_do = np.ones(rows, bool) if store is None else ~store.done()
        mine = None if store is None else store.mine()
        to_do = to_do if mine is None else to_do & mine
        assert problem.sample_fn is not None
        sample: Callable[..., Sequence[Sequence[str]]] = problem.sample_fn

        def results() -> Iterator[tuple[np.ndarray, Any]]:
            starts = [start for start in range(0, rows, SAMPLED_ROWS) if to_do[start : start + SAMPLED_ROWS].any()]
            for start in tqdm(starts, desc="sample continuations", unit="block", disable=not problem.progress):
                block = np.arange(start, min(start + SAMPLED_ROWS, rows))
                entropies = [cluster_entropy(texts, self.semantic_similarity) for texts in sample(block, **options)]
                missing = to_do[block]
                yield block[missing], np.asarray(entropies, np.float32)[missing, None]

        return np.asarray(collect_rows(results(), rows=rows, store=store, what="semantic entropy")[:, 0], np.float64)


def token_entropies(problem: SelectionProblem) -> Float[np.ndarray, "N 2"]:
    """(information, generative) entropy of every pool row, float64; kept for other methods and runs."""
    assert problem.entropy_fn is not None
    fn = jax.tree_util.Partial(entropy_batch, as_pytree_fn(problem.entropy_fn))
    return row_values(problem, fn, problem.params, kind="entropies", what="entropy", width=2)


def entropy_batch(entropy_fn: Any, params: Params, batch: Any) -> Float[Array, "B 2"]:
    """(information, generative) entropy of each row, nats."""
    generative = at_least_float32(entropy_fn(params, batch))
    information = information_entropy(jnp.asarray(batch.tokens), valid_mask(batch), owned(batch))
    information = information.astype(generative.dtype)
    return jnp.stack([information, generative], axis=1)


def information_entropy(
    tokens: Any, real: Bool[Array, "R T"], owners: Bool[Array, "R S T"] | None = None
) -> Float[Array, " B"]:
    """-sum_v f_v log f_v over the real tokens of each example: log n - 1/n sum_t log c_t, c_t how often token t occurs.

    One number for every pair of tokens of a row is made, as in attention; 0 for an example without tokens. ``owners``:
    the positions of each slot of packed rows (`ntkjax.types.owned`).
    """
    # With f_v = c_v / n, -sum_v f_v log f_v = log n - 1/n sum_t log c(x_t): a sum over positions, no table of V counts.
    members = real[:, None, :] if owners is None else owners
    same = (tokens[:, :, None] == tokens[:, None, :]) & real[:, None, :]
    if owners is not None:
        slot = jnp.argmax(owners, axis=1)
        same = same & (slot[:, :, None] == slot[:, None, :])
    logs = jnp.log(jnp.maximum(jnp.sum(same, axis=2), 1).astype(jnp.float32))
    size = jnp.maximum(jnp.sum(members, axis=2), 1).astype(jnp.float32)
    sums = jnp.sum(jnp.where(members, logs[:, None, :], jnp.zeros((), jnp.float32)), axis=2)
    return jnp.maximum(jnp.log(size) - sums / size, jnp.zeros((), jnp.float32)).reshape(-1)


def cluster_entropy(texts: Sequence[str], similarity: float) -> float:
    """-sum_c (n_c / k) log(n_c / k), nats: each text joins the first cluster whose first member shares enough words."""
    leaders: list[set[str]] = []
    sizes: list[int] = []
    for text in texts:
        words = set(re.findall(r"\w+|[^\w\s]", text.casefold()))
        near = (k for k, leader in enumerate(leaders) if _overlap(words, leader) >= similarity)
        cluster = next(near, len(leaders))
        if cluster == len(leaders):
            leaders.append(words)
            sizes.append(0)
        sizes[cluster] += 1
    shares = np.asarray(sizes, np.float64) / max(len(texts), 1)
    return float(max(0.0, -np.sum(shares * np.log(shares))))


def _overlap(a: set[str], b: set[str]) -> float:
    """|A n B| / |A u B|; 1 for two empty texts."""
    return len(a & b) / len(a | b) if a | b else 1.0
