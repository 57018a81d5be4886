"""Device meshes and how weights and batches are spread over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from ntkjax.errors import ConfigError

DATA, MODEL = "data", "model"

# Stacked [L, in, out]: which axis is split over the model axis of the mesh. Column-parallel layers split
# their outputs, row-parallel ones their inputs, so that one all-reduce per attention and per MLP suffices
# (Megatron-LM, 1909.08053).
_COLUMN = ("attention/q", "attention/k", "attention/v", "mlp/gate", "mlp/up")
_ROW = ("attention/o", "mlp/down")


def make_mesh(*, data: int, model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of data x model devices with axes "data" and "model".

    Raises ConfigError where data x model is not the number of devices, naming the nearest shape that fits.
    """
    available = list(jax.devices() if devices is None else devices)
    if data < 1 or model < 1 or data * model != len(available):
        count = len(available)
        fits = [(count // m, m) for m in range(1, count + 1) if count % m == 0]
        near = min(fits, key=lambda shape: (abs(shape[1] - model), abs(shape[0] - data)))
        raise ConfigError(
            f"a mesh of data={data} x model={model} needs {data * model} devices and there are {count}: "
            f"the nearest that fits is data={near[0]}, model={near[1]}"
        )
    return jax.make_mesh((data, model), (DATA, MODEL), (AxisType.Auto, AxisType.Auto), devices=available)


def _split_axis(path: str, rank: int) -> int | None:
    *branch, name = path.split("/")
    if path in ("embed/weight", "head/kernel"):
        return 0
    layer = "/".join(branch[-2:])
    if name in ("kernel", "bias") and layer in _COLUMN:
        return rank - 1
    if name == "kernel" and layer in _ROW:
        return 1
    return None


def weight_sharding(path: str, shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """Where the parameter at ``path`` ("layers/attention/q/kernel") lives: split over "model" or replicated.

    q, k, v, gate and up are split on their outputs, o and down on their inputs, embedding and head on the
    vocabulary; norms, adapters and everything else are replicated. Raises ConfigError where an axis does not
    divide.
    """
    axis, parts = _split_axis(path, len(shape)), mesh.shape[MODEL]
    if axis is None or parts == 1:
        return NamedSharding(mesh, PartitionSpec())
    if shape[axis] % parts:
        divisors = [d for d in range(1, parts + 1) if shape[axis] % d == 0 and parts % d == 0]
        raise ConfigError(
            f"{path} {tuple(shape)}: axis {axis} does not divide over model={parts} devices; "
            f"model={max(divisors)} would"
        )
    return NamedSharding(mesh, PartitionSpec(*(MODEL if i == axis else None for i in range(len(shape)))))


def put(array: Array | np.ndarray, path: str, mesh: Mesh | None) -> Array:
    """The parameter on its devices: by ``weight_sharding``, or on the default device without a mesh."""
    if mesh is None:
        return jax.device_put(array)
    return jax.device_put(array, weight_sharding(path, array.shape, mesh))


def shard_batch(batch: Any, mesh: Mesh | None) -> Any:
    """Every leaf [B, ...] of a batch split by rows over "data". ConfigError where B does not divide."""
    if mesh is None:
        return batch
    parts = mesh.shape[DATA]

    def place(leaf):
        if leaf.shape[0] % parts:
            raise ConfigError(f"a batch of {leaf.shape[0]} rows does not divide over data={parts} devices")
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(DATA)))

    return jax.tree.map(place, batch)
