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

import studies
import tyro


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One study of all methods; sizes of the real task are cut to what a CPU does."""

    data: Path | None = None
    """Folder with pool/ and the domains; without it the embedded task."""
    model: str | None = None
    domains: tuple[str, ...] = ("finance", "medical", "legal")
    methods: tuple[str, ...] = ("all", "loss-reweighting")
    whole_pool: bool = True
    """Also ntk with the `loss` kernel over the whole pool, without stage 1: the dearest arm."""
    lift: bool = False
    kernels: tuple[str, ...] = ("sum_logits",)
    """Kernels of ntk."""
    n: int | None = None
    """N; 240 of the planted pool, 150 of the real one."""
    seeds: int = 5
    learning_rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    pool_size: int | None = None
    """2,400 planted examples, the first 4,000 real ones."""
    train_size: int = 200
    dev_size: int = 60
    test_size: int = 300
    max_length: int = 192
    epochs: float = 1
    """Of the real task; 8 of the planted one."""
    out: Path = Path("runs/05_main_table")
    keep: bool = True
    """Copy tables and plots to experiments/results."""


def content(e: Experiment) -> tuple[str, dict[str, Any]]:
    """(name of the study, the study)."""
    if e.data is None:
        name, found = "embedded", studies.planted(e.pool_size or 2400, 96, test=e.test_size)
    else:
        assert e.model is not None, "give --model with --data"
        name = Path(e.model).name
        sizes = {"pool": e.pool_size or 4000, "train": e.train_size, "dev": e.dev_size, "test": e.test_size}
        found = studies.real(e.data, e.model, e.domains, **sizes, max_length=e.max_length, epochs=e.epochs)
    methods: list[Any] = list(e.methods)
    if e.whole_pool:
        methods.append({"label": "ntk (loss, whole pool)", "method": "ntk", "kernel": "loss", "stage1": "off"})
    if e.lift:  # all parameters want a smaller step
        methods.append({"label": "lift", "method": "lift", "learning_rates": [rate / 10 for rate in e.learning_rates]})
    return name, found | {
        "title": "Every method on every domain",
        "methods": methods,
        "kernels": list(e.kernels),
        "budgets": e.n or (240 if e.data is None else 150),
        "seeds": e.seeds,
        "learning_rates": list(e.learning_rates),
    }


def main(e: Experiment) -> None:
    """Run the study and keep its tables."""
    name, study = content(e)
    studies.run(study, e.out / name, studies.RESULTS / "05_main_table" / name if e.keep else None)
    print((e.out / name / "tables" / "main.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main(tyro.cli(Experiment))
