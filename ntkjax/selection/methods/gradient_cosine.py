"""Cosine between the gradient of a pool example's loss and the domain's mean gradient."""

from __future__ import annotations

import dataclasses

from ntkjax.selection.algorithms.mean import Mean
from ntkjax.selection.base import Selection, SelectionProblem
from ntkjax.selection.cost import Sizes
from ntkjax.selection.gradients import GradientSelector, find_candidates, gradient_features, unit_direction
from ntkjax.selection.parts import Part, Similarities, named_parts


@dataclasses.dataclass(frozen=True)
class GradientCosineSelector(GradientSelector):
    """score_j = cos(g_j, g_bar), g the gradient of the loss at theta, g_bar = 1/M sum_i g_i over the domain; top n.

    Source: a control of ours between ``ntk --kernel loss``, whose score <g_bar, g_j> also counts how long g_j is, and
    ``less``, which takes cosines with every domain example, Adam's steps and all epochs. Both gradients are sketched to
    K = ``sketch_size``, from the same rows on disk as every other gradient method; a cosine is then off by about
    1 / sqrt(K). Without a sketch, and for other kernels: ``ntk --direction cosine``.

    It is ``parts`` with representation ``gradients`` of the loss and algorithm ``mean``, the domain being one vector,
    g_bar.

    Attributes:
      sketch, sketch_size: Pi and K (see `gradient_features`).
      stage1, prefilter_factor: which rows are looked at (see `find_candidates`).

    Raises:
      ConfigError: options out of range. UserError: g_bar is zero.
    """

    def forward_tokens(self, sizes: Sizes) -> float:
        """Forward-equivalent tokens, as counted in `ntkjax.selection.cost`."""
        return sizes.stage1(self.stage1) + sizes.gradients

    def __call__(self, problem: SelectionProblem) -> Selection:
        candidates = find_candidates(problem, stage1=self.stage1, prefilter_factor=self.prefilter_factor)
        domain, read = gradient_features(problem, candidates.rows, sketch=self.sketch, size=self.sketch_size)
        direction = unit_direction(domain.mean(axis=0), "the domain's mean gradient")
        choice = Mean()(Similarities((Part(direction[None], read),), candidates.rows), problem)
        report = named_parts("gradients", "mean") | {"zero_gradients": choice.zeros}
        return choice.selection("gradient-cosine", candidates, problem, report)
