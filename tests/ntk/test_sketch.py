"""Sketches: unbiased inner products with the variance they promise, and signs that depend on nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkjax.errors import ConfigError
from ntkjax.ntk import IdentitySketch, KroneckerSketch, RademacherSketch, Sketch, SparseSketch
from ntkjax.ntk.sparse import GROUP

apply = jax.jit(lambda sketch, tree: sketch(tree))

# Small enough that every leaf has several chunks, and a last one that is not full.
SMALL = {
    "rademacher": lambda seed=0: RademacherSketch(24, seed, block=16),
    "count-sketch": lambda seed=0: SparseSketch(24, seed, tables=1),
    "sparse": lambda seed=0: SparseSketch(24, seed, tables=3),
    "kronecker": lambda seed=0: KroneckerSketch(24, seed),
    "kronecker-left": lambda seed=0: KroneckerSketch(24, seed, left=4),
}
every_sketch = pytest.mark.parametrize("make", SMALL.values(), ids=SMALL.keys())
some_sketches = pytest.mark.parametrize("make", [SMALL[k] for k in ("rademacher", "sparse", "kronecker")])


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


def variance_of(sketch, tree):
    """Var <Pi g, Pi h> of the two rows of ``tree``, from what is known of the map: a sum over pairs of entries.

    (Pi^T Pi)_pq is 1 where p = q, else of mean 0, second moment c_pq and uncorrelated with that of any other pair: so
    Var = sum_{p != q} c_pq (g_p^2 h_q^2 + g_p h_p g_q h_q). c is 1 / K for independent entries, 0 for two entries of
    one chunk. Within a matrix of a Kronecker sketch the moments are products of both sides' instead.
    """
    g, h = np.asarray(IdentitySketch()(tree), np.float64)
    if isinstance(sketch, RademacherSketch):
        part = np.arange(len(g))
    elif isinstance(sketch, SparseSketch):
        part = sparse_chunks(sketch, tree)
    else:
        part = np.repeat(np.arange(len(matrices(tree))), [m[0].size for m in matrices(tree)])
    c = (part[:, None] != part[None]) / sketch.size
    variance = np.einsum("pq,p,q", c, g**2, h**2) + np.einsum("pq,p,q", c, g * h, g * h)
    if isinstance(sketch, KroneckerSketch):
        variance += sum(matrix_variance(sketch, *pair) for pair in matrices(tree))
    return variance


def sparse_chunks(sketch, tree):
    chunks = [np.arange(leaf[0].size) // sketch.buckets for leaf in jax.tree.leaves(tree)]
    starts = np.cumsum([0] + [c.max() + 1 for c in chunks[:-1]])
    return np.concatenate([c + start for c, start in zip(chunks, starts)])


def matrices(tree):
    """The pairs (G, H) of matrices that the leaves hold, in the order of their entries."""
    shaped = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
    shaped = [leaf.reshape(2, -1, *(1, *leaf.shape[1:])[-2:]) for leaf in shaped]
    return [tuple(leaf[:, i]) for leaf in shaped for i in range(leaf.shape[1])]


def matrix_variance(sketch, g, h):
    moments = [side_moments(n, k) for n, k in zip(g.shape, sketch.split(*g.shape))]
    second = np.einsum("ikac,jlbd,ij,kl,ab,cd->", *moments, g, h, g, h, optimize=True)
    return second - np.sum(g * h) ** 2


def side_moments(n, k):
    """E[A_ik A_ac] of A = P^T P for one side, [n, n, n, n] in the order i, k, a, c."""
    chunk, eye = np.arange(n) // k, np.eye(n)
    c = (chunk[:, None] != chunk[None]) / k
    apart = np.einsum("ik,ia,kc->ikac", c, eye, eye) + np.einsum("ik,ic,ka->ikac", c, eye, eye)
    return np.einsum("ik,ac->ikac", eye, eye) + apart


@every_sketch
def test_inner_products_are_unbiased_with_the_exact_variance(make):
    tree, seeds = gradients(2), 2000
    g, h = np.asarray(IdentitySketch()(tree), np.float64)
    features = np.asarray(jax.jit(jax.vmap(lambda seed: make(seed)(tree)))(jnp.arange(seeds)), np.float64)
    products, variance = (features[:, 0] * features[:, 1]).sum(axis=1), variance_of(make(), tree)
    assert abs(products.mean() - g @ h) < 4 * np.sqrt(variance / seeds)
    error = np.std((products - products.mean()) ** 2) / np.sqrt(seeds)
    assert abs(products.var() - variance) < 4 * error
    assert error < 0.1 * variance  # the check above is worth something


@some_sketches
def test_the_map_is_one_for_every_batch_split_and_device(make):
    tree, sketch = gradients(4), make(3)
    whole = np.asarray(apply(sketch, tree))
    devices = jax.devices()[-2:]
    mesh = jax.make_mesh((2,), ("data",), devices=devices, axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(tree, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    found = apply(sketch, spread)
    assert set(found.devices()) == set(devices)
    np.testing.assert_allclose(found, whole, rtol=1e-6, atol=1e-6)
    parts = [np.asarray(apply(sketch, jax.tree.map(lambda x, i=i: x[i : i + 2], tree))) for i in (0, 2)]
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-6, atol=1e-6)


@some_sketches
def test_a_leaf_keeps_its_map_whatever_else_is_trained(make):
    tree, sketch = gradients(2), make(3)
    alone = apply(sketch, {"a": tree["a"]}) + apply(sketch, {"b": tree["b"]})
    np.testing.assert_allclose(alone, apply(sketch, tree), rtol=1e-5, atol=1e-5)
    assert not np.allclose(apply(sketch, {"a": tree["a"]}), apply(sketch, {"z": tree["a"]}), atol=0.1)


@some_sketches
def test_another_seed_is_another_map_of_the_same_program(make):
    tree = gradients(2)
    traces = []
    run = jax.jit(lambda sketch: traces.append(sketch.seed) or sketch(tree))
    one, again, two = (np.asarray(run(make(seed))) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - two).max() > 0.1
    assert len(traces) == 1


@some_sketches
def test_float64_gradients_keep_their_precision(make, x64):
    tree = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), gradients(2))
    sketch = make()
    a, b = tree, jax.tree.map(lambda leaf: 1e-12 * leaf, tree)
    assert apply(sketch, tree).dtype == jnp.float64
    found = [apply(sketch, t) for t in (a, b, jax.tree.map(jnp.add, a, b))]
    np.testing.assert_allclose(found[2] - found[0], found[1], rtol=1e-2, atol=1e-15)


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


@every_sketch
def test_a_sketch_says_what_it_is(make):
    sketch = make(2)
    assert isinstance(sketch, Sketch) and sketch.width({}) == 24 == apply(sketch, gradients(1)).shape[1]
    assert {"size": 24, "seed": 2}.items() <= sketch.describe().items()
    rebuilt = {k: v for k, v in sketch.describe().items() if k != "sketch"}
    np.testing.assert_array_equal(apply(type(sketch)(**rebuilt), gradients(2)), apply(sketch, gradients(2)))


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="multiple of the number of tables"):
        SparseSketch(10, tables=4)
    with pytest.raises(ConfigError, match="multiple of left"):
        KroneckerSketch(10, left=4)


@pytest.mark.parametrize("chunks", [3, GROUP, 2 * GROUP + 5])
def test_an_accelerator_fills_the_tables_in_groups_with_the_same_numbers(chunks):
    sketch, rng = SparseSketch(24, 2, tables=3), np.random.default_rng(chunks)
    with jax.enable_x64(True):
        rows = jnp.asarray(rng.normal(size=(2, 8 * chunks)))
        words = jnp.asarray(rng.integers(0, 1 << 32, size=(chunks, 3, 2), dtype=np.uint32))
        shifts = jnp.asarray(rng.integers(0, 8, size=(chunks, 3), dtype=np.int32))
        one_by_one, in_groups = (f(rows, words, shifts) for f in (sketch._one_by_one, sketch._in_groups))
        np.testing.assert_allclose(in_groups, one_by_one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_which_way_the_tables_are_filled_depends_on_the_device(platform):
    tree = {"a": jnp.ones((2, 8 * 200))}
    program = jax.export.export(jax.jit(SparseSketch(24, 2, tables=3)), platforms=[platform])(tree).mlir_module()
    # One by one a chunk is added to a piece of a table; in groups numbers are gathered from all of its chunks.
    assert ("stablehlo.dynamic_update_slice" in program) == (platform == "cpu")
    assert ("stablehlo.gather" in program) == (platform != "cpu")
