"""Loss drop (arXiv 2605.09404): how far the warm-up on the domain lowers the loss of a pool example."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from ntkjax.errors import ConfigError
from ntkjax.selection.base import Selection, SelectionProblem, select_top
from ntkjax.selection.cost import FORWARD, Sizes
from ntkjax.selection.forward import ForwardMethod, pool_nll
from ntkjax.selection.options import Options


@dataclasses.dataclass(frozen=True)
class LossDropSelector(Options, ForwardMethod):
    """score_j = (L_0(x_j) - L_T(x_j)) / L_0(x_j), L the mean NLL of the response at theta_0, before the warm-up on the
    domain, and at theta_T, after it; the n highest. An example with L_0 = 0 cannot fall: its score is 0.

    Source: arXiv 2605.09404 ("Let the Target Select for Itself": a short warm-up of limited capacity on the target, and
    the normalised fall of each candidate's loss along it). The warm-up is the one that all methods share.

    Cost: two forward passes over the pool.

    Raises:
      ConfigError: a problem without the parameters before its warm-up.
    """

    uses_start: ClassVar[bool] = True

    def forward_tokens(self, sizes: Sizes) -> float:
        """The pool twice."""
        return 2 * FORWARD * sizes.pool

    def __call__(self, problem: SelectionProblem) -> Selection:
        if problem.start_params is None:
            raise ConfigError(
                "loss-drop compares the model before and after the warm-up and there was none; warm up first"
            )
        before, after = pool_nll(problem, problem.start_params), pool_nll(problem, problem.params)
        scores = (before - after) / np.where(before == 0, 1, before)
        chosen = select_top("loss-drop", scores, problem.n)
        report = {
            "mean_nll_before": float(before.mean()),
            "mean_nll_after": float(after.mean()),
            "share_that_fell": float(np.mean(after < before)),
        }
        return dataclasses.replace(chosen, diagnostics=report)
