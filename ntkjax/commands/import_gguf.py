"""``ntkjax import-gguf``: a model in llama.cpp's file format as a directory in Hugging Face format."""

from __future__ import annotations

import dataclasses
from typing import Literal

from tyro.conf import Positional

from ntkjax.commands.base import Command
from ntkjax.models.gguf import Imported, import_gguf


@dataclasses.dataclass(frozen=True)
class ImportGgufConfig:
    """Write the model of a GGUF file, its weights dequantised, as a Hugging Face directory for --model."""

    file: Positional[str]
    """The GGUF file."""
    out: str
    """The directory to make; it must not be there yet."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the weights written. float32 keeps the dequantised values; the others round them, in half the space."""


def run(config: ImportGgufConfig, *, progress: bool = True) -> Imported:
    """Write the directory ``config.out``.

    Raises:
      CheckpointError: the file, a key or a tensor of it cannot be used. ConfigError: the directory is there already.
    """
    return import_gguf(config.file, config.out, dtype=config.dtype)


def describe(config: ImportGgufConfig, result: Imported) -> str:
    """What was written where."""
    types = ", ".join(f"{count} {name}" for name, count in result.types.items())
    return (
        f"{config.out}: {result.config.architecture}, {result.parameters:,} parameters in {config.dtype} "
        f"from {sum(result.types.values())} tensors ({types})"
    )


COMMAND = Command(ImportGgufConfig, run, describe)
