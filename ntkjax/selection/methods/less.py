"""LESS (arXiv 2402.04333): alignment of Adam's update from a pool example with each subtask's gradient, over epochs."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Int

from ntkjax.errors import ConfigError
from ntkjax.selection.base import Selection, SelectionProblem, select_top
from ntkjax.selection.cost import Sizes
from ntkjax.selection.gradients import (
    GradientSelector,
    cosines,
    find_candidates,
    gradient_features,
    scatter,
)
from ntkjax.selection.options import AdamOptions, GradientOptions
from ntkjax.selection.vote import unit_rows


@dataclasses.dataclass(frozen=True)
class LessOptions(AdamOptions, GradientOptions):
    """Options of ``less``."""


@dataclasses.dataclass(frozen=True)
class LessSelector(LessOptions, GradientSelector):
    """score_j = max_k sum_t eta_t / (sum_t' eta_t') mean_{i in D_k} cos(Pi Gamma_t(x_j), Pi g_t(x_i)); top n.

    D_k: the domain examples of subtask k, here of one ``source``; t: the checkpoints at the end of the warm-up's
    epochs, eta_t the mean learning rate of that epoch; g_t: gradient of the loss at theta_t; Gamma_t: Adam's update
    from it, m' / sqrt(v' + 1e-8) (see `ntkjax.selection.gradients`); Pi: a sketch to K numbers.

    Source: arXiv 2402.04333 and its program, which takes the mean of cosines with each example of a subtask, where the
    paper writes the cosine with the subtask's mean gradient: we do as the program does. It warms up on a random 5% of
    the pool for 4 epochs; here the warm-up is the one that all methods share, on the domain, so its examples are no
    held-out set to these checkpoints. Its sketch is dense Rademacher (``--sketch rademacher``), ours sparse by default;
    it scores the whole pool (``--stage1 off``), we by default what stage 1 keeps, as for every gradient method.

    ``adam`` off takes the plain gradient for Gamma_t. After a warm-up on a small domain 0.9 m is the larger part of
    every m', so that all Gamma_t point nearly the same way; without it this is not so.

    Raises:
      ConfigError: options out of range; a problem without checkpoints.
    """

    uses_checkpoints: ClassVar[bool] = True

    def forward_tokens(self, sizes: Sizes) -> float:
        """Gradients at every checkpoint."""
        return sizes.stage1(self.stage1) + sizes.checkpoints * sizes.gradients

    def __call__(self, problem: SelectionProblem) -> Selection:
        if not problem.checkpoints:
            raise ConfigError("less looks at the warm-up's epochs and there are none; warm up first, with checkpoints")
        names, subtask = np.unique(np.asarray(problem.domain.sources, dtype=str), return_inverse=True)
        candidates = find_candidates(problem, stage1=self.stage1, prefilter_factor=self.prefilter_factor)
        influence, report = self.influence(problem, candidates.rows, subtask)
        scores = scatter(influence.max(axis=1), candidates.rows, len(problem.pool))
        chosen = select_top("less", scores, problem.n, votes=candidates.counts)
        best = influence[np.searchsorted(candidates.rows, chosen.selected)].argmax(axis=1)
        report |= {"subtasks_chosen_for": dict(sorted(Counter(names[best].tolist()).items()))}
        return dataclasses.replace(chosen, diagnostics=report | candidates.report())

    def influence(
        self, problem: SelectionProblem, rows: Int[np.ndarray, " C"], subtask: Int[np.ndarray, " M"]
    ) -> tuple[Float[np.ndarray, "C S"], dict[str, Any]]:
        """(the sum over checkpoints for every candidate and subtask, what to report of it)."""
        rates = np.array([checkpoint.learning_rate for checkpoint in problem.checkpoints])
        weights, total, zeros, domain_zeros = rates / rates.sum(), 0.0, [], []
        for checkpoint, weight in zip(problem.checkpoints, weights):
            options: dict[str, Any] = {"sketch": self.sketch, "size": self.sketch_size, "checkpoint": checkpoint}
            domain, read = gradient_features(problem, rows, adam=self.adam == "on", **options)
            unit, zero = unit_rows(np.asarray(domain, np.float64))
            means = np.stack([unit[subtask == k].mean(axis=0) for k in range(subtask.max() + 1)])
            cosine, zero_rows = cosines(read, rows, means)
            total = total + weight * cosine
            zeros, domain_zeros = [*zeros, zero_rows], [*domain_zeros, zero]
        return np.asarray(total), {
            "checkpoint_steps": [checkpoint.step for checkpoint in problem.checkpoints],
            "checkpoint_weights": weights.tolist(),
            "zero_gradients": max(zeros),
            "zero_domain_gradients": max(domain_zeros),
        }
