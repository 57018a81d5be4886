"""Training state on disk, through orbax: written behind the training, whole or not at all, newest first on resume."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree
from orbax.checkpoint.options import MultiprocessingOptions

from ntkjax.errors import CheckpointError
from ntkjax.job import process


class Checkpoints:
    """The checkpoints of one run under ``folder``: one directory per step, the newest ``keep`` of them.

    Each holds the arrays (parameters, optimiser state, best parameters so far) and a small JSON record of the
    progress. A step counts only once orbax has committed it, so a process killed while saving leaves the
    previous checkpoint in force. `save` returns when the arrays are copied off the device. A thread writes them, and
    the next call of any method waits for it.

    ``together``: the arrays lie on a mesh over all processes of the job, and each of them makes the same calls and
    writes its part. What was saved so is restored on any mesh, by any number of processes, bit for bit.
    """

    def __init__(self, folder: Path, keep: int | None, together: bool = False):
        self.folder = folder
        index, count = process()
        # Without a common mesh each run of a job belongs to one process (see ntkjax.pipeline.warmup.warm_up).
        alone = MultiprocessingOptions(primary_host=index, active_processes={index}, barrier_sync_key_prefix=str(index))
        self._alone = count > 1 and not together
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=not self._alone,
            multiprocessing_options=alone if self._alone else MultiprocessingOptions(),
        )
        if self._alone:  # orbax would wait for the others while making it
            folder.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        with contextlib.suppress(OSError):  # then it is an older one
            self.wait()
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Every complete step on disk, oldest first."""
        with contextlib.suppress(OSError):
            self.wait()
        return sorted(self._manager.all_steps())

    def wait(self) -> None:
        """Return when what was saved is on disk.

        Raises:
          OSError: it could not be written; said once.
        """
        with _as_os_error():
            self._manager.wait_until_finished()

    def save(self, step: int, arrays: PyTree, progress: dict[str, Any]) -> None:
        """Save both under ``step``: return when the caller may change or donate the arrays. See `wait`.

        Raises:
          OSError: the disk is full, or would be: free space is compared first, since a failure half-way leaves partial
            files behind and messages from the threads that write. Of this step or of the one before.
        """
        self.wait()
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
        free = shutil.disk_usage(self.folder).free
        if size > free:
            raise OSError(errno.ENOSPC, f"no space: a checkpoint takes {size:,} bytes, {free:,} are free")
        if self._alone:  # orbax takes a process's own arrays for parts of larger ones
            arrays = jax.tree.map(np.asarray, arrays)
        args = ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), progress=ocp.args.JsonSave(progress))
        with _as_os_error():
            self._manager.save(step, args=args)

    def restore(self, step: int, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """(arrays, progress) of ``step``; the arrays take structure, dtypes and sharding from ``like``.

        Raises:
          CheckpointError: a file of the checkpoint is missing or damaged.
        """
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        if self._alone:
            wanted = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like)
        args = ocp.args.Composite(arrays=ocp.args.StandardRestore(wanted), progress=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=args)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.folder / str(step)}: the checkpoint cannot be read ({error}). Delete that folder to"
                f" resume from the one before it, or {self.folder} to start over"
            ) from error
        return jax.tree.map(_placed, restored["arrays"], like), restored["progress"]

    def close(self) -> None:
        """Wait for what is being written, and end. OSError: as `wait`."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(OSError, ValueError):  # what `wait` has told, again
                self._manager.close()


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    """TensorStore reports a failed write as a ValueError that carries the system's error number."""
    try:
        yield
    except ValueError as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


def _placed(restored: jax.Array | np.ndarray, like: jax.Array) -> jax.Array:
    """``restored`` where ``like`` is, committed to its device only if ``like`` is: a restored step counter pinned to
    one device could not meet parameters that live on several, and the compiled step would not be found again.
    """
    if not like.is_fully_addressable:  # orbax has put it there
        return restored  # type: ignore[return-value]
    return jax.device_put(restored, like.sharding) if like.committed else jnp.asarray(np.asarray(restored))
