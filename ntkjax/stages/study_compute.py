"""What an arm costs, whatever else the machine does: model passes, counted in tokens sent forward once.

One token through one forward pass counts 1, through a forward and a backward pass 3 (the backward pass costs two; with
frozen weights it is a little less), and a forward pass that carries t tangents costs 1 + t, at most 16 of them at a
time. FLOPs are about 2 P times that, P the weights that are multiplied (Kaplan et al., arXiv 2001.08361; attention over
long sequences comes on top). What is counted is what a method asks for when it stands alone: embeddings or gradients
that another method of the study had computed before are counted again. Searches, sketches and classifiers are not
counted; they are small beside the passes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ntkjax.models import ModelConfig
from ntkjax.ntk.approx import parse
from ntkjax.ntk.scores import MAX_TANGENTS
from ntkjax.selection import Selection
from ntkjax.stages.options import SelectorOptions
from ntkjax.training import TrainConfig

FORWARD, TRAIN = 1, 3
NO_MODEL = ("random", "length", "dsir")
"""Methods that ask the model for nothing, and so need no warm-up."""
EMBEDDINGS = ("embedding", "rds", "betr", "tsds", "random-from-stage-1")
"""Methods that embed domain and pool once, and no more."""
GRADIENTS = ("gradient-cosine", "g2is", "less")
"""Methods that take the gradient of every domain example and candidate, at every checkpoint that they look at."""


def training_cost(history: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """(forward-equivalent tokens, seconds) of a fine-tuning run from the lines of its metrics.jsonl."""
    lines = [line for line in history if line.get("kind") == "train"]
    tokens = sum(line["tokens"] for line in lines)
    return float(TRAIN * tokens), float(sum(line["tokens"] / line["tokens_per_second"] for line in lines))


def asks_the_model(options: SelectorOptions) -> bool:
    """Whether a selection looks at the model, and so at the warm-up."""
    return options.method not in NO_MODEL or options.diversity != "none"


def selection_cost(
    options: SelectorOptions,
    found: Selection,
    domain: Any,
    pool: Any,
    config: ModelConfig,
    warmup: TrainConfig | None,
) -> dict[str, float]:
    """Forward-equivalent tokens of a selection, part by part; {} for a method whose passes are not known here.

    Args:
      found: what was chosen: its scored rows are the candidates of stage 2.
      domain, pool: tokenised examples.
      warmup: settings of the warm-up that came before, or None.
    """
    if not asks_the_model(options):
        return {"warmup": 0.0, "selection": 0.0}
    sizes = _Sizes.of(found, domain, pool)
    epochs = 0.0 if warmup is None else _epochs(warmup, len(domain))
    asked = 0.0 if options.method in NO_MODEL else _asked(options, sizes, max(1, math.ceil(epochs)), config)
    if asked is None:
        return {}
    if options.diversity != "none":  # the gradients of its candidates
        candidates = min(options.diversity_factor * len(found.selected), sizes.rows)
        asked += TRAIN * candidates * sizes.pool / sizes.rows
    return {"warmup": TRAIN * sizes.domain * epochs, "selection": asked}


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Tokens of the domain, the pool, the rows that were scored, and an average pool example; rows of the pool."""

    domain: float
    pool: float
    scored: float
    rows: int

    @classmethod
    def of(cls, found: Selection, domain: Any, pool: Any) -> _Sizes:
        lengths = np.asarray(pool.lengths, np.int64)
        total = float(np.asarray(domain.lengths, np.int64).sum())
        return cls(total, float(lengths.sum()), float(lengths[found.scored].sum()), len(lengths))


def _asked(options: SelectorOptions, sizes: _Sizes, checkpoints: int, config: ModelConfig) -> float | None:
    method, embedded = options.method, FORWARD * (sizes.domain + sizes.pool)
    stage1 = embedded if options.stage1 == "on" else 0.0
    gradients = TRAIN * (sizes.domain + sizes.scored)
    if method in EMBEDDINGS:
        return embedded
    if method in GRADIENTS:
        return stage1 + (checkpoints if method == "less" else 1) * gradients
    if method == "ntk":
        return stage1 + _ntk(options, sizes, config)
    if method == "influence":
        as_ntk = {"kernel": "loss", "scores": "forward", "precondition": options.curvature, "aggregation": "mean"}
        return stage1 + _ntk(dataclasses.replace(options, **as_ntk), sizes, config)
    if method == "quad":  # mean gradient and curvature of the domain; a tangent on the rows that were probed
        return embedded + 2 * TRAIN * sizes.domain + 2 * sizes.scored
    if method == "gais":
        return embedded if options.graph_features == "embeddings" else stage1 + gradients
    if method == "euds":
        sampled = options.semantic_samples * (sizes.pool + sizes.rows * options.semantic_tokens)
        return FORWARD * (sizes.pool + sampled)
    return None


def _ntk(options: SelectorOptions, sizes: _Sizes, config: ModelConfig) -> float:
    """Mean gradients of domain and pool sample, then the candidates under all directions at once; or, where examples
    of the domain are looked at one by one or scores are sketched, the gradients of all of them."""
    spec = parse(options.kernel)
    outputs = spec.m or (config.hidden_size if spec.name.endswith("trace") else 1)
    gradient = 1 + 2 * outputs
    sample = sizes.pool / sizes.rows * min(options.pool_sample, sizes.rows)
    before = gradient * (sizes.domain + sample)
    if options.precondition != "none":
        before += TRAIN * sizes.domain
    if options.scores == "sketch":
        return before + gradient * sizes.scored
    groups = 1
    if options.aggregation == "clusters":
        groups, before = options.domain_clusters, before + gradient * sizes.domain
    tangents = (groups + 1) * outputs
    passes = math.ceil(tangents / MAX_TANGENTS) + tangents
    norms = gradient if options.direction == "cosine" else 0
    return before + (passes + norms) * sizes.scored


def _epochs(config: TrainConfig, rows: int) -> float:
    return float(config.epochs) if config.steps is None else config.steps * config.batch_size / rows


def multiplied_weights(params: Mapping[str, Any], config: ModelConfig) -> int:
    """P: weights that a token is multiplied with, the head included, embeddings that are only looked up not."""
    found = 0
    for name, value in params.items():
        if isinstance(value, Mapping):
            found += multiplied_weights(value, config)
        elif name == "kernel":
            found += int(np.prod(value.shape))
    return found + (config.vocab_size * config.hidden_size if "embed" in params and "head" not in params else 0)
