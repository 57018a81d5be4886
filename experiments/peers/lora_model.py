"""What the torch workers share: the checkpoint with the adapter as PEFT reads it, the examples, the paper's output."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers import logging as transformers_logging


@dataclasses.dataclass(frozen=True)
class Examples:
    """Right-padded examples of one length T.

    Attributes:
      tokens: int64 [n, T].
      predicts: float32 [n, T], 1 at the positions S(x) whose next token belongs to the response.
      lengths: int [n]; starts: int [n], first token of the response.
    """

    tokens: torch.Tensor
    predicts: torch.Tensor
    lengths: np.ndarray
    starts: np.ndarray

    def first(self, count: int) -> Examples:
        """The first ``count`` of them."""
        return Examples(self.tokens[:count], self.predicts[:count], self.lengths[:count], self.starts[:count])


def examples(task: dict, name: str, count: int) -> Examples:
    """The first ``count`` examples of "pool" or "domain"."""
    with np.load(task["examples"]) as held:
        tokens, lengths, starts = (held[f"{name}_{what}"][:count] for what in ("tokens", "lengths", "starts"))
    steps = np.arange(tokens.shape[1])[None]
    predicts = (steps >= starts[:, None] - 1) & (steps < lengths[:, None] - 1)
    return Examples(torch.from_numpy(tokens).long(), torch.from_numpy(predicts).float(), lengths, starts)


def load(task: dict, attention: str) -> tuple[PeftModel, list[str]]:
    """(model in float32, names of the adapter's parameters): only these require a gradient.

    ``attention``: "eager" where examples are vectorised by torch.func.vmap (it has no rule for the fused CPU kernel and
    falls back to a loop: 6 to 8 times slower), else "sdpa".
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(task["threads"])
    torch.manual_seed(0)
    base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        task["model"], dtype=torch.float32, attn_implementation=attention
    )
    model = PeftModel.from_pretrained(base, task["adapter"], is_trainable=True).eval()
    return model, [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def sum_logits(model: PeftModel, weights: dict, tokens: torch.Tensor, predicts: torch.Tensor) -> torch.Tensor:
    """F(x) of one example (both [T]), as the paper has it: all logits summed, averaged over S(x)."""
    called = torch.func.functional_call(model, weights, (tokens[None],), {"use_cache": False})
    return (called.logits[0].sum(-1) * predicts).sum() / predicts.sum()


def save_kernel(path: str, kind: str, gradients: torch.Tensor, features: torch.Tensor | None = None) -> None:
    """Evidence for the comparison: the Gram matrix of the gradients ("sum_logits" or "loss"), and of the features."""
    gram = lambda x: (x.double() @ x.double().T).numpy()
    more = {} if features is None else {"sketched": gram(features), "size": np.asarray(features.shape[1])}
    np.savez(path, kind=np.asarray(kind), exact=gram(gradients), **more)
