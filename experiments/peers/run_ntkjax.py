"""ntkjax itself, through its public functions.

"scores": `directional_scores` along the domain's mean gradient, forward mode, exact. "features-NAME":
`gradient_features` with that sketch. "gradients": `per_example_gradients`.
"""

from __future__ import annotations

import importlib
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from worker_protocol import Job, serve

from ntkjax.data import TokenisedDataset
from ntkjax.models import adapter_lora_config, load_adapter, load_lm
from ntkjax.ntk.features import gradient_features, per_example_gradients
from ntkjax.ntk.outputs import sum_logits
from ntkjax.ntk.rows import Pass
from ntkjax.ntk.scores import directional_scores, mean_gradient
from ntkjax.ntk.sketch import IdentitySketch, Sketch
from ntkjax.parallel import make_mesh, shard_batch


def dataset(task: dict, name: str, rows: int) -> TokenisedDataset:
    """The first ``rows`` examples of "pool" or "domain"."""
    with np.load(task["examples"]) as held:
        tokens, lengths, starts = (held[f"{name}_{what}"][:rows] for what in ("tokens", "lengths", "starts"))
    return TokenisedDataset.from_sequences([row[:end].tolist() for row, end in zip(tokens, lengths)], starts.tolist())


def batches(task: dict, name: str, rows: int, size: int, mesh: Mesh | None = None) -> list:
    """Batches of ``size`` rows, all padded to the task's length as the peers' are: no gain from bucketing."""
    data, size = dataset(task, name, rows), min(size, rows)
    cut = [np.arange(start, min(start + size, rows)) for start in range(0, rows, size)]
    return [shard_batch(data.collate(part, rows=size, length=task["length"]), mesh) for part in cut]


def make_sketch(task: dict, name: str) -> Sketch:
    """A sketch of K numbers by its name in the task, with its own defaults."""
    module, cls = task["sketches"][name]
    return getattr(importlib.import_module(module), cls)(size=task["size"], seed=0)


class Ours:
    """Model, adapter and the paper's output."""

    def __init__(self, task: dict, mesh: Mesh | None = None) -> None:
        self.task, self.mesh = task, mesh
        model = load_lm(task["model"], lora=adapter_lora_config(task["adapter"]), mesh=mesh)
        self.lora: Any = load_adapter(task["adapter"], model)
        self.output, self.loss = sum_logits(model.hidden_fn, model.head_fn({})), model.nll_fn
        self.options = {"microbatch": task["microbatch"], "memory_budget": task["memory_budget"]}

    def scores(self, rows: int) -> tuple[Any, int]:
        """(one pass over the pool, rows): batches spread over the devices."""
        task = self.task
        domain = mean_gradient(self.output, self.lora, batches(task, "domain", task["checked"], task["checked"]))
        pool = batches(task, "pool", rows, task["batch"], self.mesh)
        return (lambda: directional_scores(self.output, self.lora, [domain], pool, rows=rows)), rows

    def features(self, sketch: Sketch, rows: int) -> tuple[Any, int]:
        """(one pass, rows)."""
        pool = batches(self.task, "pool", rows, self.task["batch"])
        return (lambda: gradient_features(self.output, self.lora, pool, sketch, rows=Pass(rows, **self.options))), rows

    def gradients(self, rows: int) -> tuple[Any, int]:
        """(one pass, rows): a batch's gradients are dropped when the next one's are there."""
        pool, microbatch = batches(self.task, "pool", rows, self.task["batch"]), self.task["microbatch"]

        def run() -> None:
            for batch in pool:
                jax.block_until_ready(per_example_gradients(self.output, self.lora, batch, microbatch=microbatch))

        return run, rows

    def evidence(self, path: str, variant: str, sketch: Sketch | None) -> None:
        """What this variant says of the few examples: exact kernels and scores, or one kernel of its own."""
        count = self.task["checked"]
        few = batches(self.task, "pool", count, count)
        phi = lambda output, sketch: gradient_features(output, self.lora, few, sketch, rows=Pass(count, **self.options))
        gram = lambda x: x.astype(np.float64) @ x.T.astype(np.float64)
        if sketch is not None:
            arrays = {"sketched": gram(phi(self.output, sketch)), "size": np.asarray(sketch.width(self.lora))}
        elif variant == "gradients":
            gradients = per_example_gradients(self.output, self.lora, few[0], microbatch=self.task["microbatch"])
            rows = [np.asarray(leaf).reshape(count, -1) for leaf in jax.tree.leaves(gradients)]
            arrays = {"exact": gram(np.concatenate(rows, axis=1))}
        else:  # the examples as their own domain: their scores are row means of the kernel
            own = mean_gradient(self.output, self.lora, few)
            arrays = {
                name: gram(phi(f, IdentitySketch())) for name, f in {"exact": self.output, "loss": self.loss}.items()
            }
            arrays["scores"] = directional_scores(self.output, self.lora, [own], few, rows=count)[:, 0]
        np.savez(path, kind=np.asarray("sum_logits"), **arrays)


def make(task: dict, variant: str) -> Job:
    """The job of a variant."""
    devices = task["devices"] if variant == "scores" else 1
    ours = Ours(task, make_mesh(data=devices, devices=jax.local_devices()[:devices]) if devices > 1 else None)
    sketch, rows = None, task["our_rows"][variant]
    if variant == "scores":
        run, rows = ours.scores(rows)
    elif variant == "gradients":
        run, rows = ours.gradients(rows)
    else:
        sketch = make_sketch(task, variant.removeprefix("features-"))
        run, rows = ours.features(sketch, rows)
    note = {} if sketch is None else {"numbers": sketch.width(ours.lora)} | sketch.describe()
    listed = "".join(f", {key} {value}" for key, value in note.items() if key in ("numbers", "tables"))
    check = lambda path: ours.evidence(path, variant, sketch)
    return Job(run, rows, check, f"batch {min(task['batch'], rows)}, devices {devices}{listed}")


if __name__ == "__main__":
    serve(make, ["jax", "jaxlib", "ntkjax"])
