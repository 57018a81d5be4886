"""EUDS: entropies against formulas, the interval against counting, a pool of trivia, noise and what lies between."""

from __future__ import annotations

import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkjax.data import TokenisedDataset
from ntkjax.errors import ConfigError
from ntkjax.ntk.rows import NonFiniteError
from ntkjax.selection import METHODS
from ntkjax.selection.methods.euds import cluster_entropy, entropy_batch, information_entropy, token_entropies


def shannon(items):
    """-sum p log p over the shares of equal items, in nats."""
    shares = np.array(list(Counter(items).values())) / len(items)
    return float(-np.sum(shares * np.log(shares)))


def test_information_entropy_is_that_of_the_token_shares():
    rows = [[3, 3, 3, 3], [1, 2, 3, 4, 5], [7, 7, 2, 2, 2, 9], [5]]
    tokens, real = np.full((5, 8), 3, np.int32), np.zeros((5, 8), bool)  # padding is a token that occurs, too
    for i, row in enumerate(rows):
        tokens[i, : len(row)], real[i, : len(row)] = row, True
    found = np.asarray(jax.jit(information_entropy)(jnp.asarray(tokens), jnp.asarray(real)))
    np.testing.assert_allclose(found, [*map(shannon, rows), 0], atol=1e-6)
    assert found[0] == 0 and found[1] == pytest.approx(math.log(5), abs=1e-6)


@pytest.mark.parametrize(
    "texts, groups",
    [
        (["a b c", "A  b c", "a b c"], [3]),
        (["one two", "three four", "five six", "seven"], [1, 1, 1, 1]),
        (["a b c d", "a b c e", "x y", "x y z"], [2, 2]),  # Jaccard 3/5 and 2/3
        (["a b", "a c"], [1, 1]),  # 1/3
        (["", "", "a"], [2, 1]),
        # The first member decides: c is near b, not near a.
        (["a b c d", "a b c e", "b c e f"], [2, 1]),
    ],
)
def test_semantic_entropy_of_clusters(texts, groups):
    expected = shannon([k for k, size in enumerate(groups) for _ in range(size)])
    assert cluster_entropy(texts, 0.5) == pytest.approx(expected, abs=1e-12)


def in_quantiles(values, low, high):
    """Rows inside the interval and how deep, by counting: u = (smaller + half of the equal ones) / N."""
    u = np.array([(np.sum(values < v) + 0.5 * np.sum(values == v)) / len(values) for v in values])
    return np.minimum(u - low, high - u)


@pytest.mark.parametrize("keep", ["intersection", "information", "generative"])
def test_scores_are_the_depth_in_the_interval(make, keep):
    given = make(n=6)
    chosen = METHODS["euds"](entropy_keep=keep, entropy_low=0.2, entropy_high=0.9)(given)
    both = token_entropies(given)
    tokens = [given.pool.tokens(i)[0].tolist() for i in range(24)]
    np.testing.assert_allclose(both[:, 0], [shannon(row) for row in tokens], atol=1e-6)
    depth = {name: in_quantiles(values, 0.2, 0.9) for name, values in zip(("information", "generative"), both.T)}
    expected = np.minimum(*depth.values()) if keep == "intersection" else depth[keep]
    np.testing.assert_allclose(chosen.scores, expected, atol=1e-12)
    assert chosen.diagnostics["inside_the_interval"] == np.sum(expected >= 0)
    order = sorted(range(24), key=lambda j: (-expected[j], j))
    assert chosen.selected.tolist() == order[:6]


def test_too_few_inside_are_filled_up_and_counted(make):
    chosen = METHODS["euds"](entropy_low=0.45, entropy_high=0.55)(make(n=20))
    inside = chosen.diagnostics["inside_the_interval"]
    assert inside < 20 and chosen.diagnostics["filled_from_outside"] == 20 - inside
    assert (chosen.scores[chosen.selected[:inside]] >= 0).all() and (chosen.scores[chosen.selected[inside:]] < 0).all()


def planted_pool(rng):
    """60 rows: a third repeats one token (no information), a third is noise to a model that predicts its first token
    again, a third lies between."""
    kinds, rows = rng.permutation(np.repeat([0, 1, 2], 20)), []
    for kind in kinds:
        length = 40
        if kind == 0:
            rows.append([int(rng.integers(1, 50))] * length)
        elif kind == 1:
            rows.append(rng.choice(np.arange(1, 50), length, replace=False).tolist())
        else:
            few = rng.choice(np.arange(1, 50), 8, replace=False)
            rows.append(rng.choice(few, length).tolist())
    return kinds, TokenisedDataset.from_sequences(rows, [1] * 60)


def test_it_finds_what_lies_between_and_random_does_not(make):
    kinds, pool = planted_pool(np.random.default_rng(0))
    # The more different tokens so far, the less sure: -log of the share of the token in the row so far.
    unsure = lambda params, batch: jnp.asarray(information_entropy(batch.tokens, batch.response_mask))
    given = make(n=15, entropy_fn=unsure, pool=pool, pool_texts=None)
    chosen = METHODS["euds"](entropy_low=0.34, entropy_high=0.66)(given)
    share = lambda found: np.mean(kinds[found.selected] == 2)
    assert share(chosen) == 1.0
    assert share(METHODS["random"]()(given)) < 0.7


def sampler(calls):
    """Continuations of row j: all the same where j is even, all different where it is odd."""

    def sample(rows, *, samples, max_new_tokens, seed):
        calls.append((rows.tolist(), samples, max_new_tokens, seed))
        return [[f"word{i if row % 2 else 0}" for i in range(samples)] for row in rows.tolist()]

    return sample


def test_semantic_entropy_is_left_out_unless_asked_for(make):
    calls = []
    plain = METHODS["euds"]()(make(sample_fn=sampler(calls)))
    assert not calls and plain.diagnostics["entropies_used"] == "information, generative"
    METHODS["euds"](entropy_keep="information", semantic_samples=3)(make(sample_fn=sampler(calls)))
    assert not calls
    with_it = METHODS["euds"](semantic_samples=3)(make(sample_fn=sampler(calls)))
    assert with_it.diagnostics["entropies_used"] == "information, generative, semantic"
    assert calls == [(list(range(24)), 3, 64, 0)]
    alone = METHODS["euds"](entropy_keep="semantic", semantic_samples=4, entropy_low=0.5, entropy_high=1.0)
    chosen = alone(make(n=12, sample_fn=sampler([])))
    assert sorted(chosen.selected.tolist()) == list(range(1, 24, 2))
    np.testing.assert_allclose(alone.semantic(make(sample_fn=sampler([])))[1::2], math.log(4), rtol=1e-6)


def test_finished_rows_are_kept(make, tmp_path, monkeypatch):
    import ntkjax.selection.methods.euds as euds

    monkeypatch.setattr(euds, "SAMPLED_ROWS", 8)
    calls, method = [], METHODS["euds"](semantic_samples=2)
    fields = {"work_dir": tmp_path, "manifest": {"model": "m"}}

    def breaks(rows, **options):
        if rows[0] == 16:
            raise KeyboardInterrupt
        return sampler(calls)(rows, **options)

    with pytest.raises(KeyboardInterrupt):
        method(make(sample_fn=breaks, **fields))
    first = method(make(sample_fn=sampler(calls), **fields))
    # The block before the interruption was in flight, as a batch on a device is.
    assert [call[0] for call in calls] == [list(range(k, k + 8)) for k in (0, 8, 8, 16)]
    monkeypatch.setattr(euds, "entropy_batch", lambda *a: (_ for _ in ()).throw(AssertionError("computed again")))
    again = method(make(sample_fn=sampler(calls), **fields))
    np.testing.assert_array_equal(first.scores, again.scores)
    assert len(calls) == 4


def test_one_row_at_a_time_gives_the_same(make):
    given = make()
    batch = given.pool.collate(np.arange(6))
    alone = [
        entropy_batch(jax.tree_util.Partial(given.entropy_fn), given.params, given.pool.collate([i])) for i in range(6)
    ]
    together = entropy_batch(jax.tree_util.Partial(given.entropy_fn), given.params, batch)
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-6)


def test_what_it_cannot_do_is_refused(make):
    bad = {
        "entropy_low": -0.1, "entropy_high": 1.1, "semantic_samples": 1, "semantic_tokens": 0,
        "semantic_similarity": 0.0,
    }  # fmt: skip
    for name, value in bad.items():
        with pytest.raises(ConfigError, match=name):
            METHODS["euds"](**{name: value})
    with pytest.raises(ConfigError, match="semantic_samples"):
        METHODS["euds"](entropy_keep="semantic")
    with pytest.raises(ConfigError, match="entropy_fn"):
        METHODS["euds"]()(make(entropy_fn=None))
    with pytest.raises(ConfigError, match="sample_fn"):
        METHODS["euds"](semantic_samples=2)(make(sample_fn=None))
    with pytest.raises(NonFiniteError, match="entropy"):
        METHODS["euds"]()(make(entropy_fn=lambda params, batch: jnp.full(batch.tokens.shape[0], jnp.nan)))
