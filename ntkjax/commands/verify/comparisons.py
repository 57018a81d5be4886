"""Comparison of the kernel matrices of ``ntkjax verify`` with their references, as rows of numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from ntkjax.commands.verify.config import VerifyConfig
from ntkjax.commands.verify.kernels import CENTRED_TRACE, TRACE, ParameterSet, passes
from ntkjax.commands.verify.preconditioners import preconditioner_rows
from ntkjax.ntk.agreement import agreement, ranks_by_row, selected_counts, weighted_pearson
from ntkjax.ntk.cross_terms import CrossTerms, cross_ratio
from ntkjax.ntk.kernels import KERNELS, parse
from ntkjax.ntk.ladder import gaussian_sketch, square_root
from ntkjax.ntk.metrics import cka, matrix_scores, spearman, top_n_overlap
from ntkjax.rng import numpy_rng

AGAINST = {
    "top": "the exact trace of the same parameters, the top of the column",
    "step": "the approximation it departs from: the error that this one step adds",
    "centred": "the centred trace of the same parameters: the outputs that can change the loss",
    "full": "the trace of all parameters",
    "reseed": "another sketch of the same kernel: the noise ceiling",
}
NOISE_SIZES = tuple(1 << k for k in range(6, 15))
NOISE_PAIRS = 8


def step_of(approximation: str) -> str | None:
    """The kernel that ``approximation`` approximates by one step; None for the exact trace."""
    return parse(approximation).kind.approximates


def compare(config: VerifyConfig, subsets: list[ParameterSet], *, progress: bool) -> dict[str, Any]:
    """results.json: the sizes, ``ladder``, ``cross_terms``, ``preconditioners``, ``curves`` and ``noise``."""
    tasks = [task for subset in subsets for task in comparisons(config, subset, subsets)]
    ladder = [task.run(config) for task in tqdm(tasks, desc="compare kernels", disable=not progress, unit="comparison")]
    return {
        "columns": {
            c.name: {
                "parameters": c.parameters,
                "examples": len(c.rows),
                "domain": c.domain,
                "top": top_of(config, c),
                "seeds": list(c.seeds),
                "vocab": c.vocab,
                "width": c.width,
            }
            for c in subsets
        },
        "warmed_up": not config.skip_warmup,
        "ladder": ladder,
        "cross_terms": [cross_row(config, subset) for subset in subsets],
        "preconditioners": [
            row
            for c in subsets
            if c.preconditioned
            for row in preconditioner_rows(config, c.name, c.preconditioned, top_of(config, c))
        ],
        "curves": [row for subset in subsets for row in curve_rows(config, subset)],
        "noise": [row for subset in subsets for row in noise_rows(config, subset)],
    }


def top_of(config: VerifyConfig, subset: ParameterSet) -> int:
    """N for ``subset``: the same share of its scored examples as in the whole sample."""
    scored = len(subset.rows) - subset.domain
    if config.top is None:
        return max(1, scored // 4)
    return min(scored - 1, max(1, round(config.top * scored / (config.n - config.domain_count))))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One row of the ladder to be: which matrices are compared, and how the row is labelled."""

    labels: dict[str, Any]
    approx: np.ndarray
    exact: np.ndarray
    domain: int
    top: int

    def run(self, config: VerifyConfig) -> dict[str, Any]:
        """The row."""
        metrics = agreement(
            self.approx,
            self.exact,
            domain_rows=np.arange(self.domain),
            n=self.top,
            seed=config.seed,
            samples=config.bootstrap,
        )
        return self.labels | metrics


def comparisons(config: VerifyConfig, subset: ParameterSet, subsets: list[ParameterSet]) -> Iterator[Comparison]:
    """Every kernel of ``subset`` against each of `AGAINST` that applies to it."""
    kernels, top = subset.kernels, top_of(config, subset)
    full = next((c for c in subsets if c.name == "all"), None)

    def row(
        approximation: str, against: str, reference: str, approx: np.ndarray, exact: np.ndarray, how: str
    ) -> Comparison:
        base = approximation.removesuffix(" sketched")
        labels = {"column": subset.name, "approximation": approximation, "against": against, "reference": reference,
                  "passes": passes(base, subset.width), "method": how}  # fmt: skip
        return Comparison(labels, approx, exact, subset.domain, top)

    for approximation, matrices in kernels.items():
        step = step_of(approximation)
        if step is not None:
            yield row(approximation, "top", TRACE, matrices, kernels[TRACE], "exact")
            yield row(approximation, "step", step, matrices, kernels[step], "exact")
        # Also against what can change the loss: a kernel may agree with the trace through the shift of all logits,
        # which softmax does not see.
        if approximation != CENTRED_TRACE:
            yield row(approximation, "centred", CENTRED_TRACE, matrices, kernels[CENTRED_TRACE], "exact")
        if subset.name == "lora" and full is not None:
            yield from _against_full(config, subset, full, approximation)
    for approximation, (sketches, how) in subset.sketched.items():
        first, second = (_like(sketches[k]) for k in range(2))
        yield row(f"{approximation} sketched", "step", approximation, first, kernels[approximation], how)
        yield row(f"{approximation} sketched", "reseed", f"{approximation} sketched", first, second, how)


def _against_full(
    config: VerifyConfig, subset: ParameterSet, full: ParameterSet, approximation: str
) -> Iterator[Comparison]:
    """A LoRA kernel against the trace of all parameters, on the examples and at the weights that both have."""
    exact = full.kernels[TRACE]
    draws = subset.kernels[approximation]
    if not config.skip_warmup:  # each seed has its own weights after warm-up
        draws = draws[: len(full.seeds)]
    # All parameters are costly, so theirs is a part of the sample: the LoRA kernel is cut to the same examples.
    part = draws[:, full.rows[:, None], full.rows[None]]
    labels = {"column": subset.name, "approximation": approximation, "against": "full", "reference": f"all: {TRACE}",
              "passes": passes(approximation, subset.width), "method": "exact"}  # fmt: skip
    yield Comparison(labels, part, exact, full.domain, top_of(config, full))
    if approximation == TRACE:  # the first step: from all parameters to LoRA
        yield Comparison(labels | {"against": "step"}, part, exact, full.domain, top_of(config, full))


def _like(draws: np.ndarray) -> np.ndarray:
    return np.asarray(draws, np.float64)


def cross_row(config: VerifyConfig, subset: ParameterSet) -> dict[str, Any]:
    """Cosines between outputs and the cross terms over the trace of ``subset``, over its seeds."""
    row: dict[str, Any] = {"column": subset.name}
    if subset.cross:
        row |= cross_summary(subset.cross, seed=config.seed)
    # On all examples, so that it takes the place of the ratio on the few that have cosines.
    return row | cross_ratio(subset.kernels["sum_logits"], subset.kernels[TRACE], subset.vocab, seed=config.seed)


def cross_summary(seeds: list[CrossTerms], *, seed: int) -> dict[str, Any]:
    """`CrossTerms.summary` of the mean over seeds (same examples), with ``_sd`` over seeds and the histograms."""
    names = ("signed", "absolute", "signed_between", "absolute_between")
    sums = ("cross", "own", "cross_between", "own_between")
    means = {name: np.mean([getattr(c, name) for c in seeds], axis=0) for name in (*names, *sums)}
    counts = {name: np.sum([getattr(c, name) for c in seeds], axis=0) for name in ("histogram", "histogram_between")}
    row = dataclasses.replace(seeds[0], **means, **counts).summary(seed=seed)
    for name in names:
        values = [float(np.nanmean(getattr(c, name))) for c in seeds]
        row[f"{name}_sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
    return row | {"undefined": sum(c.undefined for c in seeds), "examples": len(seeds[0].signed), **counts}


def curve_rows(config: VerifyConfig, subset: ParameterSet) -> Iterator[dict[str, Any]]:
    """How the agreement grows with the number of outputs: the kernels that have a size."""
    domain, top = np.arange(subset.domain), top_of(config, subset)
    for family, sizes in subset.curves.items():
        for reference in (TRACE, CENTRED_TRACE):
            for m, draws in sizes.items():
                yield {
                    "column": subset.name,
                    "family": family,
                    "m": m,
                    "against": reference,
                    **_point(draws, subset.kernels[reference], domain, top),
                }


def _point(draws: np.ndarray, exact: np.ndarray, domain: np.ndarray, top: int) -> dict[str, float]:
    """CKA, Spearman and top-N overlap of the scores: mean and standard deviation over draws."""
    count = max(len(draws), len(exact))
    pairs = list(
        zip(np.broadcast_to(draws, (count, *draws.shape[1:])), np.broadcast_to(exact, (count, *exact.shape[1:])))
    )
    scores = [(matrix_scores(a, domain), matrix_scores(e, domain)) for a, e in pairs]
    values = {
        "cka": [cka(a, e) for a, e in pairs],
        "score_spearman": [spearman(a, e) for a, e in scores],
        "top_n_overlap": [top_n_overlap(a, e, top) for a, e in scores],
    }
    summary: dict[str, float] = {}
    for name, each in values.items():
        summary[name] = float(np.mean(each))
        summary[f"{name}_sd"] = float(np.std(each, ddof=1)) if count > 1 else float("nan")
    return summary


def noise_rows(config: VerifyConfig, subset: ParameterSet) -> Iterator[dict[str, Any]]:
    """What sketching to K numbers costs the ranking, by the law of a Gaussian sketch: two sketches against each other
    (the noise ceiling), and one against the kernel."""
    domain, top = np.arange(subset.domain), top_of(config, subset)
    for approximation in (name for name, kind in KERNELS.items() if not kind.sized):
        rng = numpy_rng(config.seed, "verify", "noise", subset.name, approximation)
        roots = [(square_root(k), matrix_scores(k, domain)) for k in subset.kernels[approximation]]
        for size in NOISE_SIZES:
            first, second, exact = [], [], []
            for root, scores in roots:
                for _ in range(NOISE_PAIRS):
                    a, b = (matrix_scores(gaussian_sketch(root, size, rng), domain) for _ in range(2))
                    first.append(a)
                    second.append(b)
                    exact.append(scores)
            ceiling, kernel = (_ranking(first, other, top) for other in (second, exact))
            yield {
                "column": subset.name,
                "approximation": approximation,
                "sketch_size": size,
                "score_spearman": float(kernel[0]),
                "top_n_overlap": float(kernel[1]),
                "ceiling_score_spearman": float(ceiling[0]),
                "ceiling_top_n_overlap": float(ceiling[1]),
                "pairs": len(first),
            }


def _ranking(first: list[np.ndarray], second: list[np.ndarray], top: int) -> tuple[float, float]:
    """Mean Spearman and mean top-N overlap of pairs of score vectors."""
    a, b = np.stack(first), np.stack(second)
    once = np.ones_like(a)
    rho = weighted_pearson(ranks_by_row(a, once), ranks_by_row(b, once), once)
    shared = np.minimum(selected_counts(a, once, top), selected_counts(b, once, top)).sum(axis=1) / top
    return float(rho.mean()), float(shared.mean())
