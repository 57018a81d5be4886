"""Training over packed rows: the steps, losses and evaluations of padded batches, by one program."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkjax.data import TokenisedDataset
from ntkjax.errors import ConfigError
from ntkjax.models.functions import pool
from ntkjax.parallel import make_mesh
from ntkjax.training import TrainConfig, fit
from ntkjax.training.rows import RowPadding
from ntkjax.training.step import train_step, used_micro_batches
from ntkjax.types import predict_mask

VOCAB = 11


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bigram:
    """nll of p(next | token) = softmax(table[token])."""

    scale: Any

    def __call__(self, params, batch):
        logp = jax.nn.log_softmax(params["kernel"][jnp.asarray(batch.tokens)] * self.scale)
        following = jnp.pad(jnp.asarray(batch.tokens)[:, 1:], ((0, 0), (0, 1)))
        chosen = jnp.take_along_axis(logp, following[:, :, None], axis=2)[..., 0]
        return pool(-chosen, predict_mask(batch), batch)


def data_of(count: int, seed: int, longest: int = 60) -> TokenisedDataset:
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, VOCAB, rng.integers(3, longest + 1)).tolist() for _ in range(count)]
    return TokenisedDataset.from_sequences(rows, [int(rng.integers(1, len(row))) for row in rows])


def params_of(dtype: str = "float32"):
    return {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(VOCAB, VOCAB)), dtype)}


SMALL = TrainConfig(epochs=2, batch_size=6, learning_rate=0.05, micro_batch_tokens=128, max_buckets=1)


def train(packing: bool, config: TrainConfig = SMALL, dtype: str = "float32", seed: int = 1, **options):
    fn = Bigram(jnp.ones((), dtype))
    data = data_of(options.pop("count", 20), seed).packed(packing).on(options.pop("mesh", None))
    return fit(fn, params_of(dtype), data, config, seed=3, dev=data_of(9, seed=2), progress=False, **options)


def lines(result, kind: str, *keys: str) -> np.ndarray:
    return np.asarray([[line[key] for key in keys] for line in result.history if line["kind"] == kind], np.float64)


@pytest.mark.parametrize("reweighting", ["none", "linupper"])
def test_a_run_is_that_of_padded_batches(x64, reweighting):
    config = dataclasses.replace(SMALL, loss_reweighting=reweighting)
    padded, packed = train(False, config, "float64"), train(True, config, "float64")
    keys = ("loss", "grad_norm", "tokens", "response_tokens")
    np.testing.assert_allclose(lines(packed, "train", *keys), lines(padded, "train", *keys), rtol=1e-10)
    np.testing.assert_allclose(lines(packed, "dev", "dev_loss"), lines(padded, "dev", "dev_loss"), rtol=1e-10)
    np.testing.assert_allclose(packed.params["kernel"], padded.params["kernel"], atol=1e-10)


def test_a_run_in_float32():
    padded, packed = train(False), train(True)
    np.testing.assert_allclose(lines(packed, "train", "loss"), lines(padded, "train", "loss"), atol=2e-6)
    np.testing.assert_allclose(lines(packed, "dev", "dev_loss"), lines(padded, "dev", "dev_loss"), atol=2e-6)


def test_one_compiled_step_whatever_the_data():
    train(True)
    before = train_step._cache_size()
    for seed, count in ((5, 14), (6, 31)):
        train(True, seed=seed, count=count)
    assert train_step._cache_size() == before


def test_only_the_micro_batches_in_use_are_computed():
    """Beyond ``used`` rows are not looked at: what stands there changes nothing."""
    data = data_of(20, 1)
    rows = RowPadding.of(data.lengths, SMALL)
    batch, accumulation = rows.collate(data, np.arange(6))
    used = used_micro_batches(batch, accumulation)
    assert batch.tokens.shape == (6, 128) and accumulation == 6 and used is not None and 1 <= used < 4
    micro = np.arange(len(batch.tokens)) % accumulation
    held = (np.asarray(batch.index).reshape(6, -1) >= 0).any(axis=1)
    assert np.array_equal(held, micro < used)
    assert sorted(batch.index[batch.index >= 0].tolist()) == list(range(6))


def test_rows_do_not_depend_on_the_data_but_for_the_longest():
    config = TrainConfig(batch_size=16)
    assert len({RowPadding.of(data_of(n, n).lengths, config) for n in (3, 30)}) == 1
    rows = RowPadding.of(np.asarray([10, 2000]), config)
    assert (rows.lengths, rows.rows, rows.slots) == ((2048,), (1,), 16)
    assert RowPadding.of(np.asarray([10, 9000]), config).lengths == (2048, 8192, 16384)
    many = RowPadding.of(np.asarray([100, 3000]), TrainConfig(batch_size=256))
    assert (many.lengths, many.rows) == ((2048, 4096), (4, 2))
    assert RowPadding.of(np.asarray([100]), TrainConfig(batch_size=256, accumulation=128)).rows == (2,)
    assert RowPadding.of(np.asarray([100]), TrainConfig(batch_size=256, micro_batch_tokens=5000)).rows == (2,)
    bound = RowPadding.of(np.asarray([1400]), TrainConfig(micro_batch_tokens=1500))
    assert (bound.lengths, bound.rows) == ((1024, 1500), (1, 1))
    with pytest.raises(ConfigError, match="micro_batch_tokens = 1500: the longest example has 1501 tokens"):
        RowPadding.of(np.asarray([1501]), TrainConfig(micro_batch_tokens=1500))


def test_a_longer_example_gets_a_longer_row():
    data = TokenisedDataset.from_sequences([[1] * 40, [2] * 300, [3] * 50, [4] * 20], [1] * 4)
    config = TrainConfig(batch_size=2, micro_batch_tokens=512)
    rows = dataclasses.replace(RowPadding.of(data.lengths, config), lengths=(128, 512), rows=(1, 1))
    shapes = [rows.collate(data, np.asarray(at))[0].tokens.shape for at in ([0, 2], [1, 3], [3])]
    assert shapes == [(2, 128), (2, 512), (2, 128)]
    evaluated = [batch for _, batch in rows.evaluation_batches(data)]
    assert sorted(i for batch in evaluated for i in batch.index.tolist() if i >= 0) == [0, 1, 2, 3]


def test_rows_spread_over_devices_give_the_same_steps():
    mesh = make_mesh(data=2, devices=jax.devices()[:2])
    config = dataclasses.replace(SMALL, micro_batch_tokens=256)
    spread, alone = train(True, config, mesh=mesh), train(True, SMALL)
    np.testing.assert_allclose(lines(spread, "train", "loss"), lines(alone, "train", "loss"), atol=2e-6)
    np.testing.assert_allclose(lines(spread, "dev", "dev_loss"), lines(alone, "dev", "dev_loss"), atol=2e-6)


class Stopping:
    """A packed dataset that stops the run at the nth batch it is asked for."""

    packing = True

    def __init__(self, data: TokenisedDataset, nth: int):
        self.data, self.left = data, nth
        self.lengths, self.response_lengths = data.lengths, data.response_lengths
        self.ids, self.fingerprint, self.collate = data.ids, data.fingerprint, data.collate

    def collate_rows(self, indices, places, *, rows, length, slots):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self.data.collate_rows(indices, places, rows=rows, length=length, slots=slots)


def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path):
    config, data, fn = dataclasses.replace(SMALL, save_every=2), data_of(20, 1).packed(True), Bigram(jnp.ones(()))
    go = lambda data: fit(fn, params_of(), data, config, seed=3, out_dir=tmp_path, progress=False)
    with pytest.raises(KeyboardInterrupt):
        go(Stopping(data, 6))
    whole = fit(fn, params_of(), data, config, seed=3, progress=False)
    np.testing.assert_array_equal(go(data).params["kernel"], whole.params["kernel"])


def test_the_data_say_whether_training_is_packed():
    data = data_of(20, 1)
    fn = Bigram(jnp.ones(()))
    runs = [fit(fn, params_of(), d, SMALL, seed=3, progress=False) for d in (data.packed(True), data.packed(False))]
    np.testing.assert_allclose(runs[0].params["kernel"], runs[1].params["kernel"], atol=1e-5)
