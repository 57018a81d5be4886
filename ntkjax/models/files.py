"""Writing model directories so that a failure, a full disk above all, leaves nothing half-written behind."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from ntkjax.errors import CheckpointError


@contextlib.contextmanager
def replaced_directory(directory: str | Path, stale: tuple[str, ...] = ()) -> Iterator[Path]:
    """A scratch folder that becomes ``directory`` when the block ends without an error.

    A new ``directory`` appears in one rename. In one that exists, each file is replaced in one rename, files
    matching a ``stale`` pattern that were not written again are removed (shards of an earlier save), and the
    others stay. On an error the scratch folder is removed and ``directory`` is as it was.

    Raises CheckpointError naming the file that could not be written (no space, no permission).
    """
    target = Path(directory)
    scratch = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        yield scratch
        _move_into(scratch, target, stale)
    except OSError as error:
        file = str(error.filename or target).replace(str(scratch), str(target))
        remedy = (
            "free some space or choose another directory"
            if error.errno == errno.ENOSPC
            else ("check the path, its permissions and the space left")
        )
        raise CheckpointError(f"{file}: cannot be written ({error.strerror or error}); {remedy}") from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _move_into(scratch: Path, target: Path, stale: tuple[str, ...]) -> None:
    if not target.exists():
        mask = os.umask(0)
        os.umask(mask)
        scratch.chmod(0o777 & ~mask)  # mkdtemp made it private
        scratch.rename(target)
        return
    written = [file.relative_to(scratch) for file in sorted(scratch.rglob("*")) if file.is_file()]
    for name in written:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (scratch / name).replace(target / name)
    for pattern in stale:
        for file in target.glob(pattern):
            if file.relative_to(target) not in written:
                file.unlink()


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
    """Write indented JSON with a final newline."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
