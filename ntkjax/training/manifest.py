"""Settings, data and weights that a run was started with; a resume under others is refused, naming what differs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from ntkjax.errors import CheckpointError
from ntkjax.files import read_json, write_json
from ntkjax.fingerprint import weights_fingerprint
from ntkjax.training.config import NO_EFFECT, TrainConfig
from ntkjax.types import Batch


@runtime_checkable
class TrainingData(Protocol):
    """What training needs of a dataset; :class:`ntkjax.data.TokenisedDataset` has it.

    One that has a ``mesh`` (of devices) or ``packing`` (True: several examples in a row) is trained on so.
    """

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int32 [N]."""
        ...

    @property
    def response_lengths(self) -> np.ndarray:
        """Response tokens of each example, int32 [N]."""
        ...

    @property
    def ids(self) -> Any:
        """Names of the examples, N strings."""
        ...

    @property
    def fingerprint(self) -> str:
        """Digest of the content."""
        ...

    def collate(self, indices: Any, *, rows: int, length: int) -> Batch:
        """A batch of ``rows`` rows padded to ``length``; rows beyond ``indices`` are fillers."""
        ...


def fingerprint_tree(tree: Any) -> str:
    """16 hexadecimal digits over the path, shape, dtype and every bit of every leaf."""
    return weights_fingerprint(jax.tree.map(jnp.asarray, tree))


def make_manifest(
    nll_fn: Any,
    params: Any,
    train: TrainingData,
    config: TrainConfig,
    *,
    seed: int,
    dev: TrainingData | None,
    domain: np.ndarray,
) -> dict[str, Any]:
    """Flat dictionary of all that decides the numbers of a run."""
    settings = {f"config.{k}": v for k, v in dataclasses.asdict(config).items() if k not in NO_EFFECT}
    return settings | {
        "seed": seed,
        "training data (examples)": len(train.lengths),
        "training data (content)": train.fingerprint,
        "dev data (content)": None if dev is None else dev.fingerprint,
        "domain rows": hashlib.sha256(np.asarray(domain, np.int64).tobytes()).hexdigest()[:16],
        "initial parameters": fingerprint_tree(params),
        "model": fingerprint_tree(nll_fn),
    }


def check_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Write ``path`` where it is missing; else compare.

    Raises:
      CheckpointError: a key differs, and which; or the file is not JSON.
    """
    if not path.exists():
        write_json(path, manifest)
        return
    old = read_json(path, remedy="use another output folder", error=CheckpointError)
    manifest = json.loads(json.dumps(manifest))  # as the file has it: tuples are lists there
    missing = object()
    changed = [
        f"{key} was {old.get(key)!r}, is now {manifest.get(key)!r}"
        for key in sorted(old.keys() | manifest.keys())
        if old.get(key, missing) != manifest.get(key, missing)
    ]
    if changed:
        raise CheckpointError(
            f"{path.parent}: this run cannot be resumed: "
            + "; ".join(changed)
            + ". Put them back, use another output folder, or remove this one to start over"
        )
