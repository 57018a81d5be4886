"""gradient-cosine against cosines of explicit gradients, and a planted group of short gradients."""

import numpy as np
import pytest

from ntkjax.errors import ConfigError, UserError
from ntkjax.selection import METHODS

EXACT = {"sketch": "sparse", "sketch_size": 32, "stage1": "off"}  # no inner product of 8 numbers is changed


def select(problem, **options):
    return METHODS["gradient-cosine"](**EXACT | options)(problem)


def test_scores_are_cosines_with_the_mean_gradient(given):
    rng = np.random.default_rng(0)
    domain, pool = rng.normal(size=(5, 8)) + 0.5, rng.normal(size=(30, 8))
    chosen = select(given(domain, pool, 6))
    mean = domain.mean(axis=0)
    expected = pool @ mean / np.linalg.norm(pool, axis=1) / np.linalg.norm(mean)
    np.testing.assert_allclose(chosen.scores, expected, atol=1e-5)
    assert chosen.selected.tolist() == np.argsort(-expected)[:6].tolist()
    lengths = rng.uniform(0.01, 100, (30, 1))
    np.testing.assert_allclose(select(given(domain, pool * lengths, 6)).scores, expected, atol=1e-5)


def test_it_follows_the_cosine_direction_of_ntk(make):
    exact = METHODS["ntk"](kernel="loss", direction="cosine", stage1="off", pool_sample=8)(make())
    np.testing.assert_allclose(select(make(), sketch_size=1 << 15).scores, exact.scores, atol=0.05)


def test_it_finds_a_planted_group_of_short_gradients(given):
    rng = np.random.default_rng(1)
    along = np.eye(8)[0]
    domain = 3 * along + 0.3 * rng.normal(size=(6, 8))
    short = 0.1 * along + 0.01 * rng.normal(size=(12, 8))
    long = along + 5 * rng.normal(size=(60, 8))
    problem = given(domain, np.concatenate([short, long]), 12)
    assert sorted(select(problem).selected) == list(range(12))
    assert not set(METHODS["ntk"](kernel="loss", stage1="off")(problem).selected) & set(range(12))
    assert np.sum(METHODS["random"]()(problem).selected < 12) < 6


def test_stage_1_and_zero_gradients_are_reported(given):
    rng = np.random.default_rng(2)
    pool = rng.normal(size=(30, 8))
    pool[4] = 0
    chosen = select(given(rng.normal(size=(5, 8)), pool, 3))
    assert chosen.scores[4] == 0 and chosen.diagnostics["zero_gradients"] == 1
    two = select(given(rng.normal(size=(5, 8)), pool, 3), stage1="on")
    assert two.scored.sum() == 12 == two.diagnostics["stage1_candidates"] and two.votes is not None


def test_what_cannot_be_is_refused(given):
    domain = np.array([[1.0, 0], [-1.0, 0]])
    with pytest.raises(UserError, match="mean gradient is zero"):
        select(given(domain, np.eye(2), 1))
    with pytest.raises(ConfigError, match="sketch_size"):
        METHODS["gradient-cosine"](sketch_size=0)
