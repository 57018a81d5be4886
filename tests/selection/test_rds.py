"""RDS+ against choosing by hand, and on a domain of two groups."""

import dataclasses

import numpy as np
import pytest

from ntkjax.errors import ConfigError
from ntkjax.selection import METHODS


def gaussian(rows, seed, width=4):
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


def weighted(problem):
    """The same problem, whose given embeddings are the position-weighted ones and no others."""
    return dataclasses.replace(problem, weighted_embed_fn=problem.embed_fn, embed_fn=problem.hidden_fn)


def by_hand(domain, pool, n):
    """Turns on the whole similarity matrix: a taken column is struck out."""
    unit = lambda x: x.astype(np.float64) / np.linalg.norm(x, axis=1, keepdims=True)
    similarity = unit(domain) @ unit(pool).T
    highest, taken = similarity.max(axis=0), []
    while len(taken) < n:
        row = int(np.argmax(similarity[len(taken) % len(domain)]))
        similarity[:, row] = -np.inf
        taken.append(row)
    return taken, highest


@pytest.mark.parametrize("members, n", [(5, 12), (7, 3), (3, 25)])
def test_turns_and_scores_equal_those_by_hand(planted, members, n):
    # The domain points lie close together, so that they want the same rows.
    domain, pool = gaussian(1, 0) + 0.2 * gaussian(members, 1), gaussian(25, 2)
    chosen = METHODS["rds"]()(weighted(planted(domain, pool, n)))
    taken, highest = by_hand(domain, pool, n)
    assert chosen.selected.tolist() == taken
    np.testing.assert_allclose(chosen.scores, highest, atol=1e-6)
    assert chosen.ranks[chosen.selected].tolist() == list(range(1, n + 1))
    assert sorted(chosen.ranks.tolist()) == list(range(1, 26))
    others = np.setdiff1d(np.arange(25), taken)
    assert (np.diff(highest[others][np.argsort(chosen.ranks[others])]) <= 1e-6).all()


def test_every_group_of_the_domain_gets_its_turns(planted):
    """One group of the domain has many near rows, one few and farther ones: turns give each half, the nearest rows
    overall would all be of the first."""
    east, north = np.array([1.0, 0, 0]), np.array([0, 1.0, 0])
    rng = np.random.default_rng(0)
    around = lambda point, count, spread: point + spread * rng.normal(size=(count, 3))
    domain = np.stack([east, north])
    pool = np.concatenate([around(east, 20, 0.01), around(north, 5, 0.2), rng.normal(size=(40, 3)) - [3, 3, 0]])
    problem = weighted(planted(domain, pool, 10))
    chosen = METHODS["rds"]()(problem).selected
    assert np.sum(chosen < 20) == 5 and np.sum((chosen >= 20) & (chosen < 25)) == 5
    assert set(np.argsort(-METHODS["rds"]()(problem).scores)[:10]) <= set(range(20))
    assert (METHODS["random"]()(problem).selected >= 25).any()


def test_without_weighted_embeddings_it_is_refused(planted):
    with pytest.raises(ConfigError, match="weighted_embed_fn"):
        METHODS["rds"]()(planted(gaussian(2, 0), gaussian(4, 1), 1))
