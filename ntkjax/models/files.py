"""The files of a model directory; `ntkjax.files.written_folder` makes the directory appear whole or not at all."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write one safetensors file, marked as transformers expects; OSError naming ``path`` on any failure."""
    dense = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    try:
        path.touch(0o644)  # the system takes the umask off; the library's own files are for their owner alone
        mode = path.stat().st_mode
        save_file(dense, path, metadata={"format": "pt"})
        path.chmod(mode)
    except SafetensorError as error:
        # The library reports a failed write in words only.
        full = "space" in str(error).lower()
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error), str(path)) from error
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def write_checkpoint(
    folder: Path, sizes: Mapping[str, int], tensor: Callable[[str], np.ndarray], max_shard_size: int
) -> None:
    """Write model.safetensors, or shards of at most ``max_shard_size`` bytes and their index, into ``folder``.

    The host holds the tensors of one file at a time.

    Args:
      sizes: bytes of each tensor, by its name. tensor: its values, asked for once, in this order.
    """
    shards = _shards(sizes, max_shard_size)
    for file, names in shards.items():
        write_tensors(folder / file, {name: tensor(name) for name in names})
    if len(shards) > 1:
        files = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(files.items()))}
        write_json(folder / "model.safetensors.index.json", index)


def _shards(sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
    """File name -> tensors, filled in order up to ``limit`` bytes (a larger tensor has a file to itself)."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write indented JSON with a final newline into a folder that `ntkjax.files.written_folder` gave."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
