"""The toy problem of these tests."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from ntkjax.training import TrainConfig, fit


@pytest.fixture(scope="session")
def toy(load_file) -> ModuleType:
    """toy_problem.py beside this file."""
    return load_file(Path(__file__).with_name("toy_problem.py"))


@pytest.fixture
def run(toy, tmp_path):
    """A small run in ``tmp_path / "run"`` whose settings can be changed."""
    nll_fn, params = toy.make_model()
    settings = {
        "steps": 6,
        "batch_size": 4,
        "learning_rate": 0.1,
        "eval_every": 2,
        "save_every": 2,
        "max_buckets": 1,
    }

    def go(*, seed=0, train=None, dev=None, resume=True, params=params, nll_fn=nll_fn, domain=None, **changed):
        config = TrainConfig(**(settings | changed))
        return fit(
            nll_fn, params, train or toy.make_data(16, 0), config, seed=seed, dev=dev or toy.make_data(6, 1),
            domain=domain, out_dir=tmp_path / "run", resume=resume, progress=False,
        )  # fmt: skip

    go.folder = tmp_path / "run"
    return go
