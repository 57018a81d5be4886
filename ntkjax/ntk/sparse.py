"""Sparse sketches: every gradient entry is added, with a random sign, to a few of the K numbers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from ntkjax.errors import ConfigError
from ntkjax.ntk.sketch import SKETCH_SIZE, as_signs, blocks
from ntkjax.types import Params

GROUP = 64
"""Chunks that an accelerator adds in one loop: with 16 rows and tables of 2,048 numbers they are 8 MiB."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseSketch:
    """Sparse Johnson-Lindenstrauss map: s entries +-1 / sqrt(s) in each column of Pi (s = 1: a count-sketch).

    The K numbers are s tables of k = K / s buckets, each filled by a map of its own (as in Kane and Nelson, 2014). To
    fill one, a leaf's entries are cut into chunks of k, and chunk c is turned by a random shift:

        entry i of chunk c goes to bucket (i + shift_c) mod k with its own random sign,

    so a chunk is added to a table in one piece: neither a scatter nor a sort, on any device, and s P additions in all.
    Two entries of one chunk never share a bucket, two entries of different chunks do with probability 1 / k in each
    table. Variances need nothing more than this and signs that are independent: the inner product is unbiased, with
    variance

        1/K sum_{i, j in different chunks} (g_i^2 h_j^2 + g_i h_i g_j h_j)                                    (exact),

    which is never above that of `RademacherSketch` (there the sum is over all i != j). What chunks turned as a whole
    give up against entries that move freely is independence between the collisions, which for one draw makes the error
    larger or smaller than that; several tables average over draws.

    Signs and shifts are threefry's, keyed by (seed, path of the leaf, chunk), see `RademacherSketch`. (Where k is no
    power of two a shift is uniform to 1 part in 2^32 / k.)

    Attributes:
      size: K, a multiple of ``tables``.
      seed: of signs and shifts.
      tables: s.

    Raises:
      ConfigError: K is not a multiple of s.
    """

    size: int = dataclasses.field(default=SKETCH_SIZE, metadata={"static": True})
    seed: int | Int[Array, ""] = 0
    tables: int = dataclasses.field(default=4, metadata={"static": True})

    grouped = False

    def __post_init__(self) -> None:
        if self.tables < 1 or self.size < 1 or self.size % self.tables:
            raise ConfigError(
                f"a sparse sketch of size K = {self.size} cannot have {self.tables} equal tables: expected a "
                "K that is a multiple of the number of tables, such as 8192 of 4"
            )

    @property
    def buckets(self) -> int:
        """k, the size of a table."""
        return self.size // self.tables

    def __call__(self, gradients: Params) -> Float[Array, "B K"]:
        rows, keys = blocks(gradients, self.seed, self.buckets)
        draw = lambda key: jax.random.bits(key, (self.tables, -(-self.buckets // 32) + 1), jnp.uint32)
        return self._fill(rows, jax.vmap(draw)(keys))

    def _fill(self, rows: Float[Array, "B n"], words: UInt32[Array, "c s w"]) -> Float[Array, "B K"]:
        """Add every chunk to every table; the last of ``words`` gives the shift."""
        shifts = (words[:, :, -1] % jnp.uint32(self.buckets)).astype(jnp.int32)
        # A CPU moves a chunk at a time through its caches. An accelerator would start two kernels for each of thousands
        # of chunks, and wait for their start longer than for their work.
        add_all = {"cpu": self._one_by_one, "default": self._in_groups}
        tables = jax.lax.platform_dependent(rows, words, shifts, **add_all)
        return tables / jnp.asarray(math.sqrt(self.tables), rows.dtype)

    def _one_by_one(
        self, rows: Float[Array, "B n"], words: UInt32[Array, "c s w"], shifts: Int[Array, "c s"]
    ) -> Float[Array, "B K"]:
        """A table is kept at twice its length while it is filled, so that a turned chunk is one piece of it."""
        k = self.buckets

        def add(c: Array, totals: list[Array]) -> list[Array]:
            chunk = jax.lax.dynamic_slice_in_dim(rows, c * k, k, axis=1)
            signs = as_signs(words[c, :, :-1], k, rows.dtype)
            return [_add_at(total, chunk * signs[i][None], shifts[c, i]) for i, total in enumerate(totals)]

        zero = jnp.zeros((rows.shape[0], 2 * k), rows.dtype)
        totals = jax.lax.fori_loop(0, len(words), add, [zero] * self.tables)
        return jnp.concatenate([total[:, :k] + total[:, k:] for total in totals], axis=1)

    def _in_groups(
        self, rows: Float[Array, "B n"], words: UInt32[Array, "c s w"], shifts: Int[Array, "c s"]
    ) -> Float[Array, "B K"]:
        """`GROUP` chunks at a time: bucket j of a table gets entry (j - shift_c) mod k of each chunk c of a group."""
        k = self.buckets
        whole, rest = divmod(len(words), GROUP)

        def turned(first: Any, count: int) -> Float[Array, "B K"]:
            of = lambda x, size, axis=0: jax.lax.dynamic_slice_in_dim(x, first * size, count * size, axis=axis)
            chunks = of(rows, k, axis=1).reshape(-1, count, k)
            own_words, own_shifts = of(words, 1), of(shifts, 1)
            tables = []
            for i in range(self.tables):
                signed = chunks * as_signs(own_words[:, i, :-1], k, rows.dtype)[None]
                entries = (jnp.arange(k, dtype=own_shifts.dtype)[None] - own_shifts[:, i, None]) % k
                tables.append(jnp.take_along_axis(signed, entries[None], axis=2).sum(axis=1))
            return jnp.concatenate(tables, axis=1)

        total = jnp.zeros((rows.shape[0], self.size), rows.dtype)
        if whole:
            total = jax.lax.fori_loop(0, whole, lambda g, total: total + turned(g * GROUP, GROUP), total)
        return total + turned(whole * GROUP, rest) if rest else total

    def width(self, params: Params) -> int:
        return self.size

    def describe(self) -> dict[str, Any]:
        return {"sketch": "sparse", "size": self.size, "seed": int(self.seed), "tables": self.tables}


def _add_at(total: Float[Array, "B K2"], chunk: Float[Array, "B k"], at: Int[Array, ""]) -> Float[Array, "B K2"]:
    start = (jnp.zeros_like(at), at)
    old = jax.lax.dynamic_slice(total, start, chunk.shape)
    return jax.lax.dynamic_update_slice(total, old + chunk, start)
