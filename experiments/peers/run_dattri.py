"""dattri on the CPU: what its TRAK and TracIn attributors do with a batch before they compare examples.

"features": AttributionTask's per-example gradients of the paper's summed logits, then random_project on the CPU with
its default (normal) entries, made anew for every batch as in the attributors. "gradients": the former alone.
"""

from __future__ import annotations

import torch
from dattri.func.projection import random_project
from dattri.task import AttributionTask
from lora_model import examples, load, save_kernel, sum_logits
from worker_protocol import Job, serve


def make(task: dict, variant: str) -> Job:
    """The job of a variant."""
    model, _ = load(task, "eager")
    frozen = {k: p.detach() for k, p in model.named_parameters() if not p.requires_grad} | dict(model.named_buffers())
    output = lambda params, data: sum_logits(model, params | frozen, *data)
    attribution = AttributionTask(loss_func=output, model=model, checkpoints=model.state_dict())
    params, _ = attribution.get_param(ckpt_idx=0)
    differentiate = attribution.get_grad_loss_func(in_dims=(None, 0))
    pool, few, batch = (
        examples(task, "pool", task["peer_rows"]),
        examples(task, "pool", task["checked"]),
        task["peer_batch"],
    )

    def project(gradients: torch.Tensor) -> torch.Tensor:
        made = random_project(
            gradients, len(gradients), proj_dim=task["size"], proj_max_batch_size=32, proj_seed=0, device="cpu"
        )
        return made(gradients, ensemble_id=0)

    def run() -> None:
        for start in range(0, task["peer_rows"], batch):
            rows = slice(start, start + batch)
            gradients = differentiate(params.detach(), (pool.tokens[rows], pool.predicts[rows]))
            if variant != "gradients":
                project(gradients)

    def check(path: str) -> None:
        gradients = differentiate(params.detach(), (few.tokens, few.predicts)).detach()
        features = None if variant == "gradients" else project(gradients)
        save_kernel(path, "sum_logits", gradients, features)

    note = f"batch {batch}" + ("" if variant == "gradients" else ", BasicProjector, normal entries")
    return Job(torch.no_grad()(run), task["peer_rows"], check, note)


if __name__ == "__main__":
    serve(make, ["dattri", "torch", "transformers", "peft"])
