"""Do the parts of a score add up, on a real run? And how large a page opens at once?

    ntkjax select --model MODEL --domain FILE --pool FILE --n 100 --kernel loss --stage1 off --out RUN
    python experiments/check_explain.py --run RUN --page build/large.html

Of the chosen examples of RUN, for each kernel: the largest difference of the sum over tokens, and over leaves of the
adapter, from the score that `scores_along` gives on the same batches, relative to the score's size. Then a page of
10,000 made-up examples; `document.body.dataset.ready` is when a browser had shown it, in ms since it was asked for.
Runtime: 2 minutes on two shared CPU cores with a model of 7 M parameters. Expected in float32:
tokens below 1e-6; layers, whose gradients come of reverse mode, a few times as far.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import tyro

from ntkjax.commands.explain.reopen import read_pool, reopen
from ntkjax.models.lm import paths
from ntkjax.ntk import gradient_features, scores_along, scores_by_position
from ntkjax.ntk.scores import ProductsByLeaf
from ntkjax.report.explanation import Explanation, ShownExample, write_explanation


@dataclasses.dataclass(frozen=True)
class Check:
    """Sums of parts against scores, and a large page."""

    run: str
    """Run directory of a selection by `ntk`."""
    kernels: tuple[str, ...] = ("loss", "sum_logits")
    page: Path | None = None
    """Where a page of 10,000 examples goes."""


def differences(check: Check) -> None:
    """Print one line for each kernel."""
    run = reopen(check.run, progress=False)
    pool = read_pool(run)
    problem = run.problem(run.domain, pool, progress=False, work_dir=None)
    rows = np.sort(run.selection.selected)
    batches = pool.tokens.batches(token_budget=problem.token_budget, indices=rows)
    for kernel in check.kernels:
        along = dataclasses.replace(run.selector, kernel=kernel).directional(problem, rows)
        args = (along.kernel, problem.params)
        scores = scores_along(*args, along.directions, batches, rows=len(pool))[rows, 0].astype(float)
        parts = dict(scores_by_position(*args, along.directions, batches))
        tokens = np.array([parts[row][:, 0].sum(dtype=float) for row in rows.tolist()])
        stacked = tuple(path.startswith("layers/") for path in paths(problem.params))
        products = ProductsByLeaf(along.directions[0], stacked)
        leaves = gradient_features(*args, batches, products, rows=len(pool))[rows].sum(axis=1, dtype=float)
        worst = [float(np.max(np.abs(sums - scores) / np.abs(scores))) for sums in (tokens, leaves)]
        print(f"{kernel}: {len(rows)} examples; tokens {worst[0]:.1e}, layers and modules {worst[1]:.1e} of the score")


def large_page(path: Path) -> None:
    """10,000 examples of 100 to 400 tokens."""
    rng = np.random.default_rng(0)
    words = [f" {''.join(rng.choice(list('abcdefghij'), rng.integers(2, 9)))}" for _ in range(5000)]

    def example(k: int) -> ShownExample:
        count = int(rng.integers(100, 400))
        texts = [words[i] for i in rng.integers(0, len(words), count)]
        learned = np.arange(count) > count // 4
        parts, table = rng.standard_normal(count) * learned, rng.standard_normal((30, 7))
        return ShownExample(
            f"example-{k}", f"source-{k % 8}", "pool.jsonl:1", k % 3, -k, k + 1, texts, learned, parts, table
        )

    groups = [("chosen", 3334, 3334), ("nearly chosen", 3333, 3333), ("rejected", 3333, 1_000_000)]
    examples = [example(k) for k in range(10_000)]
    layers, modules = [f"layer {n}" for n in range(30)], list("qkvogud")
    write_explanation(path, Explanation("A large page", "", [], groups, [], examples, layers=layers, modules=modules))
    print(f"{path}: {len(examples)} examples, {path.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    asked = tyro.cli(Check)
    differences(asked)
    if asked.page is not None:
        large_page(asked.page)
