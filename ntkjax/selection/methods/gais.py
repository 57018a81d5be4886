"""GAIS-style selection (arXiv 2502.20293): graph attention over similar examples, kept by confidence."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int
from tqdm import tqdm

from ntkjax.errors import ConfigError, UserError
from ntkjax.rng import named_key, numpy_rng
from ntkjax.selection.base import Selection, SelectionProblem, select_top
from ntkjax.selection.cost import Sizes
from ntkjax.selection.embeddings import embed_both
from ntkjax.selection.gradients import Candidates, GradientSelector, find_candidates, gradient_features
from ntkjax.selection.options import GradientOptions, check_choice, check_least
from ntkjax.selection.vote import unit_rows

FeatureName = Literal["embeddings", "gradients"]
SAMPLE = 8192
"""Pool rows that the graphs of training are drawn from."""
WIDTH, SLOPE = 64, 0.2  # hidden units; of the leaky ReLU, as in arXiv 1710.10903
LEARNING_RATE, WEIGHT_DECAY = 5e-3, 1e-2
MASKED = 0.2
"""Share of edges left out of each graph of training, so that no node leans on one neighbour."""
CHUNK = 1024
Network = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class GaisOptions(GradientOptions):
    """Options of ``gais``; those of stage 1 and of the sketch count with ``graph_features`` gradients only."""

    graph_features: FeatureName = "embeddings"
    """What similar means: embeddings as in stage 1; or gradients of the loss, of the candidates of stage 1."""
    graph_edges: float = 0.05
    """Share of pairs of examples that are joined, the most similar ones; above 0, below 1."""
    graph_nodes: int = 512
    """Examples of a graph, half of them of the domain; at least 4."""
    graph_steps: int = 200
    """Graphs that the attention network is trained on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("graph_features", self.graph_features, FeatureName)
        if not 0 < self.graph_edges < 1:
            raise ConfigError(f"graph_edges must lie between 0 and 1, got {self.graph_edges}")
        check_least(self, "graph_nodes", least=4)
        check_least(self, "graph_steps")


@dataclasses.dataclass(frozen=True)
class GaisSelector(GaisOptions, GradientSelector):
    """score_j = log-odds that row j belongs to the domain, by graph attention over examples like it; top n.

    Nodes: features x scaled to length 1, minus their mean over a sample of the pool, scaled to length 1 again. Two
    nodes are joined where x_i . x_j >= tau; every node is joined with itself. Two layers (Velickovic et al., 2018),

        h'_i = sum_j a_ij W h_j,    a_ij = softmax over j joined with i of LeakyReLU(s . W h_i + t . W h_j),

    an ELU between them, the second one wide 1. They are trained by AdamW to tell domain (1) from pool (0), both
    classes weighing the same, on ``graph_steps`` graphs of ``graph_nodes`` examples, half of them of the domain (all of
    it where it is smaller), a fifth of the edges left out at random. Then every pool row is joined with one fixed
    graph of that size: its score depends on no other row that is scored.

    Source: arXiv 2502.20293 at the level of its abstract and summaries (graphs in mini-batches that keep the shares of
    the classes, edges above a similarity, random masking, graph attention, instances kept by confidence). It selects
    among labelled instances, the classes being labels; a pool has none, so that the classes are ours: domain or pool,
    confidence is that in domain. A pool example that would serve the domain is thus trained as pool, like all others,
    and found by being hard to tell apart. Also chosen by us: tau, the similarity that the share ``graph_edges`` of
    pairs reaches in a graph drawn from the seed; widths, rates and steps; scoring against a fixed graph.

    Raises:
      ConfigError: options out of range. UserError: a domain example whose features are zero.
    """

    @property
    def embeds_pool(self) -> bool:
        """With embeddings as features; with gradients, where stage 1 is on."""
        return self.graph_features == "embeddings" or self.stage1 == "on"

    @property
    def feature_size(self) -> int:
        """K with gradients as features."""
        return self.sketch_size if self.graph_features == "gradients" else 0

    def scored_rows(self, n: int, rows: int) -> int:
        """With gradients as features what stage 1 keeps, otherwise all."""
        return super().scored_rows(n, rows) if self.graph_features == "gradients" else rows

    def forward_tokens(self, sizes: Sizes) -> float:
        """Forward-equivalent tokens, as counted in `ntkjax.selection.cost`."""
        if self.graph_features == "embeddings":
            return sizes.embeddings
        return sizes.stage1(self.stage1) + sizes.gradients

    def __call__(self, problem: SelectionProblem) -> Selection:
        candidates, domain, read = self.features(problem)
        nodes = Nodes.prepare(domain, read, candidates.rows, problem.seed)
        graphs = numpy_rng(problem.seed, "selection", "gais graphs")
        index, x, labels = nodes.draw(graphs, self.graph_nodes)
        tau = threshold(x, self.graph_edges)
        network = self.train(problem, nodes, graphs, tau)
        scores = np.full(len(problem.pool), np.nan)
        for start in range(0, len(candidates.rows), CHUNK):
            rows = candidates.rows[start : start + CHUNK]
            # np.resize repeats the rows from the start; the repetitions are scored and cut off.
            padded = np.resize(rows, min(CHUNK, len(candidates.rows)))  # one shape, so one compilation
            apart = padded[:, None] != index[None, :]
            log_odds = confidence(network, nodes.centred(read(padded)), x, apart, tau)
            scores[rows] = np.asarray(log_odds, np.float64)[: len(rows)]
        if not np.isfinite(scores[candidates.rows]).all():
            raise UserError("gais: the network did not stay finite; lower graph_steps or use graph_features embeddings")
        chosen = select_top("gais", scores, problem.n, votes=candidates.counts)
        own = np.asarray(confidence(network, x, x, ~np.eye(len(x), dtype=bool), tau))
        report = candidates.report() | {
            "graph_threshold": float(tau),
            "graph_accuracy": float(np.mean((own > 0) == (labels > 0))),
            "confidence_of_the_last_chosen": float(1 / (1 + np.exp(-scores[chosen.selected[-1]]))),
        }  # fmt: skip
        return dataclasses.replace(chosen, diagnostics=report)

    def features(self, problem: SelectionProblem) -> tuple[Candidates, np.ndarray, Callable]:
        """(rows to score, the domain's features [M, D], a function from rows to theirs)."""
        if self.graph_features == "embeddings":
            return Candidates(np.arange(len(problem.pool))), *embed_both(problem, problem.embed_fn, "embeddings")
        candidates = find_candidates(problem, stage1=self.stage1, prefilter_factor=self.prefilter_factor)
        features = gradient_features(problem, candidates.rows, sketch=self.sketch, size=self.sketch_size)
        return candidates, *features

    def train(self, problem: SelectionProblem, nodes: Nodes, rng: np.random.Generator, tau: np.float32) -> Network:
        """The network after ``graph_steps`` graphs."""
        network = fresh_network(nodes.domain.shape[1], named_key(problem.seed, "selection", "gais network"))
        state = OPTIMISER.init(network)
        for _ in tqdm(range(self.graph_steps), desc="train on graphs", unit="graph", disable=not problem.progress):
            _, x, labels = nodes.draw(rng, self.graph_nodes)
            kept = rng.random((len(x), len(x))) >= MASKED
            network, state = train_step(network, state, x, labels, kept, tau)
        return network


@dataclasses.dataclass(frozen=True)
class Nodes:
    """What graphs are drawn from.

    Attributes:
      domain: [M, D] float32, centred and of length 1; pool: [S, D] likewise, of the pool rows ``rows``.
      mean: [D], taken off before.
    """

    domain: Float[np.ndarray, "M D"]
    pool: Float[np.ndarray, "S D"]
    rows: Int[np.ndarray, " S"]
    mean: Float[np.ndarray, " D"]

    @classmethod
    def prepare(
        cls, domain: Float[np.ndarray, "M D"], read: Callable, candidates: Int[np.ndarray, " C"], seed: int
    ) -> Nodes:
        """Raises UserError where a domain example's features are zero."""
        rng = numpy_rng(seed, "selection", "gais sample")
        rows = np.sort(rng.choice(candidates, size=min(SAMPLE, len(candidates)), replace=False))
        unit, zero = unit_rows(np.asarray(domain, np.float32))
        if zero:
            raise UserError(f"{zero} domain examples have features of zero; check the model and the data")
        pool = unit_rows(np.asarray(read(rows), np.float32))[0]
        # Embeddings of a language model share a large common direction; without their mean, cosines tell rows apart.
        mean = pool.mean(axis=0, dtype=np.float64).astype(np.float32)
        return cls(unit_rows(unit - mean)[0], unit_rows(pool - mean)[0], rows, mean)

    def centred(self, features: Float[np.ndarray, "b D"]) -> Float[np.ndarray, "b D"]:
        """Features of pool rows as nodes."""
        return unit_rows(unit_rows(np.asarray(features, np.float32))[0] - self.mean)[0]

    def draw(
        self, rng: np.random.Generator, nodes: int
    ) -> tuple[Int[np.ndarray, " g"], Float[np.ndarray, "g D"], Float[np.ndarray, " g"]]:
        """A graph's (pool rows, -1 for the domain's; nodes; labels): half of it domain, or all of the domain."""
        members = min(nodes // 2, len(self.domain))
        others = min(nodes - members, len(self.pool))
        mine = rng.choice(len(self.domain), members, replace=False)
        theirs = rng.choice(len(self.pool), others, replace=False)
        index = np.concatenate([np.full(members, -1), self.rows[theirs]])
        labels = np.concatenate([np.ones(members, np.float32), np.zeros(others, np.float32)])
        return index, np.concatenate([self.domain[mine], self.pool[theirs]]), labels


def threshold(x: Float[np.ndarray, "g D"], share: float) -> np.float32:
    """The similarity that the ``share`` of pairs of different nodes reaches."""
    similarity = x @ x.T
    return np.float32(np.quantile(similarity[np.triu_indices(len(x), 1)], 1 - share))


# -- the network --

OPTIMISER = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)


def fresh_network(width: int, key: Array) -> Network:
    """Weights drawn as Glorot has it: two layers of W [D, H], s [H], t [H], and a bias."""
    glorot = jax.nn.initializers.glorot_normal()
    sizes = {"first": (width, WIDTH), "second": (WIDTH, 1)}
    network: Network = {"bias": jnp.zeros((), jnp.float32)}
    for k, (name, (wide, out)) in enumerate(sizes.items()):
        keys = jax.random.split(jax.random.fold_in(key, k), 3)
        draw = lambda key, shape: glorot(key, shape, jnp.float32)
        vectors = {"s": draw(keys[1], (out, 1))[:, 0], "t": draw(keys[2], (out, 1))[:, 0]}
        network[name] = {"w": draw(keys[0], (wide, out)), **vectors}
    return network


def attend(
    layer: Network, own: Float[Array, "b D"], others: Float[Array, "g D"], joined: Bool[Array, "b g"]
) -> Float[Array, "b H"]:
    """sum over a node itself and the others it is joined with of a_ij W h_j."""
    product = lambda x: jnp.matmul(x, layer["w"], precision=jax.lax.Precision.HIGHEST)
    mine, theirs = product(own), product(others)
    asked = mine @ layer["s"]
    logits = asked[:, None] + (theirs @ layer["t"])[None, :]
    logits = jnp.where(joined, jax.nn.leaky_relu(logits, SLOPE), -jnp.inf)
    alone = jax.nn.leaky_relu(asked + mine @ layer["t"], SLOPE)
    # A node is always joined with itself, so that one without neighbours has a softmax over one number, not none.
    shares = jax.nn.softmax(jnp.concatenate([alone[:, None], logits], axis=1), axis=1)
    return shares[:, :1] * mine + shares[:, 1:] @ theirs


@jax.jit
def confidence(
    network: Network,
    rows: Float[Array | np.ndarray, "b D"],
    graph: Float[Array | np.ndarray, "g D"],
    apart: Bool[Array | np.ndarray, "b g"],
    tau: Any,
) -> Float[Array, " b"]:
    """Log-odds of the domain for ``rows``, each joined with the nodes of ``graph`` that are like it and ``apart``."""
    similar = lambda a, b: jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST) >= jnp.asarray(tau)
    rows, graph = jnp.asarray(rows), jnp.asarray(graph)
    within = similar(graph, graph) & ~jnp.eye(len(graph), dtype=bool)
    joined = similar(rows, graph) & jnp.asarray(apart)
    first, second = network["first"], network["second"]
    context = jax.nn.elu(attend(first, graph, graph, within))
    return attend(second, jax.nn.elu(attend(first, rows, graph, joined)), context, joined)[:, 0] + network["bias"]


def graph_loss(
    network: Network, x: Float[Array, "g D"], labels: Float[Array, " g"], kept: Bool[Array, "g g"], tau: Any
) -> Float[Array, ""]:
    """Cross-entropy of domain against pool on one graph, both classes weighing the same."""
    similar = jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST) >= tau
    joined = similar & kept & ~jnp.eye(len(x), dtype=bool)
    hidden = jax.nn.elu(attend(network["first"], x, x, joined))
    logits = attend(network["second"], hidden, hidden, joined)[:, 0] + network["bias"]
    losses = optax.sigmoid_binary_cross_entropy(logits, labels)
    mean = lambda weight: jnp.sum(losses * weight) / jnp.maximum(jnp.sum(weight), jnp.ones((), weight.dtype))
    return (mean(labels) + mean(1 - labels)) / 2


@jax.jit
def train_step(network: Network, state: Any, x: Any, labels: Any, kept: Any, tau: Any) -> tuple[Network, Any]:
    """One step of AdamW on one graph."""
    arguments = [jnp.asarray(value) for value in (x, labels, kept, tau)]
    gradient = jax.grad(graph_loss)(network, *arguments)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
        updates, state = OPTIMISER.update(gradient, state, network)
    return jax.tree.map(jnp.add, network, updates), state
