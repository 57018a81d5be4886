"""Options that several stages share. One dataclass is one group of command-line flags and one block of config.yaml."""

from __future__ import annotations

import dataclasses
from typing import Literal

from ntkjax.data.dedup import DedupSettings
from ntkjax.data.prompts import LossTurns
from ntkjax.errors import ConfigError
from ntkjax.ntk.approx import parse
from ntkjax.parallel import WeightRule, parse_mesh
from ntkjax.selection.aggregation import check_aggregation
from ntkjax.selection.diversity import check_diversity
from ntkjax.selection.ntk import check_precondition


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The language model and which of its parameters are differentiated and trained."""

    model: str
    """Hugging Face directory (config.json and safetensors) or hub id."""
    adapter: str | None = None
    """PEFT adapter directory to start from; its rank, alpha and targets replace the lora flags."""
    parameters: Literal["lora", "all"] = "lora"
    """What theta is: fresh LoRA factors, or every weight of the model."""
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_targets: tuple[str, ...] = ("all-linear",)
    """Layers that carry LoRA: all-linear (every one but the head), names such as q_proj, or regular expressions."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Dtype of the frozen weights. LoRA factors, norms and softmax stay in float32."""
    remat: bool = False
    """Recompute each layer in the backward pass: less memory, about a third more time."""
    mesh: str | None = None
    """Devices of this process: data=4,model=2 splits the rows of a batch over 4 and the weights over 2 (also 4,2);
    auto: all on data. Default: one device."""
    weights: WeightRule = "tensor"
    """How weights lie on the mesh. tensor: split over model; fully-sharded: over data as well, a layer gathered when
    it is needed."""

    def __post_init__(self):
        if self.mesh is not None:
            parse_mesh(self.mesh)  # a mistake is told before anything is read
        if self.lora_rank < 1:
            raise ConfigError(f"lora_rank must be at least 1, got {self.lora_rank}")


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """How records are read, tokenised and batched."""

    on_bad_record: Literal["raise", "skip"] = "raise"
    """raise: the first bad record ends the run and is named; skip: bad records are counted and listed."""
    max_length: int = 2048
    """Longest sequence in tokens. Longer conversations lose whole turns from the front, then their prompt tokens on the
    left; every truncation is counted."""
    loss_turns: LossTurns = "all"
    """Which turns of a conversation are trained and scored. all: every assistant turn with its end token; last: the
    last one alone. A message with weight 0 or train false is never trained."""
    token_budget: int = 8192
    """Tokens (rows x length) in a batch of one device, in passes that do not train."""

    def __post_init__(self):
        if self.max_length < 2:
            raise ConfigError(f"max_length must be at least 2 tokens, got {self.max_length}")
        if self.token_budget < 1:
            raise ConfigError(f"token_budget must be at least 1 token, got {self.token_budget}")


@dataclasses.dataclass(frozen=True)
class DedupOptions:
    """Duplicates and leakage: pool examples that repeat one another, the domain, or a held-out set."""

    mode: Literal["remove", "report", "off"] = "remove"
    """remove: the pool loses them before anything is scored; report: they are only listed; off: not looked for."""
    threshold: float = 0.8
    """Jaccard similarity of two texts' sets of word shingles from which they are near-duplicates; 1: equal sets."""
    shingle: int = 5
    """Words of a shingle. Fewer find looser resemblance."""

    def __post_init__(self):
        self.settings  # noqa: B018  # checked when made

    @property
    def settings(self) -> DedupSettings:
        """How texts are compared."""
        return DedupSettings(threshold=self.threshold, shingle=self.shingle)


@dataclasses.dataclass(frozen=True)
class SelectorOptions:
    """NTK-Selector (arXiv 2511.07380) and the choices that it leaves open; other methods take those they have."""

    method: str = "ntk"
    """Selection method, a name from ntkjax.selection.METHODS."""
    kernel: str = "sum_logits"
    """sum_logits: the paper's Jacobian-free kernel; loss: label-aware; trace, centred_trace: exact; spectral:m,
    centred_spectral:m, hutchinson:m: m outputs that approximate the trace."""
    direction: Literal["raw", "contrast", "cosine"] = "raw"
    """raw: the paper's mean kernel value; contrast: without what the pool's mean gradient shares with the domain's;
    cosine: divided by gradient norms (costs per-example gradients)."""
    scores: Literal["forward", "sketch"] = "forward"
    """forward: exact, one jax.jvp pass; sketch: the paper's per-example gradients, projected."""
    sketch: Literal["rademacher", "sparse", "kronecker"] = "sparse"
    """The projection of gradients (scores=sketch, and methods that keep gradients). rademacher: the paper's, dense;
    sparse: ranks like it, at next to no cost; kronecker: of both sides of each matrix."""
    sketch_size: int = 8192
    """K, the numbers that a gradient is projected to."""
    precondition: Literal["none", "adam", "kfac"] = "none"
    """none: the paper's inner product. kfac: influence <(H + lambda I)^-1 g_bar, g_j>, H the Kronecker-factored Fisher
    of the domain's loss; adam: divided by the root of its mean squared batch gradient. Same pass over the pool."""
    damping: float = 0.1
    """lambda over the mean curvature (precondition=kfac, curvature=kfac, method=quad)."""
    curvature: Literal["kfac", "adam"] = "kfac"
    """What the direction is preconditioned with, as in --precondition (method=influence)."""
    adam: Literal["on", "off"] = "on"
    """on: a pool example is the step that Adam would take on it; off: its plain gradient (method=less, g2is)."""
    core_share: float = 0.5
    """Share of the principal components of the domain's gradients that make its core (method=g2is)."""
    walk_core: float = 0.8
    """How much of its cosine with the core a walk keeps at each step (method=g2is)."""
    stage1: Literal["on", "off"] = "on"
    """on: embedding vote first; off: score the whole pool."""
    prefilter_factor: int = 4
    """M_pre / N: how many candidates stage 1 keeps for each example wanted."""
    pool_sample: int = 512
    """Pool examples whose mean gradient is the second tangent of the report."""
    aggregation: Literal["mean", "max", "clusters", "round-robin"] = "mean"
    """Over the domain's examples (method=ntk). mean: the paper's; clusters: the best of the means of groups of them;
    max: the best of all; round-robin: each takes its best in turn. The last two need scores=sketch."""
    domain_clusters: int = 8
    """Groups of domain examples, at most (aggregation=clusters)."""
    order: Literal["longest", "shortest"] = "longest"
    """Which responses come first (method=length)."""
    buckets: int = 10_000
    """Hash buckets of words and pairs of words (method=dsir)."""
    gumbel: bool = True
    """Sample in proportion to the importance weights; without: the highest weights (method=dsir)."""
    classifier_sample: int = 20_000
    """Pool examples, or all, that are ranked by closeness to the domain to teach a classifier (method=betr)."""
    classifier_share: float = 0.1
    """The share of them that is the classifier's first class (method=betr)."""
    transport_alpha: float = 0.5
    """Up to 1: closeness to the domain; towards 0: mass spread over more examples (method=tsds)."""
    transport_scale: float = 5.0
    """C, what a distance between embeddings of length 1 is divided by (method=tsds)."""
    transport_sigma: float = 0.75
    """Distance within which examples count as near-duplicates; 0: none do (method=tsds)."""
    neighbours: int = 5000
    """Nearest pool examples that may serve a domain example (method=tsds)."""
    entropy_keep: Literal["intersection", "information", "generative", "semantic"] = "intersection"
    """Which entropies must lie in the interval: all in use, or that one (method=euds)."""
    entropy_low: float = 0.25
    """The interval's lower end, a quantile of the pool (method=euds)."""
    entropy_high: float = 0.75
    """Its upper end (method=euds)."""
    semantic_samples: int = 0
    """Sampled continuations of every pool prompt for the semantic entropy, costly; 0: leave it out (method=euds)."""
    semantic_tokens: int = 64
    """Longest sampled continuation (method=euds)."""
    semantic_similarity: float = 0.5
    """Share of words in common from which two continuations mean the same (method=euds)."""
    pool_clusters: int = 64
    """Clusters of the pool's embeddings, the arms of the bandit (method=quad)."""
    probes: int = 8
    """Members whose influence a pull of an arm computes (method=quad)."""
    arms_per_round: int = 8
    """Arms pulled before their bounds are worked out again (method=quad)."""
    probe_factor: int = 4
    """Examples probed for each one wanted (method=quad)."""
    exploration: float = 1.0
    """Weight of what is not known of an arm, in standard deviations of the influences (method=quad)."""
    graph_features: Literal["embeddings", "gradients"] = "embeddings"
    """What similar means; gradients are of the candidates of stage 1 (method=gais)."""
    graph_edges: float = 0.05
    """Share of pairs of examples that are joined, the most similar ones (method=gais)."""
    graph_nodes: int = 512
    """Examples of a graph, half of them of the domain (method=gais)."""
    graph_steps: int = 200
    """Graphs that the attention network is trained on (method=gais)."""
    diversity: Literal["none", "facility-location", "d-optimal"] = "none"
    """A pass after any method: of its best candidates those whose gradients repeat each other least.
    facility-location: every candidate has one like it; d-optimal: as many directions as can be."""
    diversity_factor: int = 2
    """Candidates for each example wanted: how much of the score is given for diversity."""
    diversity_kernel: str = "loss"
    """Whose gradients are compared, as in --kernel."""

    def __post_init__(self):
        parse(self.kernel)  # an unknown kernel is refused before anything is written
        check_precondition(self.precondition, self.scores, self.direction, self.damping)
        check_aggregation(self.aggregation, self.scores, self.domain_clusters)
        check_diversity(self.diversity, self.diversity_factor)
        parse(self.diversity_kernel)
