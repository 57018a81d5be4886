"""Jobs of several processes: how they find each other, wait for each other, and tell each other numbers.

A job is a Slurm job, a TPU pod, a Kubernetes job, or two terminals. With a mesh (`ntkjax.parallel`) every process runs
the same programs on the same global arrays; without one each holds the whole model and they share the work on the pool,
see `ntkjax.store`.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ntkjax.errors import ConfigError, UserError

_WAIT_SECONDS = 7 * 24 * 3600  # a barrier waits for whole passes over the pool; a process that dies ends it at once
_barriers = itertools.count()


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
      ConfigError: one of the three variables is missing or no number, or JAX_PLATFORMS names what is not here.
      UserError: the other processes cannot be reached.
    """
    env = os.environ if env is None else env
    launcher = cluster(env)
    if launcher is None or jax.distributed.is_initialized():
        _look_for_platform(env)
        return process()
    options: dict[str, Any] = {}
    if launcher == "environment":
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
    # Its handler of SIGTERM would keep a pass from ending; `ntkjax.preemption` has ours.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**options, shutdown_timeout_seconds=15)
    except (RuntimeError, ValueError, ImportError) as error:
        raise UserError(
            f"cannot join the other processes of this job ({launcher}): {str(error).splitlines()[0]}. Set "
            "JAX_COORDINATOR_ADDRESS=HOST:PORT of process 0, JAX_NUM_PROCESSES and JAX_PROCESS_ID yourself, or (on "
            "Kubernetes) install the package kubernetes, through which jax asks the cluster"
        ) from error
    _look_for_platform(env)
    return process()


def _look_for_platform(env: Mapping[str, str]) -> None:
    """ConfigError where JAX_PLATFORMS names a platform that has no device here."""
    if not (named := env.get("JAX_PLATFORMS")):
        return
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the second for cuda, where its plugin is not installed
        said = f" ({str(error).splitlines()[0]})" if str(error) else ""
        raise ConfigError(
            f"JAX_PLATFORMS is {named!r}, and jax finds no such device here{said}; expected a platform of this "
            "machine, such as cpu: set it to one (under launch: --platform), or unset it"
        ) from error


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


def everyone(number: int) -> list[int]:
    """The ``number`` of every process, in their order."""
    if process()[1] == 1:
        return [number]
    from jax.experimental import multihost_utils

    barrier("everyone")  # as in broadcast
    # As bytes: without jax_enable_x64 an int64 would lose its upper half on the way.
    gathered = multihost_utils.process_allgather(np.frombuffer(np.int64(number).tobytes(), np.uint8))
    return np.asarray(gathered, np.uint8).reshape(-1, 8).copy().view(np.int64)[:, 0].tolist()


def texts(text: str) -> list[str]:
    """The ``text`` of every process, in their order."""
    if process()[1] == 1:
        return [text]
    from jax.experimental import multihost_utils

    content = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)
    sizes = everyone(len(content))
    padded = np.zeros(max(*sizes, 1), np.uint8)
    padded[: len(content)] = content
    gathered = np.asarray(multihost_utils.process_allgather(padded), np.uint8).reshape(len(sizes), -1)
    return [row[:size].tobytes().decode("utf-8", "surrogatepass") for row, size in zip(gathered, sizes)]


def broadcast(tree: Any) -> Any:
    """The arrays of process 0 on every process, bit for bit, placed as each process has its own ``tree``. What lies on
    a mesh over several processes is the same on all of them, and stays as it is."""
    if process()[1] == 1 or all(not leaf.is_fully_addressable for leaf in jax.tree.leaves(tree)):
        return tree
    from jax.experimental import multihost_utils

    barrier("broadcast")  # collectives give up after seconds; process 0 may take hours to come here
    bits = lambda leaf: np.asarray(leaf).view(f"u{leaf.dtype.itemsize}")  # summed with zeros, floats would lose -0.0
    received = multihost_utils.broadcast_one_to_all(jax.tree.map(bits, tree))
    back = lambda leaf, own: jax.device_put(np.asarray(leaf).view(own.dtype), own.sharding)
    return jax.tree.map(back, received, tree)
