"""Selection methods on a small model: what is scored, chosen, kept and reported."""

import json

import jax
import numpy as np
import pytest

from ntkjax.data import TokenisedDataset
from ntkjax.errors import ConfigError
from ntkjax.selection import METHODS, described, rank, select_top
from ntkjax.selection.diagnostics import examples


@pytest.mark.parametrize("kernel", ["sum_logits", "loss"])
def test_whole_pool_scores_are_the_row_means_of_the_kernel(kernel, small):
    problem = small.make()
    output_fn = small.nll_fn if kernel == "loss" else small.sum_of_logits
    chosen = METHODS["ntk"](kernel=kernel, stage1="off", pool_sample=8)(problem)
    gradients = lambda data: small.explicit_gradients(problem, data, output_fn)
    expected = gradients(problem.pool) @ gradients(problem.domain).mean(axis=0)
    np.testing.assert_allclose(chosen.scores, expected, atol=1e-5 * np.abs(expected).max())
    assert set(chosen.selected.tolist()) == set(np.argsort(-expected)[:5].tolist())
    assert chosen.scored.all() and chosen.votes is None
    assert described(chosen, problem.pool).diagnostics["negative_share"] == np.mean(expected < 0)


def test_a_mean_gradient_is_taken_in_batches_of_its_own_size(make, monkeypatch):
    """However large the batches of the forward passes: here at most 16 tokens a batch."""
    problem, asked = make(token_budget=4096), []
    whole = METHODS["ntk"](stage1="off", pool_sample=8)(problem)
    batches = TokenisedDataset.batches

    def watched(self, *, token_budget, **rest):
        plan = batches(self, token_budget=token_budget, **rest)
        asked.append((token_budget, max(batch.tokens.size for batch in plan)))
        return plan

    monkeypatch.setattr(TokenisedDataset, "batches", watched)
    monkeypatch.setattr("ntkjax.selection.base.GRADIENT_TOKENS", 16)
    parts = METHODS["ntk"](stage1="off", pool_sample=8)(problem)
    assert {budget for budget, _ in asked} == {16, 4096}  # domain and sample of the pool, scores
    assert all(largest <= 16 for budget, largest in asked if budget == 16)
    np.testing.assert_allclose(parts.scores, whole.scores, rtol=1e-4, atol=1e-5)


def test_stage_1_limits_what_is_scored(make):
    problem = make(n=2)
    whole = METHODS["ntk"](stage1="off", pool_sample=8)(problem)
    two = METHODS["ntk"](prefilter_factor=4, pool_sample=8)(problem)
    assert two.scored.sum() == 8 and np.isnan(two.scores[~two.scored]).all()
    np.testing.assert_allclose(two.scores[two.scored], whole.scores[two.scored], rtol=1e-4, atol=1e-5)
    assert two.votes.sum() == 6 * 2 and two.votes[two.scored].min() >= two.votes[~two.scored].max()
    assert sorted(two.ranks[two.scored].tolist()) == list(range(1, 9)) and (two.ranks[~two.scored] == 0).all()
    assert two.ranks[two.selected].tolist() == [1, 2]
    assert two.diagnostics["stage1_candidates"] == described(two, problem.pool).diagnostics["scored"] == 8


@pytest.mark.parametrize("sketch", ["rademacher", "sparse", "kronecker"])
def test_sketched_scores_follow_the_exact_ones(sketch, make):
    problem = make()
    exact = METHODS["ntk"](stage1="off", pool_sample=8)(problem)
    options = {"sketch": sketch, "sketch_size": 256 if sketch != "rademacher" else 2048}
    sketched = METHODS["ntk"](stage1="off", scores="sketch", pool_sample=8, **options)(problem)
    assert np.corrcoef(exact.scores, sketched.scores)[0, 1] > 0.9
    assert not np.array_equal(exact.scores, sketched.scores)


@pytest.mark.parametrize("precondition", ["adam", "kfac", "ekfac"])
def test_a_preconditioner_changes_the_direction_and_nothing_else(precondition, make):
    from ntkjax.ntk.precondition import build_preconditioner

    problem = make()
    nll_fn = problem.nll_fn
    chosen = METHODS["ntk"](kernel="loss", stage1="off", precondition=precondition, pool_sample=8)(problem)
    solve = build_preconditioner(precondition, nll_fn, problem.params, problem.domain.batches(token_budget=64))
    mean = jax.grad(
        lambda p: sum(nll_fn(p, b)[b.index >= 0].sum() for b in problem.domain.batches(token_budget=64)) / 6
    )
    along = jax.tree.map(lambda leaf: leaf[0], solve(jax.tree.map(lambda leaf: leaf[None], mean(problem.params))))
    expected = np.zeros(len(problem.pool))
    for batch in problem.pool.batches(token_budget=64):
        moved = jax.jvp(lambda p, b=batch: nll_fn(p, b), (problem.params,), (along,))[1]
        expected[batch.index[batch.index >= 0]] = np.asarray(moved)[batch.index >= 0]
    np.testing.assert_allclose(chosen.scores, expected, atol=1e-4 * np.abs(expected).max())
    assert chosen.diagnostics["precondition"] == precondition


@pytest.mark.parametrize("options", [{"scores": "sketch"}, {"direction": "cosine"}, {"damping": 0.0}])
def test_options_that_do_not_fit_together_are_refused(options):
    with pytest.raises(ConfigError, match=r"precondition kfac|damping must be above 0"):
        METHODS["ntk"](precondition="kfac", **options)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_selection_is_complete_repeatable_and_plain(method, make):
    problem = make()
    one, two = METHODS[method]()(problem), METHODS[method]()(problem)
    assert len(set(one.selected.tolist())) == 5
    np.testing.assert_array_equal(one.selected, two.selected)
    np.testing.assert_array_equal(one.scores, two.scores)
    report = json.loads(json.dumps(described(one, problem.pool).diagnostics, allow_nan=False))
    assert sum(report["sources_chosen"].values()) == 5
    assert report["sources_offered"] == {"even": 12, "odd": 12}
    assert -1 <= report["rank_correlation_with_length"] <= 1
    assert ("rank_correlation_with_pool_mean" in report) == (method in ("ntk", "influence"))


def test_random_depends_on_the_seed_alone(make):
    draw = lambda **changes: METHODS["random"]()(make(**changes)).selected.tolist()
    assert draw(seed=1) == draw(seed=1, token_budget=32) != draw(seed=2)
    assert draw(n=3, seed=1) == draw(n=5, seed=1)[:3]


def test_embedding_orders_by_votes_then_similarity(make):
    chosen = METHODS["embedding"]()(make())
    order = np.argsort(chosen.ranks)
    assert (np.diff(chosen.votes[order]) <= 0).all()
    assert chosen.votes.sum() == 6 * 5


def test_finished_rows_are_kept_and_used_again(tmp_path, monkeypatch, make):
    first = METHODS["ntk"](pool_sample=8)(make(work_dir=tmp_path))
    import ntkjax.ntk.scores as scores

    def refuse(*args):
        raise AssertionError("computed again")

    monkeypatch.setattr(scores, "score_batch", refuse)
    again = METHODS["ntk"](pool_sample=8)(make(work_dir=tmp_path))
    np.testing.assert_array_equal(again.scores, first.scores)
    with pytest.raises(ConfigError, match="kernel"):
        METHODS["ntk"](pool_sample=8, kernel="loss")(make(work_dir=tmp_path))


def test_ranks_break_ties_by_row_and_skip_what_is_not_scored():
    scores = np.array([1.0, np.nan, 3, 3, 1])
    assert rank(scores).tolist() == [3, 0, 1, 2, 4]
    assert select_top("x", scores, 3).selected.tolist() == [2, 3, 0]
    with pytest.raises(ConfigError, match="only 4"):
        select_top("x", scores, 5)


def test_examples_to_look_at():
    shown = examples(select_top("x", np.array([5.0, 4, np.nan, 3, 2, 1, 0]), 2), shown=2)
    assert {k: v.tolist() for k, v in shown.items()} == {"chosen": [0, 1], "just_missed": [3, 4], "lowest": [6, 5]}


def test_impossible_requests_are_refused(make):
    with pytest.raises(ConfigError, match=r"n = 25 .*\(24 examples"):
        make(n=25)
    with pytest.raises(ConfigError, match="at least 1"):
        make(n=0)
    for option in ("sketch_size", "prefilter_factor", "pool_sample"):
        with pytest.raises(ConfigError, match=option):
            METHODS["ntk"](**{option: 0})
