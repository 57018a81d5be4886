"""Digests of settings, arrays and weights, by which a result is found again only for what it was computed from.

All three stand in manifests and names of folders on disk: a change of their values makes every kept result unknown.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ntkjax.parallel import to_host
from ntkjax.types import Params


def digest(*parts: Any) -> str:
    """32 hex digits of BLAKE2b over the JSON of ``parts``: equal parts, equal digest, on every machine."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def tree_digest(tree: Params) -> str:
    """16 hex digits of BLAKE2b over path, shape, dtype and bytes of every leaf, which is copied to the host.

    For parameters that are trained, which are small; `weights_fingerprint` is for whole models.
    """
    hasher = hashlib.blake2b(digest_size=8)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        values = np.ascontiguousarray(to_host(leaf))
        hasher.update(f"{jax.tree_util.keystr(path)} {values.shape} {values.dtype}".encode())
        hasher.update(values.tobytes())
    return hasher.hexdigest()


def weights_fingerprint(*trees: Params) -> str:
    """16 hex digits over names, shapes, types and every bit of every weight.

    The weights stay where they are: each is summed up on its devices, in integers, so that the digits are the same on
    every device and every mesh.
    """
    hasher = hashlib.blake2b(digest_size=8)
    for tree in trees:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        # All sums are asked for before the first is read: reading waits for the device.
        for (path, leaf), sums in zip(leaves, [_checksums(leaf) for _, leaf in leaves]):
            hasher.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
            hasher.update(to_host(sums).tobytes())
    return hasher.hexdigest()


@jax.jit
def _checksums(leaf: Array) -> Array:
    """Two sums mod 2^32 over hashes of (bits, place), uint32 [2]. Compiled once for each shape, whatever the tree."""
    return jnp.stack([_checksum(leaf, 0x9E3779B9), _checksum(leaf, 0x85EBCA77)])


def _checksum(leaf: Array, salt: int) -> Array:
    bits = leaf.astype(jnp.uint8) if leaf.dtype in (bool, jnp.uint4) else leaf
    # Bits, not values: -0.0 and 0.0, and NaNs of different payloads, are different weights. Values of 64 bits come
    # apart into two words.
    bits = jax.lax.bitcast_convert_type(bits, jnp.dtype(f"uint{8 * min(bits.dtype.itemsize, 4)}")).astype(jnp.uint32)
    index, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):  # not by flattening, which would gather a sharded leaf
        index += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    # Position by position, so that two weights that change places are seen; then summed mod 2^32, which is the same in
    # any order and on any split.
    mixed = bits ^ (index * jnp.uint32(salt))
    for factor in (0x7FEB352D, 0x846CA68B):  # the mixing steps of a 32-bit integer hash
        mixed = (mixed ^ (mixed >> jnp.uint32(16))) * jnp.uint32(factor)
    return jnp.sum(mixed ^ (mixed >> jnp.uint32(16)), dtype=jnp.uint32)
