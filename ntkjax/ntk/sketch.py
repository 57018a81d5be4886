"""Sketches Pi: linear maps of gradients to K numbers that keep inner products, E <Pi g, Pi h> = <g, h>.

| sketch | work for a row of P gradient entries | in |
|---|---|---|
| `RademacherSketch` | P K, and P K random signs for a group of rows | here |
| `SparseSketch` | s P | ntkjax/ntk/sparse.py |
| `KroneckerSketch` | P on formed gradients; need not form them | ntkjax/ntk/kronecker.py |
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from ntkjax.types import Params, at_least_float32

SKETCH_SIZE = 8192
"""K where none is asked for [the paper's]."""


@runtime_checkable
class Sketch(Protocol):
    """A callable pytree over gradients with leaves [B, ...]; one map for every batch split and device."""

    @property
    def grouped(self) -> bool:
        """Whether a call does work that all its rows share, so that it pays to gather the rows of many batches."""
        ...

    def __call__(self, gradients: Params) -> Float[Array, "B K"]:
        """Pi g for each row."""
        ...

    def width(self, params: Params) -> int:
        """K for gradients shaped like ``params``."""
        ...

    def describe(self) -> dict[str, Any]:
        """What identifies the map, for a manifest."""
        ...


def flat_rows(leaf: Float[Array, "B ..."]) -> Float[Array, "B n"]:
    """A gradient leaf as one row an example, at least float32."""
    leaf = at_least_float32(leaf)
    return leaf.reshape(leaf.shape[0], -1)


def block_keys(seed: Any, counts: list[tuple[str, int]]) -> Array:
    """Threefry keys of numbered blocks, side by side, for (path of a leaf, number of its blocks) each.

    A key comes of the seed, the path and the block's number alone, so it is the same beside any other leaves, on every
    device and for every batch split.
    """
    # The generator is named: the map must not change with jax_default_prng_impl.
    base, fold = jax.random.key(seed, impl="threefry2x32"), jax.random.fold_in
    # CRC-32, because Python's own hash of a string differs from process to process.
    paths = np.concatenate([np.full(count, zlib.crc32(path.encode()), np.uint32) for path, count in counts])
    numbers = np.concatenate([np.arange(count, dtype=np.uint32) for _, count in counts])
    return jax.vmap(fold)(jax.vmap(fold, in_axes=(None, 0))(base, jnp.asarray(paths)), jnp.asarray(numbers))


def blocks(gradients: Params, seed: Any, size: int) -> tuple[Float[Array, "B n"], Array]:
    """All leaves side by side, each filled up with zeros to whole blocks of ``size`` entries, and a key for each block.

    So one loop can run over the blocks of all leaves: threefry is long code, compiled once instead of once a leaf.
    """
    rows, counts = [], []
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        flat = flat_rows(leaf)
        count = -(-flat.shape[1] // size)
        rows.append(jnp.pad(flat, ((0, 0), (0, count * size - flat.shape[1]))))
        counts.append((jax.tree_util.keystr(path), count))
    return jnp.concatenate(rows, axis=1), block_keys(seed, counts)


def as_signs(words: UInt32[Array, "*a w"], count: int, dtype: Any) -> Float[Array, "*a n"]:
    """``count`` signs from the bits of random ``words``, 32 to a word, lowest bit first: 1 is +1, 0 is -1."""
    places = jnp.arange(32, dtype=jnp.uint32).reshape((1,) * words.ndim + (32,))
    bits = (words[..., None] >> places) & jnp.uint32(1)
    bits = bits.reshape(*words.shape[:-1], -1)[..., :count]
    return jnp.where(bits == 1, jnp.ones((), dtype), -jnp.ones((), dtype))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IdentitySketch:
    """Pi = identity, K = P: every gradient entry, leaves in tree order. For tests and small models."""

    grouped = False

    def __call__(self, gradients: Params) -> Float[Array, "B P"]:
        return jnp.concatenate([flat_rows(leaf) for leaf in jax.tree.leaves(gradients)], axis=1)

    def width(self, params: Params) -> int:
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))

    def describe(self) -> dict[str, Any]:
        return {"sketch": "identity"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RademacherSketch:
    """Dense Rademacher projection [the paper's]: Pi_ki = +-1 / sqrt(K), independent fair signs.

    Unbiased for the inner product, with variance
    ``(|g|^2 |h|^2 + <g, h>^2 - 2 sum_i g_i^2 h_i^2) / K`` (exact for independent signs).

    Signs are bits of threefry keyed by (seed, path of the leaf, block number), 32 signs to a random word:
    they depend on nothing else, so every device and every batch split sees the same map, and a leaf keeps
    its signs whatever other leaves are trained. At most ``block * K`` signs exist at a time, and one block
    of them serves all rows given: hand over as many rows as memory allows.

    Attributes:
      size: K.
      seed: of the signs.
      block: parameters per block of signs; part of what identifies the map.
    """

    size: int = dataclasses.field(default=SKETCH_SIZE, metadata={"static": True})
    seed: int | Int[Array, ""] = 0  # data, not structure: another seed runs the same compiled program
    block: int = dataclasses.field(default=1024, metadata={"static": True})

    grouped = True  # the signs

    def __call__(self, gradients: Params) -> Float[Array, "B K"]:
        return self._project(*blocks(gradients, self.seed, self.block))

    def _project(self, rows: Float[Array, "B n"], keys: Array) -> Float[Array, "B K"]:
        def add(i: Array, total: Array) -> Array:
            # HIGHEST, although a sign is exact in any dtype: an accelerator would round the gradients to 8 or 11 bits.
            part = jax.lax.dynamic_slice_in_dim(rows, i * self.block, self.block, axis=1)
            return total + jnp.matmul(part, self._signs(keys[i], rows.dtype), precision=jax.lax.Precision.HIGHEST)

        zero = jnp.zeros((rows.shape[0], self.size), rows.dtype)
        total = jax.lax.fori_loop(0, len(keys), add, zero)
        return total / jnp.sqrt(jnp.asarray(self.size, rows.dtype))

    def _signs(self, key: Array, dtype: Any) -> Float[Array, "n K"]:
        words = jax.random.bits(key, (self.block, -(-self.size // 32)), jnp.uint32)
        return as_signs(words, self.size, dtype)

    def width(self, params: Params) -> int:
        return self.size

    def describe(self) -> dict[str, Any]:
        return {"sketch": "rademacher", "size": self.size, "seed": int(self.seed), "block": self.block}
