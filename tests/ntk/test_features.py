"""Per-example gradients and sketched scores against single-row gradients and exact scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkjax.errors import UserError
from ntkjax.ntk import (
    IdentitySketch,
    KroneckerSketch,
    Pass,
    RademacherSketch,
    SketchScorer,
    SparseSketch,
    gradient_features,
    kernel_scores,
    mean_features,
    per_example_gradients,
)
from ntkjax.ntk.features import group_rows
from ntkjax.ntk.rows import NonFiniteError
from ntkjax.store import RowStore


@pytest.fixture
def case(toy):
    output_fn, params = toy.output("all")
    return output_fn, params, toy.sequences(19, 2)


def relative(a, b):
    return np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max()


@pytest.mark.parametrize("microbatch", [None, 2])
def test_per_example_gradients_are_those_of_single_rows(toy, case, microbatch):
    output_fn, params, rows = case
    batch = toy.collate(rows[:5], range(5), fill=1)
    gradients = per_example_gradients(output_fn, params, batch, microbatch=microbatch)
    for i in range(5):
        single = toy.jacobian(output_fn, params, toy.collate([rows[i]], [i], length=9))
        for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(single)):
            np.testing.assert_allclose(np.asarray(a)[i], b[0], atol=1e-6 * max(1, np.abs(b).max()))


SKETCHES = {
    "rademacher": RademacherSketch(96, seed=1, block=32),
    "sparse": SparseSketch(96, seed=1),
    "kronecker": KroneckerSketch(96, seed=1),
}


@pytest.mark.parametrize("name, budget_rows", [("rademacher", 1), ("rademacher", 6), ("sparse", 3), ("kronecker", 100)])
def test_features_do_not_depend_on_grouping_or_batches(toy, case, name, budget_rows):
    output_fn, params, rows = case
    sketch, size = SKETCHES[name], 4 * IdentitySketch().width(params)
    whole = gradient_features(output_fn, params, [toy.collate(rows, range(19))], sketch, rows=19)
    split = gradient_features(
        output_fn, params, toy.batches(rows, 4), sketch, rows=Pass(19, memory_budget=budget_rows * size + 3)
    )
    stacked = jax.tree.map(lambda leaf: leaf[None], params)
    assert group_rows(stacked, budget_rows * size + 3) == budget_rows
    assert whole.shape == (19, 96) and np.isfinite(whole).all()
    assert relative(split, whole) < 2e-6


@pytest.mark.parametrize("sketch", SKETCHES.values(), ids=SKETCHES.keys())
def test_a_stopped_run_goes_on_and_ends_with_the_same_features(toy, case, sketch, tmp_path):
    output_fn, params, rows = case
    plan = toy.batches(rows, 4)

    def run(batches, name):
        with RowStore.open(tmp_path / name, rows=19, width=96, dtype="float32", manifest=sketch.describe()) as store:
            return gradient_features(output_fn, params, batches, sketch, rows=Pass(19, store, memory_budget=1 << 12))

    def killed():
        yield from plan[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(killed(), "stopped")
    with RowStore.open(tmp_path / "stopped", rows=19, width=96, dtype="float32", manifest=sketch.describe()) as store:
        assert 0 < store.done().sum() < 19
    np.testing.assert_array_equal(run(plan, "stopped"), run(plan, "whole"))


def test_mean_features_are_the_mean_of_the_features(toy, case):
    output_fn, params, rows = case
    sketch = RademacherSketch(64)
    features = gradient_features(output_fn, params, toy.batches(rows, 4), sketch, rows=19)
    mean = mean_features(output_fn, params, toy.batches(rows, 4), sketch, memory_budget=1)
    assert relative(mean, features.mean(axis=0)) < 1e-5


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sketched_scores_agree_within_the_johnson_lindenstrauss_error(toy, case, seed):
    output_fn, params, rows = case
    domain, size = toy.sequences(6, 9), 512
    args = (output_fn, params, toy.batches(domain, 4), toy.batches(rows, 4))
    exact = kernel_scores(*args, rows=19).scores[:, 0]
    sketched = kernel_scores(*args, rows=19, scorer=SketchScorer(RademacherSketch(size, seed))).scores[:, 0]
    g = gradient_features(output_fn, params, toy.batches(rows, 4), IdentitySketch(), rows=19).astype(np.float64)
    mean = mean_features(output_fn, params, toy.batches(domain, 4), IdentitySketch())
    error = np.sqrt(((g**2).sum(1) * (mean**2).sum() + (g @ mean) ** 2 - 2 * g**2 @ mean**2) / size)
    z = (sketched - exact) / error
    assert np.abs(z).max() < 4.5
    assert np.abs(z).max() > 1e-3  # it is an estimate, not the exact path under another name


def test_filler_rows_reach_no_result(toy, case):
    output_fn, params, rows = case
    loud = lambda p, b: output_fn(p, b) + jnp.where(jnp.asarray(b.index) < 0, jnp.nan, 0.0) * p["embed"].sum()
    features = gradient_features(loud, params, [toy.collate(rows[:3], range(3), fill=2)], IdentitySketch(), rows=3)
    plain = gradient_features(output_fn, params, [toy.collate(rows[:3], range(3))], IdentitySketch(), rows=3)
    assert relative(features, plain) < 1e-6
    mean = mean_features(loud, params, [toy.collate(rows[:3], range(3), fill=2)], IdentitySketch())
    assert relative(mean, plain.mean(axis=0)) < 1e-5


def test_non_finite_features_name_their_rows(toy, case):
    output_fn, params, rows = case
    bad = lambda p, b: output_fn(p, b) + jnp.where(jnp.asarray(b.index) == 2, jnp.nan, 0.0) * p["embed"].sum()
    plan = toy.batches(rows[:6], 4)
    with pytest.raises(NonFiniteError) as error:
        gradient_features(bad, params, plan, IdentitySketch(), rows=6)
    assert error.value.rows == [2]
    with pytest.raises(NonFiniteError):
        mean_features(bad, params, plan, IdentitySketch())
    with pytest.raises(UserError, match="no examples"):
        mean_features(output_fn, params, [], IdentitySketch())
