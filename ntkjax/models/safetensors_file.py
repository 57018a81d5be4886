"""Reading safetensors one tensor at a time, without a framework and without mapping the file into memory.

Format: 8 bytes little-endian header length n, n bytes of JSON {name: {dtype, shape, data_offsets}}, then the
data.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np

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

    def read(self) -> np.ndarray:
        """The tensor as a NumPy array of its own (bfloat16 through ml_dtypes)."""
        if self.dtype not in _DTYPES:
            raise CheckpointError(f"{self.file}: tensor {self.name!r} has dtype {self.dtype}, which is not supported")
        dtype = _DTYPES[self.dtype]
        with self.file.open("rb") as stream:
            stream.seek(self.start)
            flat = np.fromfile(stream, dtype=dtype, count=math.prod(self.shape))
        return flat.reshape(self.shape)

    @property
    def is_float(self) -> bool:
        """True for a floating-point tensor of a dtype that can be read."""
        return self.dtype in ("F64", "F32", "F16", "BF16")


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
