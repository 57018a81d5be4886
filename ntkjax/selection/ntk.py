"""NTK-Selector (arXiv 2511.07380): an embedding vote, then the tangent kernel's mean score with the domain.

s_j = 1/M sum_i k(x_i, x_j) = <g_bar, g_j>; the n highest are chosen. ``k`` is the paper's ``sum_logits`` kernel or the
label-aware ``loss`` kernel; the scores are exact (forward-mode pass) or the paper's (per-example gradients, Rademacher
sketch to K).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np

from ntkjax.errors import ConfigError
from ntkjax.ntk.features import kernel_scores
from ntkjax.ntk.outputs import sum_logits
from ntkjax.ntk.sketch import RademacherSketch
from ntkjax.rng import numpy_rng
from ntkjax.selection.base import Selection, SelectionProblem, select_top
from ntkjax.selection.diagnostics import describe
from ntkjax.selection.embedding import stage1_votes
from ntkjax.selection.vote import Votes
from ntkjax.store import RowStore


@dataclasses.dataclass(frozen=True)
class NtkSelector:
    """The paper's two stages, and the choices it leaves open.

    Attributes:
      kernel: ``sum_logits`` or ``loss``.
      scores: ``forward`` (exact) or ``sketch`` (the paper's path, K = ``sketch_size``).
      stage1: ``on``: only the M_pre = ``prefilter_factor`` * n rows with the most votes are scored, each domain point
        voting for M_pre / 4; ``off``: every row is scored.
      pool_sample: rows of the whole pool, drawn from the seed, whose mean gradient is the second tangent.
    """

    kernel: Literal["sum_logits", "loss"] = "sum_logits"
    scores: Literal["forward", "sketch"] = "forward"
    sketch_size: int = 8192
    stage1: Literal["on", "off"] = "on"
    prefilter_factor: int = 4
    pool_sample: int = 512

    def __post_init__(self) -> None:
        for name, allowed in (
            ("kernel", ("sum_logits", "loss")),
            ("scores", ("forward", "sketch")),
            ("stage1", ("on", "off")),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(allowed)}")
        for name in ("sketch_size", "prefilter_factor", "pool_sample"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")

    def __call__(self, problem: SelectionProblem) -> Selection:
        votes = self.prefilter(problem)
        kept = min(self.prefilter_factor * problem.n, len(problem.pool))
        candidates = np.arange(len(problem.pool)) if votes is None else votes.top(kept)
        scores, reference = self.score(problem, candidates)
        counted = None if votes is None else votes.votes
        chosen = select_top("ntk", scores, problem.n, votes=counted)
        report = describe(chosen, problem.pool, reference) | {"kernel": self.kernel, "scores": self.scores}
        if votes is not None:
            report |= {
                "stage1_candidates": len(candidates),
                "stage1_without_a_vote": int(np.sum(votes.votes[candidates] == 0)),
                "stage1_zero_embeddings": votes.zero_norm,
            }
        return dataclasses.replace(chosen, diagnostics=report)

    def prefilter(self, problem: SelectionProblem) -> Votes | None:
        """Stage 1: the domain's votes, or None where it is off."""
        if self.stage1 == "off":
            return None
        return stage1_votes(problem, max(1, self.prefilter_factor * problem.n // 4))

    def output_fn(self, problem: SelectionProblem) -> Callable:
        """The scalar F whose gradient the kernel compares."""
        return problem.nll_fn if self.kernel == "loss" else sum_logits(problem.hidden_fn, problem.head)

    def score(self, problem: SelectionProblem, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(s_j with the domain, s_j with the pool's own mean gradient), float64 [N], NaN outside ``candidates``."""
        rows, budget = len(problem.pool), problem.token_budget
        rng = numpy_rng(problem.seed, "selection", "pool sample")
        drawn = rng.choice(rows, size=min(self.pool_sample, rows), replace=False)
        store = None
        if problem.work_dir is not None:
            store = RowStore.open(
                problem.work_dir / "scores",
                rows=rows,
                width=2,
                dtype=np.float32,
                manifest={
                    **problem.manifest,
                    **dataclasses.asdict(self),
                    "n": problem.n,
                    "seed": problem.seed,
                    "rows": "scores",
                },
            )
        found = kernel_scores(
            self.output_fn(problem),
            problem.params,
            problem.domain.batches(token_budget=budget),
            problem.pool.batches(token_budget=budget, indices=candidates),
            rows=rows,
            method=self.scores,
            references=[problem.pool.batches(token_budget=budget, indices=np.sort(drawn))],
            sketch=RademacherSketch(self.sketch_size, problem.seed) if self.scores == "sketch" else None,
            store=store,
            progress=problem.progress and "score pool",
        )
        scores = np.asarray(found.scores, np.float64)
        return scores[:, 0], scores[:, 1]
