"""The directions of a selection's scores give these scores, and their own mean is that of the domain's examples."""

from __future__ import annotations

import numpy as np
import pytest

from ntkjax.errors import ConfigError
from ntkjax.ntk import scores_along
from ntkjax.selection import METHODS

PLAIN = {"stage1": "off", "pool_sample": 12}
EXACT = {"kernel": "loss", "sketch_size": 32, "sketch": "sparse"}


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ntk", EXACT),
        ("ntk", EXACT | {"direction": "contrast", "precondition": "kfac", "damping": 0.5}),
        ("ntk", EXACT | {"direction": "contrast", "aggregation": "clusters", "domain_clusters": 2}),
        ("ntk", EXACT | {"direction": "cosine", "aggregation": "clusters", "domain_clusters": 2}),
        ("influence", {"damping": 0.5}),
    ],
)
def test_scores_are_those_along_the_directions(method, options, given):
    rng = np.random.default_rng(2)
    domain = 2 * np.eye(8)[np.array([0, 1, 0, 0, 1, 0, 0, 1, 0])] + 0.1 * rng.normal(size=(9, 8))
    pool = rng.normal(size=(20, 8)) + 0.3
    problem, selector = given(domain, pool, 4), METHODS[method](**PLAIN, **options)
    rows = np.arange(20)
    assert selector.no_parts is None
    found = selector.directional(problem, rows)
    along = lambda data: scores_along(
        found.kernel, problem.params, found.directions, data.batches(token_budget=64), rows=len(data)
    )
    scores = along(problem.pool).max(axis=1)
    scores = scores if found.divisors is None else scores / found.divisors
    np.testing.assert_allclose(scores, selector(problem).scores, rtol=1e-4, atol=1e-5)
    if options.get("direction") == "cosine":
        assert found.own is None
        return
    clusters = options.get("aggregation") == "clusters"
    groups = [[0, 2, 3, 5, 6, 8], [1, 4, 7]] if clusters else [list(range(9))]
    means = sorted(along(problem.domain)[group, r].mean() for group in groups for r in range(len(groups)))
    assert len(found.own) == len(groups)
    for own in found.own:  # each group's own mean is along its own direction
        assert min(abs(mean - own) for mean in means) < 1e-4 * abs(own)


def test_methods_without_directions_say_why(given):
    problem = given(np.eye(8), np.eye(8), 2)
    for selector, why in (
        (METHODS["length"](), "not derivatives along a direction"),
        (METHODS["ntk"](scores="sketch", aggregation="max"), "compares examples one by one"),
        (METHODS["ntk"](scores="sketch"), "scores forward gives them exactly"),
    ):
        assert why in selector.no_parts
        with pytest.raises(ConfigError, match=why):
            selector.directional(problem, np.arange(2))
