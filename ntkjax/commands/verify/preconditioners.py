"""Scores of the loss kernel along preconditioned directions, against the whole Fisher inverted exactly.

The kernel matrix of the loss, which the ladder has, gives the exact solution
(`ntkjax.ntk.precondition.explicit_scores`). Each preconditioner is built, and its scores are taken, as
`select --kernel loss --precondition P` does it, with the sample's domain as the domain and its other examples as the
pool.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ntkjax.commands.verify.config import VerifyConfig
from ntkjax.ntk.kernels import KernelFunctions, build
from ntkjax.ntk.metrics import bootstrap_interval, relative_error, spearman, top_n_overlap
from ntkjax.ntk.precondition import build_preconditioner, explicit_scores
from ntkjax.ntk.rows import Pass
from ntkjax.ntk.scores import ForwardScorer, kernel_scores
from ntkjax.types import Params

EXACT = "exact"
"""The solution that the others are compared with."""
LOSS = "loss"
"""The kernel whose scores are preconditioned, as an influence function is."""

Draw = dict[str, Any]
"""One draw: ``damping`` -> ``{"lambda": float, "scores": {preconditioner or exact: [scored]}, "residual": ...}``."""


def preconditioned_scores(
    config: VerifyConfig,
    functions: KernelFunctions,
    params: Params,
    matrix: np.ndarray,
    domain: Iterable,
    pool: Iterable,
    *,
    sizes: tuple[int, int],
    parameters: int,
    progress: bool,
) -> Draw:
    """The scores of the examples outside the domain by every preconditioner and damping of ``config``.

    Args:
      matrix: the kernel matrix of the loss [n, n], domain first.
      domain, pool: batches of the M domain examples and of the others, each numbered from 0.
      sizes: (M, n - M).
      parameters: P.
    """
    kernel, by_damping = build(LOSS, functions, params, seed=config.seed), {}
    loss_fn = functions.nll_fn
    assert loss_fn is not None, "the functions of a language model have a loss"
    for damping in config.damping:
        exact, lam = explicit_scores(matrix, np.arange(sizes[0]), damping=damping, parameters=parameters)
        scores, residual = {EXACT: exact.tolist()}, {}
        for name in config.precondition:
            solver = build_preconditioner(name, loss_fn, params, domain, damping=damping, progress=progress)
            run = Pass(sizes[1], memory_budget=config.memory_budget, progress=progress and f"scores, {name}")
            along = kernel_scores(kernel, params, domain, pool, rows=run, scorer=ForwardScorer(solver))
            scores[name] = np.asarray(along.scores[:, 0], np.float64).tolist()
            if along.residual is not None:
                residual[name] = along.residual
        by_damping[str(damping)] = {"lambda": lam, "scores": scores, "residual": residual}
    return by_damping


def preconditioner_rows(config: VerifyConfig, column: str, draws: list[Draw], top: int) -> Iterator[dict[str, Any]]:
    """One row for each damping and preconditioner: means over draws, ``_sd`` over draws, ``_low`` and ``_high`` the 95%
    bootstrap interval over the scored examples."""
    metrics = {
        "score_spearman": spearman,
        "relative_error": relative_error,
        "relative_error_scaled": functools.partial(relative_error, scaled=True),
        "top_n_overlap": lambda a, e: top_n_overlap(a, e, top),
    }
    for damping in map(str, config.damping):
        parts = [draw[damping] for draw in draws]
        exact = np.array([part["scores"][EXACT] for part in parts]).T  # [scored, draws]
        for name in config.precondition:
            scores = np.array([part["scores"][name] for part in parts]).T
            row: dict[str, Any] = {"column": column, "damping": float(damping), "precondition": name}
            row["lambda"] = float(np.mean([part["lambda"] for part in parts]))
            for metric, of in metrics.items():
                each = [of(a, e) for a, e in zip(scores.T, exact.T)]
                row[metric] = float(np.mean(each))
                row[f"{metric}_sd"] = float(np.std(each, ddof=1)) if len(each) > 1 else float("nan")
            over = lambda a, e: float(np.mean([spearman(x, y) for x, y in zip(a.T, e.T)]))
            low, high = bootstrap_interval(over, scores, exact, seed=config.seed, samples=config.bootstrap)
            row |= {"score_spearman_low": low, "score_spearman_high": high}
            residuals = [part["residual"][name] for part in parts if name in part["residual"]]
            row["residual"] = max(residuals) if residuals else None
            yield row | {"scored": len(scores), "n": top, "draws": len(draws)}
