"""bergson on the CPU: its hooks on the adapter's layers, collected in memory.

It differentiates a loss and offers no summed logits, so it gets the mean cross-entropy over the response: the same
backward pass, and what ntkjax calls the ``loss`` kernel. "dense": ``projection_target="global"`` with projection_dim K,
one Rademacher vector of K numbers an example. "per_module": its default, a p x p two-sided projection of each adapter
matrix, with p chosen so that the numbers come nearest to K in all. "gradients": without projection.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import torch
from bergson import CollectorComputer, GradientProcessor, IndexConfig, InMemoryCollector
from bergson.utils.peft import detect_peft_modules
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from lora_model import Examples, examples, load, save_kernel
from worker_protocol import Job, serve


def as_dataset(x: Examples) -> Dataset:
    """Token lists and labels, -100 outside the response; bergson pads them."""
    rows = [
        {"input_ids": tokens[:end], "labels": [-100] * int(start) + tokens[int(start) : end]}
        for tokens, end, start in zip(x.tokens.tolist(), x.lengths.tolist(), x.starts, strict=True)
    ]
    return Dataset.from_list(rows)


class Collection:
    """The model, and one pass over a data set."""

    def __init__(self, task: dict, variant: str) -> None:
        self.model, names = load(task, "sdpa")
        self.targets, self.batch = detect_peft_modules(self.model), task["peer_batch"]
        self.side = max(1, round(math.sqrt(task["size"] / len(names))))
        size = {"dense": task["size"], "per_module": self.side, "gradients": 0}[variant]
        self.config = IndexConfig(
            run_path=str(Path(tempfile.mkdtemp()) / "run"), projection_dim=size, loss_reduction="mean",
            projection_target="global" if variant == "dense" else "per_module",
        )  # fmt: skip
        self.config.partial_run_path.mkdir(parents=True)
        self.processor = GradientProcessor(
            projection_dim=size or None, projection_type=self.config.projection_type,
            projection_target=self.config.projection_target,
        )  # fmt: skip

    def run(self, data: Dataset) -> torch.Tensor:
        """[n, K or P]"""
        collector = InMemoryCollector(
            model=self.model.base_model,
            cfg=self.config,
            processor=self.processor,
            target_modules=self.targets,
            data=data,
        )
        batches = [list(range(a, min(a + self.batch, len(data)))) for a in range(0, len(data), self.batch)]
        CollectorComputer(
            model=self.model, data=data, collector=collector, batches=batches, cfg=self.config
        ).run_with_collector_hooks()
        return torch.cat(list(collector.gradients.values()), dim=1)


def make(task: dict, variant: str) -> Job:
    """The job of a variant."""
    disable_progress_bar()
    collection = Collection(task, variant)
    pool = as_dataset(examples(task, "pool", task["peer_rows"]))
    few = as_dataset(examples(task, "pool", task["checked"]))

    def check(path: str) -> None:
        features = collection.run(few)
        if variant == "gradients":
            save_kernel(path, "loss", features)
        else:
            save_kernel(path, "loss", Collection(task, "gradients").run(few), features)

    notes = {
        "dense": "Rademacher, projection_target=global",
        "per_module": f"its default: {collection.side} x {collection.side} numbers an adapter matrix, "
        f"{collection.side**2 * len(collection.targets):,} in all",
        "gradients": "no projection",
    }
    return Job(lambda: collection.run(pool), task["peer_rows"], check, f"batch {collection.batch}, {notes[variant]}")


if __name__ == "__main__":
    serve(make, ["bergson", "torch", "transformers", "peft"])
