"""The embedding vote against brute force."""

import numpy as np
import pytest

from ntkjax.errors import UserError
from ntkjax.selection.vote import vote


def brute_force(domain, pool, k):
    """Votes by sorting every similarity (float64), ties by lower row; and the mean similarity."""
    unit = lambda x: x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-300)
    similarity = unit(domain.astype(np.float64)) @ unit(pool.astype(np.float64)).T
    nearest = np.argsort(-similarity.round(6), axis=1, kind="stable")[:, :k]
    return np.bincount(nearest.ravel(), minlength=len(pool)), similarity.mean(axis=0)


def gaussian(rows, seed, width=5):
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


def run(domain, pool, k, chunk):
    return vote(domain, lambda index: pool[index], rows=len(pool), k=k, chunk=chunk)


@pytest.mark.parametrize("chunk", [7, 16, 64, 1000])
def test_votes_equal_brute_force_for_every_chunk(chunk):
    domain, pool = gaussian(9, 0), gaussian(61, 1)
    found = run(domain, pool, 6, chunk)
    votes, similarity = brute_force(domain, pool, 6)
    np.testing.assert_array_equal(found.votes, votes)
    np.testing.assert_allclose(found.similarity, similarity, atol=1e-6)
    assert found.votes.sum() == 9 * 6 and found.zero_norm == 0


@pytest.mark.parametrize("chunk", [5, 8, 100])
def test_equal_similarities_go_to_the_lower_row(chunk):
    # Rows 3, 8, 20 and 27 are one point; so are 5 and 6: the cut at k = 3 runs through the first group.
    pool = gaussian(30, 2)
    pool[[8, 20, 27]], pool[6] = pool[3], pool[5]
    found = run(pool[[3]], pool, 3, chunk)
    assert np.flatnonzero(found.votes).tolist() == [3, 8, 20]
    assert np.flatnonzero(run(pool[[5]], pool, 1, chunk).votes).tolist() == [5]


def test_most_votes_first_then_similarity_then_row():
    domain = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    pool = np.array([[-1, -0.1], [2, 0], [0, 3], [-1, -0.1], [-1, 0]], np.float32)
    found = run(domain, pool, 1, 8)
    assert found.votes.tolist() == [0, 2, 1, 0, 0]
    similarity = found.similarity
    assert similarity[0] == similarity[3] and similarity[4] > similarity[0]
    assert [found.top(n).tolist() for n in (1, 2, 3, 4)] == [[1], [1, 2], [1, 2, 4], [0, 1, 2, 4]]


def test_more_votes_than_pool_rows_is_one_vote_for_each():
    assert run(gaussian(4, 0), gaussian(6, 1), 50, 4).votes.tolist() == [4] * 6


def test_length_of_an_embedding_does_not_matter():
    domain, pool = gaussian(5, 0), gaussian(20, 1)
    scaled = pool * (2.0 ** np.arange(-10, 10, dtype=np.float32))[:, None]
    np.testing.assert_array_equal(run(domain, pool, 4, 8).votes, run(4 * domain, scaled, 4, 8).votes)


def test_zero_embeddings_are_counted_in_the_pool_and_refused_in_the_domain():
    domain, pool = gaussian(5, 0), gaussian(20, 1)
    pool[[2, 9]] = 0
    found = run(domain, pool, 3, 8)
    assert found.zero_norm == 2 and (found.similarity[[2, 9]] == 0).all()
    domain[1] = 0
    with pytest.raises(UserError, match="1 domain examples"):
        run(domain, pool, 3, 8)
