"""Sketches Pi: linear maps of gradients to K numbers that keep inner products, E <Pi g, Pi h> = <g, h>."""

from __future__ import annotations

import dataclasses
import math
import zlib
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ntkjax.types import Params, at_least_float32


@runtime_checkable
class Sketch(Protocol):
    """A callable pytree over gradients with leaves [B, ...]; one map for every batch split and device."""

    def __call__(self, gradients: Params) -> Float[Array, "B K"]:
        """Pi g for each row."""
        ...

    def width(self, params: Params) -> int:
        """K for gradients shaped like ``params``."""
        ...

    def describe(self) -> dict[str, Any]:
        """What identifies the map, for a manifest."""
        ...


def _rows(leaf: Array) -> Float[Array, "B n"]:
    leaf = at_least_float32(leaf)
    return leaf.reshape(leaf.shape[0], -1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IdentitySketch:
    """Pi = identity, K = P: every gradient entry, leaves in tree order. For tests and small models."""

    def __call__(self, gradients: Params) -> Float[Array, "B P"]:
        return jnp.concatenate([_rows(leaf) for leaf in jax.tree.leaves(gradients)], axis=1)

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

    size: int = dataclasses.field(default=8192, metadata={"static": True})
    seed: int | Int[Array, ""] = 0  # data, not structure: another seed runs the same compiled program
    block: int = dataclasses.field(default=1024, metadata={"static": True})

    def __call__(self, gradients: Params) -> Float[Array, "B K"]:
        # One loop over the blocks of all leaves: threefry is long code, compiled once instead of once a leaf.
        base, rows, keys = jax.random.key(self.seed, impl="threefry2x32"), [], []
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
            flat = _rows(leaf)
            blocks = -(-flat.shape[1] // self.block)
            rows.append(jnp.pad(flat, ((0, 0), (0, blocks * self.block - flat.shape[1]))))
            leaf_key = jax.random.fold_in(base, zlib.crc32(jax.tree_util.keystr(path).encode()))
            keys.append(jax.vmap(jax.random.fold_in, in_axes=(None, 0))(leaf_key, jnp.arange(blocks)))
        return self._project(jnp.concatenate(rows, axis=1), jnp.concatenate(keys))

    def _project(self, rows: Float[Array, "B n"], keys: Array) -> Float[Array, "B K"]:
        def add(i: Array, total: Array) -> Array:
            part = jax.lax.dynamic_slice_in_dim(rows, i * self.block, self.block, axis=1)
            return total + jnp.matmul(part, self._signs(keys[i], rows.dtype), precision=jax.lax.Precision.HIGHEST)

        zero = jnp.zeros((rows.shape[0], self.size), rows.dtype)
        total = jax.lax.fori_loop(0, len(keys), add, zero)
        return total / jnp.sqrt(jnp.asarray(self.size, rows.dtype))

    def _signs(self, key: Array, dtype: Any) -> Float[Array, "n K"]:
        words = jax.random.bits(key, (self.block, -(-self.size // 32)), jnp.uint32)
        bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None, :]) & jnp.uint32(1)
        bits = bits.reshape(self.block, -1)[:, : self.size]
        return jnp.where(bits == 1, jnp.ones((), dtype), -jnp.ones((), dtype))

    def width(self, params: Params) -> int:
        return self.size

    def describe(self) -> dict[str, Any]:
        return {"sketch": "rademacher", "size": self.size, "seed": int(self.seed), "block": self.block}
