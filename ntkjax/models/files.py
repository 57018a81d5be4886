"""The files of a model directory; `ntkjax.files.written_folder` makes the directory appear whole or not at all."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write one safetensors file, marked as transformers expects; OSError naming ``path`` on any failure."""
    dense = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    try:
        save_file(dense, path, metadata={"format": "pt"})
    except SafetensorError as error:
        # The library reports a failed write in words only.
        full = "space" in str(error).lower()
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error), str(path)) from error
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write indented JSON with a final newline into a folder that `ntkjax.files.written_folder` gave."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
