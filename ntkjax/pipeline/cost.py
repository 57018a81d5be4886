"""Cost of an arm in model passes: forward-equivalent tokens of its warm-up, its selection and its training.

They do not depend on the machine's load; `ntkjax.selection.cost` says how they are counted.

FLOPs are about 2 P times that, P the weights that are multiplied (Kaplan et al., arXiv 2001.08361; attention over long
sequences comes on top).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ntkjax.models import ModelConfig
from ntkjax.pipeline.options import SelectorOptions
from ntkjax.pipeline.select import make_selector
from ntkjax.selection import Selection, Selector
from ntkjax.selection.cost import TRAIN, Sizes
from ntkjax.training import TrainConfig


def training_cost(history: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """(forward-equivalent tokens, seconds) of a fine-tuning run from the lines of its metrics.jsonl."""
    lines = [line for line in history if line.get("kind") == "train"]
    tokens = sum(line["tokens"] for line in lines)
    return float(TRAIN * tokens), float(sum(line["tokens"] / line["tokens_per_second"] for line in lines))


def uses_model(options: SelectorOptions) -> bool:
    """Whether a selection looks at the model, and so at the warm-up: its method or the pass for diversity does."""
    return make_selector(options).uses_model or options.diversity != "none"


def forward_tokens(selector: Selector, options: SelectorOptions, sizes: Sizes, n: int) -> float | None:
    """Forward-equivalent tokens of a method and of the pass for diversity after it, which takes the gradients of its
    candidates; None for a method that does not say what it costs."""
    of_method = selector.forward_tokens(sizes)
    candidates = 0 if options.diversity == "none" else min(options.diversity_factor * n, sizes.rows)
    return None if of_method is None else of_method + TRAIN * candidates * sizes.pool / sizes.rows


def selection_cost(
    options: SelectorOptions,
    selection: Selection,
    domain: Any,
    pool: Any,
    config: ModelConfig,
    warmup: TrainConfig | None,
) -> dict[str, float]:
    """Forward-equivalent tokens of a selection, part by part; {} for a method that does not say what it costs.

    Args:
      selection: what was selected; its scored rows are the candidates of stage 2.
      domain, pool: tokenised examples.
      warmup: settings of the warm-up that came before, or None.
    """
    if not uses_model(options):
        return {"warmup": 0.0, "selection": 0.0}
    epochs = 0.0 if warmup is None else warmup.epochs_over(len(domain))
    sizes = Sizes.of(selection.scored, domain, pool, width=config.hidden_size, checkpoints=max(1, math.ceil(epochs)))
    tokens = forward_tokens(make_selector(options), options, sizes, len(selection.selected))
    return {} if tokens is None else {"warmup": TRAIN * sizes.domain * epochs, "selection": tokens}


def multiplied_weights(params: Mapping[str, Any], config: ModelConfig) -> int:
    """P: weights that a token is multiplied with, the head included, embeddings that are only looked up not; of routed
    experts those of as many as a token goes to.
    """
    count = 0
    for name, value in params.items():
        if isinstance(value, Mapping):
            count += multiplied_weights(value, config)
        elif name == "kernel":
            size = int(np.prod(value.shape))
            # [L, experts, in, out], where other kernels have no axis of experts
            count += size * config.experts_per_token // config.num_experts if len(value.shape) == 4 else size
    return count + (config.vocab_size * config.hidden_size if "embed" in params and "head" not in params else 0)
