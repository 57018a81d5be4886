"""The warm-up and its epochs: what is handed over is what training went through, killed or not."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import ntkjax.training.run as training_run
from ntkjax.errors import CheckpointError, ConfigError
from ntkjax.models import LoraConfig, load_lm
from ntkjax.pipeline.load import load_data
from ntkjax.pipeline.options import DataOptions, SelectorOptions
from ntkjax.pipeline.select import ChoiceSettings, choose
from ntkjax.pipeline.warmup import epoch_ends, epoch_rates, needs_checkpoints, warm_up
from ntkjax.selection import METHODS
from ntkjax.selection.gradients import gradient_features
from ntkjax.training import TrainConfig, adam_moments, fit, learning_rates

CONFIG = TrainConfig(epochs=2.5, batch_size=5, learning_rate=1e-3, max_buckets=1)  # 12 examples: 3 steps an epoch
DATA = DataOptions(token_budget=1024)


@pytest.fixture(scope="module")
def loaded(files):
    model = load_lm(files.model, seed=0, lora=LoraConfig(rank=2))
    return model, load_data(files.domain, model, DATA), load_data(files.pool, model, DATA)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def run(loaded, out, **options):
    model, domain, _ = loaded
    options = {"config": CONFIG, "checkpoints": True} | options
    return warm_up(model, model.lora, domain, seed=3, out=out, progress=False, **options)


@pytest.fixture(scope="module")
def warmed(loaded, tmp_path_factory):
    return run(loaded, tmp_path_factory.mktemp("warmed"))


def test_checkpoints_are_what_training_went_through(loaded, warmed):
    model, domain, _ = loaded
    seen = []
    record = lambda params: seen.append(jax.tree.map(np.asarray, params)) or {}
    for steps in (3, 6, 8):
        # The schedule is that of the whole run: cut it, instead of asking for fewer steps.
        config = TrainConfig(epochs=2.5, batch_size=5, learning_rate=1e-3, max_buckets=1, eval_every=steps)
        result = fit(model.nll_fn, model.lora, domain.tokens, config, seed=3, progress=False, extra_metrics=record)
    at = {3: seen[1], 6: seen[5], 8: seen[-1]}  # evaluations at 0 3 6 8, 0 6 8, 0 8
    assert [checkpoint.step for checkpoint in warmed.checkpoints] == [3, 6, 8]
    for checkpoint in warmed.checkpoints:
        same(checkpoint.params, at[checkpoint.step])
    same(warmed.params, warmed.checkpoints[-1].params)
    first, second, _ = adam_moments(result.opt_state)
    same(warmed.checkpoints[-1].first, first)
    same(warmed.checkpoints[-1].second, second)
    rates = learning_rates(CONFIG, 8)
    expected = [rates[:3].mean(), rates[3:6].mean(), rates[6:].mean()]
    np.testing.assert_allclose([c.learning_rate for c in warmed.checkpoints], expected)


def test_epochs(loaded):
    _, domain, _ = loaded
    ends = lambda **options: epoch_ends(TrainConfig(**{"batch_size": 5} | options), domain)
    assert ends(epochs=2) == [3, 6] and ends(steps=2) == [2] and ends(steps=7) == [3, 6, 7]
    assert ends(epochs=1, batch_size=12) == [1]
    assert epoch_rates(CONFIG, []) == []


@pytest.mark.parametrize("save_every", [1, 2])
def test_other_savings_lose_no_epoch(save_every, loaded, warmed, tmp_path):
    found = run(loaded, tmp_path, config=TrainConfig(**vars(CONFIG) | {"save_every": save_every}))
    same([vars(c) for c in found.checkpoints], [vars(c) for c in warmed.checkpoints])


def test_a_killed_warm_up_goes_on_to_the_same_checkpoints(loaded, warmed, tmp_path, monkeypatch):
    real, left = training_run.train_step, [5]

    def stop(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(training_run, "train_step", stop)
    with pytest.raises(KeyboardInterrupt):
        run(loaded, tmp_path)
    left[0] = 1000
    found = run(loaded, tmp_path)
    assert left[0] == 1000 - 5  # from step 3 on
    same([vars(c) for c in found.checkpoints], [vars(c) for c in warmed.checkpoints])
    left[0] = 0
    again = run(loaded, tmp_path)  # nothing is trained again
    same([vars(c) for c in again.checkpoints], [vars(c) for c in warmed.checkpoints])


def test_a_warm_up_that_kept_too_little_is_told(loaded, tmp_path):
    assert run(loaded, tmp_path, checkpoints=False).checkpoints == ()
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 3; there are: 6, 8"):
        run(loaded, tmp_path)


def test_selections_share_a_warm_up_and_rows(loaded, warmed, tmp_path, monkeypatch):
    model, domain, pool = loaded
    seen = {}

    def look(problem):
        seen["problem"] = problem
        gradient_features(problem, np.arange(5), sketch="sparse", size=16)
        return METHODS["embedding"]()(problem)

    monkeypatch.setitem(METHODS, "random", type("Look", (METHODS["random"],), {"__call__": lambda self, p: look(p)}))
    for name in ("one", "two"):
        options = SelectorOptions(method="random" if name == "one" else "embedding")
        out, shared = tmp_path / name, tmp_path / "shared"
        settings = ChoiceSettings(3, 0, DATA, out, shared=shared, progress=False)
        choose(model, model.lora, domain, pool, options, settings, warmup=warmed)
        assert not (out / "warmup").exists() and not (out / "rows").exists()
        assert (out / "selection.json").exists()
    assert len([p for p in shared.iterdir() if p.name.startswith("embeddings-")]) == 1
    same(seen["problem"].params, warmed.params)
    assert seen["problem"].checkpoints is warmed.checkpoints and seen["problem"].shared_dir == shared


def test_a_method_that_needs_epochs_is_refused_without_a_warm_up(loaded, tmp_path, monkeypatch):
    model, domain, pool = loaded
    assert not needs_checkpoints(SelectorOptions(method="ntk"))
    assert needs_checkpoints(SelectorOptions(method="parts", trajectory="epochs"))
    assert not needs_checkpoints(SelectorOptions(method="parts", representation="ngrams", trajectory="epochs"))
    monkeypatch.setitem(METHODS, "random", type("Looks", (METHODS["random"],), {"uses_checkpoints": True}))
    settings = ChoiceSettings(3, 0, DATA, tmp_path / "x", progress=False)
    with pytest.raises(ConfigError, match="epochs of the warm-up"):
        choose(model, model.lora, domain, pool, SelectorOptions(method="random"), settings, warmup=None)
    with pytest.raises(ConfigError, match="the model before and after the warm-up"):
        choose(model, model.lora, domain, pool, SelectorOptions(method="loss-drop"), settings, warmup=None)
    assert not (tmp_path / "x").exists()
