"""One sweep of gradients, and every kernel that its first m outputs give.

The Gram matrices of the single outputs, G_c(x, x') = <grad F_c(x), grad F_c(x')>, add up to the kernel of all M outputs
and, summed up to m, to that of the first m: in the eigenbasis of the head ``spectral:m`` for every m, with Rademacher
probes ``hutchinson:m``. So the kernels of all m cost the passes of the largest, once.

Between the trace and its centred form no second sweep is needed either. With s = sum_k f_k,

    centred_trace = sum_k <grad (f_k - s / V), grad (f_k' - s' / V)> = trace - sum_logits / V,

so ``sum_logits`` is V times the part of the trace that centring removes: the one output direction that softmax does not
see, and nothing of the V - 1 others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float
from tqdm import tqdm

from ntkjax.errors import ConfigError
from ntkjax.ntk.exact import logits
from ntkjax.ntk.gram import contract, gradient_bytes, rows_of
from ntkjax.ntk.kernel import MAX_PASSES, Kernel, as_kernel, count_outputs, gradients
from ntkjax.ntk.kernels import KernelFunctions
from ntkjax.ntk.outputs import FoldedOutput, TrainedHeadOutput
from ntkjax.ntk.rows import NonFiniteError, one_a_row, title
from ntkjax.parallel import to_host
from ntkjax.types import Params, as_pytree_fn

BLOCK = 8  # outputs at a time, also where fewer are left: one program for all kernels, and more gain little speed


@dataclasses.dataclass(frozen=True)
class OutputGrams:
    """The Gram matrices of each output of one kernel, on the same examples.

    Attributes:
      grams: G_c, float64 [M, n, n].
      head_coefficient: the coefficient of <h, h'> with all M outputs.
      hidden: <h, h'> [n, n] where the head is trained and its own gradient is shared between the outputs and the
        term in <h, h'> (`ntkjax.ntk.kernels`), else None.
    """

    grams: np.ndarray
    head_coefficient: float = 0.0
    hidden: np.ndarray | None = None

    def matrix(self, m: int | None = None, *, rescale: bool = False) -> Float[np.ndarray, "n n"]:
        """The kernel matrix of the first m outputs (None: all).

        The head's own gradient along the directions left out moves to the term in <h, h'>, whose coefficient becomes
        head_coefficient + M - m. ``rescale`` multiplies by M / m instead, for probes that average to the kernel.
        """
        count = len(self.grams)
        m = count if m is None else m
        if not 1 <= m <= count:
            raise ConfigError(f"a sweep of {count} outputs holds the kernels of 1 to {count} of them, not of {m}")
        total = self.grams[:m].sum(axis=0)
        if rescale:
            return total * (count / m)
        return total if self.hidden is None else total + (self.head_coefficient + count - m) * self.hidden


def common_form(
    kernel: Kernel, functions: KernelFunctions, params: Params
) -> tuple[Kernel, Float[np.ndarray, "M m"] | None]:
    """(base, S) where the M outputs of ``kernel`` are S F, F those of the base: the same for all kernels of the logits.

    With the head held fixed F = h [B, D] and S = (W^T v)^T; with the head trained F = W h [B, V] and S = v^T. A kernel
    that is no linear map of the logits (``loss``) is its own base, with S None. The base is without the term in
    <h, h'>.
    """
    output, hidden = kernel.output_fn, functions.hidden_fn
    rows = lambda array: to_host(array).reshape(len(array), -1).T
    if isinstance(output, FoldedOutput):
        return Kernel(as_pytree_fn(hidden), name="hidden"), rows(output.weight)
    if isinstance(output, TrainedHeadOutput):
        base = Kernel(logits(hidden, functions.head), name="logits")
        if output.probe is not None:
            return base, rows(output.probe)
        vocab = jax.eval_shape(output.head_fn, params).shape[0]
        return base, np.ones((1, vocab), np.float32)
    return kernel, None


def output_grams(
    kernel: Kernel | Callable,
    params: Params,
    batches: Iterable,
    *,
    rows: int,
    store: Any = None,
    selectors: Float[np.ndarray, "M m"] | None = None,
    memory_budget: int = 1 << 30,
    progress: bool | str = False,
) -> Float[np.ndarray, "M rows rows"]:
    """G_c(x_i, x_j) = <grad F_c(x_i), grad F_c(x_j)> for every output c of ``kernel``, float64.

    Args:
      kernel: a `Kernel`, or ``F(params, batch) -> [B]`` or ``[B, M]``. The head's own term is not part of
        this.
      selectors: take the M outputs S F in the place of F's own: S [M, m]. Kernels that differ in S alone, as those of
        `common_form` do, then run one compiled program.
      params: theta.
      batches: batches with ``index`` [B] that hold each of the ``rows`` examples once; -1 is a filler. They may differ
        in length, so that short examples are not padded to the longest.
      store: a `RowStore` of M rows of width ``rows`` ** 2, or None. Outputs that it holds are not computed again. On a
        mesh over several processes one that they fill together.
      memory_budget: bytes of gradients in memory. Where one output of all examples needs more, blocks of examples are
        paired and their gradients computed again for each pair.
      progress: show a progress bar over outputs; a string is its description.

    Raises:
      NonFiniteError: naming the examples whose gradient is NaN or infinite.
    """
    kernel, plan = as_kernel(kernel), list(one_a_row(batches))
    if selectors is None:
        selectors = np.eye(count_outputs(kernel, params, plan[0]), dtype=np.float32)
    count = len(selectors)
    one = gradient_bytes(params)
    # Where one output of all rows fits into the budget, its gradients are held and every pair of batches is contracted.
    # Otherwise batches are cut into pieces of half the budget, two of which are held at a time (`_block`).
    outputs = max(1, min(BLOCK, memory_budget // max(1, one * rows)))
    whole = one * rows <= memory_budget
    pieces = plan if whole else list(_pieces(plan, max(1, memory_budget // max(1, 2 * one))))
    if sorted(i for p in pieces for i in np.asarray(p.index) if i >= 0) != list(range(rows)):
        raise ValueError(f"the batches must hold each of the rows 0 to {rows - 1} once")
    done = np.zeros(count, bool) if store is None else np.asarray(store.done())
    grams, todo = np.zeros((count, rows, rows)), np.flatnonzero(~done)
    bar = tqdm(
        total=count,
        initial=int(done.sum()),
        desc=title(progress, "gradients"),
        disable=progress is False,
        unit="output",
    )
    for start in range(0, len(todo), outputs):
        chosen = todo[start : start + outputs]
        # Always ``outputs`` selectors, the last ones 0 where fewer are left: one shape, one compiled program.
        block = np.zeros((outputs, selectors.shape[1]), selectors.dtype)
        block[: len(chosen)] = selectors[chosen]
        block = _block(kernel, params, pieces, block, rows, keep=whole)[: len(chosen)]
        if not np.isfinite(block).all():
            # A row with a gradient that is not finite spoils its diagonal entry; the others' diagonals stay finite.
            bad = ~np.isfinite(np.einsum("cii->ci", block)).all(axis=0)
            raise NonFiniteError("gradient", np.flatnonzero(bad).tolist())
        grams[chosen] = block
        if store is not None:
            store.write(chosen, block.reshape(len(chosen), -1))
        bar.update(len(chosen))
    bar.close()
    if store is not None:
        store.gather()
        grams = np.asarray(store.read(), np.float64).reshape(count, rows, rows)
    return grams


def _block(kernel: Kernel, params: Params, pieces: list, selectors: np.ndarray, rows: int, *, keep: bool) -> np.ndarray:
    """G_c for the outputs of ``selectors`` [c, M]: float64 [c, rows, rows]."""
    microbatch = max(1, MAX_PASSES // len(selectors))
    pull = lambda i: gradients(
        kernel,
        params,
        pieces[i],
        selectors,
        microbatch=microbatch if microbatch < len(pieces[i].index) else None,
    )
    # With `keep` all pieces are held; without it two at a time, and the second of a pair is computed anew for each:
    # n (n + 1) / 2 pieces of gradients in the place of n, for memory that does not grow with the rows.
    kept = {i: pull(i) for i in range(len(pieces))} if keep else {}
    total = np.zeros((len(selectors), rows, rows))
    # Pairs i <= j only; `_scatter` writes both triangles, at the dataset rows that the batches' ``index`` names.
    for i, first in enumerate(pieces):
        left = kept[i] if keep else pull(i)
        for j in range(i, len(pieces)):
            right = left if i == j else kept[j] if keep else pull(j)
            values = to_host(contract(left, right, outputs="each")).astype(np.float64)
            _scatter(total, np.asarray(first.index), np.asarray(pieces[j].index), values)
    return total


def _scatter(total: np.ndarray, at: np.ndarray, to: np.ndarray, values: np.ndarray) -> None:
    """Write the block of rows ``at`` and ``to`` without fillers, and its mirror image."""
    values = values[:, at >= 0][:, :, to >= 0]
    at, to = at[at >= 0], to[to >= 0]
    total[:, at[:, None], to[None]] = values
    total[:, to[:, None], at[None]] = np.swapaxes(values, 1, 2)


def _pieces(batches: list, size: int) -> Iterator[Any]:
    for batch in batches:
        for start in range(0, len(batch.index), size):
            yield rows_of(batch, slice(start, start + size))


def hidden_gram(hidden_fn: Callable, params: Params, batches: Iterable, *, rows: int) -> Float[np.ndarray, "rows rows"]:
    """<h(x_i), h(x_j)> of the pooled hidden states, float64."""
    states: np.ndarray | None = None
    for batch in batches:
        values = to_host(_hidden(hidden_fn, params, batch)).astype(np.float64)
        index = np.asarray(batch.index)
        states = np.zeros((rows, values.shape[1])) if states is None else states
        states[index[index >= 0]] = values[index >= 0]
    assert states is not None
    return states @ states.T


@jax.jit
def _hidden(hidden_fn: Callable, params: Params, batch: Any) -> Float[Array, "B D"]:
    return hidden_fn(params, batch)


def square_root(matrix: np.ndarray) -> Float[np.ndarray, "n r"]:
    """B with B B^T = the kernel matrix, r its rank.

    Raises:
      ValueError: the matrix has an eigenvalue below -1e-3 of the largest; smaller ones are rounding and count as 0.
    """
    # Not Cholesky, which wants a positive definite matrix: kernels of few outputs have low rank.
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    if values[0] < -1e-3 * abs(values[-1]):
        raise ValueError(f"not a kernel matrix: its eigenvalues run from {values[0]:.3g} to {values[-1]:.3g}")
    kept = values > 0
    return vectors[:, kept] * np.sqrt(values[kept])


def gaussian_sketch(root: Float[np.ndarray, "n r"], size: int, rng: np.random.Generator) -> Float[np.ndarray, "n n"]:
    """One draw of Phi Phi^T, Phi = G Pi^T [n, K] with Gaussian Pi_ki ~ N(0, 1 / K), from ``root`` of G G^T alone.

    The K columns of Phi are independent draws of N(0, G G^T / K), so the sketched kernel matrix is B S B^T / K with S
    of the Wishart law of K degrees of freedom: it depends on the gradients through their Gram matrix only, and no
    gradient and no sign is needed. S = L L^T, L lower triangular with L_ii^2 ~ chi^2 of K - i degrees (i from 0) and
    L_ij ~ N(0, 1) below the diagonal [Bartlett 1933]. A Rademacher sketch has the same mean, and its variance is
    smaller by 2 sum_i g_i^2 g'_i^2 / K, nothing where gradients have many entries.
    """
    rank = root.shape[1]
    if size < rank:
        # Fewer columns than the rank: the sketch itself, B G with G Gaussian, is smaller than Bartlett's triangle.
        factor = rng.normal(size=(rank, size))
    else:
        factor = np.tril(rng.normal(size=(rank, rank)), -1)
        factor[np.diag_indices(rank)] = np.sqrt(rng.chisquare(size - np.arange(rank)))
    phi = root @ factor / np.sqrt(size)
    return phi @ phi.T
