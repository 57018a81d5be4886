"""NTK-Selector (arXiv 2511.07380): an embedding vote, then the tangent kernel's mean score with the domain.

s_j = 1/M sum_i k(x_i, x_j) = <g_bar, g_j>; the n highest are chosen. ``k`` is the paper's ``sum_logits`` kernel or any
other of ``ntkjax.ntk.kernels``; the scores are exact (forward-mode pass) or the paper's (per-example gradients,
sketched to K); the direction is g_bar, or what is left of it without what all gradients share, preconditioned or not;
and the mean over the domain may be another aggregation (``ntkjax.selection.aggregation``).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ntkjax.ahead import Program
from ntkjax.errors import ConfigError
from ntkjax.ntk.features import squared_norms
from ntkjax.ntk.kernel import Kernel
from ntkjax.ntk.kernels import KernelFunctions, build, parse
from ntkjax.ntk.precondition import PASSES, build_preconditioner
from ntkjax.ntk.rows import Pass
from ntkjax.ntk.scores import (
    MANY,
    MAX_TANGENTS,
    ForwardScorer,
    KernelScores,
    Scorer,
    SketchScorer,
    kernel_scores,
    score_directions,
    score_programs,
)
from ntkjax.ntk.sketch import Sketch
from ntkjax.ntk.sketches import SKETCHES
from ntkjax.rng import numpy_rng
from ntkjax.selection.aggregation import BY_EXAMPLE, AggregationName, check_aggregation, compare_examples
from ntkjax.selection.algorithms.clusters import domain_groups
from ntkjax.selection.base import Selection, SelectionProblem, select_top
from ntkjax.selection.cost import FORWARD, TRAIN, Sizes
from ntkjax.selection.directional import Directional
from ntkjax.selection.gradients import Candidates, Stage1Selector, domain_features, find_candidates, scatter
from ntkjax.selection.options import (
    CgOptions,
    ClusterOptions,
    DirectionOptions,
    KernelOptions,
    PreconditionOptions,
    SketchOptions,
    Stage1Options,
    check_choice,
)
from ntkjax.selection.parts import named_parts
from ntkjax.store import RowStore

ScoreMethod = Literal["forward", "sketch"]


def check_precondition(name: str, scores: str, direction: str) -> None:
    """Raise ConfigError where a preconditioner cannot serve the other options."""
    if name == "none":
        return
    if scores != "forward":
        raise ConfigError(f"precondition {name} needs scores forward, got {scores}")
    if direction == "cosine":
        raise ConfigError(
            f"precondition {name} with direction cosine: the norm of every example's preconditioned gradient would be "
            "needed, which forward mode does not give; use direction raw or contrast"
        )


@dataclasses.dataclass(frozen=True)
class NtkOptions(
    KernelOptions, DirectionOptions, SketchOptions, Stage1Options, PreconditionOptions, CgOptions, ClusterOptions
):
    """Options of ``ntk``, NTK-Selector (arXiv 2511.07380): the defaults are the paper's but for the sketch."""

    scores: ScoreMethod = "forward"
    """forward: exact, one jax.jvp pass; sketch: the paper's per-example gradients, projected."""
    aggregation: AggregationName = "mean"
    """Over the domain's examples. mean: the paper's; clusters: the best of the means of groups of them; max: the best
    of all; round-robin: each takes its best in turn. The last two need scores=sketch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("scores", self.scores, ScoreMethod)
        check_precondition(self.precondition, self.scores, self.direction)
        check_aggregation(self.aggregation, self.scores)


@dataclasses.dataclass(frozen=True)
class NtkSelector(NtkOptions, Stage1Selector):
    """The paper's two stages, and the choices it leaves open.

    Stage 2 scores the M_pre = ``prefilter_factor`` * n rows with the most votes along one direction: g_bar [paper],
    what ``direction`` leaves of it, P^-1 of that with ``precondition`` (`ntkjax.ntk.precondition`; the pool's mean
    gradient is treated alike), or one for each group of domain examples (`ntkjax.selection.aggregation`). ``scores``
    sketch is the paper's way to the same numbers; the default sketch ranks like the paper's and costs next to nothing
    (experiments/bench_sketch.py).

    Raises:
      ConfigError: options out of range, or that do not go together.
    """

    @property
    def forward_kernel(self) -> str | None:
        """The kernel, with the options under which one pass with two tangents is all that is asked."""
        plain = (self.scores, self.aggregation, self.precondition) == ("forward", "mean", "none")
        return self.kernel if plain and self.direction != "cosine" else None

    @property
    def feature_size(self) -> int:
        """K where more than one forward-mode pass is asked."""
        return 0 if self.forward_kernel is not None else self.sketch_size

    def forward_tokens(self, sizes: Sizes) -> float:
        """Mean gradients of domain and pool sample, then the candidates under all directions at once; or, where
        examples of the domain are looked at one by one or scores are sketched, the gradients of all of them."""
        outputs = parse(self.kernel).outputs(sizes.width)
        gradient = FORWARD + 2 * outputs  # one backward pass for each output
        sample = sizes.pool / sizes.rows * min(self.pool_sample, sizes.rows)
        before = sizes.stage1(self.stage1) + gradient * (sizes.domain + sample)
        before += TRAIN * PASSES[self.precondition] * sizes.domain
        if self.scores == "sketch":
            return before + gradient * sizes.scored
        groups = 1
        if self.aggregation == "clusters":
            groups, before = self.domain_clusters, before + gradient * sizes.domain
        tangents = (groups + 1) * outputs
        if self.precondition == "cg":  # a forward-mode and a reverse product for each iteration, at most
            before += (2 * FORWARD + TRAIN) * self.cg_iterations * tangents * sizes.domain
        passes = gradient if groups + 1 >= MANY else math.ceil(tangents / MAX_TANGENTS) + tangents
        norms = gradient if self.direction == "cosine" else 0
        return before + (passes + norms) * sizes.scored

    def __call__(self, problem: SelectionProblem) -> Selection:
        candidates = find_candidates(problem, stage1=self.stage1, prefilter_factor=self.prefilter_factor)
        if self.aggregation in BY_EXAMPLE:
            chosen, report = self.by_example(problem, candidates), {}
        else:
            scores, pool_mean_scores, report = self.score(problem, candidates.rows)
            chosen = select_top("ntk", scores, problem.n, votes=candidates.counts, pool_mean_scores=pool_mean_scores)
        options = {k: getattr(self, k) for k in ("kernel", "direction", "scores", "precondition", "aggregation")}
        similarity = "cosine" if self.direction == "cosine" else "product"
        options |= named_parts("gradients", self.aggregation, similarity)
        return dataclasses.replace(chosen, diagnostics=options | report | candidates.report())

    def programs(self, problem: SelectionProblem) -> Iterator[Program]:
        """Those of stage 1; and, where one pass in forward mode is all that is asked after it, those of the mean
        gradients and of that pass, for as many candidates as there will be."""
        yield from super().programs(problem)
        if self.forward_kernel is None:
            return
        of = lambda rows, budget: problem.pool.batches(token_budget=budget, indices=rows)
        candidates = np.arange(self.scored_rows(problem.n, len(problem.pool)))
        sets = [*self.groups(problem)[0], of(self.sample(problem), problem.gradient_budget)]
        kernel, pool = self.kernel_of(problem), of(candidates, problem.token_budget)
        yield from score_programs(kernel, problem.params, sets, pool)

    def score(self, problem: SelectionProblem, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """(s_j along the domain's direction, s_j with the pool's own mean gradient: float64 [N], NaN outside
        ``candidates``; and what to report)."""
        kernel = self.kernel_of(problem)
        domain, report = self.groups(problem)
        sample = problem.pool.batches(token_budget=problem.gradient_budget, indices=self.sample(problem))
        scored = kernel_scores(
            kernel,
            problem.params,
            domain[0],
            problem.pool.batches(token_budget=problem.token_budget, indices=candidates),
            rows=Pass(
                len(problem.pool),
                self.store(problem, "scores", width=len(domain) + 1),
                progress=problem.bar("score pool"),
            ),
            references=[*domain[1:], sample],
            scorer=self.scorer(problem),
        )
        report = report | self.solved(scored.residual)
        # The raw scores and the Gram matrix hold every direction: contrasts and cosines cost no pass over the pool.
        by_group = self.along(scored, problem, kernel, candidates)
        return by_group.max(axis=1), np.asarray(scored.scores[:, -1], np.float64), report

    def kernel_of(self, problem: SelectionProblem) -> Kernel:
        """The kernel at the problem's parameters."""
        functions = KernelFunctions(problem.hidden_fn, problem.head, problem.nll_fn, problem.sum_logits_fn)
        return build(self.kernel, functions, problem.params, seed=problem.seed)

    @property
    def no_parts(self) -> str | None:
        """None on the exact path: a mean over examples, or over groups of them, is a direction."""
        if self.scores == "forward":
            return None
        if self.aggregation in BY_EXAMPLE:
            return f"aggregation {self.aggregation} compares examples one by one, and not with a direction"
        return "scores sketch estimates them from projected gradients; scores forward gives them exactly"

    def directional(self, problem: SelectionProblem, rows: np.ndarray) -> Directional:
        """u_r = P^-1 g_bar_r, without what ``direction`` takes from it; for cosines divided by |g_bar_r|, and the
        scores by |g_j|."""
        if self.no_parts is not None:
            raise ConfigError(f"ntk: {self.no_parts}")
        kernel, (domain, _) = self.kernel_of(problem), self.groups(problem)
        sample = problem.pool.batches(token_budget=problem.gradient_budget, indices=self.sample(problem))
        along, gram = score_directions(
            kernel,
            problem.params,
            [*domain, sample] if self.direction == "contrast" else domain,
            precondition=self.preconditioner(problem),
            progress=problem.bar(),
        )
        if self.direction == "raw":
            return Directional(kernel, tuple(along), tuple(np.diagonal(gram).tolist()))
        if self.direction == "contrast":
            shared = gram[:-1, -1] / gram[-1, -1]
            less = lambda u, share: jax.tree.map(lambda a, p: a - jnp.asarray(share, a.dtype) * p, u, along[-1])
            own = np.diagonal(gram)[:-1] - shared * gram[-1, :-1]
            return Directional(kernel, tuple(map(less, along[:-1], shared)), tuple(own.tolist()))
        lengths = np.sqrt(np.diagonal(gram))
        unit = [jax.tree.map(lambda a, x=x: a / jnp.asarray(x, a.dtype), u) for u, x in zip(along, lengths)]
        squares = np.asarray(self.squares(problem, kernel, rows), np.float64)
        return Directional(kernel, tuple(unit), divisors=np.sqrt(squares))

    def squares(self, problem: SelectionProblem, kernel: Kernel, candidates: np.ndarray) -> np.ndarray:
        """|g_j|^2 of the candidates, [N], NaN elsewhere."""
        return squared_norms(
            kernel,
            problem.params,
            problem.pool.batches(token_budget=problem.token_budget, indices=candidates),
            rows=Pass(
                len(problem.pool),
                self.store(problem, "norms", width=1),
                progress=problem.bar("gradient norms"),
            ),
            sketch=self.make_sketch(problem),
        )

    def solved(self, residual: float | None) -> dict[str, Any]:
        """What conjugate gradients reached, in words where that is not what was asked for."""
        if residual is None:
            return {}
        report: dict[str, Any] = {"cg_residual": residual, "cg_converged": bool(residual <= self.cg_tolerance)}
        if not report["cg_converged"]:
            report["cg_warning"] = (
                f"conjugate gradients did not converge: a residual of {residual:.1e} |u| after at most "
                f"{self.cg_iterations} iterations in the precision of the parameters, and {self.cg_tolerance:.1e} |u| "
                "was asked for; raise --cg-iterations or --damping, or ask for less with a higher --cg-tolerance"
            )
        return report

    def sample(self, problem: SelectionProblem) -> np.ndarray:
        """The pool rows whose mean gradient stands for the pool's."""
        rows = len(problem.pool)
        rng = numpy_rng(problem.seed, "selection", "pool sample")
        return np.sort(rng.choice(rows, size=min(self.pool_sample, rows), replace=False))

    def groups(self, problem: SelectionProblem) -> tuple[list[Any], dict[str, Any]]:
        """(batches of every group of domain examples whose mean gradient is a direction, what to report)."""
        plan: Any = problem.domain.batches(token_budget=problem.gradient_budget)
        if self.aggregation == "mean":
            return [plan], {}
        options = {"kernel": self.kernel, "sketch": self.sketch, "size": self.sketch_size}
        labels = domain_groups(problem, lambda: domain_features(problem, **options), self.domain_clusters, options)
        sizes = np.bincount(labels).tolist()
        return [plan.only(labels == group) for group in range(len(sizes))], {"domain_cluster_sizes": sizes}

    def along(
        self, scored: KernelScores, problem: SelectionProblem, kernel: Kernel, candidates: np.ndarray
    ) -> np.ndarray:
        """The scores along ``direction`` for each group of domain examples, float64 [N, groups]."""
        raw, gram = np.asarray(scored.scores[:, :-1], np.float64), scored.gram
        if self.direction == "raw":
            return raw
        if self.direction == "contrast":  # what each direction shares with the pool's, the last
            return raw - gram[:-1, -1] / gram[-1, -1] * np.asarray(scored.scores[:, -1:], np.float64)
        # |g_j| is the one thing that forward mode does not give: it takes a gradient for each example.
        squares = self.squares(problem, kernel, candidates)
        zero = np.flatnonzero(squares == 0)
        if len(zero):
            raise ConfigError(
                f"direction cosine: the gradient of {len(zero)} pool example(s) is exactly 0 (first: row {zero[0]}), "
                "so their cosine is undefined; leave them out of the pool, or use direction raw or contrast"
            )
        return raw / np.sqrt(np.asarray(squares, np.float64)[:, None] * np.diagonal(gram)[:-1])

    def by_example(self, problem: SelectionProblem, candidates: Candidates) -> Selection:
        """The selection by ``max`` or ``round-robin``, without what is reported."""
        choice, pool_mean_scores = compare_examples(
            problem,
            candidates.rows,
            self.sample(problem),
            kernel=self.kernel,
            sketch=self.sketch,
            size=self.sketch_size,
            direction=self.direction,
            algorithm=BY_EXAMPLE[self.aggregation],
        )
        chosen = choice.selection("ntk", candidates, problem, {})
        return dataclasses.replace(
            chosen, pool_mean_scores=scatter(pool_mean_scores, candidates.rows, len(problem.pool))
        )

    def make_sketch(self, problem: SelectionProblem) -> Sketch | None:
        """The projection of the paper's path, or None on the exact path."""
        return SKETCHES[self.sketch](self.sketch_size, problem.seed) if self.scores == "sketch" else None

    def scorer(self, problem: SelectionProblem) -> Scorer:
        """How the scores are computed."""
        sketch = self.make_sketch(problem)
        return ForwardScorer(self.preconditioner(problem)) if sketch is None else SketchScorer(sketch)

    def preconditioner(self, problem: SelectionProblem) -> Any:
        """P^-1 at theta from the domain's loss, or None."""
        return build_preconditioner(
            self.precondition,
            problem.nll_fn,
            problem.params,
            problem.domain.batches(token_budget=problem.gradient_budget),
            damping=self.damping,
            iterations=self.cg_iterations,
            tolerance=self.cg_tolerance,
            progress=problem.bar("curvature of the domain loss"),
        )

    def store(self, problem: SelectionProblem, name: str, *, width: int) -> RowStore | None:
        """Where rows called ``name`` are kept so that a killed run goes on; None without a work directory."""
        if problem.work_dir is None:
            return None
        # A contrast is taken from the same rows as the raw score: the direction is no part of what they depend on.
        unused = {"direction"} | ({"aggregation", "domain_clusters"} if self.aggregation == "mean" else set())
        unused |= set() if self.precondition == "cg" else {"cg_iterations", "cg_tolerance"}
        options = {k: v for k, v in dataclasses.asdict(self).items() if k not in unused}
        manifest = {**problem.manifest, **options, "n": problem.n, "seed": problem.seed, "rows": name}
        path: Path = problem.work_dir / name
        shared: dict[str, Any] = {"manifest": manifest, "together": problem.together}
        return RowStore.open(path, rows=len(problem.pool), width=width, dtype=np.float32, **shared)
