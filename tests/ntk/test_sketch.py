"""Sketches: unbiased inner products with the variance they promise, and signs that depend on nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkjax.ntk import IdentitySketch, RademacherSketch

apply = jax.jit(lambda sketch, tree: sketch(tree))


def gradients(rows, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"a": (5, 7), "b": {"c": (40,), "d": (3, 2, 2)}}
    leaf = lambda shape: jnp.asarray(rng.normal(size=(rows, *shape)), jnp.float32)
    return jax.tree.map(leaf, shapes, is_leaf=lambda x: isinstance(x, tuple))


def signs(sketch, shape=(5, 7)):
    """The explicit matrix sqrt(K) Pi^T [P, K] of one leaf, by sketching unit vectors."""
    size = int(np.prod(shape))
    unit = jnp.eye(size, dtype=jnp.float32).reshape(size, *shape)
    return np.asarray(apply(sketch, {"a": unit})) * np.sqrt(sketch.size)


def test_identity_keeps_every_entry():
    tree = gradients(3)
    flat = IdentitySketch()(tree)
    assert flat.shape == (3, 35 + 40 + 12) and IdentitySketch().width(jax.tree.map(lambda x: x[0], tree)) == 87
    np.testing.assert_array_equal(flat[:, :35], tree["a"].reshape(3, 35))


def test_signs_are_fair_and_unlike():
    matrix = signs(RademacherSketch(size=1000, seed=4, block=16))
    np.testing.assert_allclose(np.abs(matrix), 1, rtol=1e-5)
    assert abs(matrix.mean()) < 4 / np.sqrt(matrix.size)
    gram = matrix @ matrix.T / 1000
    assert np.abs(gram - np.eye(35)).max() < 5 / np.sqrt(1000)  # rows of different blocks do not repeat


@pytest.mark.parametrize("block", [8, 1024])
def test_inner_products_are_unbiased_with_the_stated_variance(block):
    tree, size, seeds = gradients(2), 64, 400
    g, h = np.asarray(IdentitySketch()(tree), np.float64)
    draw = jax.jit(jax.vmap(lambda seed: RademacherSketch(size, seed, block)(tree)))
    features = np.asarray(draw(jnp.arange(seeds)))
    products = (features[:, 0] * features[:, 1]).sum(axis=1)
    variance = ((g @ g) * (h @ h) + (g @ h) ** 2 - 2 * (g**2 * h**2).sum()) / size
    assert abs(products.mean() - g @ h) < 4 * np.sqrt(variance / seeds)
    assert 0.75 < products.var() / variance < 1.3  # 4 standard errors of a variance from 400 draws


def test_rows_do_not_depend_on_the_batch_split_or_on_jit():
    tree, sketch = gradients(6), RademacherSketch(100, seed=3, block=16)
    whole = np.asarray(sketch(tree))  # not jitted
    parts = [np.asarray(apply(sketch, jax.tree.map(lambda x, i=i: x[i : i + 2], tree))) for i in (0, 2, 4)]
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-5, atol=1e-5)


def test_signs_do_not_depend_on_the_device():
    tree, sketch = gradients(2), RademacherSketch(64, seed=3, block=16)
    other = jax.device_put(tree, jax.devices()[-1])
    assert jax.devices()[-1] != jax.devices()[0]
    np.testing.assert_array_equal(apply(sketch, other), apply(sketch, tree))


def test_a_leaf_keeps_its_signs_whatever_else_is_trained():
    tree, sketch = gradients(2), RademacherSketch(64, seed=3)
    alone = apply(sketch, {"a": tree["a"]}) + apply(sketch, {"b": tree["b"]})
    np.testing.assert_allclose(alone, apply(sketch, tree), rtol=1e-5, atol=1e-5)


def test_seeds_differ_and_one_seed_repeats():
    same = signs(RademacherSketch(64, seed=1))
    np.testing.assert_array_equal(same, signs(RademacherSketch(64, seed=1)))
    agreement = (same == signs(RademacherSketch(64, seed=2))).mean()
    assert 0.4 < agreement < 0.6


def test_known_signs():
    """Pinned: a change of the generator or of the keys would silently change every stored feature."""
    matrix = signs(RademacherSketch(size=8, seed=0), shape=(2, 2)).round().astype(int)
    assert matrix.tolist() == PINNED


PINNED = [
    [1, 1, -1, -1, 1, 1, -1, -1],
    [1, -1, 1, -1, -1, -1, -1, -1],
    [-1, -1, 1, -1, -1, -1, 1, 1],
    [-1, 1, -1, 1, 1, 1, -1, -1],
]


def test_description_and_width():
    sketch = RademacherSketch(64, seed=2)
    assert sketch.width({}) == 64
    assert sketch.describe() == {"sketch": "rademacher", "size": 64, "seed": 2, "block": 1024}
