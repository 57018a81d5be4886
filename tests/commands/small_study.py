"""A small study: what its file holds, how it is run, and what is read from its run directory."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml

import ntkjax.pipeline.study.runner as study_run
from ntkjax.cli import main

QUICK = {"epochs": 1, "batch_size": 4, "max_buckets": 1}
ALIGNMENT = {"label": "alignment", "method": "ntk", "stage1": "off", "learning_rates": [1e-3, 1e-2]}


def content(files, **more) -> dict:
    domain = {"train": files.domain, "dev": files.dev, "test": files.test}
    return {
        "model": {"model": files.model, "lora_rank": 2},
        "pool": files.pool,
        "domains": {"ball": domain},
        "methods": ["dsir", ALIGNMENT],
        "budgets": 6,
        "seeds": 2,
        "learning_rates": 1e-2,
        "data": {"token_budget": 1024},
        "dedup": {"mode": "off"},  # records that differ in a number: near-duplicates are meant here
        "warmup": QUICK,
        "train": QUICK,
    } | more


def run(files, folder: Path, *flags: str, **more) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.yaml").write_text(yaml.safe_dump(content(files, **more), sort_keys=False))
    return main(["study", str(folder / "study.yaml"), "--out", str(folder / "out"), *flags])


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def without_times(out: Path) -> dict:
    """results.json but for what a clock measured."""
    found = results(out)
    for cell in found["cells"]:
        cell["means"] = {name: value for name, value in cell["means"].items() if not name.startswith("seconds")}
    return found


def count_calls(patch: pytest.MonkeyPatch) -> Counter:
    calls: Counter = Counter()

    def counted(name, real):
        def call(*args, **kwargs):
            calls[name] += 1
            return real(*args, **kwargs)

        return call

    for name in ("train_on", "choose", "warm_up", "evaluate_on"):
        patch.setattr(study_run, name, counted(name, getattr(study_run, name)))
    return calls
