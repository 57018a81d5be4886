"""Gradient features against explicit gradients; what is kept is computed once, whoever asks and whatever is killed."""

import dataclasses

import jax
import numpy as np
import pytest

from ntkjax.errors import ConfigError
from ntkjax.ntk.sketches import SKETCHES
from ntkjax.selection import METHODS
from ntkjax.selection.gradients import find_candidates, gradient_features, in_blocks
from ntkjax.selection.options import GradientOptions
from ntkjax.store import RowStore

SIZE = 32


def unflatten(problem, rows):
    """Gradients [N, P] as the sketches get them: {"outputs": leaves [N, 1, ...]}."""
    leaves, structure = jax.tree.flatten(problem.params)
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
    parts = [np.asarray(p, np.float32) for p in np.split(rows, ends, axis=1)]
    shaped = [jax.numpy.asarray(p.reshape(len(rows), 1, *leaf.shape)) for p, leaf in zip(parts, leaves)]
    return {"outputs": structure.unflatten(shaped)}


def flat(tree):
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("sketch", sorted(SKETCHES))
def test_features_are_the_sketch_of_explicit_gradients(sketch, make, small):
    problem = make(seed=3)
    checkpoint = problem.checkpoints[0] if sketch == "sparse" else None
    params = problem.params if checkpoint is None else checkpoint.params
    rows = np.array([1, 4, 5, 17, 23])
    domain, read = gradient_features(problem, rows, sketch=sketch, size=SIZE, checkpoint=checkpoint)
    apply = lambda g: np.asarray(SKETCHES[sketch](SIZE, 3)(unflatten(problem, g)))
    one, other = (small.explicit_gradients(problem, data, params=params) for data in (problem.domain, problem.pool))
    np.testing.assert_allclose(domain, apply(one), atol=1e-4)
    np.testing.assert_allclose(read(rows[[3, 0]]), apply(other)[rows[[3, 0]]], atol=1e-4)
    assert domain.dtype == read(rows).dtype == np.float32


@pytest.mark.parametrize("sketch", sorted(SKETCHES))
def test_adam_moves_the_pools_gradients_before_the_sketch_and_leaves_the_domains(sketch, make, small):
    problem = make()
    checkpoint, rows = problem.checkpoints[0], np.arange(24)
    domain, read = gradient_features(problem, rows, sketch=sketch, size=SIZE, checkpoint=checkpoint, adam=True)
    plain, _ = gradient_features(problem, rows, sketch=sketch, size=SIZE, checkpoint=checkpoint)
    np.testing.assert_array_equal(domain, plain)
    g = small.explicit_gradients(problem, problem.pool, params=checkpoint.params)
    m, v = flat(checkpoint.first), flat(checkpoint.second)
    moved = (0.9 * m + 0.1 * g) / np.sqrt(0.999 * v + 0.001 * g * g + 1e-8)
    expected = np.asarray(SKETCHES[sketch](SIZE, 0)(unflatten(problem, moved)))
    np.testing.assert_allclose(read(rows), expected, atol=1e-4 * np.abs(expected).max())


def test_a_kernel_of_several_outputs(make, small):
    problem, rows = make(), np.arange(24)
    # Several outputs in one phi: inner products estimate the trace kernel, here with K far above P.
    _, read = gradient_features(problem, rows, kernel="trace", sketch="sparse", size=1 << 16)
    logits = lambda p, b: small.hidden_fn(p, b) @ p["head"].T
    g, found = small.explicit_gradients(problem, problem.pool, logits), read(rows).astype(np.float64)
    np.testing.assert_allclose(found @ found.T, g @ g.T, atol=0.05 * np.max(g @ g.T))


@pytest.fixture
def written(monkeypatch):
    """Rows that any store was given, in order."""
    rows, write = [], RowStore.write

    def record(self, index, values):
        rows.extend(np.asarray(index)[np.asarray(index) >= 0].tolist())
        write(self, index, values)

    monkeypatch.setattr(RowStore, "write", record)
    return rows


def test_other_candidates_compute_what_is_missing_and_nothing_twice(make, tmp_path, written):
    problem = make(work_dir=tmp_path, token_budget=24)
    ask = lambda rows: gradient_features(problem, np.asarray(rows), sketch="sparse", size=SIZE)
    few = [2, 3, 11, 12, 20]
    _, read = ask(few)
    first = read(np.array(few))
    assert sorted(written) == sorted([*range(6), *few])  # the domain's too
    written.clear()
    _, read = ask(range(16))
    assert sorted(written) == [row for row in range(16) if row not in few]
    np.testing.assert_array_equal(read(np.array([2, 3, 11, 12])), first[:4])
    written.clear()
    np.testing.assert_array_equal(ask([20, 3])[1](np.array([20, 3])), first[[4, 1]])
    assert not written
    whole = gradient_features(make(token_budget=24), np.arange(16), sketch="sparse", size=SIZE)[1](np.arange(16))
    np.testing.assert_allclose(read(np.arange(16)), whole, atol=1e-5)


@pytest.mark.parametrize("sketch", ["sparse", "rademacher"])
def test_a_killed_request_ends_with_the_same_bits(sketch, make, tmp_path, monkeypatch):
    ask = lambda root, rows: gradient_features(
        make(work_dir=root, token_budget=24), np.asarray(rows), sketch=sketch, size=SIZE
    )
    requests = ([2, 3, 11, 12, 20], range(16), range(24))
    for rows in requests:
        _, whole = ask(tmp_path / "whole", rows)
    monkeypatch.setattr("ntkjax.store._FLUSH_SECONDS", 0.0)
    write, budget = RowStore.write, [0]

    def stop(self, index, values):
        budget[0] -= 1
        if budget[0] < 0:
            raise KeyboardInterrupt
        write(self, index, values)

    monkeypatch.setattr(RowStore, "write", stop)
    kills = 0
    for number, rows in enumerate(requests):
        budget[0] = 2 if sketch == "sparse" else 1 - min(number, 1)  # dense: all rows are written at once
        try:
            ask(tmp_path / "killed", rows)
        except KeyboardInterrupt:
            kills += 1
        if number == 0:
            continue  # the second request begins before the first has ended, and finds its part begun
        budget[0] = 1000
        _, killed = ask(tmp_path / "killed", rows)
    assert kills >= 2
    if sketch == "sparse":
        np.testing.assert_array_equal(killed(np.arange(24)), whole(np.arange(24)))
    else:  # rows share one matrix product with others than before
        np.testing.assert_allclose(killed(np.arange(24)), whole(np.arange(24)), atol=1e-5)


def test_a_folder_is_named_from_what_its_rows_depend_on(make, tmp_path):
    problem = make(shared_dir=tmp_path / "shared", work_dir=tmp_path / "own", manifest={"domain": "a", "model": "m"})
    folders = lambda: {path.name for path in (tmp_path / "shared").glob("gradients-*")}
    rows = np.arange(3)

    def ask(problem, **options):
        gradient_features(problem, rows, **{"sketch": "sparse", "size": SIZE} | options)
        return len(folders())

    assert ask(problem) == 1
    assert ask(problem, checkpoint=problem.checkpoints[-1]) == 1  # its theta is the problem's
    smaller = dataclasses.replace(problem, manifest={"domain": "b", "model": "m"}, work_dir=tmp_path / "two")
    assert ask(smaller) == 1  # the pool's gradients do not see the domain
    other = dataclasses.replace(problem, params=problem.checkpoints[0].params)
    assert [
        ask(problem, sketch="kronecker"),
        ask(problem, size=2 * SIZE),
        ask(problem, kernel="sum_logits"),
        ask(dataclasses.replace(problem, seed=1)),
        ask(dataclasses.replace(problem, manifest={"domain": "a", "model": "other"})),
        ask(other),
        ask(problem, checkpoint=problem.checkpoints[0]),  # the same theta
        ask(problem, checkpoint=problem.checkpoints[0], adam=True),
        ask(problem, checkpoint=problem.checkpoints[1], adam=True),
        ask(make(rows=30, shared_dir=tmp_path / "shared", manifest={"model": "m"})),
    ] == [2, 3, 4, 5, 6, 7, 7, 8, 9, 10]
    assert not (tmp_path / "own").exists()


def test_embeddings_are_shared_too(make, tmp_path, written):
    shared = tmp_path / "shared"
    one = METHODS["embedding"]()(make(shared_dir=shared, work_dir=tmp_path / "one"))
    assert sorted(written) == list(range(24))
    written.clear()
    two = METHODS["embedding"]()(make(shared_dir=shared, work_dir=tmp_path / "two", seed=1))
    assert not written
    np.testing.assert_array_equal(one.scores, two.scores)
    other = make().checkpoints[0].params
    METHODS["embedding"]()(make(shared_dir=shared, params=other))  # no refusal: a folder of its own
    assert sorted(written) == list(range(24))


def test_only_candidates_can_be_read(make, tmp_path):
    for root in (None, tmp_path):
        _, read = gradient_features(make(work_dir=root), np.array([1, 2]), sketch="sparse", size=SIZE)
        with pytest.raises(Exception, match=r"not computed yet|not among the candidates"):
            read(np.array([1, 3]))


def test_candidates(make):
    problem = make(n=2)
    every = find_candidates(problem, stage1="off", prefilter_factor=4)
    assert every.rows.tolist() == list(range(24)) and every.counts is None and every.report() == {}
    some = find_candidates(problem, stage1="on", prefilter_factor=4)
    assert len(some.rows) == 8 == some.report()["stage1_candidates"] and some.counts.sum() == 6 * 2
    assert len(find_candidates(problem, stage1="on", prefilter_factor=40).rows) == 24


def test_blocks_hold_every_row_once():
    found = list(in_blocks(np.array([3, 5, 6, 9, 10]), 2))
    assert [(at.start, at.stop, rows.tolist()) for at, rows in found] == [(0, 2, [3, 5]), (2, 4, [6, 9]), (4, 5, [10])]


def test_what_cannot_be_is_refused(make):
    problem = make()
    checkpoint, options = problem.checkpoints[0], {"sketch": "sparse", "size": SIZE}
    with pytest.raises(ConfigError, match="needs a warm-up checkpoint"):
        gradient_features(problem, np.arange(2), adam=True, **options)
    with pytest.raises(ConfigError, match="one output"):
        gradient_features(problem, np.arange(2), adam=True, checkpoint=checkpoint, kernel="trace", **options)
    good = {"sketch": "sparse", "sketch_size": 8, "stage1": "on", "prefilter_factor": 4}
    GradientOptions(**good)
    for bad in ({"sketch_size": 0}, {"prefilter_factor": 0}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            GradientOptions(**good | bad)
    with pytest.raises(ConfigError, match="multiple of the number of tables"):
        GradientOptions(**good | {"sketch_size": 10})
