"""Reading safetensors one tensor at a time, without a framework and without mapping the file into memory.

Format: 8 bytes little-endian header length n, n bytes of JSON {name: {dtype, shape, data_offsets}}, then the
data.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np
from jaxtyping import Int

from ntkjax.errors import CheckpointError

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: its dtype's name in the file ("BF16"), shape, and bytes from ``start`` to ``stop``."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def read(self, part: Sequence[Int[np.ndarray, "_"]] | None = None) -> np.ndarray:
        """The tensor as a NumPy array of its own (bfloat16 through ml_dtypes), or the part of it at the given places of
        each axis, of which no other byte is read: ``np.ix_(*part)`` of the whole.
        """
        if self.dtype not in _DTYPES:
            raise CheckpointError(f"{self.file}: tensor {self.name!r} has dtype {self.dtype}, which is not supported")
        dtype = _DTYPES[self.dtype]
        part = [np.arange(size) for size in self.shape] if part is None else part
        values = np.empty([len(places) for places in part], dtype)
        flat, at = values.reshape(-1).view(np.uint8).data, 0
        with self.file.open("rb", buffering=0) as stream:
            for first, count in _runs(self.shape, part):
                size = count * dtype.itemsize
                read_into(stream, self.start + first * dtype.itemsize, flat[at : at + size])
                at += size
        return values

    @property
    def is_float(self) -> bool:
        """True for a floating-point tensor of a dtype that can be read."""
        return self.dtype in ("F64", "F32", "F16", "BF16")


def read_into(stream: BinaryIO, start: int, view: memoryview) -> None:
    """Fill ``view`` with the bytes of an unbuffered file from ``start`` on. All weights are read here.

    Raises CheckpointError where the file ends before.
    """
    stream.seek(start)
    while view:
        count = stream.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise CheckpointError(f"{stream.name}: ends before the tensors that it names; download or export it again")
        view = view[count:]


def _runs(shape: tuple[int, ...], part: Sequence[Int[np.ndarray, "_"]]) -> Iterator[tuple[int, int]]:
    """(first, count): the runs of neighbours that the places ``part`` of a row-major array of ``shape`` form."""
    whole = len(shape)  # axes from here on are taken whole, so that each place of the axis before is one run
    while whole > 0 and len(part[whole - 1]) == shape[whole - 1] and np.all(np.diff(part[whole - 1]) == 1):
        whole -= 1
    if whole == 0:
        yield 0, math.prod(shape)
        return
    inner, places = math.prod(shape[whole:]), part[whole - 1]
    breaks = np.flatnonzero(np.diff(places) != 1) + 1
    pieces = [(int(run[0]) * inner, len(run) * inner) for run in np.split(places, breaks) if len(run)]
    strides = [math.prod(shape[axis + 1 :]) for axis in range(whole - 1)]
    for outer in np.ndindex(*(len(axis) for axis in part[: whole - 1])):
        start = sum(int(part[axis][i]) * stride for axis, (i, stride) in enumerate(zip(outer, strides)))
        for first, count in pieces:
            yield start + first, count


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one file by name. Raises CheckpointError where the file is empty, truncated or not safetensors."""
    size = path.stat().st_size
    bad = lambda why: CheckpointError(f"{path}: not a usable safetensors file: {why}; download or export it again")
    with path.open("rb") as stream:
        first = stream.read(8)
        if len(first) < 8:
            raise bad(f"it has {size} bytes and no header")
        if first == b"version ":
            raise bad("it is a Git LFS pointer, not the file itself (run `git lfs pull`)")
        length = int.from_bytes(first, "little")
        if length > size - 8:
            raise bad(f"its header claims {length} bytes and the file has {size}")
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError) as error:
            raise bad(f"its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise bad("its header is not a JSON object")
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        try:
            (start, stop), shape = entry["data_offsets"], tuple(int(n) for n in entry["shape"])
            if not all(type(n) is int and 0 <= n < 2**62 for n in (start, stop, *entry["shape"])):
                raise ValueError
            info = TensorInfo(path, name, str(entry["dtype"]), shape, 8 + length + start, 8 + length + stop)
        except (KeyError, OverflowError, TypeError, ValueError):
            raise bad(f"the header entry of tensor {name!r} is malformed") from None
        width = _DTYPES[info.dtype].itemsize * math.prod(shape) if info.dtype in _DTYPES else stop - start
        if start < 0 or stop - start != width or info.stop > size:
            raise bad(f"tensor {name!r} {info.dtype} {list(shape)} does not fit its place in the file (truncated?)")
        tensors[name] = info
    return tensors
