"""A control: the pool examples that the model predicts worst, best, or neither."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
from scipy.stats import rankdata

from ntkjax.selection.base import Selection, SelectionProblem, select_top
from ntkjax.selection.forward import ForwardMethod, pool_nll
from ntkjax.selection.options import Options, check_choice

PerplexityName = Literal["middle", "high", "low"]


@dataclasses.dataclass(frozen=True)
class PerplexityOptions(Options):
    """Options of ``perplexity``."""

    perplexity: PerplexityName = "middle"
    """Which come first: those nearest the pool's median, the highest or the lowest."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("perplexity", self.perplexity, PerplexityName)


@dataclasses.dataclass(frozen=True)
class PerplexitySelector(PerplexityOptions, ForwardMethod):
    """With L_j = 1/|S| sum_{t in S(x_j)} -log p(x_t+1 | x_<=t), the log perplexity of the response given its prompt:
    score_j = L_j (``perplexity`` high), -L_j (low), or -|u_j - 1/2| (middle), u_j = (rank of L_j - 1/2) / N its
    quantile in the pool, ties sharing their mean rank; the n highest. The domain is looked at by the warm-up alone.

    Source: arXiv 2309.04564 (Marion et al., pruning by perplexity: the middle does best there), which prunes whole
    texts for pre-training with a model of its own; here the response counts and the model is theta, after the warm-up.

    Cost: a forward pass over the pool.
    """

    def __call__(self, problem: SelectionProblem) -> Selection:
        nll = pool_nll(problem, problem.params)
        quantile = (rankdata(nll) - 0.5) / len(nll)
        scores = {"high": nll, "low": -nll, "middle": -abs(quantile - 0.5)}[self.perplexity]
        chosen = select_top("perplexity", scores, problem.n)
        report = {
            "perplexity": self.perplexity,
            "median_nll_offered": float(np.median(nll)),
            "lowest_nll_chosen": float(nll[chosen.selected].min()),
            "highest_nll_chosen": float(nll[chosen.selected].max()),
        }
        return dataclasses.replace(chosen, diagnostics=report)
