"""What the gradient methods share: gradient features of domain and pool, computed once, and stage 1 before them.

phi_j = Pi g_j in R^K for the gradient g_j of a kernel's output at x_j, by default of its loss, under one sketch Pi for
domain and pool, so that inner products estimate the kernel (see ``ntkjax.ntk.sketch``). With ``adam`` the pool's
gradients are what an Adam step would make of them (LESS, arXiv 2402.04333): from the moments m, v of a checkpoint

    g_j  ->  m' / sqrt(v' + 1e-8),    m' = 0.9 m + 0.1 g_j,    v' = 0.999 v + 0.001 g_j^2

elementwise, without bias correction, before the sketch. The domain's gradients stay as they are: they say how its loss
changes along a step, and the pool's examples give the steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ntkjax import ntk
from ntkjax.ahead import Program
from ntkjax.errors import ConfigError, UserError
from ntkjax.fingerprint import tree_digest
from ntkjax.ntk.kernel import Kernel
from ntkjax.ntk.kernels import KERNELS, KernelFunctions, build, parse
from ntkjax.ntk.precondition import DAMPING, build_preconditioner
from ntkjax.ntk.rows import Pass
from ntkjax.ntk.sketch import Sketch
from ntkjax.ntk.sketches import SKETCHES
from ntkjax.selection.base import Batches, Dataset, SelectionProblem, Selector, WarmupCheckpoint
from ntkjax.selection.embeddings import embedding_programs, stage1_votes
from ntkjax.selection.options import GradientOptions, Stage1Options
from ntkjax.selection.shared import open_shared, parts_to_do
from ntkjax.selection.vote import Votes
from ntkjax.types import Params

BLOCK = 1024
"""Rows of features read at a time."""
ADAM_B1, ADAM_B2, ADAM_EPS = 0.9, 0.999, 1e-8
ReadRows = Callable[[np.ndarray], Float[np.ndarray, "n K"]]


# -- stage 1 --


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The pool rows that a method looks at.

    Attributes:
      rows: int64 [C], ascending.
      votes: the domain's votes of stage 1; None where every row is a candidate.
    """

    rows: Int[np.ndarray, " C"]
    votes: Votes | None = None

    @property
    def counts(self) -> Int[np.ndarray, " N"] | None:
        """Votes of every pool row, for a `Selection`."""
        return None if self.votes is None else self.votes.votes

    def report(self) -> dict[str, Any]:
        """What stage 1 did, for the diagnostics; empty without it."""
        if self.votes is None:
            return {}
        return {
            "stage1_candidates": len(self.rows),
            "stage1_without_a_vote": int(np.sum(self.votes.votes[self.rows] == 0)),
            "stage1_zero_embeddings": self.votes.zero_norm,
        }


def find_candidates(problem: SelectionProblem, *, stage1: str, prefilter_factor: int) -> Candidates:
    """Stage 1 of NTK-Selector (arXiv 2511.07380), the same for every gradient method: with ``stage1`` on the M_pre =
    ``prefilter_factor`` * n rows with the most votes, each domain point voting for its M_pre / 4 nearest; off: all."""
    if stage1 == "off":
        return Candidates(np.arange(len(problem.pool)))
    kept = prefilter_factor * problem.n
    votes = stage1_votes(problem, max(1, kept // 4))
    return Candidates(votes.top(min(kept, len(problem.pool))), votes)


class Stage1Selector(Stage1Options, Selector):
    """A method that scores what stage 1 keeps, and reads nothing else of the pool's other rows but their embeddings."""

    def programs(self, problem: SelectionProblem) -> Iterator[Program]:
        """The embedding, where there is a stage 1."""
        yield from embedding_programs(problem) if self.stage1 == "on" else ()


class GradientSelector(GradientOptions, Stage1Selector):
    """A method that keeps a sketched gradient of every candidate."""

    @property
    def feature_size(self) -> int:
        """K."""
        return self.sketch_size


# -- features --


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdamSketch:
    """Pi(m' / sqrt(v' + 1e-8)) of each row's gradient (see the module).

    Attributes:
      sketch: Pi.
      first, second: m, v, pytrees like the parameters.
    """

    sketch: Any
    first: Any
    second: Any

    @property
    def grouped(self) -> bool:
        return self.sketch.grouped

    def __call__(self, gradients: Params) -> Float[Array, "B K"]:
        """Of gradients {"outputs": leaves [B, 1, ...]} of a kernel of one output."""
        moved = jax.tree.map(adam_update, gradients["outputs"], self.first, self.second)
        return self.sketch({"outputs": moved})

    def width(self, params: Params) -> int:
        return self.sketch.width(params)

    def describe(self) -> dict[str, Any]:
        return self.sketch.describe() | {"adam": [tree_digest(self.first), tree_digest(self.second)]}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PreconditionedSketch:
    """Pi P^-1 g of each row's gradient.

    Attributes:
      sketch: Pi.
      solve: P^-1, a function of trees of leaves [c, ...] (see `ntkjax.ntk.precondition`).
      name: of P and its damping.
    """

    sketch: Any
    solve: Any
    name: tuple[str, float] = dataclasses.field(metadata={"static": True})

    @property
    def grouped(self) -> bool:
        return self.sketch.grouped

    def __call__(self, gradients: Params) -> Float[Array, "B K"]:
        """Of gradients {"outputs": leaves [B, m, ...]}."""
        outputs = gradients["outputs"]
        solved = self.solve(jax.tree.map(lambda g: g.reshape(-1, *g.shape[2:]), outputs))
        return self.sketch({"outputs": jax.tree.map(lambda g, u: u.reshape(g.shape), outputs, solved)})

    def width(self, params: Params) -> int:
        return self.sketch.width(params)

    def describe(self) -> dict[str, Any]:
        return self.sketch.describe() | {"precondition": list(self.name)}


def adam_update(g: Float[Array, "..."], m: Float[Array, "..."], v: Float[Array, "..."]) -> Float[Array, "..."]:
    """m' / sqrt(v' + 1e-8) with the moments' axes the last of g's, in g's dtype."""
    # g has axes of examples and outputs in front; m and v are one for all.
    axes = (1,) * (g.ndim - jnp.ndim(m)) + jnp.shape(m)
    first = ADAM_B1 * jnp.asarray(m).astype(g.dtype).reshape(axes) + (1 - ADAM_B1) * g
    second = ADAM_B2 * jnp.asarray(v).astype(g.dtype).reshape(axes) + (1 - ADAM_B2) * g * g
    return first / jnp.sqrt(second + ADAM_EPS)


def gradient_features(
    problem: SelectionProblem,
    candidates: Int[np.ndarray, " C"],
    *,
    kernel: str | Kernel = "loss",
    sketch: str,
    size: int,
    checkpoint: WarmupCheckpoint | None = None,
    adam: bool = False,
    precondition: str = "none",
    damping: float = DAMPING,
) -> tuple[Float[np.ndarray, "M K"], ReadRows]:
    """phi of every domain example [M, K], and a function from candidates (any of them, [n]) to theirs [n, K], float32.

    Under ``shared_dir`` (``work_dir`` without one; neither: in memory) rows lie in a folder named from what they depend
    on, which the candidates are not among: a method with more or other candidates computes the rows that are missing
    and reads the others, and a killed run goes on (see `ntkjax.selection.shared.parts_to_do`).

    Args:
      candidates: rows of the pool.
      kernel: a name of `ntkjax.ntk.kernels.parse`, or a kernel, whose name must tell it from all others; g the
        gradients of its outputs, sketched into one phi.
      sketch: a name of `SKETCHES`, drawn from the problem's seed. size: K.
      checkpoint: theta (and Adam's moments) to use; None: the problem's ``params``.
      adam: Adam's step in the place of the pool's gradients, with the moments of ``checkpoint``.
      precondition, damping: P^-1 g in the place of the domain's gradients (see `ntkjax.ntk.precondition`), P of the
        domain's loss at the same theta.

    Raises:
      ConfigError: ``adam`` without a checkpoint, or with a kernel of several outputs; ``precondition`` with a trained
        head whose gradient the kernel does not hold.
      NonFiniteError: rows whose gradient is NaN or infinite; the others are kept.
    """
    if adam and (checkpoint is None or isinstance(kernel, Kernel) or not parse(kernel).kind.single):
        single = " or ".join(name for name, kind in KERNELS.items() if kind.single)
        raise ConfigError(
            f"Adam's update of gradients needs a warm-up checkpoint and a kernel of one output "
            f"({single}); got checkpoint {checkpoint and checkpoint.step} and kernel {kernel}"
        )
    plain = _Features.of(problem, kernel, SKETCHES[sketch](size, problem.seed), checkpoint)
    pool = dataclasses.replace(plain, data=problem.pool, kind="gradients")
    if adam and checkpoint is not None:
        pool = dataclasses.replace(pool, sketch=AdamSketch(plain.sketch, checkpoint.first, checkpoint.second))
    return plain.preconditioned(precondition, damping).read_all(), pool.reader(candidates)


def domain_features(
    problem: SelectionProblem,
    *,
    kernel: str = "loss",
    sketch: str,
    size: int,
    checkpoint: WarmupCheckpoint | None = None,
) -> Float[np.ndarray, "M K"]:
    """phi of every domain example alone, the same numbers as those of `gradient_features`."""
    return _Features.of(problem, kernel, SKETCHES[sketch](size, problem.seed), checkpoint).read_all()


@dataclasses.dataclass(frozen=True)
class _Features:
    """The features of one data set under one kernel, theta and sketch."""

    problem: SelectionProblem
    data: Dataset
    kind: str
    kernel: Kernel
    params: Params
    sketch: Any

    @classmethod
    def of(
        cls, problem: SelectionProblem, kernel: str | Kernel, sketch: Sketch, checkpoint: WarmupCheckpoint | None
    ) -> _Features:
        """Those of the domain."""
        params = problem.params if checkpoint is None else checkpoint.params
        if not isinstance(kernel, Kernel):
            functions = KernelFunctions(problem.hidden_fn, problem.head, problem.nll_fn, problem.sum_logits_fn)
            kernel = build(kernel, functions, params, seed=problem.seed)
        return cls(problem, problem.domain, "domain-gradients", kernel, params, sketch)

    def preconditioned(self, name: str, damping: float) -> _Features:
        """The same of P^-1 g."""
        if name == "none":
            return self
        if self.kernel.head_coefficient:
            raise ConfigError(
                f"precondition {name}: a trained head is part of kernel {self.kernel.name} in closed form, not as a "
                "gradient, so it cannot be preconditioned; hold the head fixed (lora), or use kernel sum_logits or loss"
            )
        batches = self.problem.domain.batches(token_budget=self.problem.gradient_budget)
        progress = self.problem.bar("curvature of the domain loss")
        solve = build_preconditioner(
            name, self.problem.nll_fn, self.params, batches, damping=damping, progress=progress
        )
        return dataclasses.replace(self, sketch=PreconditionedSketch(self.sketch, solve, (name, damping)))

    def read_all(self) -> np.ndarray:
        """Of every example."""
        rows = np.arange(len(self.data))
        return self.reader(rows)(rows)

    def reader(self, rows: Int[np.ndarray, " C"]) -> ReadRows:
        """Compute what is missing of ``rows``; a function that reads any of them."""
        depends = {
            "data": self.data.fingerprint,
            "theta": tree_digest(self.params),
            "kernel": self.kernel.name,
            "seed": self.problem.seed,
            **self.sketch.describe(),
        }
        width = self.sketch.width(self.params)
        store = open_shared(self.problem, self.kind, depends, rows=len(self.data), width=width)
        if store is None:
            features = np.asarray(self._compute(self._batches(rows), None), np.float32)
            return lambda index: _all_there(features[index])
        # Part by part, each in batches of its own: see `parts_to_do` for why the bits do not depend on who computes it.
        for part, missing in parts_to_do(store, rows):
            batches = self._batches(part).without(~missing)
            self._compute(batches, store)
        store.gather()
        return lambda index: np.asarray(store.read(index), np.float32)

    def _batches(self, rows: np.ndarray) -> Batches:
        return self.data.batches(token_budget=self.problem.token_budget, indices=rows)

    def _compute(self, batches: Any, store: Any) -> np.ndarray:
        run = Pass(len(self.data), store, progress=self.problem.bar(self.kind.replace("-", " ")))
        return ntk.gradient_features(self.kernel, self.params, batches, self.sketch, rows=run, read=store is None)


def _all_there(values: np.ndarray) -> np.ndarray:
    if np.isnan(values).any():
        raise ValueError("gradient features of rows that are not among the candidates were asked for")
    return values


def in_blocks(rows: Int[np.ndarray, " C"], size: int = BLOCK) -> Iterator[tuple[slice, np.ndarray]]:
    """(places among the candidates, their rows) for ``size`` candidates at a time."""
    for start in range(0, len(rows), size):
        yield slice(start, min(start + size, len(rows))), rows[start : start + size]


def scatter(values: Float[np.ndarray, " C"], rows: Int[np.ndarray, " C"], total: int) -> Float[np.ndarray, " N"]:
    """The ``values`` of the candidates ``rows`` among all pool rows, NaN where a row is no candidate."""
    scattered = np.full(total, np.nan)
    scattered[rows] = values
    return scattered


def unit_direction(vector: Float[np.ndarray, " K"], what: str) -> Float[np.ndarray, " K"]:
    """The vector at length 1, float64. UserError where it is zero."""
    vector = np.asarray(vector, np.float64)
    norm = np.linalg.norm(vector)
    if norm == 0:
        raise UserError(f"{what} is zero, so nothing can point its way; check the domain's responses and the model")
    return vector / norm
