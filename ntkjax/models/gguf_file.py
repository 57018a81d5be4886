"""Reading GGUF, the file format of llama.cpp: its metadata, and one tensor at a time, dequantised.

Format (version 2 and 3, little-endian): "GGUF", uint32 version, uint64 number of tensors, uint64 number of keys; each
key as name, uint32 type, value; each tensor as name, uint32 number of dimensions, uint64 sizes (fastest first), uint32
type, uint64 offset; padding; the data. A string is its length (uint64) and UTF-8. Source: docs/gguf.md of the ggml
project.

The package `gguf` dequantises and knows the sizes of blocks. Its own reader is not used: it takes what a cut file lacks
for empty, and builds two arrays for every string of a vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Float

from ntkjax.errors import CheckpointError

TENSOR_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
"""Types of tensors that are read, by their names in ggml."""
_ANEW = "download or convert it again"
_ALIGNMENT = 32
_MOST_DIMENSIONS = 8
_SCALARS = dict(enumerate(("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?"))) | {10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY, _FLOAT32 = 8, 9, 6
"""Types of values, by their numbers in the file."""


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file: the name of its type ("Q4_K"), its shape (slowest first, as NumPy has it), and its bytes
    from ``start`` to ``stop``.
    """

    file: Path
    name: str
    type: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def read(self) -> Float[np.ndarray, "..."]:
        """The dequantised values in float32, as the package `gguf` gives them."""
        with self.file.open("rb") as stream:
            stream.seek(self.start)
            raw = np.fromfile(stream, np.uint8, self.stop - self.start)
        if raw.size < self.stop - self.start:
            raise CheckpointError(f"{self.file}: tensor {self.name!r} ends beyond the file; {_ANEW}")
        from gguf.constants import GGMLQuantizationType  # here: it takes a third of a second, and few commands need it
        from gguf.quants import dequantize

        rows = raw.reshape(*self.shape[:-1], -1)
        return dequantize(rows, GGMLQuantizationType[self.type]).astype(np.float32, copy=False).reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """A file's metadata and tensors.

    Attributes:
      fields: key -> a number, text, truth value, or a list of them; float32 as its shortest decimal (1e-5).
      tensors: by name.
    """

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def fail(self, message: str) -> CheckpointError:
        """An error to raise, with the file's name in front."""
        return CheckpointError(f"{self.path}: {message}")


def read_gguf(path: str | Path) -> GgufFile:
    """The metadata and the places of the tensors; no tensor is read yet.

    Raises CheckpointError naming the file, and the key or tensor: not GGUF, another version or byte order, cut off, a
    tensor of a type that is not read (`TENSOR_TYPES`) or that does not lie inside the file, one of several parts.
    """
    path = Path(path)
    try:
        stream = path.open("rb")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); expected a GGUF file") from error
    with stream:
        parser = _Parser(path, stream, os.fstat(stream.fileno()).st_size)
        parser.magic()
        tensors, keys = parser.number("<u8", "the number of tensors"), parser.number("<u8", "the number of keys")
        fields: dict[str, Any] = {}
        for _ in range(keys):
            key = parser.text("a key")
            if key in fields:
                raise parser.fail(f"key {key!r} is there twice")
            fields[key] = parser.value(key)
        entries = [parser.entry() for _ in range(tensors)]
        if fields.get("split.count", 0) not in (0, 1):
            raise CheckpointError(
                f"{path}: is one of {fields['split.count']} parts (split.count); expected one file: join them with "
                "llama.cpp's llama-gguf-split"
            )
        return GgufFile(path, fields, _placed(parser, entries, fields.get("general.alignment", _ALIGNMENT)))


_Entry = tuple[str, tuple[int, ...], int, int]
"""A tensor's name, shape, type and offset."""


class _Parser:
    """A position in a file's header; every error names the file, and what was being read."""

    def __init__(self, path: Path, stream: IO[bytes], size: int):
        self.path, self.stream, self.size = path, stream, size

    def fail(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: not a usable GGUF file: {why}; {_ANEW}")

    def take(self, count: int, what: str) -> bytes:
        data = self.stream.read(count) if count <= self.size - self.stream.tell() else b""
        if len(data) < count:
            raise self.fail(f"it has {self.size} bytes and ends inside {what} (truncated?)")
        return data

    def number(self, dtype: str, what: str) -> int:
        return int(np.frombuffer(self.take(np.dtype(dtype).itemsize, what), dtype)[0])

    def text(self, what: str) -> str:
        data = self.take(self.number("<u8", what), what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not text in UTF-8 ({error.reason})") from None

    def magic(self) -> None:
        magic = self.take(4, "its first bytes")
        if magic != b"GGUF":
            pointer = magic == b"vers"
            raise self.fail(
                "it is a Git LFS pointer, not the file itself (run `git lfs pull`)"
                if pointer
                else f"it begins with {magic!r}, not with b'GGUF'"
            )
        version = self.number("<u4", "its version")
        if version not in (2, 3):
            kind = "big-endian" if version & 0xFFFF == 0 else f"of version {version}"
            raise self.fail(f"it is {kind}; expected version 2 or 3, little-endian")

    def value(self, key: str) -> Any:
        what = f"key {key!r}"
        kind = self.kind(what)
        if kind == _STRING:
            return self.text(what)
        if kind != _ARRAY:
            return self.scalars(kind, 1, what)[0]
        kind, count = self.kind(what), self.number("<u8", what)
        if kind == _STRING:
            return [self.text(what) for _ in range(count)]
        if kind == _ARRAY:
            raise self.fail(f"{what} is an array of arrays")
        return self.scalars(kind, count, what)

    def kind(self, what: str) -> int:
        number = self.number("<u4", what)
        if number not in _SCALARS and number not in (_STRING, _ARRAY):
            raise self.fail(f"{what} has the unknown type {number}")
        return number

    def scalars(self, kind: int, count: int, what: str) -> list[Any]:
        dtype = np.dtype(_SCALARS[kind])
        values = np.frombuffer(self.take(dtype.itemsize * count, what), dtype)
        return [float(str(value)) for value in values] if kind == _FLOAT32 else values.tolist()

    def entry(self) -> _Entry:
        name = self.text("a tensor's name")
        what = f"the entry of tensor {name!r}"
        dimensions = self.number("<u4", what)
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise self.fail(f"tensor {name!r} has {dimensions} dimensions")
        sizes = np.frombuffer(self.take(8 * dimensions, what), "<u8").tolist()
        return name, tuple(sizes[::-1]), self.number("<u4", what), self.number("<u8", what)


def _placed(parser: _Parser, entries: list[_Entry], alignment: Any) -> dict[str, GgufTensor]:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    if not isinstance(alignment, int) or alignment < 1:
        raise parser.fail(f"key 'general.alignment' is {alignment!r}, not a number of bytes")
    begin = -(-parser.stream.tell() // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, number, offset in entries:
        if name in tensors:
            raise parser.fail(f"tensor {name!r} is there twice")
        known = {kind.value: kind for kind in GGMLQuantizationType}
        label = known[number].name if number in known else f"number {number}"
        if label not in TENSOR_TYPES:
            raise CheckpointError(
                f"{parser.path}: tensor {name!r} is of type {label}, which is not supported; expected one of "
                f"{', '.join(TENSOR_TYPES)}: take another quantisation of the model, such as Q8_0 or Q4_K"
            )
        block, size = GGML_QUANT_SIZES[known[number]]
        if not all(shape) or shape[-1] % block:
            raise parser.fail(f"tensor {name!r} {label} {list(shape)} does not consist of rows of {block}")
        start = begin + offset
        stop = start + math.prod(shape) // block * size
        if stop > parser.size:
            raise parser.fail(f"it has {parser.size} bytes and tensor {name!r} ends at {stop} (truncated?)")
        tensors[name] = GgufTensor(parser.path, name, label, shape, start, stop)
    return tensors
