"""Cosines between outputs against explicit Jacobians, closed forms, and samples against the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkjax.errors import ConfigError
from ntkjax.ntk import KernelFunctions, build, kernel_matrix
from ntkjax.ntk import cross_terms as module
from ntkjax.ntk.cross_terms import cross_output_cosines, cross_ratio, cross_terms, hidden_products

ROWS = 4


def case(toy, subset):
    base = toy.init(5, jnp.float64)
    hidden = jax.tree_util.Partial(lambda base, p, b: toy.hidden_fn({**base, **p}, b), base)
    head = jax.tree_util.Partial(lambda base, p: {**base, **p}["head"], base)
    names = ("lora_a", "lora_b") if subset == "lora" else tuple(base)
    return KernelFunctions(hidden, head), {name: base[name] for name in names}


def jacobian(functions, params, batch):
    """[n, V, P] of the logits."""
    tree = jax.jacobian(lambda p: functions.hidden_fn(p, batch) @ functions.head(p).T)(params)
    n, vocab = functions.hidden_fn(params, batch).shape[0], functions.head(params).shape[0]
    return np.concatenate([np.asarray(leaf).reshape(n, vocab, -1) for leaf in jax.tree.leaves(tree)], axis=2)


def cosines(j, pairs):
    """(mean cos, mean |cos|) over outputs k != l for each pair (x, x') of examples, by loops."""
    found = []
    for i, o in pairs:
        values = [
            j[i, k] @ j[o, m] / (np.linalg.norm(j[i, k]) * np.linalg.norm(j[o, m]))
            for k in range(j.shape[1])
            for m in range(j.shape[1])
            if k != m
        ]
        found.append((np.mean(values), np.mean(np.abs(values))))
    return np.transpose(found)


@pytest.mark.parametrize("subset", ["lora", "all"])
def test_all_pairs_of_outputs(toy, x64, subset, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 5)  # neither D nor V is a multiple
    functions, params = case(toy, subset)
    batch = toy.collate(toy.sequences(ROWS, 1), range(ROWS))
    j = jacobian(functions, params, batch)
    rows = toy.sequences(ROWS, 1)
    parts = [toy.collate(rows[:3], range(3), fill=2), toy.collate(rows[3:], [3], length=12)]
    found = cross_output_cosines(functions, params, parts)
    assert found.outputs == found.vocab == toy.vocab and found.undefined == 0
    signed, absolute = cosines(j, [(i, i) for i in range(ROWS)])
    np.testing.assert_allclose(found.signed, signed, atol=1e-10)
    np.testing.assert_allclose(found.absolute, absolute, atol=1e-10)
    total = np.einsum("ikp,ilp->ikl", j, j)
    np.testing.assert_allclose(found.own, np.einsum("ikk->i", total), rtol=1e-10)
    np.testing.assert_allclose(found.cross, total.sum(axis=(1, 2)) - found.own, rtol=1e-8)
    assert found.summary()["ratio"] == pytest.approx(found.cross.sum() / found.own.sum())
    total = np.einsum("ikp,ilp->ikl", j[:-1], j[1:])
    np.testing.assert_allclose(found.own_between, np.einsum("ikk->i", total), rtol=1e-10)
    np.testing.assert_allclose(found.cross_between, total.sum(axis=(1, 2)) - found.own_between, rtol=1e-8)
    signed, absolute = cosines(j, [(i, i + 1) for i in range(ROWS - 1)])
    np.testing.assert_allclose(found.signed_between, signed, atol=1e-10)
    np.testing.assert_allclose(found.absolute_between, absolute, atol=1e-10)


def test_a_sample_of_outputs_is_unbiased_and_both_paths_agree(toy, x64):
    functions, params = case(toy, "lora")
    batch = toy.collate(toy.sequences(2, 1), range(2))
    whole = cross_output_cosines(functions, params, [batch])
    one = sum(8 * leaf.size for leaf in params.values())
    direct = cross_output_cosines(functions, params, [batch], outputs=5, memory_budget=2 * 5 * one)  # 5 < D: itself
    j = jacobian(functions, params, batch)
    draws = [cross_output_cosines(functions, params, [batch], outputs=5, seed=s) for s in range(60)]
    np.testing.assert_allclose(draws[0].signed, direct.signed, atol=1e-10)
    signed = np.array([d.signed for d in draws])
    assert (np.abs(signed.mean(axis=0) - whole.signed) < 4 * signed.std(axis=0) / np.sqrt(60)).all()
    for name in ("cross", "own"):  # scaled up to all outputs
        each = np.array([getattr(d, name) for d in draws])
        assert (np.abs(each.mean(axis=0) - getattr(whole, name)) < 4 * each.std(axis=0) / np.sqrt(60)).all()
    assert signed.std() > 0 and draws[0].outputs == 5
    through_hidden = cross_output_cosines(functions, params, [batch], outputs=8)  # D = 6 passes for 8 outputs
    assert through_hidden.outputs == 8
    assert np.abs(through_hidden.signed - cosines(j, [(0, 0), (1, 1)])[0]).max() > 1e-6


def test_products_that_are_kept_serve_any_choice_of_outputs(toy, x64):
    functions, params = case(toy, "lora")
    batch = toy.collate(toy.sequences(3, 1), range(3))
    products = list(hidden_products(functions.hidden_fn, params, [batch], width=toy.width))
    assert len(products) == 3 and products[0][1] is None
    weight, j = np.asarray(functions.head(params)), jacobian(functions, params, batch)
    some = cross_terms(products, weight[[1, 4, 7]])
    assert some.outputs == some.vocab == 3
    np.testing.assert_allclose(some.signed, cosines(j[:, [1, 4, 7]], [(i, i) for i in range(3)])[0], atol=1e-10)
    centred = cross_terms(products, weight - weight.mean(axis=0))
    np.testing.assert_allclose(centred.cross, -centred.own, rtol=1e-8)  # the outputs sum to 0


def test_parallel_rows_and_a_row_of_zeros(toy):
    functions, params = case(toy, "lora")
    base = np.asarray(functions.head(params))
    same = np.tile(base[:1], (toy.vocab, 1))
    same[3] *= -1
    same[5] = 0  # an output that is always 0 has no direction
    batch = toy.collate(toy.sequences(ROWS, 1), range(ROWS))
    found = cross_output_cosines(KernelFunctions(functions.hidden_fn, same), params, [batch])
    left = toy.vocab - 1
    expected = ((left - 2) ** 2 - left) / (left * (left - 1))  # (sum of signs)^2 without the diagonal
    np.testing.assert_allclose(found.signed, expected, atol=1e-5)
    np.testing.assert_allclose(found.absolute, 1, atol=1e-5)
    assert found.undefined == ROWS
    signs = left - 1, 1  # of the outputs with a direction: same, opposite
    assert found.histogram[-1] == ROWS * sum(c * (c - 1) for c in signs) and found.histogram[0] == ROWS * 2 * (left - 1)
    assert found.histogram.sum() == ROWS * left * (left - 1)
    assert found.histogram_between.sum() == (ROWS - 1) * left * (left - 1)
    summary = found.summary()
    assert summary["signed"] == pytest.approx(expected, abs=1e-5) and summary["undefined"] == ROWS
    assert summary["signed_low"] <= summary["signed"] <= summary["signed_high"]
    zero = cross_output_cosines(KernelFunctions(functions.hidden_fn, 0 * base), params, [batch])
    assert np.isnan(zero.signed).all() and np.isnan(zero.summary()["signed"])


def test_a_budget_below_two_outputs_is_refused(toy):
    functions, params = case(toy, "all")
    batch = toy.collate(toy.sequences(2, 1), range(2))
    with pytest.raises(ConfigError, match="memory budget"):
        cross_output_cosines(functions, params, [batch], memory_budget=10)
    with pytest.raises(ConfigError, match="at least 2 outputs"):
        cross_output_cosines(functions, params, [batch], outputs=1)


@pytest.mark.parametrize("subset", ["lora", "all"])
def test_the_ratio_is_the_sum_of_the_cross_terms_over_the_trace(toy, x64, subset):
    functions, params = case(toy, subset)
    batch = toy.collate(toy.sequences(ROWS, 1), range(ROWS))
    matrix = lambda name: kernel_matrix(build(name, functions, params, seed=0), params, batch)
    found = cross_ratio(matrix("sum_logits"), matrix("trace"), toy.vocab)
    j = jacobian(functions, params, batch)
    products = np.einsum("ikp,jlp->ijkl", j, j)
    own = np.einsum("ijkk->ij", products)
    cross = products.sum(axis=(2, 3)) - own
    apart = ~np.eye(ROWS, dtype=bool)
    assert found["ratio"] == pytest.approx(np.trace(cross) / np.trace(own))
    assert found["ratio_between"] == pytest.approx(cross[apart].sum() / own[apart].sum())
    assert found["shift_share"] == pytest.approx((found["ratio"] + 1) / toy.vocab)
    mean = j.mean(axis=1)  # the part of the trace along the all-ones direction: V <mean, mean>
    assert found["shift_share"] == pytest.approx(toy.vocab * (mean**2).sum() / np.trace(own))
    assert found["ratio_low"] <= found["ratio"] <= found["ratio_high"]
