"""Kronecker sketches: (P_a x P_b) vec(G) = P_a G P_b^T for the gradient G of each matrix, summed over the matrices.

A linear layer y = x W has the gradient G = X^T dY, so its sketch is (X P_a^T)^T (dY P_b^T): inputs and output gradients
are sketched apart and G [in, out] need never exist. `ntk` sees functions (params, batch) and no layers, so what gives
it X P_a^T and dY P_b^T is a change of variable: for any matrices,

    d/dZ F(W + P_a^T Z P_b) at Z = 0  =  P_a (dF/dW) P_b^T,                 Z [k_a, k_b]

and x (W + P_a^T Z P_b) = x W + (x P_a^T)(Z P_b) is the layer with a low-rank adapter of factors P_a^T and Z P_b.
So a function with adapters is all that is asked for: `ProbedOutput` lays the two factors into them, with one Z for all
layers, and its gradient in Z is the sketch of all their gradients. Nothing larger than [k_a, out] is formed a layer.

LoRA factors A [in, r] and B [r, out] are thin already: forming their gradients takes T in r products an example, less
than sketching the T inputs to k_a > r numbers each. There `KroneckerSketch` is applied to what is formed, like any
other sketch.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from ntkjax.errors import ConfigError
from ntkjax.ntk.sketch import SKETCH_SIZE, as_signs, block_keys
from ntkjax.types import Params, at_least_float32, precision_of


class _Side(NamedTuple):
    """One side of s matrices: a sign for each of its n entries [s, n], a shift for each chunk [s, c], k buckets."""

    signs: Array
    shifts: Array
    buckets: int

    def matrix(self) -> Float[Array, "s k n"]:
        """The map itself."""
        entries = jnp.arange(self.signs.shape[1], dtype=jnp.int32)
        bucket = (entries[None] % self.buckets + jnp.take(self.shifts, entries // self.buckets, axis=1)) % self.buckets
        hit = bucket[:, None, :] == jnp.arange(self.buckets, dtype=jnp.int32)[None, :, None]
        return jnp.where(hit, self.signs[:, None, :], jnp.zeros((), self.signs.dtype))


def _words_of_side(n: int, k: int) -> int:
    """Random words for one side of a matrix: a shift for each chunk of k entries, a bit for each entry."""
    return -(-n // k) + -(-n // 32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KroneckerSketch:
    """phi = sum over matrices of vec(P_a G P_b^T), with maps P_a [k_a, m], P_b [k_b, n], k_a k_b = K, of each its own.

    A leaf [..., m, n] holds one matrix for each index of its leading axes (layers, outputs); a vector is a matrix of
    one row. Each side is a count-sketch as in `SparseSketch` with one table: entry i of chunk c goes with a random
    sign to (i + shift_c) mod k, so a side no longer than k is embedded without any loss. The inner product is
    unbiased; its variance has a closed form (written out in tests/ntk/test_sketch.py), which for gradients of low rank
    is above that of the dense sketch: about 2 / k for each side that does not fit, in units of |G|^4, against 2 / K.
    Entries of two different matrices meet as in a sparse sketch of all entries, with probability 1 / K.

    Each matrix gets the k_a k_b = K that loses least (see `split`), so K should have many divisors.

    Attributes:
      size: K.
      seed: of signs and shifts: threefry's, keyed by (seed, path of the leaf, matrix, side, chunk).
      left: k_a of every matrix; None: the best of each.

    Raises:
      ConfigError: K is not a multiple of ``left``.
    """

    size: int = dataclasses.field(default=SKETCH_SIZE, metadata={"static": True})
    seed: int | Int[Array, ""] = 0
    left: int | None = dataclasses.field(default=None, metadata={"static": True})

    grouped = False

    def __post_init__(self) -> None:
        if self.size < 1 or (self.left is not None and (self.left < 1 or self.size % self.left)):
            raise ConfigError(
                f"a Kronecker sketch of size K = {self.size} with left = {self.left}: expected a positive K that "
                "is a multiple of left, such as 8192 of 64"
            )

    def split(self, m: int, n: int) -> tuple[int, int]:
        """(k_a, k_b) for an m x n matrix: the divisors of K with the least c_a + c_b + c_a c_b, where c = 1/k - 1/n is
        how often two entries of a side of n > k share a bucket, on average over its pairs, and 0 where it fits."""
        if self.left is not None:
            return self.left, self.size // self.left
        lost = lambda n, k: max(0.0, 1 / k - 1 / n)
        pairs = [(k, self.size // k) for k in range(1, self.size + 1) if self.size % k == 0]
        return min(pairs, key=lambda k: (1 + lost(m, k[0])) * (1 + lost(n, k[1])))

    def __call__(self, gradients: Params) -> Float[Array, "B K"]:
        leaves: list[Array] = [at_least_float32(leaf) for leaf in jax.tree.leaves(gradients)]
        # Every leaf as s matrices: [B, ..., m, n] -> [B, s, m, n]. A leaf with one axis beside B, or with none, is a
        # matrix with m = 1: (1, 1, *axes)[-2:] are the last two axes of (1, 1, ...).
        leaves = [leaf.reshape(leaf.shape[0], -1, *(1, 1, *leaf.shape[1:])[-2:]) for leaf in leaves]
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(gradients)]
        words = self._words([(path, leaf.shape[1:]) for path, leaf in zip(paths, leaves)])
        sketched = []
        for shape in {leaf.shape[2:]: None for leaf in leaves}:  # one loop for all matrices of a shape
            # leaves [B, s_i, m, n] and their words [s_i, w] -> one leaf [B, s, m, n] and words [s, w], s = sum of s_i
            parts = [(leaf, w) for leaf, w in zip(leaves, words) if leaf.shape[2:] == shape]
            stacked, drawn = (jnp.concatenate(part, axis=axis) for part, axis in zip(zip(*parts), (1, 0)))
            sketched.append(self._fold(stacked, drawn))
        return functools.reduce(jnp.add, sketched)

    def _fold(self, leaf: Float[Array, "B s m n"], words: UInt32[Array, "s w"]) -> Float[Array, "B K"]:
        """sum_s vec(P_a,s G_s P_b,s^T): a loop over chunks of both sides, each added in one piece to a table that is
        kept at twice its size, so that a turned chunk lies in it whole."""
        rows, matrices, *lengths = leaf.shape  # B, s, [m, n]
        # Two of each from here on, for the side of the rows (k_a buckets) and of the columns (k_b): a side of length n
        # is cut into ceil(n / k) chunks of min(n, k) entries, the last one filled up with zeros.
        maps = self._maps(words, lengths, leaf.dtype)
        sides, sizes = [side.buckets for side in maps], [min(n, side.buckets) for n, side in zip(lengths, maps)]
        counts = [side.shifts.shape[1] for side in maps]
        fill = [(0, count * size - n) for count, size, n in zip(counts, sizes, lengths)]
        leaf = jnp.pad(leaf, ((0, 0), (0, 0), *fill))
        signs = [jnp.pad(side.signs, ((0, 0), end)) for side, end in zip(maps, fill)]

        def add(step: Int[Array, ""], total: Array) -> Array:
            # step counts (matrix s, chunk of rows, chunk of columns), the last fastest
            s, chunk = jnp.divmod(step.astype(jnp.int32), counts[0] * counts[1])
            chunks, zero = jnp.divmod(chunk, counts[1]), jnp.zeros_like(s)
            start = [c * size for c, size in zip(chunks, sizes)]
            part = jax.lax.dynamic_slice(leaf, (zero, s, *start), (rows, 1, *sizes))[:, 0]
            cut = lambda side: jax.lax.dynamic_slice(signs[side], (s, start[side]), (1, sizes[side]))[0]
            part = part * (cut(0)[:, None] * cut(1)[None, :])[None]
            # A chunk's entry e goes to bucket (e + shift) mod k. In a table of 2 k it goes to e + shift, without the
            # mod, so that the whole chunk is one slice; the two halves are added up at the end.
            at = (zero, *(side.shifts[s, c] for side, c in zip(maps, chunks)))
            old = jax.lax.dynamic_slice(total, at, part.shape)
            return jax.lax.dynamic_update_slice(total, old + part, at)

        total = jnp.zeros((rows, 2 * sides[0], 2 * sides[1]), leaf.dtype)
        total = jax.lax.fori_loop(0, matrices * counts[0] * counts[1], add, total)
        return total.reshape(rows, 2, sides[0], 2, sides[1]).sum(axis=(1, 3)).reshape(rows, self.size)

    def _words(self, leaves: list[tuple[str, tuple[int, ...]]]) -> list[UInt32[Array, "s w"]]:
        """Random words of every matrix of leaves [s, m, n] of these paths; threefry is compiled once for all."""
        keys = block_keys(self.seed, [(path, shape[0]) for path, shape in leaves])
        sizes = [sum(_words_of_side(n, k) for n, k in zip(shape[1:], self.split(*shape[1:]))) for _, shape in leaves]
        # One number for each word of each matrix: word i of matrix q is drawn from the q-th key folded with i.
        per_matrix = np.concatenate([np.full(shape[0], size) for (_, shape), size in zip(leaves, sizes)])
        number = np.concatenate([np.arange(size, dtype=np.uint32) for size in per_matrix])
        draw = lambda key, i: jax.random.bits(jax.random.fold_in(key, i), (), jnp.uint32)
        drawn = jax.vmap(draw)(keys[np.repeat(np.arange(len(per_matrix)), per_matrix)], jnp.asarray(number))
        ends = np.cumsum([shape[0] * size for (_, shape), size in zip(leaves, sizes)])
        parts = jnp.split(drawn, ends[:-1])
        return [part.reshape(shape[0], size) for part, (_, shape), size in zip(parts, leaves, sizes)]

    def _maps(self, words: UInt32[Array, "s w"], lengths: Sequence[int], dtype: Any) -> list[_Side]:
        """Both sides of s matrices [m, n]."""
        sides = []
        for n, k in zip(lengths, self.split(*lengths)):
            # the words of this side, and those that are left for the other
            used, words = words[:, : _words_of_side(n, k)], words[:, _words_of_side(n, k) :]
            chunks = -(-n // k)
            # the first words are the chunks' shifts, the bits of the others the entries' signs
            shifts = (used[:, :chunks] % jnp.uint32(k)).astype(jnp.int32)
            sides.append(_Side(as_signs(used[:, chunks:], n, dtype), shifts, k))
        return sides

    def factors(self, path: str, shape: tuple[int, ...], dtype: Any) -> tuple[Array, Array]:
        """P_a [..., k_a, m] and P_b [..., k_b, n], as matrices, of the leaf of that path (as ``keystr`` writes it) and
        ``shape`` [..., m, n]."""
        *stack, m, n = shape
        words = self._words([(path, (math.prod(stack), m, n))])[0]
        left, right = (side.matrix() for side in self._maps(words, (m, n), dtype))
        return left.reshape(*stack, *left.shape[1:]), right.reshape(*stack, *right.shape[1:])

    def width(self, params: Params) -> int:
        return self.size

    def describe(self) -> dict[str, Any]:
        return {"sketch": "kronecker", "size": self.size, "seed": int(self.seed), "left": self.left}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ProbedOutput:
    """F as a function of Z, one matrix for all linear layers; dF/dZ = sum_l P_a G_l P_b^T is their Kronecker sketch.

    Layer l becomes y = x W_l + c (x P_a^T)(Z P_b / c); at ``zeros()`` that is the function itself. With
    ``gradient_features(ProbedOutput(...), probed.zeros(), batches, IdentitySketch(), ...)`` the full gradients of all
    linear layers [in, out] are sketched to K numbers an example and no gradient of a layer is ever formed.

    Attributes:
      output_fn: ``F(adapters, batch) -> [B]`` or ``[B, m]`` for a tree of adapters as below.
      adapters: the tree of factors, arrays or shapes: each innermost node holds two leaves, first [..., m, k_a] and
        then [..., k_a, n] in tree order (``lora_a`` and ``lora_b``, say).
      sketch: a `KroneckerSketch` whose ``left`` is the rank k_a of the adapters.
      scale: c, what ``output_fn`` multiplies an adapter by.

    Raises:
      ConfigError: leaves that are no such pairs, or another rank than the sketch's ``left``.
    """

    output_fn: Any
    adapters: Any
    sketch: Any
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})

    def zeros(self) -> Float[Array, "k_a k_b"]:
        """Z = 0, where the function is what it is without adapters."""
        dtype = at_least_float32(jnp.zeros((), jax.tree.leaves(self.adapters)[0].dtype)).dtype
        return jnp.zeros((self.sketch.left, self.sketch.size // self.sketch.left), dtype)

    def lift(self, z: Float[Array, "k_a k_b"]) -> Params:
        """The adapters' factors P_a^T and Z P_b / c, a tree like ``adapters``."""
        leaves = jax.tree_util.tree_leaves_with_path(self.adapters)
        factors = []
        for (path, a), (other, b) in zip(leaves[::2], leaves[1::2], strict=True):
            rank = self.sketch.left
            if path[:-1] != other[:-1] or a.shape[-1] != rank or b.shape != (*a.shape[:-2], rank, b.shape[-1]):
                raise ConfigError(
                    f"probes of rank {rank}: {jax.tree_util.keystr(path)} {a.shape} and "
                    f"{jax.tree_util.keystr(other)} {b.shape} are not the factors [..., m, {rank}] and "
                    f"[..., {rank}, n] of one layer; build the model's adapters with rank {rank} on every layer wanted"
                )
            shape = (*a.shape[:-1], b.shape[-1])
            left, right = self.sketch.factors(jax.tree_util.keystr(path[:-1]), shape, z.dtype)
            rows = z.reshape((1,) * (right.ndim - 2) + z.shape)
            right = jnp.matmul(rows, right, precision=precision_of(z.dtype)) / self.scale
            factors += [jnp.swapaxes(left, -1, -2), right]
        return jax.tree.unflatten(jax.tree.structure(self.adapters), factors)

    def __call__(self, z: Float[Array, "k_a k_b"], batch: Any) -> Array:
        return self.output_fn(self.lift(z), batch)
