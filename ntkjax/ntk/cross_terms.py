"""What the Jacobian-free kernel adds to the trace: products of the gradients of different outputs.

    sum_logits(x, x') = trace(x, x') + sum_{k != l} <grad f_k(x), grad f_l(x')>

It stands for the trace where the cross terms cancel, that is where the cosines of different outputs' gradients are 0 on
average *with their signs*: a small mean of |cos| is not enough, as V (V - 1) terms stand against V.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from ntkjax.errors import ConfigError
from ntkjax.ntk.gram import contract, gradient_bytes, rows_of
from ntkjax.ntk.kernel import Kernel, gradients
from ntkjax.ntk.kernels import KernelFunctions, head_is_trained
from ntkjax.ntk.metrics import bootstrap_interval, resample, square
from ntkjax.ntk.outputs import FoldedOutput, TrainedHeadOutput
from ntkjax.ntk.rows import one_a_row, title
from ntkjax.parallel import to_host
from ntkjax.rng import numpy_rng
from ntkjax.types import ArrayLike, Params, as_pytree_fn, at_least_float32

BINS = 100
BLOCK = 64  # gradients of one example made at a time
Products = tuple[np.ndarray, np.ndarray | None]


@dataclasses.dataclass(frozen=True)
class CrossTerms:
    """Cosines of the gradients of different outputs k != l, averaged over the pairs of outputs.

    Attributes:
      signed, absolute: mean of cos and of |cos| between grad f_k(x) and grad f_l(x), for each example [n].
      signed_between, absolute_between: the same between grad f_k(x_i) and grad f_l(x_i+1) [n - 1]: what enters a
        kernel of two different examples.
      cross, own: sum over pairs k != l of <grad f_k(x), grad f_l(x)>, and sum_k |grad f_k(x)|^2, over all V outputs
        (scaled up from those compared), for each example [n]: the cross terms and the trace.
      cross_between, own_between: the same for x_i and x_i+1 [n - 1].
      histogram, histogram_between: how many of all those cosines fall into each of `BINS` equal bins of [-1, 1].
      outputs: how many of the V outputs were compared, all pairs of them: V, or a uniform sample.
      vocab: V.
      undefined: outputs, summed over examples, whose gradient is 0 and has no direction; they are left out.
    """

    signed: np.ndarray
    absolute: np.ndarray
    signed_between: np.ndarray
    absolute_between: np.ndarray
    cross: np.ndarray
    own: np.ndarray
    cross_between: np.ndarray
    own_between: np.ndarray
    histogram: np.ndarray
    histogram_between: np.ndarray
    outputs: int
    vocab: int
    undefined: int

    def summary(self, *, seed: int = 0, samples: int = 1000) -> dict[str, float]:
        """Means over examples of the four cosines, and ``ratio`` = sum cross / sum own (``ratio_between``), each with
        ``_low`` and ``_high`` (percentile bootstrap over examples)."""
        numbers: dict[str, float] = {}
        for name in ("signed", "absolute", "signed_between", "absolute_between"):
            values = getattr(self, name)
            values = values[np.isfinite(values)]
            numbers[name] = float(values.mean()) if len(values) else math.nan
            low, high = math.nan, math.nan
            if len(values) > 1:
                low, high = bootstrap_interval(lambda v: float(v.mean()), values, seed=seed, samples=samples)
            numbers |= {f"{name}_low": low, f"{name}_high": high}
        for suffix in ("", "_between"):
            cross, own = getattr(self, f"cross{suffix}"), getattr(self, f"own{suffix}")
            share = lambda c, o: float(c.sum() / o.sum()) if o.sum() != 0 else math.nan
            name, low, high = f"ratio{suffix}", math.nan, math.nan
            if len(cross) > 1:
                low, high = bootstrap_interval(share, cross, own, seed=seed, samples=samples)
            numbers |= {name: share(cross, own), f"{name}_low": low, f"{name}_high": high}
        return numbers | {"outputs": self.outputs, "vocab": self.vocab, "undefined": self.undefined}


def cross_output_cosines(
    functions: KernelFunctions,
    params: Params,
    batches: Iterable,
    *,
    outputs: int = 4096,
    seed: int = 0,
    memory_budget: int = 1 << 30,
    progress: bool | str = False,
) -> CrossTerms:
    """E[cos] and E|cos| between the gradients of different outputs, example by example.

    With the head held fixed grad f_k = sum_d W_kd grad h_d, so all products of V outputs are W A W^T with A the D x D
    products of the hidden units' gradients: D passes an example, whatever V. With the head trained, and where D
    gradients do not fit, the gradients of the sampled outputs themselves are taken.

    Args:
      functions: hidden state and head.
      params: theta.
      batches: batches with ``index``; each real row is one example (fillers are left out).
      outputs: at most so many outputs are compared, drawn uniformly without replacement: the mean over their pairs is
        an unbiased estimate of the mean over all V (V - 1) pairs.
      seed: of that draw.
      memory_budget: bytes of gradients: those of two examples are held at a time. Where the sampled outputs' do not
        fit, fewer are drawn.
      progress: show a progress bar over examples; a string is its description.

    Raises:
      ConfigError: the budget does not hold the gradients of two outputs of two examples, or ``outputs`` below 2.
    """
    if functions.sum_logits_fn is not None:
        raise ConfigError(
            "cross terms take the outputs to be W h, linear in the head, and this model's are c tanh(W h / c) "
            "(final_logit_softcapping); use a model without it"
        )
    head: Any = functions.head
    weight: Any = head(params) if callable(head) else head
    weight = to_host(at_least_float32(weight))
    vocab, width = weight.shape
    one = gradient_bytes(params)
    # Two examples' gradients are held at a time, for the products between neighbours.
    fit, wanted = memory_budget // (2 * one), min(outputs, vocab)
    rng, trained = numpy_rng(seed, "ntk", "cross terms"), head_is_trained(head, params)
    by_width = not trained and width <= min(fit, wanted)
    # Where the products come from those of the hidden units, the number of outputs costs no memory.
    chosen = np.sort(rng.choice(vocab, size=wanted if by_width else min(wanted, fit), replace=False))
    if len(chosen) < 2:
        raise ConfigError(
            f"cross terms need the gradients of 2 outputs of 2 examples, {4 * one:,} bytes of the memory budget of "
            f"{memory_budget:,}; raise it, or ask for at least 2 outputs (got {outputs})"
        )
    if by_width:
        products = hidden_products(functions.hidden_fn, params, batches, width=width, progress=progress)
        return cross_terms(products, weight[chosen], vocab=vocab)
    if trained:
        probes = np.zeros((vocab, len(chosen)), weight.dtype)
        probes[chosen, np.arange(len(chosen))] = 1
        output: Any = TrainedHeadOutput(as_pytree_fn(functions.hidden_fn), as_pytree_fn(head), jnp.asarray(probes))
    else:
        output = FoldedOutput(as_pytree_fn(functions.hidden_fn), jnp.asarray(weight[chosen].T))
    return cross_terms(_products_of(Kernel(output), params, batches, len(chosen), progress), None, vocab=vocab)


def hidden_products(
    hidden_fn: Callable, params: Params, batches: Iterable, *, width: int, progress: bool | str = False
) -> Iterator[Products]:
    """A_de = <grad h_d(x), grad h_e(x)> of the D = ``width`` hidden units, float64 [D, D], for one example after the
    other, each with the same between the example before and it (None for the first).

    Kept, they give `cross_terms` for any choice of outputs without another pass. The gradients of two examples are in
    memory at a time.
    """
    return _products_of(Kernel(as_pytree_fn(hidden_fn)), params, batches, width, progress)


def cross_terms(
    products: Iterable[Products], weight: Float[ArrayLike, "S c"] | None, *, vocab: int | None = None
) -> CrossTerms:
    """`CrossTerms` of the outputs with the rows of ``weight`` as their head (None: the products are the outputs').

    Args:
      products: those of `hidden_products`.
      weight: W_S, S rows of the head [S, D].
      vocab: V, where these are a uniform sample of V outputs; None: they are all that is asked about.
    """
    rows = None if weight is None else np.asarray(weight, np.float64)
    within, between, undefined, size = _Cosines(), _Cosines(), 0, 0
    previous: np.ndarray | None = None
    for own, other in products:
        values = _of_outputs(own, rows)
        size, norms = len(values), np.sqrt(np.maximum(np.diag(values), 0))
        undefined += int(np.sum(norms == 0))
        within.add(values, norms, norms)
        if other is not None and previous is not None:
            between.add(_of_outputs(other, rows), previous, norms)
        previous = norms
    vocab = size if vocab is None else vocab
    # From a uniform sample of S outputs to all V: sums over pairs grow by the number of pairs, sums over outputs by
    # their number. Both estimates are unbiased.
    up = {"cross": vocab * (vocab - 1) / max(1, size * (size - 1)), "own": vocab / max(1, size)}
    columns = {}
    for suffix, part in (("", within), ("_between", between)):
        for name in ("signed", "absolute", "cross", "own"):
            columns[name + suffix] = np.asarray(getattr(part, name)) * up.get(name, 1.0)
        columns[f"histogram{suffix}"] = part.histogram
    return CrossTerms(**columns, outputs=size, vocab=vocab, undefined=undefined)


def _products(a: list[Params], b: list[Params]) -> np.ndarray:
    """<a_k, b_l> for the gradients of one example each, in blocks of outputs [1, c, ...]: float64 [c, c]."""
    block = lambda x, y: to_host(contract(x, y, outputs="pairs")).astype(np.float64)[0, :, 0]
    return np.block([[block(x, y) for y in b] for x in a])


def _jacobians(kernel: Kernel, params: Params, batches: list, count: int) -> Iterator[list[Params]]:
    """All ``count`` gradients of one example after the other, in blocks of leaves [1, c, ...]."""
    selectors = np.eye(count, dtype=np.float32)
    for batch in batches:
        for row in np.flatnonzero(np.asarray(batch.index) >= 0):
            single = rows_of(batch, slice(int(row), int(row) + 1))
            starts = range(0, count, BLOCK)
            yield [gradients(kernel, params, single, selectors[start : start + BLOCK]) for start in starts]


def _products_of(
    kernel: Kernel, params: Params, batches: Iterable, count: int, progress: bool | str
) -> Iterator[Products]:
    """<grad F_k(x), grad F_l(x)> [count, count] of each example, and between the one before and it."""
    plan = list(one_a_row(batches))
    examples = sum(int((np.asarray(b.index) >= 0).sum()) for b in plan)
    previous: list[Params] | None = None
    every = _jacobians(kernel, params, plan, count)
    for jacobian in tqdm(
        every, total=examples, desc=title(progress, "cross terms"), disable=progress is False, unit="example"
    ):
        other = None if previous is None else _products(previous, jacobian)
        yield _products(jacobian, jacobian), other
        previous = jacobian


@dataclasses.dataclass
class _Cosines:
    """Means over the pairs k != l of outputs whose gradients are not 0, one for each matrix added; NaN without any."""

    signed: list[float] = dataclasses.field(default_factory=list)
    absolute: list[float] = dataclasses.field(default_factory=list)
    cross: list[float] = dataclasses.field(default_factory=list)
    own: list[float] = dataclasses.field(default_factory=list)
    histogram: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(BINS, np.int64))

    def add(self, products: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
        """The products [c, c] of one pair of examples, and the norms [c] of either's gradients."""
        self.own.append(float(np.trace(products)))
        self.cross.append(float(products.sum()) - self.own[-1])
        kept = (left > 0) & (right > 0)
        count = int(kept.sum())
        if count < 2:
            self.signed.append(math.nan)
            self.absolute.append(math.nan)
            return
        cosines = products[np.ix_(kept, kept)] / (left[kept, None] * right[None, kept])
        apart = cosines[~np.eye(count, dtype=bool)]
        self.signed.append(float(apart.mean()))
        self.absolute.append(float(np.abs(apart).mean()))
        # cosines of parallel gradients may pass 1 by rounding
        self.histogram += np.histogram(np.clip(apart, -1, 1), bins=BINS, range=(-1, 1))[0]


def _of_outputs(products: np.ndarray, rows: np.ndarray | None) -> np.ndarray:
    """W A W^T."""
    return products if rows is None else rows @ products @ rows.T


def cross_ratio(
    summed: np.ndarray, trace: np.ndarray, vocab: int, *, seed: int = 0, samples: int = 1000
) -> dict[str, float]:
    """How large the cross terms are beside the trace, from the kernel matrices of ``sum_logits`` and ``trace``.

    Args:
      summed, trace: [n, n], or draws [S, n, n] of the same examples, over which ratios are averaged.
      vocab: V.

    Returns:
      ``ratio`` = sum_i S_ii / sum_i T_ii - 1, the cross terms over the trace within an example, and ``ratio_between``
      the same over the pairs i != j; 0 is what the approximation needs and V - 1 what parallel gradients give.
      ``shift_share`` = sum_i S_ii / (V sum_i T_ii): the part of the trace along the all-ones direction, the one that
      softmax does not see (1 / V if no direction is preferred); and ``shift_share_between``. Each with ``_low`` and
      ``_high``: percentile bootstrap over examples, pairs of one example drawn twice left out, and ``_sd`` over draws.
    """
    above, below = (np.stack([square(k) for k in (m if np.ndim(m) == 3 else [m])]) for m in (summed, trace))
    n = above.shape[1]
    weights = np.concatenate([np.ones((1, n)), resample(numpy_rng(seed, "cross ratio"), n, samples)])
    apart = 1 - np.eye(n)
    within = lambda k: np.einsum("bi,sii->sb", weights, k)
    between = lambda k: np.einsum("bi,sij,bj->sb", weights, k * apart, weights, optimize=True)
    numbers: dict[str, float] = {}
    for suffix, part in (("", within), ("_between", between)):
        with np.errstate(divide="ignore", invalid="ignore"):
            share = part(above) / part(below)  # [draws, 1 + samples]
        for name, values in ((f"ratio{suffix}", share - 1), (f"shift_share{suffix}", share / vocab)):
            means = values.mean(axis=0)
            finite = means[1:][np.isfinite(means[1:])]
            low, high = np.quantile(finite, [0.025, 0.975]) if len(finite) else (math.nan, math.nan)
            spread = float(values[:, 0].std(ddof=1)) if len(values) > 1 else math.nan
            numbers |= {name: float(means[0]), f"{name}_low": float(low), f"{name}_high": float(high)}
            numbers[f"{name}_sd"] = spread
    return numbers
