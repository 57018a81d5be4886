"""The controls: length, and random rows from stage 1's candidates."""

import dataclasses

import numpy as np
import pytest

from ntkjax.errors import ConfigError
from ntkjax.selection import METHODS, described
from ntkjax.selection.gradients import find_candidates
from ntkjax.selection.methods.length_matched import match_lengths


def gaussian(rows, seed, width=4):
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


def test_length_takes_the_longest_or_the_shortest_ties_by_row(planted):
    lengths = [3, 7, 1, 7, 5, 1]
    problem = planted(gaussian(2, 0), gaussian(6, 1), 3, lengths)
    longest, shortest = METHODS["length"]()(problem), METHODS["length"](order="shortest")(problem)
    assert longest.selected.tolist() == [1, 3, 4] and shortest.selected.tolist() == [2, 5, 0]
    assert longest.scores.tolist() == lengths
    assert described(longest, problem.pool).diagnostics["rank_correlation_with_length"] == pytest.approx(1)
    assert described(shortest, problem.pool).diagnostics["rank_correlation_with_length"] == pytest.approx(-1)


def test_random_from_stage_1_draws_from_the_candidates_and_no_others(planted):
    # Half the pool lies along the domain, half against it: with M_pre = half the pool, stage 1 keeps the first half.
    domain = np.abs(gaussian(5, 0)) + 1
    pool = np.concatenate([np.abs(gaussian(20, 1)) + 1, -np.abs(gaussian(20, 2)) - 1])
    drawn = []
    for seed in range(12):
        chosen = METHODS["random-from-stage-1"](prefilter_factor=4)(planted(domain, pool, 5, seed=seed))
        kernel_candidates = find_candidates(planted(domain, pool, 5), stage1="on", prefilter_factor=4).rows
        assert np.flatnonzero(chosen.scored).tolist() == kernel_candidates.tolist() == list(range(20))
        drawn += chosen.selected.tolist()
    # 60 draws from 20 rows: uniform draws leave a row out with probability (3/4)^12 = 0.03
    assert len(set(drawn)) >= 17
    control = METHODS["random"]()(planted(domain, pool, 5, seed=0)).selected
    assert (control >= 20).any()


def test_its_number_for_a_row_is_that_of_any_other_candidate_set(planted):
    problem = planted(gaussian(5, 0), gaussian(30, 1), 4)
    few, many = (METHODS["random-from-stage-1"](prefilter_factor=f)(problem) for f in (2, 5))
    both = few.scored & many.scored
    np.testing.assert_array_equal(few.scores[both], many.scores[both])
    assert few.scored.sum() == 8 and many.scored.sum() == 20 and both.any()
    with pytest.raises(ConfigError, match="prefilter_factor"):
        METHODS["random-from-stage-1"](prefilter_factor=0)


def test_length_matched_draws_other_rows_of_the_same_lengths(make):
    problem, options = make(n=6, rows=60), {"stage1": "off", "kernel": "loss"}
    lengths = problem.pool.response_lengths
    taken = METHODS["ntk"](**options)(problem).selected
    chosen = METHODS["length-matched"](**options)(problem)
    assert not set(taken.tolist()) & set(chosen.selected.tolist()) and len(chosen.selected) == 6
    assert sorted(lengths[chosen.selected]) == sorted(lengths[taken]) and chosen.diagnostics["length_gap"] == 0
    assert chosen.scored.sum() == 6
    with pytest.raises(ConfigError, match="expected at least 62"):
        METHODS["length-matched"](**options)(dataclasses.replace(problem, n=31))


def test_every_row_of_a_length_is_as_likely():
    lengths, taken = np.asarray([4] * 8 + [7] * 8), np.asarray([0, 8, 9])
    counts = np.zeros(16)
    for seed in range(400):
        counts[match_lengths(lengths, taken, np.random.default_rng(seed).random(16))] += 1
    assert counts[taken].sum() == 0
    np.testing.assert_allclose(counts[1:8] / 400, 1 / 7, atol=0.07)  # four standard deviations
    np.testing.assert_allclose(counts[10:] / 400, 2 / 6, atol=0.1)


def test_what_there_is_too_little_of_is_matched_by_what_is_nearest():
    lengths = np.asarray([3, 3, 3, 5, 5, 9, 10, 30])
    # Of length 3 one is left for two, of length 9 none: 5 has its own, and 3 must not take it.
    drawn = match_lengths(lengths, np.asarray([0, 1, 5]), np.linspace(0, 1, 8))
    assert sorted(lengths[drawn]) == [3, 5, 10]
    drawn = match_lengths(lengths, np.asarray([0, 1, 3]), np.linspace(0, 1, 8))
    assert sorted(lengths[drawn]) == [3, 5, 9]
