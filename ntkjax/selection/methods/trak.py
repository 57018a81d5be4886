"""TRAK (arXiv 2303.14186): attribution by random projection, (Phi^T Phi)^-1, and an ensemble of checkpoints."""

from __future__ import annotations

import dataclasses
import warnings
from typing import ClassVar

import numpy as np
import scipy.linalg
from jaxtyping import Float, Int

from ntkjax.errors import ConfigError
from ntkjax.ntk.kernel import Kernel
from ntkjax.rng import numpy_rng
from ntkjax.selection.base import Selection, SelectionProblem, select_top
from ntkjax.selection.cost import FORWARD, Sizes
from ntkjax.selection.forward import row_values
from ntkjax.selection.gradients import (
    GradientSelector,
    ReadRows,
    find_candidates,
    gradient_features,
    in_blocks,
    scatter,
)
from ntkjax.selection.options import DampingOptions, GradientOptions
from ntkjax.types import as_pytree_fn


@dataclasses.dataclass(frozen=True)
class TrakOptions(GradientOptions, DampingOptions):
    """Options of ``trak``."""


@dataclasses.dataclass(frozen=True)
class TrakSelector(TrakOptions, GradientSelector):
    """score_j = (1/T sum_t phi_bar_t^T (Phi_t^T Phi_t + lambda_t I)^-1 phi_t(x_j)) (1/T sum_t q_t(x_j)); the n highest.

    phi_t(x) = P_t^T grad F(x; theta_t): the gradient of F(x) = 1/|S| sum_{s in S} log(p_s / (1 - p_s)), p_s the
    probability of the next token, by a random projection P_t to K numbers, another for every checkpoint; phi_bar_t: its
    mean over the domain; Phi_t [C, K]: those of the C candidates; q_t(x) = 1/|S| sum_s (1 - p_s); t: the checkpoints at
    the end of the warm-up's epochs. So score_j is the mean over domain examples of what TRAK says x_j adds to F(x_i).

    Source: arXiv 2303.14186, equation 17, without its soft threshold. Its ensemble are models trained apart, each on a
    random half of the training set; here, as its package allows, they are epochs of one run, the warm-up on the domain
    that all methods share. Open there and chosen by us: the mean over the tokens of a response, for F and for q; which
    examples Phi has: the candidates; lambda_t = ``damping`` tr(Phi_t^T Phi_t) / K, where the paper has 0 and at least K
    examples (``damping`` near 0 then gives its numbers; with fewer, the pseudo-inverse). The paper's projections are
    ``--sketch rademacher``; ours are sparse by default.

    Memory: K^2 numbers of 64 bits, or C^2 + C K where there are fewer candidates than K.

    Raises:
      ConfigError: options out of range; a problem without checkpoints, or without ``margin_fn`` and ``error_fn``.
    """

    uses_checkpoints: ClassVar[bool] = True

    def forward_tokens(self, sizes: Sizes) -> float:
        """Gradients and predictions at every checkpoint."""
        return sizes.stage1(self.stage1) + sizes.checkpoints * (sizes.gradients + FORWARD * sizes.pool)

    def __call__(self, problem: SelectionProblem) -> Selection:
        if problem.margin_fn is None or problem.error_fn is None:
            raise ConfigError("trak needs the margin and the error of every response: give margin_fn and error_fn")
        if not problem.checkpoints:
            raise ConfigError("trak is an ensemble over the warm-up's epochs and there are none; warm up first")
        candidates = find_candidates(problem, stage1=self.stage1, prefilter_factor=self.prefilter_factor)
        kernel, rows = Kernel(as_pytree_fn(problem.margin_fn), name="margin"), candidates.rows
        total, errors, zeros = np.zeros(len(rows)), np.zeros(len(rows)), 0
        for number, checkpoint in enumerate(problem.checkpoints):
            # A projection of its own for every checkpoint: the members of the ensemble then err independently.
            own = int(numpy_rng(problem.seed, "trak", number).integers(1 << 30))
            domain, read = gradient_features(
                dataclasses.replace(problem, seed=own), rows, kernel=kernel, sketch=self.sketch, size=self.sketch_size,
                checkpoint=checkpoint,
            )  # fmt: skip
            attributed, empty = attributions(domain.mean(axis=0, dtype=np.float64), read, rows, self.damping)
            total, zeros = total + attributed, zeros + empty
            q = row_values(problem, problem.error_fn, checkpoint.params, kind="error", what="prediction errors")
            errors += q[rows, 0]
        count = len(problem.checkpoints)
        scores = scatter(total / count * errors / count, rows, len(problem.pool))
        report = {
            "checkpoint_steps": [checkpoint.step for checkpoint in problem.checkpoints],
            "mean_error": float(errors.mean() / count),
            "zero_gradients": zeros,
        }
        return select_top("trak", scores, problem.n, votes=candidates.counts, diagnostics=report | candidates.report())


def attributions(
    mean: Float[np.ndarray, " K"], read: ReadRows, rows: Int[np.ndarray, " C"], damping: float
) -> tuple[Float[np.ndarray, " C"], int]:
    """(phi_bar^T (Phi^T Phi + lambda I)^-1 phi_j of every candidate, float64; how many phi_j are 0).

    lambda = ``damping`` tr(Phi^T Phi) / K. With fewer candidates than K, from (Phi^T Phi + lambda I)^-1 Phi^T =
    Phi^T (Phi Phi^T + lambda I)^-1, a system of C equations in the place of K.

    Args:
      mean: phi_bar. read: phi of the rows that it is given [n, K].

    Raises:
      ConfigError: every phi_j is 0.
    """
    size, count, zeros = len(mean), len(rows), 0
    blocks = lambda: ((at, np.asarray(read(part), np.float64)) for at, part in in_blocks(rows))
    few = count < size
    held, along = np.zeros((count, size) if few else (size, size)), np.zeros(count)
    for at, phi in blocks():
        zeros += int(np.sum(~phi.any(axis=1)))
        if few:
            held[at] = phi
        else:
            held += phi.T @ phi
    trace = float(np.sum(held * held) if few else np.trace(held))
    if trace == 0:
        raise ConfigError("trak: the gradient of every candidate is 0; check the pool's responses and the model")
    lam = damping * trace / size
    if few:
        return _solve(held @ held.T + lam * np.eye(count), held @ mean, damping), zeros
    weights = _solve(held + lam * np.eye(size), mean, damping)
    for at, phi in blocks():
        along[at] = phi @ weights
    return along, zeros


def _solve(matrix: Float[np.ndarray, "n n"], right: Float[np.ndarray, " n"], damping: float) -> Float[np.ndarray, " n"]:
    """matrix^-1 right of a symmetric positive definite matrix; ConfigError where it is singular as far as float64 can
    tell, since what comes out would be rounding errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", scipy.linalg.LinAlgWarning)
        try:
            return scipy.linalg.solve(matrix, right, assume_a="pos")
        except (np.linalg.LinAlgError, scipy.linalg.LinAlgWarning):
            raise ConfigError(
                f"trak: with --damping {damping:g} the {len(matrix)} equations for the candidates' gradients have no "
                "unique solution in float64 (gradients that depend on each other); raise --damping, to 1e-6 say"
            ) from None
