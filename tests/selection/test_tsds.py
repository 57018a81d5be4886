"""TSDS against a linear program, and a planted group with near-duplicates."""

import numpy as np
import pytest
from scipy.optimize import linprog

from ntkjax.errors import ConfigError
from ntkjax.selection import METHODS
from ntkjax.selection.algorithms.knn_kde import density_of, in_order, transport
from ntkjax.selection.methods.tsds import TsdsSelector


def objective(gamma, distance, density, price, weight):
    return price * np.sum(gamma * distance) + weight * len(gamma) * np.max(density * gamma)


def solve(distance, density, price, weight):
    """The same problem as a linear program in (gamma, t): M rho_j gamma_ij <= t, rows sum to 1/M."""
    members, k = distance.shape
    size = members * k
    cost = np.append(price * distance.ravel(), weight)
    above = np.concatenate([np.diag(members * density.ravel()), -np.ones((size, 1))], axis=1)
    rows = np.concatenate([np.kron(np.eye(members), np.ones(k)), np.zeros((members, 1))], axis=1)
    found = linprog(cost, A_ub=above, b_ub=np.zeros(size), A_eq=rows, b_eq=np.full(members, 1 / members))
    assert found.success
    return found.fun


@pytest.mark.parametrize("weight", [0.0, 0.02, 0.1, 0.5, 5.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_transport_is_the_linear_programs(weight, seed):
    rng = np.random.default_rng(seed)
    distance = np.sort(rng.uniform(0.2, 1.4, (4, 9)), axis=1)
    density = rng.uniform(1, 4, (4, 9))
    gamma = transport(distance, density, 0.2, weight)
    assert (gamma >= 0).all()
    np.testing.assert_allclose(gamma.sum(axis=1), 1 / 4, atol=1e-12)
    np.testing.assert_allclose(
        objective(gamma, distance, density, 0.2, weight), solve(distance, density, 0.2, weight), rtol=1e-9
    )


def test_density_counts_near_duplicates():
    unit = np.array([[1, 0], [1, 0], [0, 1], [np.cos(0.1), np.sin(0.1)]], np.float32)
    square = 2 - 2 * np.cos(0.1)  # the last row lies this far (squared) from the first two
    near = 1 - square / 0.75**2
    np.testing.assert_allclose(density_of(unit, 0.75), [2 + near, 2 + near, 1, 1 + 2 * near], atol=1e-5)
    assert density_of(unit, 0.0).tolist() == [1, 1, 1, 1]


def test_the_draw_is_in_proportion_to_the_mass_and_then_by_similarity():
    mass, similarity = np.array([0.0, 0.5, 0.25, 0.0, 0.25]), np.array([0.1, 0, 0, 0.9, 0])
    drawn = np.array([in_order(mass, similarity, np.random.default_rng(i)) for i in range(2000)])
    assert (drawn[:, 3:] == [3, 0]).all()
    shares = np.bincount(drawn[:, 0], minlength=5) / 2000
    np.testing.assert_allclose(shares, mass, atol=0.05)  # more than 4 standard errors


def test_without_a_draw_rows_come_by_mass_then_similarity_then_row(planted):
    mass, similarity = np.array([0.0, 0.25, 0.5, 0.0, 0.25, 0.0]), np.array([0.1, 0, 0, 0.9, 0.2, 0.1])
    assert in_order(mass, similarity, None).tolist() == [2, 4, 1, 3, 0, 5]
    rng = np.random.default_rng(3)
    problem = planted(rng.normal(size=(5, 3)), rng.normal(size=(40, 3)), 8)
    drawn, top = (TsdsSelector(transport_rows=rows)(problem) for rows in ("draw", "top"))
    np.testing.assert_array_equal(top.scores, drawn.scores)
    assert sorted(top.scores[top.selected], reverse=True) == top.scores[top.selected].tolist()
    assert top.scores[top.selected].min() >= np.delete(top.scores, top.selected).max()
    assert top.selected.tolist() != drawn.selected.tolist()


def test_it_finds_the_planted_group_and_spares_its_copies(planted):
    rng = np.random.default_rng(0)
    domain = np.array([2.0, 0, 0, 0]) + 0.4 * rng.normal(size=(6, 4))
    near = np.array([2.0, 0, 0, 0]) + 0.4 * rng.normal(size=(15, 4))
    copies = np.repeat(near[:1], 15, axis=0)
    pool = np.concatenate([near, copies, rng.normal(size=(60, 4)) - [3, 0, 0, 0]])
    problem = planted(domain, pool, 10)
    chosen = TsdsSelector(transport_sigma=0.1)(problem)
    assert np.sum(chosen.selected < 30) == 10
    np.testing.assert_allclose(chosen.scores.sum(), 1, atol=1e-9)
    blind = TsdsSelector(transport_sigma=0.0)(problem)
    on_copies = lambda found: found.scores[[0, *range(15, 30)]].sum()
    assert on_copies(chosen) < on_copies(blind)
    assert chosen.diagnostics["filled_without_mass"] == max(0, 10 - chosen.diagnostics["rows_with_mass"])
    assert (METHODS["random"]()(problem).selected >= 30).any()


BAD = ({"transport_alpha": 0.0}, {"transport_scale": 0.0}, {"transport_sigma": -1.0}, {"neighbours": 0},
       {"transport_rows": "best"})  # fmt: skip


@pytest.mark.parametrize("option", BAD)
def test_options_out_of_range_are_refused(option):
    with pytest.raises(ConfigError, match=next(iter(option))):
        TsdsSelector(**option)
