"""Training a real decoder: adapter only, all weights in bfloat16, and again from its checkpoint."""

from __future__ import annotations

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkjax.data import TokenisedDataset
from ntkjax.models import LoraConfig, ModelConfig, init_lm
from ntkjax.training import TrainConfig, fit

SHAPE = ModelConfig(
    family="llama", vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=4, initializer_range=0.3,
)  # fmt: skip
SETTINGS = {"batch_size": 4, "max_buckets": 1, "warmup_ratio": 0.1, "clip_norm": 1.0}


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    rows = [[int(t) for t in rng.integers(1, 32, size=rng.integers(6, 16))] for _ in range(8)]
    return TokenisedDataset.from_sequences(rows, [len(row) // 2 for row in rows])


def nll(model, params, data):
    batch = data.collate(np.arange(len(data)), rows=len(data), length=16)
    counts = data.response_lengths
    return float(np.sum(counts * np.asarray(model.nll_fn(params, batch), np.float64)) / counts.sum())


def test_an_adapter_learns_and_resumes(data, tmp_path):
    model = init_lm(SHAPE, seed=0, lora=LoraConfig(rank=8, alpha=16.0, targets=("q", "v", "up")))
    config = TrainConfig(epochs=30, learning_rate=0.03, save_every=20, **SETTINGS)
    before = jax.tree.map(np.array, model.params)
    run = lambda: fit(model.nll_fn, model.lora, data, config, seed=0, dev=data, out_dir=tmp_path, progress=False)
    result = run()
    assert nll(model, result.params, data) < 0.6 * nll(model, model.lora, data)
    # The dev set is the training set: its best evaluation is that of the parameters returned.
    evals = [entry["dev_loss"] for entry in result.history if entry["kind"] == "dev"]
    assert evals[0] == pytest.approx(nll(model, model.lora, data), rel=1e-5)
    assert min(evals) == pytest.approx(nll(model, result.params, data), rel=1e-5)
    assert jax.tree.structure(result.params) == jax.tree.structure(model.lora)
    jax.tree.map(np.testing.assert_array_equal, model.params, before)
    shutil.rmtree(tmp_path / "checkpoints" / "60")
    again = run()
    jax.tree.map(np.testing.assert_array_equal, result.params, again.params)


def test_all_weights_in_bfloat16_learn(data):
    model = init_lm(SHAPE, seed=0, lora=None, dtype="bfloat16")
    params = model.select_params("all")
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, params)
    assert jnp.bfloat16 in jax.tree.leaves(dtypes)
    config = TrainConfig(epochs=20, learning_rate=0.01, **SETTINGS)
    result = fit(model.nll_fn, params, data, config, seed=0, progress=False)
    assert nll(model, result.params, data) < 0.5 * nll(model, params, data)
    assert jax.tree.map(lambda leaf: leaf.dtype, result.params) == dtypes
