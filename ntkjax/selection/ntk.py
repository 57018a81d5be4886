"""NTK-Selector (arXiv 2511.07380): an embedding vote, then the tangent kernel's mean score with the domain.

s_j = 1/M sum_i k(x_i, x_j) = <g_bar, g_j>; the n highest are chosen. ``k`` is the paper's ``sum_logits`` kernel or any
other of ``ntkjax.ntk.kernels``; the scores are exact (forward-mode pass) or the paper's (per-example gradients,
sketched to K); the direction is g_bar, or what is left of it without what all gradients share, preconditioned or not;
and the mean over the domain may be another aggregation (``ntkjax.selection.aggregation``).
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from ntkjax.errors import ConfigError
from ntkjax.ntk.features import squared_norms
from ntkjax.ntk.kernel import Kernel
from ntkjax.ntk.kernels import KernelFunctions, build, parse
from ntkjax.ntk.precondition import DAMPING, PreconditionerName, build_preconditioner
from ntkjax.ntk.scores import MANY, MAX_TANGENTS, KernelScores, kernel_scores
from ntkjax.ntk.sketch import Sketch
from ntkjax.rng import numpy_rng
from ntkjax.selection.aggregation import (
    BY_EXAMPLE,
    AggregationName,
    check_aggregation,
    compare_examples,
    domain_groups,
)
from ntkjax.selection.base import Selection, SelectionProblem, ranks_after, select_top
from ntkjax.selection.cost import FORWARD, TRAIN, Sizes
from ntkjax.selection.diagnostics import describe
from ntkjax.selection.gradients import (
    SKETCHES,
    Candidates,
    SketchName,
    Switch,
    domain_features,
    find_candidates,
    place,
)
from ntkjax.selection.rds import take_turns
from ntkjax.store import RowStore

ScoreMethod = Literal["forward", "sketch"]
DirectionName = Literal["raw", "contrast", "cosine"]


def check_precondition(name: str, scores: str, direction: str, damping: float) -> None:
    """Raise ConfigError where a preconditioner cannot serve the other options."""
    if not damping > 0:
        raise ConfigError(f"damping must be above 0, got {damping}")
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
class NtkSelector:
    """The paper's two stages, and the choices it leaves open.

    Attributes:
      kernel: ``sum_logits`` [paper], ``loss``, ``spectral:m``, ... (see `ntkjax.ntk.kernels.parse`).
      direction: ``raw`` [paper]: <g_bar, g_j>. ``contrast``: <g_bar - proj_p g_bar, g_j> with p the mean gradient of
        the pool sample. ``cosine``: <g_bar, g_j> / (|g_bar| |g_j|), which needs every candidate's gradient norm and so
        costs per-example gradients.
      scores: ``forward`` (exact) or ``sketch`` (the paper's path, K = ``sketch_size``).
      sketch: the map of ``scores`` sketch: ``rademacher`` [paper], ``sparse`` or ``kronecker``. The default ranks like
        the paper's and costs next to nothing (experiments/bench_sketch.py).
      precondition: ``none``; ``adam`` or ``kfac``: <P^-1 g_bar, g_j> with P from the domain's loss (see
        `ntkjax.ntk.precondition`), the pool's mean gradient treated alike.
      damping: of ``kfac``, over the mean curvature.
      stage1: ``on``: only the M_pre = ``prefilter_factor`` * n rows with the most votes are scored, each domain point
        voting for M_pre / 4; ``off``: every row is scored.
      pool_sample: rows of the whole pool, drawn from the seed, whose mean gradient is one more tangent.
      aggregation: ``mean`` [paper], ``clusters``, ``max`` or ``round-robin`` over the domain's examples, see
        `ntkjax.selection.aggregation`; the last two need ``scores`` sketch.
      domain_clusters: how many groups of domain examples ``clusters`` makes, at most.
    """

    kernel: str = "sum_logits"
    direction: DirectionName = "raw"
    scores: ScoreMethod = "forward"
    sketch: SketchName = "sparse"
    sketch_size: int = 8192
    precondition: PreconditionerName = "none"
    damping: float = DAMPING
    stage1: Switch = "on"
    prefilter_factor: int = 4
    pool_sample: int = 512
    aggregation: AggregationName = "mean"
    domain_clusters: int = 8

    def __post_init__(self) -> None:
        parse(self.kernel)
        kinds = {"direction": DirectionName, "scores": ScoreMethod, "sketch": SketchName, "stage1": Switch}
        for name, kind in (kinds | {"precondition": PreconditionerName}).items():
            if getattr(self, name) not in get_args(kind):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(get_args(kind))}")
        check_precondition(self.precondition, self.scores, self.direction, self.damping)
        check_aggregation(self.aggregation, self.scores, self.domain_clusters)
        for name in ("sketch_size", "prefilter_factor", "pool_sample"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def one_pass(self) -> bool:
        """Whether the candidates are scored by one forward-mode pass with two tangents, and nothing else."""
        plain = (self.scores, self.aggregation, self.precondition) == ("forward", "mean", "none")
        return plain and self.direction != "cosine"

    def passes(self, sizes: Sizes) -> float:
        """Mean gradients of domain and pool sample, then the candidates under all directions at once; or, where
        examples of the domain are looked at one by one or scores are sketched, the gradients of all of them."""
        outputs = parse(self.kernel).outputs(sizes.width)
        gradient = FORWARD + 2 * outputs  # one backward pass for each output
        sample = sizes.pool / sizes.rows * min(self.pool_sample, sizes.rows)
        before = sizes.stage1(self.stage1) + gradient * (sizes.domain + sample)
        if self.precondition != "none":
            before += TRAIN * sizes.domain
        if self.scores == "sketch":
            return before + gradient * sizes.scored
        groups = 1
        if self.aggregation == "clusters":
            groups, before = self.domain_clusters, before + gradient * sizes.domain
        tangents = (groups + 1) * outputs
        passes = gradient if groups + 1 >= MANY else math.ceil(tangents / MAX_TANGENTS) + tangents
        norms = gradient if self.direction == "cosine" else 0
        return before + (passes + norms) * sizes.scored

    def __call__(self, problem: SelectionProblem) -> Selection:
        candidates = find_candidates(problem, stage1=self.stage1, prefilter_factor=self.prefilter_factor)
        if self.aggregation in BY_EXAMPLE:
            chosen, reference, more = self.by_example(problem, candidates)
        else:
            scores, reference, more = self.score(problem, candidates.rows)
            chosen = select_top("ntk", scores, problem.n, votes=candidates.counts)
        options = {k: getattr(self, k) for k in ("kernel", "direction", "scores", "precondition", "aggregation")}
        report = describe(chosen, problem.pool, reference) | options | more | candidates.report()
        return dataclasses.replace(chosen, diagnostics=report)

    def score(self, problem: SelectionProblem, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """(s_j along ``direction``, s_j with the pool's own mean gradient: float64 [N], NaN outside ``candidates``; and
        what to report)."""
        budget = problem.token_budget
        functions = KernelFunctions(problem.hidden_fn, problem.head, problem.nll_fn)
        kernel = build(self.kernel, functions, problem.params, seed=problem.seed)
        domain, report = self.groups(problem)
        found = kernel_scores(
            kernel,
            problem.params,
            domain[0],
            problem.pool.batches(token_budget=budget, indices=candidates),
            rows=len(problem.pool),
            method=self.scores,
            references=[*domain[1:], problem.pool.batches(token_budget=budget, indices=self.sample(problem))],
            sketch=self.make_sketch(problem),
            precondition=self.preconditioner(problem),
            store=self.store(problem, "scores", width=len(domain) + 1),
            progress=problem.progress and "score pool",
        )
        along = self.along(found, problem, kernel, candidates)
        return along.max(axis=1), np.asarray(found.scores[:, -1], np.float64), report

    def sample(self, problem: SelectionProblem) -> np.ndarray:
        """The pool rows whose mean gradient stands for the pool's."""
        rows = len(problem.pool)
        rng = numpy_rng(problem.seed, "selection", "pool sample")
        return np.sort(rng.choice(rows, size=min(self.pool_sample, rows), replace=False))

    def groups(self, problem: SelectionProblem) -> tuple[list[Any], dict[str, Any]]:
        """(batches of every group of domain examples whose mean gradient is a direction, what to report)."""
        plan: Any = problem.domain.batches(token_budget=problem.token_budget)
        if self.aggregation == "mean":
            return [plan], {}
        options = {"kernel": self.kernel, "sketch": self.sketch, "size": self.sketch_size}
        labels = domain_groups(problem, lambda: domain_features(problem, **options), self.domain_clusters, options)
        sizes = np.bincount(labels).tolist()
        return [plan.only(labels == group) for group in range(len(sizes))], {"domain_cluster_sizes": sizes}

    def along(
        self, found: KernelScores, problem: SelectionProblem, kernel: Kernel, candidates: np.ndarray
    ) -> np.ndarray:
        """The scores along ``direction`` for each group of domain examples, float64 [N, groups]."""
        raw, gram = np.asarray(found.scores[:, :-1], np.float64), found.gram
        if self.direction == "raw":
            return raw
        if self.direction == "contrast":  # what each direction shares with the pool's, the last
            return raw - gram[:-1, -1] / gram[-1, -1] * np.asarray(found.scores[:, -1:], np.float64)
        squares = squared_norms(
            kernel,
            problem.params,
            problem.pool.batches(token_budget=problem.token_budget, indices=candidates),
            rows=len(problem.pool),
            sketch=self.make_sketch(problem),
            store=self.store(problem, "norms", width=1),
            progress=problem.progress and "gradient norms",
        )
        zero = np.flatnonzero(squares == 0)
        if len(zero):
            raise ConfigError(
                f"direction cosine: the gradient of {len(zero)} pool example(s) is exactly 0 (first: row {zero[0]}), "
                "so their cosine is undefined; leave them out of the pool, or use direction raw or contrast"
            )
        return raw / np.sqrt(np.asarray(squares, np.float64)[:, None] * np.diagonal(gram)[:-1])

    def by_example(
        self, problem: SelectionProblem, candidates: Candidates
    ) -> tuple[Selection, np.ndarray, dict[str, Any]]:
        """(the selection by ``max`` or ``round-robin``, s_j with the pool's own mean gradient, what to report)."""
        turns = self.aggregation == "round-robin"
        found, reference = compare_examples(
            problem,
            candidates.rows,
            self.sample(problem),
            kernel=self.kernel,
            sketch=self.sketch,
            size=self.sketch_size,
            direction=self.direction,
            nearest_rows=problem.n if turns else 1,
        )
        rows = len(problem.pool)
        scores = place(found.highest.astype(np.float64), candidates.rows, rows)
        chosen = select_top("ntk", scores, problem.n, votes=candidates.counts)
        if turns:
            taken = candidates.rows[take_turns(found.rows, problem.n)]
            chosen = dataclasses.replace(chosen, ranks=ranks_after(taken, scores), selected=taken)
        return chosen, place(reference, candidates.rows, rows), {}

    def make_sketch(self, problem: SelectionProblem) -> Sketch | None:
        """The projection of the paper's path, or None on the exact path."""
        return SKETCHES[self.sketch](self.sketch_size, problem.seed) if self.scores == "sketch" else None

    def preconditioner(self, problem: SelectionProblem) -> Any:
        """P^-1 at theta from the domain's loss, or None."""
        return build_preconditioner(
            self.precondition,
            problem.nll_fn,
            problem.params,
            problem.domain.batches(token_budget=problem.token_budget),
            damping=self.damping,
            progress=problem.progress and "curvature of the domain loss",
        )

    def store(self, problem: SelectionProblem, name: str, *, width: int) -> RowStore | None:
        """Where rows called ``name`` are kept so that a killed run goes on; None without a work directory."""
        if problem.work_dir is None:
            return None
        # A contrast is taken from the same rows as the raw score: the direction is no part of what they depend on.
        unused = {"direction"} | ({"aggregation", "domain_clusters"} if self.aggregation == "mean" else set())
        options = {k: v for k, v in dataclasses.asdict(self).items() if k not in unused}
        manifest = {**problem.manifest, **options, "n": problem.n, "seed": problem.seed, "rows": name}
        path: Path = problem.work_dir / name
        return RowStore.open(path, rows=len(problem.pool), width=width, dtype=np.float32, manifest=manifest)
