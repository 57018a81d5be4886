"""LESS (arXiv 2402.04333): alignment of Adam's update from a pool example with each subtask's gradient, over epochs."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import ClassVar

import numpy as np

from ntkjax.selection.algorithms.clusters import Clusters
from ntkjax.selection.base import Selection, SelectionProblem
from ntkjax.selection.cost import Sizes
from ntkjax.selection.gradients import GradientSelector
from ntkjax.selection.options import AdamOptions, GradientOptions
from ntkjax.selection.parts import named_parts
from ntkjax.selection.representations.gradients import Gradients


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

    It is ``parts`` with representation ``gradients`` of the loss, trajectory ``adam``, and algorithm ``clusters`` over
    the sources.

    Raises:
      ConfigError: options out of range; a problem without checkpoints.
    """

    uses_checkpoints: ClassVar[bool] = True

    def forward_tokens(self, sizes: Sizes) -> float:
        """Gradients at every checkpoint."""
        return sizes.stage1(self.stage1) + sizes.checkpoints * sizes.gradients

    def as_gradients(self) -> Gradients:
        """The same as options of the representation ``gradients``."""
        options = dataclasses.asdict(self)
        return Gradients(kernel="loss", trajectory="adam" if options.pop("adam") == "on" else "epochs", **options)

    def __call__(self, problem: SelectionProblem) -> Selection:
        gradients, subtasks = self.as_gradients(), Clusters(domain_groups="sources")
        candidates = gradients.candidates(problem)
        similarities = gradients.similarities(problem, candidates.rows)
        choice = subtasks(similarities, problem)
        chosen, names = choice.selection("less", candidates, problem, {}), choice.report["domain_clusters"]
        assert choice.groups is not None
        best = choice.groups[np.searchsorted(candidates.rows, chosen.selected)]
        report = named_parts("gradients", "clusters") | {
            "checkpoint_steps": [checkpoint.step for checkpoint in problem.checkpoints],
            "checkpoint_weights": [part.weight for part in similarities.parts],
            "zero_gradients": choice.zeros,
            "zero_domain_gradients": similarities.zero_domain,
            "subtasks_chosen_for": dict(sorted(Counter(names[group] for group in best).items())),
        }
        return dataclasses.replace(chosen, diagnostics=report | candidates.report())
