"""Cosine between the gradient of a pool example's loss and the domain's mean gradient."""

from __future__ import annotations

import dataclasses

from ntkjax.selection.base import Selection, SelectionProblem, select_top
from ntkjax.selection.cost import Sizes
from ntkjax.selection.diagnostics import describe
from ntkjax.selection.gradients import (
    SketchName,
    Switch,
    check_options,
    cosines,
    find_candidates,
    gradient_features,
    place,
    unit_direction,
)


@dataclasses.dataclass(frozen=True)
class GradientCosineSelector:
    """score_j = cos(g_j, g_bar), g the gradient of the loss at theta, g_bar = 1/M sum_i g_i over the domain; top n.

    Source: a control of ours between ``ntk --kernel loss``, whose score <g_bar, g_j> also counts how long g_j is, and
    ``less``, which takes cosines with every domain example, Adam's steps and all epochs. Both gradients are sketched to
    K = ``sketch_size``, from the same rows on disk as every other gradient method; a cosine is then off by about
    1 / sqrt(K). Without a sketch, and for other kernels: ``ntk --direction cosine``.

    Attributes:
      sketch, sketch_size: Pi and K (see `gradient_features`).
      stage1, prefilter_factor: which rows are looked at (see `find_candidates`).

    Raises:
      ConfigError: options out of range. UserError: g_bar is zero.
    """

    sketch: SketchName = "sparse"
    sketch_size: int = 8192
    stage1: Switch = "on"
    prefilter_factor: int = 4

    def __post_init__(self) -> None:
        check_options(self.sketch, self.sketch_size, self.stage1, self.prefilter_factor)

    def passes(self, sizes: Sizes) -> float:
        """Forward-equivalent tokens, as counted in `ntkjax.selection.cost`."""
        return sizes.stage1(self.stage1) + sizes.gradients

    def __call__(self, problem: SelectionProblem) -> Selection:
        candidates = find_candidates(problem, stage1=self.stage1, prefilter_factor=self.prefilter_factor)
        domain, read = gradient_features(problem, candidates.rows, sketch=self.sketch, size=self.sketch_size)
        mean = unit_direction(domain.mean(axis=0), "the domain's mean gradient")
        found, zeros = cosines(read, candidates.rows, mean[None])
        scores = place(found[:, 0], candidates.rows, len(problem.pool))
        chosen = select_top("gradient-cosine", scores, problem.n, votes=candidates.counts)
        report = describe(chosen, problem.pool, None) | {"zero_gradients": zeros} | candidates.report()
        return dataclasses.replace(chosen, diagnostics=report)
