"""TRAK (arXiv 2303.14186, package traker) as its documentation says, on the CPU.

"features": TRAKer.featurize with an AbstractModelOutput of ours for the paper's summed logits, ``grad_wrt`` the
adapter's parameters, float32. On the CPU TRAKer takes its BasicProjector with normal entries by itself (the CUDA
projector needs fast_jl and a GPU), which draws all of them again for every batch. "gradients": its gradient computer
alone, which differentiates by every parameter of the model and then drops those not asked for.
"""

from __future__ import annotations

import math
import tempfile

import torch
from lora_model import examples, load, save_kernel, sum_logits
from trak import TRAKer
from trak.modelout_functions import AbstractModelOutput
from trak.projectors import NoOpProjector
from trak.utils import vectorize
from worker_protocol import Job, serve


class SummedLogits(AbstractModelOutput):
    """F(x), and a loss whose derivative by it is 1."""

    def __init__(self) -> None:
        super().__init__()

    @staticmethod
    def get_output(model, weights, buffers, tokens, predicts):
        return sum_logits(model, weights | buffers, tokens, predicts)

    def get_out_to_loss_grad(self, model, weights, buffers, batch):
        return torch.ones(len(batch[0]), 1)


def make(task: dict, variant: str) -> Job:
    """The job of a variant."""
    model, names = load(task, "eager")
    pool, few, batch = (
        examples(task, "pool", task["peer_rows"]),
        examples(task, "pool", task["checked"]),
        task["peer_batch"],
    )
    alone = variant == "gradients"
    tracer = TRAKer(
        model=model, task=SummedLogits(), train_set_size=task["peer_rows"], save_dir=tempfile.mkdtemp(), device="cpu",
        projector=NoOpProjector(device="cpu") if alone else None, proj_dim=task["size"], use_half_precision=False,
        grad_wrt=names, logging_level=30,
    )  # fmt: skip
    computer = tracer.gradient_computer
    starts = range(0, task["peer_rows"], batch)
    if not alone:
        tracer.load_checkpoint(model.state_dict(), model_id=0)

    def run() -> None:
        if not alone:
            tracer.saver.current_store["is_featurized"][:] = 0  # otherwise it skips what it has
        for start in starts:
            rows = slice(start, start + batch)
            inputs = (pool.tokens[rows], pool.predicts[rows])
            if alone:
                computer.compute_per_sample_grad(batch=inputs)
            else:
                tracer.featurize(batch=inputs, inds=torch.arange(task["peer_rows"])[rows].numpy())

    def check(path: str) -> None:
        inputs = (few.tokens, few.predicts)
        gradients = vectorize(computer.compute_per_sample_grad(batch=inputs), device="cpu").detach()
        features = None if alone else tracer.projector.project(gradients, model_id=0) / math.sqrt(task["size"])
        save_kernel(path, "sum_logits", gradients, features)

    # What differentiates by torch.func has no use for a graph of its own.
    kind = "" if alone else f", {type(tracer.projector).__name__}, {tracer.projector.proj_type.value} entries"
    return Job(torch.no_grad()(run), task["peer_rows"], check, f"batch {batch}{kind}")


if __name__ == "__main__":
    serve(make, ["traker", "torch", "transformers", "peft"])
