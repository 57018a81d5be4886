"""Named random keys from one seed: the same name gives the same stream, whatever else is drawn."""

from __future__ import annotations

import hashlib

import jax
import numpy as np
from jaxtyping import Array


def _digest(seed: int, names: tuple[str | int, ...]) -> int:
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")


def named_key(seed: int, *names: str | int) -> Array:
    """A typed JAX key for ``names`` under ``seed``, e.g. ``named_key(0, "warmup", "epoch", 3)``.

    Deterministic across processes, devices and Python versions (SHA-256 of the names, then threefry).
    """
    digest = _digest(seed, names)
    return jax.random.fold_in(jax.random.key(digest & 0x7FFFFFFF), (digest >> 32) & 0x7FFFFFFF)


def numpy_rng(seed: int, *names: str | int) -> np.random.Generator:
    """A NumPy generator (PCG64) for ``names`` under ``seed``, for choices made on the host."""
    return np.random.default_rng(_digest(seed, names))
