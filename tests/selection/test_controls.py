"""The controls: length, and random rows from stage 1's candidates."""

import numpy as np
import pytest

from ntkjax.errors import ConfigError
from ntkjax.selection import METHODS, described
from ntkjax.selection.gradients import find_candidates


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
