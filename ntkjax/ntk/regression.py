"""Kernel regression with the tangent kernel at theta_0: fine-tuning as ridge regression in the linearised model.

The linearised model with squared loss and an L2 penalty on the distance moved, over n examples,

    min_delta  1/n sum_i |f_0(x_i) + J(x_i) delta - y_i|^2 + lambda |delta|^2,

has delta = J^T alpha with alpha = (K + n lambda I)^{-1} (y - f_0), K = J J^T, and predicts f_0(x) + k(x, X) alpha.
With several outputs an example (the choices of a question) K is the kernel between all (example, output) pairs, so they
share one delta, as they do in fine-tuning.

Adam's first steps follow the sign of the gradient, so Malladi et al. (2023, arXiv 2210.05643) replace a gradient by its
sign, entry by entry:

    sgd                <grad f(x), grad f(x')>
    asymmetric_signgd  <grad f(x), sign grad f(x')>          x' the training example: what a step on it does to f(x)
    signgd             <sign grad f(x), sign grad f(x')>     its symmetric stand-in

They derive the sign kernels for one output; with several, the sign of each output's gradient is taken by itself, which
is the natural extension but no longer the step that Adam takes. An entry whose gradient is exactly 0 counts in neither
(the A factors of fresh LoRA, say, which Adam moves from its second step on).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from tqdm import tqdm

from ntkjax.errors import ConfigError
from ntkjax.ntk.gram import contract, count_rows, row_blocks
from ntkjax.ntk.kernel import MAX_PASSES, as_kernel, block_sizes, count_outputs, gradients
from ntkjax.ntk.rows import title
from ntkjax.rng import numpy_rng
from ntkjax.types import Params

FORMULAS = ("sgd", "asymmetric_signgd", "signgd")
CRITERIA = ("squared", "accuracy")
RELATIVE_RIDGES = tuple(float(10.0**power) for power in range(-6, 4))
"""Candidates for n lambda, in units of the mean of K's diagonal."""


@functools.partial(jax.jit, static_argnames="formula")
def _pair_gram(a: Params, b: Params, formula: str) -> Float[Array, "n1 m n2 m"]:
    """<a_ic, b_jd> over all leaves [n1, m, ...] and [n2, m, ...], with the signs that ``formula`` takes."""
    left = jnp.sign if formula == "signgd" else lambda leaf: leaf
    right = (lambda leaf: leaf) if formula == "sgd" else jnp.sign

    return contract(jax.tree.map(left, a), jax.tree.map(right, b), outputs="pairs")


def output_kernels(
    output_fn: Callable,
    params: Params,
    x1: Any,
    x2: Any = None,
    *,
    formulas: Sequence[str] = FORMULAS,
    memory_budget: int = 1 << 30,
    progress: bool | str = False,
) -> dict[str, Float[np.ndarray, "n1 m n2 m"]]:
    """K[i, c, j, d] between output c of x1_i and output d of x2_j by each of ``formulas``, from the same gradients.

    Args:
      output_fn: ``f(params, batch) -> [B]`` or ``[B, m]``, one example's outputs independent of the others.
      params: theta, what is differentiated.
      x1: where f is predicted; x2: the training examples (its gradients carry the sign of ``asymmetric_signgd``); None
        means x1. Pytrees whose leaves have a leading axis of examples.
      formulas: names of `FORMULAS`; see the top of this file.
      memory_budget: bytes of gradients held at a time, down to those of one example on either side.
      progress: show a progress bar; a string is its description.

    Returns:
      formula -> float64 sums of products computed in float32 or wider.

    Raises:
      ConfigError: an unknown formula.
    """
    unknown = [name for name in formulas if name not in FORMULAS]
    if unknown:
        raise ConfigError(f"kernel formula {unknown[0]!r}: expected one of {', '.join(FORMULAS)}")
    kernel, same = as_kernel(output_fn), x2 is None
    m, x2 = count_outputs(kernel, params, x1), x1 if x2 is None else x2
    n1, n2 = count_rows(x1), count_rows(x2)
    rows, outputs = block_sizes(params, max(n1, n2), m, memory_budget)
    # All m outputs of an example are needed together, as every output meets every other: fewer rows instead.
    size = max(1, rows * outputs // m)
    at_once = max(1, MAX_PASSES // m)

    def pull(block: Any) -> Params:
        microbatch = None if at_once >= count_rows(block) else at_once
        return gradients(kernel, params, block, np.eye(m, dtype=np.float32), microbatch=microbatch)

    total = {formula: np.zeros((n1, m, n2, m)) for formula in formulas}
    left, right = row_blocks(x1, size), row_blocks(x2, size)
    # The right side fits at once: its gradients are taken once, not for every block on the left.
    kept = pull(right[0][1]) if len(right) == 1 and not same else None
    for i, (at, block) in enumerate(tqdm(left, desc=title(progress, "kernels"), disable=progress is False)):
        g1 = pull(block)
        for j, (to, other) in enumerate(right):
            g2 = kept if kept is not None else g1 if same and i == j else pull(other)
            for formula in formulas:
                pair = np.asarray(_pair_gram(g1, g2, formula), np.float64)
                total[formula][at, :, to] = pair[: at.stop - at.start, :, : to.stop - to.start]
    return total


def as_matrix(kernel: Float[np.ndarray, "n1 m n2 m"]) -> Float[np.ndarray, "N1 N2"]:
    """The kernel between (example, output) pairs, outputs of an example side by side: [n1 m, n2 m]."""
    n1, m, n2, _ = kernel.shape
    return kernel.reshape(n1 * m, n2 * m)


@dataclasses.dataclass(frozen=True)
class KernelRegression:
    """f(x) = w f_0(x) + k(x, X) alpha.

    Attributes:
      alpha: [N, k]; N rows of the training kernel, k targets that share it.
      ridge: lambda. f0_weight: w.
    """

    alpha: Float[np.ndarray, "N k"]
    ridge: float
    f0_weight: float

    def predict(self, kernel: Float[np.ndarray, "M N"], f0: Float[np.ndarray, "M k"]) -> Float[np.ndarray, "M k"]:
        """Predictions for M rows: ``kernel`` between them and the training rows, ``f0`` the model's own outputs."""
        return self.f0_weight * np.asarray(f0, np.float64) + np.asarray(kernel, np.float64) @ self.alpha


def fit_kernel_regression(
    kernel: Float[np.ndarray, "N N"],
    targets: Float[np.ndarray, "N k"],
    f0: Float[np.ndarray, "N k"],
    *,
    ridge: float,
    f0_weight: float = 1.0,
    examples: int | None = None,
) -> KernelRegression:
    """alpha = (K + n lambda I)^{-1} (y - w f_0); the least-norm solution for lambda = 0 and a singular K.

    Args:
      kernel: K, symmetric or not. targets: y. f0: f_0, the outputs at theta_0, in the units of y.
      ridge: lambda >= 0, per example.
      f0_weight: w: 1 keeps f_0 as it is, 0 leaves it out; between them y is that much larger against f_0 (the
        "f_0 scaling" 1/w of Malladi et al. 2023).
      examples: n; None: N. Fewer where the rows are the (example, output) pairs.

    Raises:
      ConfigError: a negative ridge.
    """
    if ridge < 0:
        raise ConfigError(f"ridge lambda must be at least 0, got {ridge}")
    matrix = np.asarray(kernel, np.float64)
    n = len(matrix) if examples is None else examples
    residual = np.asarray(targets, np.float64) - f0_weight * np.asarray(f0, np.float64)
    if ridge > 0:
        try:
            alpha = np.linalg.solve(matrix + n * ridge * np.eye(len(matrix)), residual)
            return KernelRegression(alpha, ridge, f0_weight)
        except np.linalg.LinAlgError:  # a sign kernel is not positive: K + n lambda I can be singular
            matrix = matrix + n * ridge * np.eye(len(matrix))
    return KernelRegression(np.linalg.lstsq(matrix, residual, rcond=None)[0], ridge, f0_weight)


def ridge_grid(
    kernel: Float[np.ndarray, "N N"], examples: int, relative: Sequence[float] = RELATIVE_RIDGES
) -> list[float]:
    """Candidates for lambda such that n lambda is ``relative`` times the mean of K's diagonal."""
    mean = float(np.trace(kernel)) / len(kernel)
    if not mean > 0:
        raise ConfigError(f"the kernel's diagonal has mean {mean}; expected a number above 0: are all gradients zero?")
    return [r * mean / examples for r in relative]


@dataclasses.dataclass(frozen=True)
class RidgeChoice:
    """What cross-validation chose, and what it saw.

    Attributes:
      ridge, f0_weight: the choice.
      table: one dict for each candidate: ridge, f0_weight, squared (mean squared error of held-out outputs), accuracy.
      at_edge: the smallest or largest ridge was chosen (of several): the best may lie outside the grid.
    """

    ridge: float
    f0_weight: float
    table: list[dict[str, float]]
    at_edge: bool


def choose_ridge(
    kernel: Float[np.ndarray, "N N"],
    targets: Float[np.ndarray, "N k"],
    f0: Float[np.ndarray, "N k"],
    *,
    ridges: Sequence[float],
    f0_weights: Sequence[float] = (1.0,),
    examples: int | None = None,
    valid: Bool[np.ndarray, "n C"] | None = None,
    folds: int = 5,
    seed: int = 0,
    criterion: str = "squared",
) -> RidgeChoice:
    """lambda (and w) by k-fold cross-validation over the training examples; no other example is looked at.

    Args:
      kernel, targets, f0, examples: as for `fit_kernel_regression`.
      ridges, f0_weights: candidates.
      valid: bool [n, C], the outputs that exist (questions with fewer choices); None: all.
      folds: at most one for each example; drawn from ``seed``.
      criterion: ``squared``: least error on the held-out outputs; ``accuracy``: most held-out examples whose largest
        output is that of their largest target, ties by squared error. Remaining ties: the larger ridge.

    Raises:
      ConfigError: fewer than two folds or examples, or an unknown criterion.
    """
    n = len(kernel) if examples is None else examples
    if criterion not in CRITERIA:
        raise ConfigError(f"criterion {criterion!r}: expected one of {', '.join(CRITERIA)}")
    if folds < 2 or n < 2:
        raise ConfigError(f"cross-validation needs at least 2 folds and 2 examples, got {folds} and {n}")
    per_example = len(kernel) // n
    # Folds are of examples: all outputs of one are held out together, since they share its label.
    rows = np.arange(n * per_example).reshape(n, per_example)
    order = numpy_rng(seed, "ntk", "folds").permutation(n)
    held_out = [np.sort(part) for part in np.array_split(order, min(folds, n))]
    table = []
    for ridge in ridges:
        for weight in f0_weights:
            predicted = np.empty_like(np.asarray(targets, np.float64))
            for part in held_out:
                train, test = np.delete(rows, part, axis=0).ravel(), rows[part].ravel()
                model = fit_kernel_regression(
                    kernel[np.ix_(train, train)], targets[train], f0[train],
                    ridge=ridge, f0_weight=weight, examples=n - len(part),
                )  # fmt: skip
                predicted[test] = model.predict(kernel[np.ix_(test, train)], f0[test])
            error = float(np.mean((predicted - targets) ** 2))
            right = accuracy(predicted.reshape(n, -1), np.asarray(targets).reshape(n, -1), valid)
            table.append({"ridge": ridge, "f0_weight": weight, "squared": error, "accuracy": right})
    score = lambda row: (row["accuracy"] if criterion == "accuracy" else 0.0, -row["squared"], row["ridge"])
    # A sign kernel may be indefinite, and its smallest ridges may give predictions that overflow: no candidates.
    best = max((row for row in table if np.isfinite(row["squared"])), key=score)
    edge = len(set(ridges)) > 1 and best["ridge"] in (min(ridges), max(ridges))
    return RidgeChoice(best["ridge"], best["f0_weight"], table, edge)


def accuracy(
    outputs: Float[np.ndarray, "n C"], targets: Float[np.ndarray, "n C"], valid: Bool[np.ndarray, "n C"] | None = None
) -> float:
    """Share of examples whose largest output is that of the largest target (the first of equal ones)."""
    return float(np.mean(right_answers(outputs, targets, valid)))


def right_answers(
    outputs: Float[np.ndarray, "n C"], targets: Float[np.ndarray, "n C"], valid: Bool[np.ndarray, "n C"] | None = None
) -> Bool[np.ndarray, " n"]:
    """For each example whether its largest output is that of its largest target, outputs not ``valid`` left out."""
    shown = np.asarray(outputs, np.float64)
    if valid is not None:
        shown = np.where(valid, shown, -np.inf)
    return np.argmax(shown, axis=1) == np.argmax(np.where(True if valid is None else valid, targets, -np.inf), axis=1)


def centred_targets(gold: np.ndarray, valid: Bool[np.ndarray, "n C"]) -> Float[np.ndarray, "n C"]:
    """One-hot minus 1/C over the valid outputs, 0 elsewhere: targets for outputs that are centred the same way."""
    hot = np.zeros(valid.shape)
    hot[np.arange(len(gold)), gold] = 1
    return np.where(valid, hot - 1 / valid.sum(axis=1, keepdims=True), 0)
