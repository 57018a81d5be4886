"""What an arm costs, whatever else the machine does: model passes in forward-equivalent tokens, for its warm-up, its
selection and its training. `ntkjax.selection.cost` says how they are counted.

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
from ntkjax.selection import METHODS, Selection
from ntkjax.selection.cost import TRAIN, Sizes, passes_of
from ntkjax.training import TrainConfig


def training_cost(history: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """(forward-equivalent tokens, seconds) of a fine-tuning run from the lines of its metrics.jsonl."""
    lines = [line for line in history if line.get("kind") == "train"]
    tokens = sum(line["tokens"] for line in lines)
    return float(TRAIN * tokens), float(sum(line["tokens"] / line["tokens_per_second"] for line in lines))


def asks_the_model(options: SelectorOptions) -> bool:
    """Whether a selection looks at the model, and so at the warm-up: a method does unless its class has
    ``uses_model = False``."""
    return getattr(METHODS[options.method], "uses_model", True) or options.diversity != "none"


def selection_cost(
    options: SelectorOptions,
    found: Selection,
    domain: Any,
    pool: Any,
    config: ModelConfig,
    warmup: TrainConfig | None,
) -> dict[str, float]:
    """Forward-equivalent tokens of a selection, part by part; {} for a method that does not say what it costs.

    Args:
      found: what was chosen: its scored rows are the candidates of stage 2.
      domain, pool: tokenised examples.
      warmup: settings of the warm-up that came before, or None.
    """
    if not asks_the_model(options):
        return {"warmup": 0.0, "selection": 0.0}
    epochs = 0.0 if warmup is None else warmup.epochs_over(len(domain))
    sizes = Sizes.of(found, domain, pool, width=config.hidden_size, checkpoints=max(1, math.ceil(epochs)))
    candidates = 0 if options.diversity == "none" else options.diversity_factor * len(found.selected)
    asked = passes_of(make_selector(options), sizes, diversity_rows=candidates)
    return {} if asked is None else {"warmup": TRAIN * sizes.domain * epochs, "selection": asked}


def multiplied_weights(params: Mapping[str, Any], config: ModelConfig) -> int:
    """P: weights that a token is multiplied with, the head included, embeddings that are only looked up not."""
    found = 0
    for name, value in params.items():
        if isinstance(value, Mapping):
            found += multiplied_weights(value, config)
        elif name == "kernel":
            found += int(np.prod(value.shape))
    return found + (config.vocab_size * config.hidden_size if "embed" in params and "head" not in params else 0)
