"""What a compiled program sends between devices, counted from its text.

Run as ``python -m ntkjax.commands.plan.collectives`` in a process of its own, which has as many simulated devices as
the mesh: it compiles the score of one batch for shapes alone (no weight is made) and prints what it counted as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from ntkjax.devices import simulated_devices
from ntkjax.errors import UserError

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_OPERATION = re.compile(rf"= (.+?) ({'|'.join(KINDS)})(?:-start)?\(")
_ARRAY = re.compile(r"(?:f|bf|s|u|pred)\w*\[([\d,]*)\]")
_EXPLICIT, _IOTA = re.compile(r"replica_groups=\{\{([\d,]*)\}"), re.compile(r"replica_groups=\[(\d+),(\d+)\]")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Counted:
    """Of one batch, for each device.

    Attributes:
      elements: those that it receives, by operation.
      bytes_a_token: working memory that grows with the tokens of a device, by the difference between a batch and one of
        twice its rows.
    """

    elements: dict[str, float]
    bytes_a_token: float


def received(kind: str, elements: int, group: int) -> float:
    """Elements that a device receives in a ring of ``group`` devices, ``elements`` those of the operation's result.

    all-gather: (g - 1) / g of the result; all-reduce: twice that; reduce-scatter: g - 1 times its result; all-to-all:
    (g - 1) / g; collective-permute: all of it.
    """
    if group == 1:
        return 0.0
    share = (group - 1) / group
    factor = {"all-reduce": 2 * share, "all-gather": share, "reduce-scatter": group - 1, "all-to-all": share}
    return factor.get(kind, 1.0) * elements


def operations(text: str, devices: int) -> Iterator[tuple[str, str, int, int]]:
    """(computation, operation, elements of its result, devices that take part) of every collective of an HLO text."""
    computation = ""
    for line in text.splitlines():
        if line and not line.startswith(" ") and line.rstrip().endswith("{"):
            computation = line.split()[1] if line.startswith("ENTRY") else line.split()[0]
        if (match := _OPERATION.search(line)) is None:
            continue
        shapes = [math.prod(map(int, dims.split(","))) if dims else 1 for dims in _ARRAY.findall(match[1])]
        # What starts asynchronously has the operands beside the results in its type.
        elements = max(shapes) if f"{match[2]}-start(" in line else sum(shapes)
        yield computation.lstrip("%"), match[2], elements, _group(line, devices)


def _group(line: str, devices: int) -> int:
    """How many devices take part, in each of the forms in which XLA writes it; all of them where it says nothing."""
    if match := _EXPLICIT.search(line):
        return len(match[1].split(","))
    if match := _IOTA.search(line):
        return int(match[2])
    if match := _NAMED.search(line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", match[2]))
    return devices


def count(text: str, devices: int, layers: int) -> dict[str, float]:
    """Elements that a device receives in the whole program, by operation: what stands in the body of a loop, the loop
    over layers, counts ``layers`` times."""
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    inside = _reached(text, bodies)
    totals: dict[str, float] = {}
    for computation, kind, elements, group in operations(text, devices):
        times = layers if computation in inside else 1
        totals[kind] = totals.get(kind, 0.0) + times * received(kind, elements, group)
    return totals


def _reached(text: str, start: set[str]) -> set[str]:
    """``start`` and every computation that these call."""
    calls: dict[str, set[str]] = {}
    computation = ""
    for line in text.splitlines():
        if line and not line.startswith(" ") and line.rstrip().endswith("{"):
            computation = (line.split()[1] if line.startswith("ENTRY") else line.split()[0]).lstrip("%")
        for name in re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", line):
            calls.setdefault(computation, set()).add(name)
    reached, waiting = set(start), list(start)
    while waiting:
        for name in calls.get(waiting.pop(), set()) - reached:
            reached.add(name)
            waiting.append(name)
    return reached


def compiled(settings: dict[str, Any]) -> Counted:
    """Compile in a process with simulated devices; ``settings`` as in ``main``.

    Raises:
      UserError: it ended with an error, whose last line is told.
    """
    devices = settings["fsdp"] * settings["model"]
    # In a process of its own, because the number of devices is fixed when JAX starts.
    flags = simulated_devices(os.environ.get("XLA_FLAGS", ""), devices)
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    words = [sys.executable, "-m", "ntkjax.commands.plan.collectives"]
    done = subprocess.run(words, input=json.dumps(settings), env=env, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(
            f"the score could not be compiled for fsdp={settings['fsdp']},model={settings['model']}: {last}"
        )
    return Counted(**json.loads(done.stdout.strip().splitlines()[-1]))


def main(settings: dict[str, Any]) -> Counted:
    """Count in this process. ``settings``: ``config`` (the content of config.json), ``dtype``, ``rank``, ``fsdp``,
    ``model``, ``rows`` of all devices, ``length``."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from ntkjax.models.config import ModelConfig
    from ntkjax.models.functions import param_shapes
    from ntkjax.models.layers import ModelSpec
    from ntkjax.models.lm import LanguageModel, paths, unflatten
    from ntkjax.models.lora import LoraConfig
    from ntkjax.ntk.kernel import as_kernel
    from ntkjax.ntk.outputs import sum_logits
    from ntkjax.ntk.scores import Direction, score_batch
    from ntkjax.parallel import make_mesh, shard_batch, weight_sharding, weights_over_rows
    from ntkjax.types import Batch

    config = ModelConfig.from_hf(settings["config"])
    mesh = make_mesh(data=1, fsdp=settings["fsdp"], model=settings["model"])
    lora = LoraConfig(rank=settings["rank"])
    spec = ModelSpec(config, lora, settings["dtype"], gathered_on=weights_over_rows(mesh))
    sharded = lambda path, shape: jax.ShapeDtypeStruct(
        shape.shape, shape.dtype, sharding=weight_sharding(path, shape.shape, mesh, config.split(path))
    )
    # Shapes and shardings are all that a compiler wants: no weight of the model is ever made.
    leaves = paths(param_shapes(spec))
    model = LanguageModel(spec, unflatten({path: sharded(path, shape) for path, shape in leaves.items()}))
    kernel = as_kernel(sum_logits(model.hidden_fn, model.head_fn))
    stacked = Direction(jax.tree.map(lambda p: jax.ShapeDtypeStruct((1, 1, *p.shape), jnp.float32), model.lora))

    def compiled_for(rows: int, length: int) -> tuple[str, int]:
        """Text and temporary bytes of the program."""
        empty = Batch(
            np.zeros((rows, length), np.int32), np.zeros((rows, length), bool), np.full(rows, length, np.int32),
            np.arange(rows, dtype=np.int32),
        )  # fmt: skip
        of = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        batch = jax.tree.map(of, shard_batch(empty, mesh))
        program = score_batch.lower(kernel, model.lora, stacked, batch).compile()
        text, memory = program.as_text(), program.memory_analysis()
        if text is None or memory is None:
            raise UserError("the compiler of this machine's jax tells nothing of its programs; expected that of CPUs")
        return text, int(memory.temp_size_in_bytes)

    rows, length = settings["rows"], settings["length"]
    # Of two batches, because what does not grow with the tokens (gathered weights) would count in one.
    (text, few), (_, many) = compiled_for(rows, length), compiled_for(2 * rows, length)
    tokens = rows * length / settings["fsdp"]  # of a device
    return Counted(count(text, mesh.size, config.num_layers), (many - few) / tokens)


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(main(json.load(sys.stdin)))))
