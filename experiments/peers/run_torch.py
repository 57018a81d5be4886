"""The paper's pipeline (arXiv 2511.07380) in plain torch, as one would write it: the baseline that we made ourselves.

"scores": per-example LoRA gradients of the summed logits (torch.func, response positions, length-normalised), a dense
Rademacher projection to K numbers with the signs of a block drawn anew for every batch, and the mean inner product with
the domain's features. "gradients": the gradients alone.
"""

from __future__ import annotations

import math

import torch
from lora_model import Examples, examples, load, save_kernel, sum_logits
from worker_protocol import Job, serve

BLOCK = 4096  # gradient entries whose signs exist at a time: 128 MiB at K = 8192


class Pipeline:
    """Model, adapter and the two steps."""

    def __init__(self, task: dict) -> None:
        self.model, names = load(task, "eager")
        everything = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        self.lora = {name: everything[name].detach() for name in names}
        self.fixed = {name: value.detach() for name, value in everything.items() if name not in self.lora}
        self.size, self.batch = task["size"], task["peer_batch"]

        def output(lora: dict, tokens: torch.Tensor, predicts: torch.Tensor) -> torch.Tensor:
            return sum_logits(self.model, lora | self.fixed, tokens, predicts)

        self.differentiate = torch.func.vmap(torch.func.grad(output), in_dims=(None, 0, 0))

    def gradients(self, x: Examples) -> torch.Tensor:
        """[n, P] of one batch."""
        gradients = self.differentiate(self.lora, x.tokens, x.predicts)
        return torch.cat([leaf.flatten(1) for leaf in gradients.values()], dim=1)

    def features(self, x: Examples) -> torch.Tensor:
        """Pi g [n, K] of one batch, entries of Pi +-1 / sqrt(K), the same for every batch."""
        gradients, generator = self.gradients(x), torch.Generator().manual_seed(0)
        total = torch.zeros(len(gradients), self.size)
        for start in range(0, gradients.shape[1], BLOCK):
            part = gradients[:, start : start + BLOCK]
            signs = torch.randint(0, 2, (part.shape[1], self.size), dtype=torch.int8, generator=generator)
            total += part @ signs.float().mul_(2).sub_(1)
        return total / math.sqrt(self.size)

    def batches(self, x: Examples) -> list[Examples]:
        """In batches of the peers' size."""
        cut = lambda a: Examples(
            *(getattr(x, f)[a : a + self.batch] for f in ("tokens", "predicts", "lengths", "starts"))
        )
        return [cut(start) for start in range(0, len(x.tokens), self.batch)]


def make(task: dict, variant: str) -> Job:
    """The job of a variant."""
    pipeline = Pipeline(task)
    pool, few = examples(task, "pool", task["peer_rows"]), examples(task, "pool", task["checked"])
    with torch.no_grad():
        if variant == "gradients":
            run = lambda: [pipeline.gradients(x) for x in pipeline.batches(pool)]
        else:
            domain = pipeline.features(examples(task, "domain", task["checked"])).mean(0)
            run = lambda: [pipeline.features(x) @ domain for x in pipeline.batches(pool)]

    def check(path: str) -> None:
        features = None if variant == "gradients" else pipeline.features(few)
        save_kernel(path, "sum_logits", pipeline.gradients(few), features)

    return Job(torch.no_grad()(run), len(pool.tokens), check, f"torch.func.vmap, batch {pipeline.batch}")


if __name__ == "__main__":
    serve(make, ["torch", "transformers", "peft"])
