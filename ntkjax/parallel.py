"""Meshes of devices, and how weights and batches are spread over them.

A mesh has the axes "data", "fsdp" and "model". Rows of a batch are split over "data" and "fsdp", weights over "fsdp"
and "model". In a job of several processes (`ntkjax.job`) it holds the devices of all of them: every process runs the
same programs on the same global arrays, of which it holds its part.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array

from ntkjax.errors import ConfigError
from ntkjax.types import Batch

DATA, FSDP, MODEL = "data", "fsdp", "model"
AXES = (DATA, FSDP, MODEL)
WeightRule = Literal["tensor", "fully-sharded"]


# -- meshes --


def parse_mesh(text: str) -> tuple[int | None, int, int]:
    """(data, fsdp, model) of ``data=4,fsdp=2,model=2``, or of ``4,2`` and ``4x2`` for data=4,model=2. An axis that is
    not named has size 1; data that is not named, and ``auto``, are None: all devices that are left.

    Raises:
      ConfigError: anything else.
    """
    if text == "auto":
        return None, 1, 1
    parts = re.split("[,x]", text.replace(" ", ""))
    sizes: dict[str, str] = {}
    if all(part.isdecimal() for part in parts) and len(parts) <= 2:
        sizes = dict(zip((DATA, MODEL), parts))
    elif all(re.fullmatch(r"[a-z]+=\d+", part) for part in parts):
        sizes = dict(part.split("=") for part in parts)
    in_order = [name for name in AXES if name in sizes] == list(sizes) and len(sizes) == len(parts)
    if not sizes or not in_order or any(int(size) == 0 for size in sizes.values()):
        raise ConfigError(
            f"mesh {text!r}: expected data=D,fsdp=F,model=M (any of them, in this order) with whole numbers from 1 "
            "(4,2 and 4x2 are short for data=4,model=2), or auto for all devices on data"
        )
    data = sizes.get(DATA)
    return None if data is None else int(data), int(sizes.get(FSDP, 1)), int(sizes.get(MODEL, 1))


def mesh_of(text: str | None) -> Mesh | None:
    """The mesh that ``text`` (see `parse_mesh`) names over the devices of all processes of this job; None for None."""
    if text is None:
        return None
    data, fsdp, model = parse_mesh(text)
    data = max(1, jax.device_count() // (fsdp * model)) if data is None else data
    return make_mesh(data=data, fsdp=fsdp, model=model)


def make_mesh(*, data: int, fsdp: int = 1, model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of data x fsdp x model devices (default: all of every process of this job) with axes of these names.

    Raises ConfigError where their product is not the number of devices, naming the nearest shape that fits.
    """
    available = list(jax.devices() if devices is None else devices)
    wanted = (data, fsdp, model)
    if min(wanted) < 1 or data * fsdp * model != len(available):
        count = len(available)
        divisors = [d for d in range(1, count + 1) if count % d == 0]
        fits = [(count // (f * m), f, m) for m in divisors for f in divisors if count % (f * m) == 0]
        fits = [shape for shape in fits if shape[1] == 1 or fsdp > 1]
        # Nearest in model first, then in fsdp: how far weights must be split follows from the model's size, and what is
        # left over goes to data.
        near = min(fits, key=lambda shape: [abs(a - b) for a, b in zip(shape[::-1], wanted[::-1])])
        named = lambda sizes: [f"{name}={size}" for name, size in zip(AXES, sizes) if name != FSDP or fsdp != 1]
        raise ConfigError(
            f"a mesh of {' x '.join(named(wanted))} needs {data * fsdp * model} devices and there are {count}: "
            f"the nearest that fits is {', '.join(named(near))}"
        )
    return jax.make_mesh(wanted, AXES, (AxisType.Auto,) * len(AXES), devices=available)


def _row_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The axes that rows of a batch are split over: those of `DATA` and `FSDP` that are longer than 1."""
    return tuple(name for name in (DATA, FSDP) if mesh.shape.get(name, 1) > 1)


def data_parallel(mesh: Mesh | None) -> int:
    """In how many parts the rows of a batch are split: data x fsdp, 1 without a mesh."""
    return 1 if mesh is None else _parts(mesh, _row_axes(mesh))


def _parts(mesh: Mesh | AbstractMesh, names: Sequence[str]) -> int:
    return int(np.prod([mesh.shape[name] for name in names], dtype=np.int64))


def describe_mesh(mesh: Mesh | AbstractMesh | None) -> str | None:
    """``data=4,model=2`` or, where fsdp is longer than 1, ``data=2,fsdp=2,model=2``; None without a mesh."""
    if mesh is None:
        return None
    return ",".join(f"{name}={mesh.shape[name]}" for name in AXES if name != FSDP or mesh.shape.get(FSDP, 1) > 1)


def spans_processes(mesh: Mesh | None) -> bool:
    """Whether devices of other processes are on the mesh: all of them then run every program together."""
    return mesh is not None and any(device.process_index != jax.process_index() for device in mesh.devices.flat)


# -- weights and batches --


@dataclasses.dataclass(frozen=True)
class Split:
    """Which axes of a parameter are divided over a mesh, counted from the last (-1); None for none.

    Attributes:
      model: the axis over "model". data: the axis over "fsdp", and over "data" as well where weights are fully sharded.
    """

    model: int | None = None
    data: int | None = None


def weight_sharding(
    path: str, shape: Sequence[int], mesh: Mesh | AbstractMesh, split: Split, rule: str = "tensor"
) -> NamedSharding:
    """Where the parameter at ``path`` (it stands in errors) lives: split over the mesh or replicated.

    ``tensor``: ``split.model`` is split over "model" and ``split.data`` over "fsdp". ``fully-sharded``: ``split.data``
    is split over "data" as well, so that a device holds 1 / (data x fsdp x model) of the weights and gathers a layer
    when it comes to it. A model's family declares the split of each parameter. Raises ConfigError where an axis does
    not divide.
    """
    if rule not in ("tensor", "fully-sharded"):
        raise ConfigError(f"weights {rule!r}: expected tensor or fully-sharded")
    spec: list[str | tuple[str, ...] | None] = [None] * len(shape)
    over_rows = _row_axes(mesh) if rule == "fully-sharded" else [name for name in _row_axes(mesh) if name == FSDP]
    for axis, names in ((split.model, [MODEL] if mesh.shape[MODEL] > 1 else []), (split.data, over_rows)):
        if axis is None or not names:
            continue
        axis, parts, name = axis % len(shape), _parts(mesh, names), " x ".join(names)
        if shape[axis] % parts:
            divisors = [d for d in range(1, parts + 1) if shape[axis] % d == 0 and parts % d == 0]
            raise ConfigError(
                f"{path} {tuple(shape)}: axis {axis} does not divide over {name}={parts} devices; "
                f"{name}={max(divisors)} would"
            )
        spec[axis] = names[0] if len(names) == 1 else tuple(names)
    return NamedSharding(mesh, PartitionSpec(*spec) if any(spec) else PartitionSpec())


def weights_over_rows(mesh: Mesh | None, rule: str = "tensor") -> Mesh | None:
    """``mesh`` where weights are split over an axis that splits rows too; else None."""
    if mesh is None:
        return None
    axes = _row_axes(mesh)
    return mesh if axes and (rule == "fully-sharded" or FSDP in axes) else None


def split_rows(x: Array, mesh: Mesh | None) -> Array:
    """``x`` [B, ...] held to its place by rows, inside a jitted function; as it comes without a mesh, and where B does
    not divide: an example that is differentiated by itself, prompts that are continued."""
    if mesh is None or x.shape[0] % data_parallel(mesh):
        return x
    # Where weights are split over the same axis as rows, the compiler may as well move activations to the weights: held
    # to their rows, activations stay, and the weights come to them.
    return jax.lax.with_sharding_constraint(x, _row_sharding(mesh, x.shape[0]))


def put(array: Array | np.ndarray, path: str, mesh: Mesh | None, split: Split, rule: str = "tensor") -> Array:
    """The parameter on its devices: by ``weight_sharding``, or on the default device without a mesh."""
    if mesh is None:
        return jax.device_put(array)
    return spread(array, weight_sharding(path, array.shape, mesh, split, rule))


def spread(array: Array | np.ndarray, sharding: Sharding) -> Array:
    """``array`` where ``sharding`` says. Over several processes each gives the same whole array and places its part of
    it, and none waits for another."""
    if sharding.is_fully_addressable or (isinstance(array, jax.Array) and not array.is_fully_addressable):
        return jax.device_put(array, sharding)
    # jax.device_put to devices of several processes would compare the array between them, which waits for all.
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def to_host(array: Any) -> np.ndarray:
    """All of an array on this process. One that is spread over several processes is gathered: they must all ask for the
    same arrays in the same order."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(_gather(array.sharding.mesh)(array))  # type: ignore[attr-defined]


# One jitted function for each mesh: a new one in every call would be compiled anew in every call.
@functools.lru_cache(maxsize=8)
def _gather(mesh: Mesh) -> Callable[[Array], Array]:
    return jax.jit(lambda array: array, out_shardings=NamedSharding(mesh, PartitionSpec()))


def rows_here(mesh: Mesh | None, rows: int) -> slice:
    """The rows of a batch of ``rows`` that this process must read: all of them without other processes on the mesh,
    else from the first to the last that its devices hold."""
    if mesh is None or not spans_processes(mesh):
        return slice(0, rows)
    places = list(_row_sharding(mesh, rows).addressable_devices_indices_map((rows,)).values())
    bounds = [index[0].indices(rows) for index in places if index]
    # One range, so that a batch is read in one piece; where the devices of a process are no neighbours on the mesh it
    # reads rows that none of them needs.
    return slice(min(start for start, _, _ in bounds), max(stop for _, stop, _ in bounds))


def _row_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """Rows split over the mesh. ConfigError where they do not divide."""
    names, parts = _row_axes(mesh), data_parallel(mesh)
    if rows % parts:
        raise ConfigError(
            f"a batch of {rows} rows does not divide over {' x '.join(names)}={parts} devices; the nearest that does "
            f"has {-(-rows // parts) * parts} (give batches filler rows with index -1)"
        )
    over = names[0] if len(names) == 1 else names
    return NamedSharding(mesh, PartitionSpec(over) if over else PartitionSpec())


def shard_batch(
    batch: Any, mesh: Mesh | None, *, rows: int | None = None, whole: Mapping[str, np.ndarray] | None = None
) -> Any:
    """Every leaf [B, ...] of a batch split by rows over "data" and "fsdp". ConfigError where B does not divide.

    Over several processes the ``index`` and the ``lengths`` of a `Batch`, which every process reads, are whole on all.

    Args:
      rows: B, where ``batch`` holds `rows_here` of them alone; ``whole`` then holds those two leaves of all B.
    """
    if mesh is None:
        return batch
    if not spans_processes(mesh):
        return jax.tree.map(lambda leaf: jax.device_put(leaf, _row_sharding(mesh, leaf.shape[0])), batch)

    def placed(leaf: Any) -> Array:
        count = leaf.shape[0] if rows is None else rows
        held = slice(0, count) if rows is None else rows_here(mesh, rows)
        each = leaf.shape[0] // (held.stop - held.start)  # a packed row has an index and a length for every slot
        total, first = count * each, held.start * each
        sharding, leaf = _row_sharding(mesh, total), np.asarray(leaf)

        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(total)
            return leaf[start - first : stop - first]

        return jax.make_array_from_callback((total, *leaf.shape[1:]), sharding, part)

    if not isinstance(batch, Batch):
        return jax.tree.map(placed, batch)
    known = {"index": batch.index, "lengths": batch.lengths} if whole is None else whole
    everywhere = {name: spread(leaf, NamedSharding(mesh, PartitionSpec())) for name, leaf in known.items()}
    # What passes ask a batch on the host, which rows it holds and how long they are, must be there on every process.
    rest = jax.tree.map(placed, dataclasses.replace(batch, **dict.fromkeys(known)))
    return dataclasses.replace(rest, **everywhere)


def keep_shardings(tree: Any, shardings: tuple | None) -> Any:
    """``tree`` with its leaves, in tree order, held to ``shardings`` inside a jitted function; None: as they come."""
    if shardings is None:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten(
        [jax.lax.with_sharding_constraint(leaf, sharding) for leaf, sharding in zip(leaves, shardings, strict=True)]
    )
