"""The one contraction of gradients against einsum in float64; blocks of rows; bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkjax.ntk.gram import contract, gradient_bytes, row_blocks

EQUATIONS = {"sum": "icp,jcp->ij", "each": "icp,jcp->cij", "pairs": "icp,jdp->icjd"}


def gradients(rows: int, outputs: int, seed: int, dtype=jnp.float32):
    """Leaves [rows, outputs, 3, 4] and [rows, outputs]."""
    rng = np.random.default_rng(seed)
    return {
        "w": jnp.asarray(rng.normal(size=(rows, outputs, 3, 4)), dtype),
        "b": jnp.asarray(rng.normal(size=(rows, outputs)), dtype),
    }


def flat(tree) -> np.ndarray:
    parts = [np.asarray(leaf, np.float64).reshape(*leaf.shape[:2], -1) for leaf in jax.tree.leaves(tree)]
    return np.concatenate(parts, axis=2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("outputs", EQUATIONS)
def test_it_is_the_sum_of_products_in_single_precision(outputs, dtype):
    a, b = gradients(5, 3, 0, dtype), gradients(4, 2 if outputs == "pairs" else 3, 1, dtype)
    found = contract(a, b, outputs=outputs)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, np.einsum(EQUATIONS[outputs], flat(a), flat(b)), rtol=1e-5, atol=1e-5)


def test_the_sum_also_takes_leaves_without_outputs():
    h = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)
    np.testing.assert_allclose(contract([h], [h]), np.asarray(h, np.float64) @ np.asarray(h, np.float64).T, rtol=1e-5)


def test_double_precision_stays(x64):
    a = gradients(3, 2, 0, jnp.float64)
    mixed = contract(a, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), a))
    assert contract(a, a).dtype == mixed.dtype == jnp.float64
    np.testing.assert_allclose(contract(a, a), np.einsum("icp,jcp->ij", flat(a), flat(a)), rtol=1e-13)


@pytest.mark.parametrize("size, shapes", [(2, [2, 2, 1]), (5, [5]), (9, [5]), (1, [1] * 5)])
def test_blocks_have_one_shape_and_hold_every_row_once(size, shapes):
    x = {"a": np.arange(5), "b": np.arange(10).reshape(5, 2)}
    blocks = row_blocks(x, size)
    assert [rows.stop - rows.start for rows, _ in blocks] == shapes
    assert {block["b"].shape for _, block in blocks} == {(min(size, 5), 2)}
    held = np.concatenate([block["a"][: rows.stop - rows.start] for rows, block in blocks])
    np.testing.assert_array_equal(held, np.arange(5))
    assert all((block["a"][rows.stop - rows.start :] == 4).all() for rows, block in blocks)


def test_a_gradient_takes_at_least_four_bytes_a_number():
    params = {"half": jnp.zeros((3, 2), jnp.bfloat16), "single": jnp.zeros(5)}
    assert gradient_bytes(params) == 4 * (6 + 5)
