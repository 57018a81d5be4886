"""What an arm costs, whatever else the machine does: model passes, counted in tokens sent forward once.

One token through one forward pass counts 1, through a forward and a backward pass 3 (the backward pass costs two; with
frozen weights it is a little less), and a forward pass that carries t tangents costs 1 + t, at most 16 of them at a
time. FLOPs are about 2 P times that, P the weights that are multiplied (Kaplan et al., arXiv 2001.08361; attention over
long sequences comes on top). What is counted is what a method asks for when it stands alone: embeddings or gradients
that another method of the study had computed before are counted again. Searches, sketches and classifiers are not
counted; they are small beside the passes.
"""

from __future__ import annotations

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
"""Methods that embed domain and pool once."""
GRADIENTS = ("gradient-cosine", "g2is", "less", "quad")
"""Methods that take the gradient of every candidate, once for each checkpoint that they look at."""


def training_cost(history: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """(forward-equivalent tokens, seconds) of a fine-tuning run from the lines of its metrics.jsonl."""
    lines = [line for line in history if line.get("kind") == "train"]
    tokens = sum(line["tokens"] for line in lines)
    return float(TRAIN * tokens), float(sum(line["tokens"] / line["tokens_per_second"] for line in lines))


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
    total = lambda lengths: float(np.asarray(lengths, np.int64).sum())
    tokens, offered = total(domain.lengths), total(pool.lengths)
    scored = total(np.asarray(pool.lengths)[found.scored])
    if options.method in NO_MODEL:
        return {"warmup": 0.0, "selection": 0.0}
    before = 0.0 if warmup is None else TRAIN * tokens * _epochs(warmup, len(domain))
    stage1 = FORWARD * (tokens + offered)
    if options.method in EMBEDDINGS:
        return {"warmup": before, "selection": stage1}
    with_stage1 = stage1 if options.stage1 == "on" else 0.0
    mean = offered / len(pool)
    if options.method == "ntk":
        sample = mean * min(options.pool_sample, len(pool))
        return {"warmup": before, "selection": with_stage1 + _ntk(options, tokens, sample, scored, config)}
    if options.method == "influence":
        return {"warmup": before, "selection": with_stage1 + 2 * TRAIN * tokens + 2 * scored}
    if options.method in GRADIENTS:
        looks = 1 if options.method != "less" else max(1, math.ceil(_epochs(warmup, len(domain)) if warmup else 1))
        return {"warmup": before, "selection": with_stage1 + looks * TRAIN * (tokens + scored)}
    return {}


def _ntk(options: SelectorOptions, domain: float, sample: float, scored: float, config: ModelConfig) -> float:
    """Mean gradients of domain and pool sample, then the candidates under both directions at once."""
    spec = parse(options.kernel)
    outputs = spec.m or (config.hidden_size if spec.name.endswith("trace") else 1)
    gradients = (1 + 2 * outputs) * (domain + sample)
    if options.precondition != "none":
        gradients += TRAIN * domain
    if options.scores == "sketch":
        return gradients + (1 + 2 * outputs) * scored
    tangents = 2 * outputs
    passes = math.ceil(tangents / MAX_TANGENTS) + tangents
    norms = (1 + 2 * outputs) if options.direction == "cosine" else 0
    return gradients + (passes + norms) * scored


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
