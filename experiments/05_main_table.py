"""Question: which selection method helps most? The paper's Table 1: every method on every domain, with the same steps.

Commands: python experiments/05_main_table.py                 # the embedded model and its planted task
          python experiments/05_main_table.py --data ../shared/data --model ../shared/models/cot-lm-7m
Hardware: 4 CPU cores, no accelerator.
Runtime:  experiments/README.md; every run is kept, and the same command goes on where it was stopped.
Expect:   experiments/README.md, "Every method". The paper reports NTK-Selector ahead of all baselines on 8B models.
          What is measured here may say otherwise at this size; intervals say what is within the noise.

All selectors and loss reweighting, 5 seeds, learning rates tuned on dev for every arm; `--lift` adds LIFT, which trains
all parameters. Recipes for the paper's own models and data are under experiments/recipes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import script
import studies


@dataclasses.dataclass(frozen=True)
class Experiment(studies.Setting):
    """One study of all methods."""

    methods: tuple[str, ...] = ("all", "loss-reweighting")
    whole_pool: bool = True
    """Also ntk with the `loss` kernel over the whole pool, without stage 1, in three forms; they take longest."""
    lift: bool = False
    kernels: tuple[str, ...] = ("sum_logits",)
    """Kernels of ntk."""
    n: int | None = None
    """N; 240 of the planted pool, 150 of the real one."""
    seeds: int = 5
    learning_rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    out: Path = Path("runs/05_main_table")
    keep: bool = True
    """Copy tables and plots to experiments/results."""


def content(e: Experiment) -> dict[str, Any]:
    """The study."""
    methods: list[Any] = list(e.methods)
    if e.whole_pool:
        methods += studies.WHOLE_POOL
    if e.lift:  # all parameters want a smaller step
        methods.append({"label": "lift", "method": "lift", "learning_rates": [rate / 10 for rate in e.learning_rates]})
    return e.content() | {
        "title": "Every method on every domain",
        "methods": methods,
        "kernels": list(e.kernels),
        "budgets": e.n or (240 if e.data is None else 150),
        "seeds": e.seeds,
        "learning_rates": list(e.learning_rates),
    }


def main(e: Experiment) -> None:
    """Run the study and keep its tables."""
    studies.run(content(e), e.out / e.name, studies.RESULTS / "05_main_table" / e.name if e.keep else None)
    print((e.out / e.name / "tables" / "main.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    script.start(main, Experiment)
