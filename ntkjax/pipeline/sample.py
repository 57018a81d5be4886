"""Sampled continuations of the prompts of a data set, as methods that look at several answers ask for them."""

from __future__ import annotations

import dataclasses

import numpy as np

from ntkjax.data import TokenisedDataset
from ntkjax.models import LanguageModel
from ntkjax.models.generate import generate
from ntkjax.rng import named_key
from ntkjax.types import Params


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Continuations drawn from softmax(logits), temperature 1: the model's own distribution.

    Attributes:
      params: theta, laid over the model's weights.
    """

    model: LanguageModel
    params: Params
    data: TokenisedDataset
    batch_size: int = 32

    def __call__(self, rows: np.ndarray, *, samples: int, max_new_tokens: int, seed: int) -> list[list[str]]:
        """``samples`` continuations of each row's prompt, as text without special tokens.

        The random stream is that of ``seed`` and the first row: the same rows asked for together give the same texts.

        Raises:
          UserError: a prompt too long for a model with learned positions.
        """
        prompts = [tokens[:start].tolist() for tokens, start in map(self.data.tokens, rows)]
        made = generate(
            self.model,
            self.params,
            [prompt for prompt in prompts for _ in range(samples)],
            max_new_tokens=max_new_tokens,
            key=named_key(seed, "continuations", int(rows[0])),
            temperature=1.0,
            batch_size=self.batch_size,
        )
        texts = self.model.tokenizer.batch_decode(made, skip_special_tokens=True)
        return [texts[k : k + samples] for k in range(0, len(texts), samples)]
