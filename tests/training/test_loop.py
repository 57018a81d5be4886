"""``fit``: it learns, stops, counts, reports and refuses as it says."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkjax.errors import ConfigError, DataError, UserError
from ntkjax.parallel import make_mesh
from ntkjax.training import EpochPlan, TrainConfig, adam_moments, fit, learning_rates

# One shape and one optimiser for most tests: they then share one compiled step.
SMALL = {"batch_size": 6, "max_buckets": 1, "learning_rate": 0.1}


def lines(result, kind):
    return [entry for entry in result.history if entry["kind"] == kind]


def test_overfits_a_tiny_problem(toy):
    """Every next token follows from the last one: the loss can reach 0."""
    nll_fn, params = toy.make_model()
    rows = [[(3**k * start + (3**k - 1) // 2) % toy.VOCAB for k in range(8)] for start in range(toy.VOCAB)]
    data = toy.TokenisedDataset.from_sequences(rows, [1] * len(rows))
    config = TrainConfig(epochs=80, **SMALL | {"learning_rate": 0.2})
    result = fit(nll_fn, params, data, config, seed=0, progress=False)
    batch = data.collate(np.arange(len(data)), rows=len(data), length=8)
    assert float(jnp.max(nll_fn(params, batch))) > 1.5
    assert float(jnp.max(nll_fn(result.params, batch))) < 0.05
    assert result.steps == 80 * 2 and result.best_step == result.steps
    assert not result.stopped_early


def test_one_step_is_the_adamw_step_of_the_first_batch(toy):
    """Against jax.grad of the token mean over the plan's first batch, written out here."""
    nll_fn, params = toy.make_model()
    data = toy.make_data(20, 0)
    config = TrainConfig(steps=1, eps=1e-3, clip_norm=None, weight_decay=0.2, **SMALL)
    result = fit(nll_fn, params, data, config, seed=5, progress=False)
    rows = next(EpochPlan(data.lengths, 6, 5, np.zeros(0, np.int64)).batches(0, 1))
    batch = data.collate(rows, rows=6, length=24)
    counts = jnp.asarray(data.response_lengths[rows], jnp.float32)
    loss, g = jax.value_and_grad(lambda p: jnp.sum(counts * nll_fn(p, batch)) / jnp.sum(counts))(params)
    assert result.history[0]["loss"] == pytest.approx(float(loss), rel=1e-5)
    for name, decay in (("kernel", 0.2), ("bias", 0.0)):
        theta, grad = params["table"][name], g["table"][name]
        want = theta - 0.1 * (grad / (jnp.abs(grad) + 1e-3) + decay * theta)  # the first step of Adam
        np.testing.assert_allclose(result.params["table"][name], want, atol=1e-5)
    m, _, count = adam_moments(result.opt_state)
    np.testing.assert_allclose(m["table"]["kernel"], 0.1 * g["table"]["kernel"], atol=1e-6)
    assert int(count) == 1


@pytest.mark.parametrize(("epochs", "steps", "want"), [(2, None, 8), (0.5, None, 2), (0.01, None, 1), (9, 5, 5)])
def test_epochs_and_equal_steps(toy, epochs, steps, want):
    nll_fn, params = toy.make_model()
    config = TrainConfig(epochs=epochs, steps=steps, **SMALL)
    result = fit(nll_fn, params, toy.make_data(20, 0), config, seed=0, progress=False)
    assert result.steps == want == len(lines(result, "train"))
    assert result.mean_lr == pytest.approx(learning_rates(config, want).mean())


@pytest.mark.parametrize("share", [None, 0.6])
def test_every_example_is_seen_and_the_domain_reaches_its_share(toy, share):
    nll_fn, params = toy.make_model()
    data, domain = toy.make_data(30, 0), np.array([3, 7, 11])
    seen = []

    class Watched(toy.Dying):
        def collate(self, indices, *, rows, length):
            seen.extend(indices)
            return super().collate(indices, rows=rows, length=length)

    config = TrainConfig(epochs=1, domain_share=share, **SMALL)
    fit(nll_fn, params, Watched(data, -1), config, seed=0, domain=domain, progress=False)
    assert set(seen) == set(range(30))
    assert np.isin(seen, domain).mean() >= (share or 0.1)
    assert share is not None or len(seen) == 30


def overfitting_problem(toy):
    """Training and dev sequences follow different rules: sooner or later the dev loss rises."""
    nll_fn, params = toy.make_model()
    train = toy.make_data(12, 0)
    rng = np.random.default_rng(9)
    rows = [[int(t) for t in rng.integers(toy.VOCAB, size=12)] for _ in range(10)]
    return nll_fn, params, train, toy.TokenisedDataset.from_sequences(rows, [2] * 10)


def test_early_stopping_returns_the_best(toy):
    nll_fn, params, train, dev = overfitting_problem(toy)
    config = TrainConfig(epochs=60, eval_every=2, patience=3, **SMALL)
    result = fit(nll_fn, params, train, config, seed=0, dev=dev, progress=False)
    evals = lines(result, "dev")
    assert evals[0]["step"] == 0 and [e["step"] for e in evals[1:]] == list(range(2, result.steps + 1, 2))
    losses = {e["step"]: e["dev_loss"] for e in evals[1:]}
    best = min(losses, key=losses.get)
    assert result.stopped_early and result.best_step == best == result.steps - 3 * 2
    batch = dev.collate(np.arange(10), rows=10, length=16)
    # Responses are all 10 tokens long: the token mean is the mean over examples.
    assert float(jnp.mean(nll_fn(result.params, batch))) == pytest.approx(losses[best], rel=1e-5)
    assert losses[result.steps] > losses[best] + 1e-3


def test_without_patience_the_run_ends_and_the_best_is_kept_unless_told_otherwise(toy):
    nll_fn, params, train, dev = overfitting_problem(toy)
    settings = SMALL | {"steps": 41, "eval_every": 5}
    best = fit(nll_fn, params, train, TrainConfig(**settings), seed=0, dev=dev, progress=False)
    last = fit(nll_fn, params, train, TrainConfig(**settings, restore_best=False), seed=0, dev=dev, progress=False)
    assert best.steps == last.steps == 41 and not best.stopped_early
    assert lines(best, "dev")[-1]["step"] == 41  # the last step is evaluated, due or not
    assert best.best_step < 41 == last.best_step
    assert not np.array_equal(best.params["table"]["kernel"], last.params["table"]["kernel"])


def test_clipped_steps_are_counted(toy):
    nll_fn, params = toy.make_model()
    run = lambda clip: fit(
        nll_fn, params, toy.make_data(30, 0), TrainConfig(clip_norm=clip, **SMALL), seed=0, progress=False
    )
    norms = sorted(entry["grad_norm"] for entry in lines(run(None), "train"))
    middle = norms[len(norms) // 2]
    result = run(middle)
    above = [entry["grad_norm"] > middle for entry in lines(result, "train")]
    assert result.clipped_steps == sum(above) and 0 < sum(above) < len(above)
    assert above == [entry["clipped"] for entry in lines(result, "train")]


def test_history_is_the_file_and_counts_tokens(toy, tmp_path):
    nll_fn, params = toy.make_model()
    data, dev = toy.make_data(20, 0), toy.make_data(6, 1)
    extra = lambda p: {"largest": float(jnp.max(p["table"]["kernel"]))}
    config = TrainConfig(epochs=2, **SMALL)
    result = fit(
        nll_fn, params, data, config, seed=0, dev=dev, out_dir=tmp_path / "run", progress=False,
        extra_metrics=extra
    )  # fmt: skip
    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert written == result.history
    train = lines(result, "train")
    assert [entry["step"] for entry in train] == list(range(1, 9)) and train[-1]["epoch"] == 2.0
    assert sum(entry["tokens"] for entry in train) == 2 * data.lengths.sum()
    assert sum(entry["response_tokens"] for entry in train) == 2 * data.response_lengths.sum()
    np.testing.assert_allclose([entry["lr"] for entry in train], learning_rates(config, 8))
    evals = lines(result, "dev")
    assert [entry["step"] for entry in evals] == [0, 4, 8]
    assert evals[0]["largest"] == float(params["table"]["kernel"].max()) != evals[-1]["largest"]
    assert result.tokens_per_second > 0


def test_same_seed_same_bytes_other_seed_other_bytes(toy):
    nll_fn, params = toy.make_model()
    config = TrainConfig(steps=6, **SMALL)
    run = lambda seed: fit(nll_fn, params, toy.make_data(30, 0), config, seed=seed, progress=False)
    kernels = [np.asarray(run(seed).params["table"]["kernel"]).tobytes() for seed in (1, 1, 2)]
    assert kernels[0] == kernels[1] != kernels[2]


def test_runs_of_other_lengths_and_rates_share_one_compilation(toy):
    nll_fn, params = toy.make_model()
    data, traces = toy.make_data(30, 0, longest=40), []

    def counted(p, batch):
        traces.append(batch.tokens.shape)
        return nll_fn(p, batch)

    fn = jax.tree_util.Partial(counted)
    fit(fn, params, data, TrainConfig(epochs=3, batch_size=4, max_buckets=2), seed=0, progress=False)
    first = list(traces)
    other = TrainConfig(steps=7, batch_size=4, max_buckets=2, learning_rate=0.3, schedule="cosine")
    fit(fn, params, data, other, seed=1, progress=False)
    assert traces == first and len(set(first)) == 2


def test_bfloat16_parameters_come_back_as_bfloat16(toy):
    nll_fn, params = toy.make_model()
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    config = TrainConfig(steps=2, **SMALL)
    result = fit(nll_fn, params, toy.make_data(10, 0), config, seed=0, progress=False)
    assert {x.dtype for x in jax.tree.leaves(result.params)} == {jnp.dtype(jnp.bfloat16)}


def test_rows_spread_over_a_mesh_train_the_same(toy, tmp_path):
    nll_fn, params = toy.make_model()
    data, dev = toy.make_data(20, 0), toy.make_data(7, 1)
    config = TrainConfig(steps=4, eps=1e-3, accumulation=2, save_every=2, **SMALL)
    alone = fit(nll_fn, params, data, config, seed=0, dev=dev, progress=False)
    mesh = make_mesh(data=2, devices=jax.devices()[:2])
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    nll_fn, params = jax.device_put((nll_fn, params), everywhere)
    out = tmp_path / "run"
    run = lambda: fit(nll_fn, params, data.on(mesh), config, seed=0, dev=dev, out_dir=out, progress=False)
    spread = run()
    for a, b in zip(alone.history, spread.history, strict=True):
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), abs=1e-5)
        assert a.get("dev_loss", 0) == pytest.approx(b.get("dev_loss", 0), abs=1e-5)
    np.testing.assert_allclose(alone.params["table"]["kernel"], spread.params["table"]["kernel"], atol=1e-5)
    # And again from the checkpoint before the last one: the arrays come back on their devices.
    shutil.rmtree(out / "checkpoints" / "4")
    resumed = run()
    assert resumed.params["table"]["kernel"].sharding == everywhere
    np.testing.assert_array_equal(spread.params["table"]["kernel"], resumed.params["table"]["kernel"])


def poisoned(nll_fn, token):
    """The loss of every sequence that starts with ``token`` is not a number."""

    def fn(params, batch):
        bad = jnp.asarray(batch.tokens)[:, 0] == token
        return jnp.where(bad, jnp.nan, nll_fn(params, batch))

    return fn


def test_a_loss_that_is_not_finite_stops_and_names_the_example(toy, tmp_path):
    nll_fn, params = toy.make_model()
    rows = [[t % 9 + 1, 2, 3, 4] for t in range(24)]
    data = toy.TokenisedDataset.from_sequences(rows, [1] * 24, ids=[f"row-{i}" for i in range(24)])
    config = TrainConfig(epochs=2, save_every=1, **SMALL)
    step = next(
        i for i, batch in enumerate(EpochPlan(data.lengths, 6, 0, np.zeros(0, np.int64)).epoch(0)) if 6 in
        batch
    )  # fmt: skip
    assert step > 0
    # Row 6 alone starts with token 0.
    rows[6][0] = 0
    data = toy.TokenisedDataset.from_sequences(rows, [1] * 24, ids=data.ids)
    with pytest.raises(UserError) as error:
        fit(poisoned(nll_fn, 0), params, data, config, seed=0, out_dir=tmp_path, progress=False)
    message = str(error.value)
    assert f"stopped at step {step + 1}: loss nan" in message
    assert "examples with a non-finite loss: row-6;" in message
    assert f"Kept: the checkpoint of step {step} in {tmp_path}" in message
    assert (tmp_path / "checkpoints" / str(step)).is_dir()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == step


def test_a_dev_loss_that_is_not_finite_stops_and_names_the_example(toy):
    nll_fn, params = toy.make_model()
    rows = [[t, 2, 3, 4] for t in range(3)]
    dev = toy.TokenisedDataset.from_sequences(rows, [1] * 3, ids=["a", "b", "c"])
    train = toy.TokenisedDataset.from_sequences([[5, 1, 2]] * 3, [1] * 3)
    with pytest.raises(UserError, match=r"step 0.*not finite: b\. No checkpoint"):
        fit(poisoned(nll_fn, 1), params, train, TrainConfig(steps=1, **SMALL), seed=0, dev=dev, progress=False)


def test_what_cannot_be_trained_is_refused(toy):
    nll_fn, params = toy.make_model()
    data = toy.make_data(5, 0)
    empty = toy.TokenisedDataset.from_sequences([], [])
    with pytest.raises(ConfigError, match="nothing to train"):
        fit(nll_fn, {}, data, TrainConfig(), seed=0)
    with pytest.raises(ConfigError, match=r"patience = 2.*dev"):
        fit(nll_fn, params, data, TrainConfig(patience=2), seed=0)
    with pytest.raises(ConfigError, match=r"domain_share = 0\.5"):
        fit(nll_fn, params, data, TrainConfig(domain_share=0.5), seed=0)
    with pytest.raises(DataError, match="training data hold no examples"):
        fit(nll_fn, params, empty, TrainConfig(), seed=0)
    with pytest.raises(DataError, match="dev data hold no examples"):
        fit(nll_fn, params, data, TrainConfig(), seed=0, dev=empty)


def test_a_folder_that_cannot_be_made_is_a_users_error(toy, tmp_path):
    nll_fn, params = toy.make_model()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write"):
        fit(nll_fn, params, toy.make_data(5, 0), TrainConfig(), seed=0, out_dir=tmp_path / "file" / "run")
