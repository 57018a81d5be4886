"""Devices and processes: meshes, how weights and batches are spread over them, and jobs of several processes.

One process drives a mesh of its own devices, with the axes "data" and "model". Several processes (a Slurm job, a TPU
pod, a Kubernetes job, or two terminals) each hold the whole model on a mesh of their own and share the work on the
pool, see `ntkjax.store`.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from ntkjax.errors import ConfigError, UserError

DATA, MODEL = "data", "model"
WeightRule = Literal["tensor", "fully-sharded"]

_WAIT_SECONDS = 7 * 24 * 3600  # a barrier waits for whole passes over the pool; a process that dies ends it at once
_barriers = itertools.count()


# -- meshes --


def parse_mesh(text: str) -> tuple[int | None, int]:
    """(data, model) of ``data=4,model=2``, ``4,2`` or ``4x2``; data None (all devices that are left) for ``auto`` and
    ``model=2``.

    Raises:
      ConfigError: anything else.
    """
    if text == "auto":
        return None, 1
    match = re.fullmatch(r"(?:data=)?(\d+)(?:[,x](?:model=)?(\d+))?|model=(\d+)", text.replace(" ", ""))
    if match is None or "0" in match.groups():
        raise ConfigError(
            f"mesh {text!r}: expected data=D,model=M with whole numbers from 1 (4,2 and 4x2 are short for "
            "data=4,model=2), or auto for all devices of this process on data"
        )
    data, model, alone = match.groups()
    return (None, int(alone)) if alone else (int(data), int(model or 1))


def mesh_of(text: str | None) -> Mesh | None:
    """The mesh that ``text`` (see `parse_mesh`) names over this process's devices; None for None."""
    if text is None:
        return None
    data, model = parse_mesh(text)
    return make_mesh(data=max(1, jax.local_device_count() // model) if data is None else data, model=model)


def make_mesh(*, data: int, model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of data x model devices (default: all of this process) with axes "data" and "model".

    Raises ConfigError where data x model is not the number of devices, naming the nearest shape that fits.
    """
    available = list(jax.local_devices() if devices is None else devices)
    if data < 1 or model < 1 or data * model != len(available):
        count = len(available)
        fits = [(count // m, m) for m in range(1, count + 1) if count % m == 0]
        near = min(fits, key=lambda shape: (abs(shape[1] - model), abs(shape[0] - data)))
        raise ConfigError(
            f"a mesh of data={data} x model={model} needs {data * model} devices and there are {count}: "
            f"the nearest that fits is data={near[0]}, model={near[1]}"
        )
    return jax.make_mesh((data, model), (DATA, MODEL), (AxisType.Auto, AxisType.Auto), devices=available)


def data_parallel(mesh: Mesh | None) -> int:
    """In how many parts the rows of a batch are split: the size of "data", 1 without a mesh."""
    return 1 if mesh is None else mesh.shape[DATA]


def describe_mesh(mesh: Mesh | None) -> str | None:
    """``data=4,model=2``, or None."""
    return None if mesh is None else f"data={mesh.shape[DATA]},model={mesh.shape[MODEL]}"


# -- weights and batches --


@dataclasses.dataclass(frozen=True)
class Split:
    """Which axes of a parameter are divided over a mesh, counted from the last (-1); None for none.

    Attributes:
      model: the axis over "model". data: the axis over "data" as well, where weights are fully sharded.
    """

    model: int | None = None
    data: int | None = None


def weight_sharding(path: str, shape: Sequence[int], mesh: Mesh, split: Split, rule: str = "tensor") -> NamedSharding:
    """Where the parameter at ``path`` (it stands in errors) lives: split over the mesh or replicated.

    ``tensor``: ``split.model`` is split over "model". ``fully-sharded``: ``split.data`` is split over "data" as well,
    so that a device holds 1 / (data x model) of the weights and gathers a layer when it comes to it. A model's family
    declares the split of each parameter. Raises ConfigError where an axis does not divide.
    """
    if rule not in ("tensor", "fully-sharded"):
        raise ConfigError(f"weights {rule!r}: expected tensor or fully-sharded")
    spec: list[str | None] = [None] * len(shape)
    divided = [(split.model, MODEL)] + ([(split.data, DATA)] if rule == "fully-sharded" else [])
    for axis, name in divided:
        parts = mesh.shape[name]
        if axis is None or parts == 1:
            continue
        axis %= len(shape)
        if shape[axis] % parts:
            divisors = [d for d in range(1, parts + 1) if shape[axis] % d == 0 and parts % d == 0]
            raise ConfigError(
                f"{path} {tuple(shape)}: axis {axis} does not divide over {name}={parts} devices; "
                f"{name}={max(divisors)} would"
            )
        spec[axis] = name
    return NamedSharding(mesh, PartitionSpec(*spec) if any(spec) else PartitionSpec())


def put(array: Array | np.ndarray, path: str, mesh: Mesh | None, split: Split, rule: str = "tensor") -> Array:
    """The parameter on its devices: by ``weight_sharding``, or on the default device without a mesh."""
    if mesh is None:
        return jax.device_put(array)
    return jax.device_put(array, weight_sharding(path, array.shape, mesh, split, rule))


def shard_batch(batch: Any, mesh: Mesh | None) -> Any:
    """Every leaf [B, ...] of a batch split by rows over "data". ConfigError where B does not divide."""
    if mesh is None:
        return batch
    parts = mesh.shape[DATA]

    def place(leaf):
        if leaf.shape[0] % parts:
            raise ConfigError(
                f"a batch of {leaf.shape[0]} rows does not divide over data={parts} devices; the nearest that does "
                f"has {-(-leaf.shape[0] // parts) * parts} (give batches filler rows with index -1)"
            )
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(DATA)))

    return jax.tree.map(place, batch)


def keep_shardings(tree: Any, shardings: tuple | None) -> Any:
    """``tree`` with its leaves, in tree order, held to ``shardings`` inside a jitted function; None: as they come."""
    if shardings is None:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten(
        [jax.lax.with_sharding_constraint(leaf, sharding) for leaf, sharding in zip(leaves, shardings, strict=True)]
    )


# -- processes --


def cluster(env: Mapping[str, str]) -> str | None:
    """Which launcher started several processes, as its environment tells: "environment" (JAX_COORDINATOR_ADDRESS),
    "slurm", "kubernetes", "tpu"; None for a process that stands alone."""
    if env.get("JAX_COORDINATOR_ADDRESS"):
        return "environment"
    # Only inside srun: a batch script that starts one process directly has SLURM_NTASKS too.
    if "SLURM_STEP_NODELIST" in env and int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1"))) > 1:
        return "slurm"
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        return "kubernetes"
    # A pod slice lists its workers. On a plain TPU VM the metadata server does, and jax asks it.
    if "," in env.get("TPU_WORKER_HOSTNAMES", "") or "TPU_ACCELERATOR_TYPE" in env or Path("/dev/accel0").exists():
        return "tpu"
    return None


def start(env: Mapping[str, str] | None = None) -> tuple[int, int]:
    """Join the other processes of this job, if there are any; gives (index, count). Before the first use of a device.

    By environment: JAX_COORDINATOR_ADDRESS (HOST:PORT of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID. Under Slurm
    (srun), on TPU pods and in indexed Kubernetes jobs jax finds the others by itself. A second call does nothing.

    Raises:
      ConfigError: one of the three variables is missing or no number.
      UserError: the other processes cannot be reached.
    """
    env = os.environ if env is None else env
    found = cluster(env)
    if found is None or jax.distributed.is_initialized():
        return process()
    options: dict[str, Any] = {}
    if found == "environment":
        names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
        wrong = [name for name in names.values() if not env.get(name, "").isdigit()]
        if wrong:
            raise ConfigError(
                f"JAX_COORDINATOR_ADDRESS is set, so {' and '.join(wrong)} must be whole numbers: how many processes "
                "the job has, and which of them this is (from 0). Set them, or unset JAX_COORDINATOR_ADDRESS"
            )
        options = {key: int(env[name]) for key, name in names.items()}
        options |= {"coordinator_address": env["JAX_COORDINATOR_ADDRESS"], "cluster_detection_method": "deactivate"}
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(**options, shutdown_timeout_seconds=15)
    except (RuntimeError, ValueError, ImportError) as error:
        raise UserError(
            f"cannot join the other processes of this job ({found}): {str(error).splitlines()[0]}. Set "
            "JAX_COORDINATOR_ADDRESS=HOST:PORT of process 0, JAX_NUM_PROCESSES and JAX_PROCESS_ID yourself, or (on "
            "Kubernetes) install the package kubernetes, through which jax asks the cluster"
        ) from error
    return process()


def process() -> tuple[int, int]:
    """(index of this process, how many there are); (0, 1) where jax.distributed was not started."""
    return (jax.process_index(), jax.process_count()) if jax.distributed.is_initialized() else (0, 1)


def is_primary() -> bool:
    """True on the one process that writes what is written once, and prints."""
    return process()[0] == 0


def barrier(name: str) -> None:
    """Wait until every process is here. All of them must make the same calls in the same order.

    Raises:
      UserError: another process has ended.
    """
    if process()[1] == 1:
        return
    from orbax.checkpoint.multihost import get_barrier_sync_fn

    try:
        get_barrier_sync_fn()(key=f"ntkjax-{next(_barriers)}-{name}", timeout_ms=_WAIT_SECONDS * 1000)
    except Exception as error:  # jaxlib's own class, which has no public name
        raise UserError(
            f"process {process()[0]}: another process of this job ended before {name!r}; what it said is above or in "
            "its log. Start the whole job again: it goes on from what is finished"
        ) from error


def broadcast(tree: Any) -> Any:
    """The arrays of process 0 on every process, bit for bit, placed as each process has its own ``tree``."""
    if process()[1] == 1:
        return tree
    from jax.experimental import multihost_utils

    barrier("broadcast")  # collectives give up after seconds; process 0 may take hours to come here
    bits = lambda leaf: np.asarray(leaf).view(f"u{leaf.dtype.itemsize}")  # summed with zeros, floats would lose -0.0
    found = multihost_utils.broadcast_one_to_all(jax.tree.map(bits, tree))
    back = lambda leaf, own: jax.device_put(np.asarray(leaf).view(own.dtype), own.sharding)
    return jax.tree.map(back, found, tree)
