"""Kronecker sketches against explicit matrices, and the sketch that never forms what it sketches."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from ntkjax.errors import ConfigError
from ntkjax.ntk import IdentitySketch, KroneckerSketch, ProbedOutput, gradient_features, per_example_gradients

RANK, SCALE = 4, 2.0


def relative(a, b):
    return np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max()


@pytest.mark.parametrize("left", [None, 4])
def test_a_sketch_is_the_sum_of_explicit_products(left):
    rng, sketch = np.random.default_rng(0), KroneckerSketch(48, 3, left)
    tree = {
        "w": jnp.asarray(rng.normal(size=(2, 3, 11, 7)), jnp.float32),
        "v": jnp.asarray(rng.normal(size=(2, 9)), jnp.float32),
    }
    expected = 0
    for name, shape in (("w", (3, 11, 7)), ("v", (1, 1, 9))):
        a, b = jax.jit(lambda n=name, s=shape: sketch.factors(f"['{n}']", s, jnp.float32))()
        products = np.einsum("lkm,zlmn,ljn->zkj", a, tree[name].reshape(2, *shape), b)
        expected = expected + products.reshape(2, 48)
        for matrix, size in ((a, shape[-2]), (b, shape[-1])):  # a count-sketch: one sign a column
            np.testing.assert_array_equal(np.abs(matrix).sum(axis=-2), 1)
            assert matrix.shape[-1] == size
    np.testing.assert_allclose(jax.jit(sketch)(tree), expected, atol=1e-5)


def test_sides_that_fit_lose_nothing():
    sketch = KroneckerSketch()
    assert sketch.split(512, 16) == (512, 16) and sketch.split(16, 512) == (16, 512)
    assert sketch.split(4096, 16) == (512, 16) and sketch.split(1, 5000) == (1, 8192)
    assert sorted(sketch.split(4096, 4096)) == [64, 128]
    one = {"a": jnp.asarray(np.random.default_rng(0).normal(size=(3, 300, 16)), jnp.float32)}
    phi, flat = np.asarray(sketch(one)), np.asarray(IdentitySketch()(one))
    np.testing.assert_allclose(phi @ phi.T, flat @ flat.T, rtol=1e-5, atol=1e-3)


LAYERS, WIDTH, INNER = 3, 6, 10
SHAPES = {"down": (LAYERS, INNER, WIDTH), "up": (LAYERS, WIDTH, INNER)}


@dataclasses.dataclass
class Rows:
    """What `gradient_features` asks of a batch."""

    x: np.ndarray
    index: np.ndarray


jax.tree_util.register_dataclass(Rows, ["x", "index"], [])


def stack(weights, adapters, batch):
    """F(x) [B] of layers scanned over as a language model's are: h + tanh(h up) down at each of 4 positions, every
    linear layer with an adapter."""

    def linear(layer, h, name):
        low = h @ layer[1][name]["lora_a"] @ layer[1][name]["lora_b"]
        return h @ layer[0][name] + SCALE * low

    body = lambda h, layer: (h + linear(layer, jnp.tanh(linear(layer, h, "up")), "down"), None)
    h, _ = jax.lax.scan(body, jnp.asarray(batch.x), (weights, adapters))
    return jnp.sum(h * h, axis=(1, 2))


@pytest.fixture
def layers():
    """(F of adapters, F of weights, adapters, weights, batch)."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape) / 2, jnp.float32)
    weights = {name: normal(*shape) for name, shape in SHAPES.items()}
    adapters = {
        name: {"lora_a": normal(LAYERS, m, RANK), "lora_b": jnp.zeros((LAYERS, RANK, n))}
        for name, (_, m, n) in SHAPES.items()
    }
    batch = Rows(rng.normal(size=(5, 4, WIDTH)).astype(np.float32), np.arange(5, dtype=np.int32))
    return Partial(stack, weights), Partial(of_weights, adapters), adapters, weights, batch


def of_weights(adapters, weights, batch):
    return stack(weights, adapters, batch)


def test_probes_give_the_sketch_of_all_linear_layers(layers):
    of_adapters, output, adapters, weights, batch = layers
    sketch = KroneckerSketch(24, 1, left=RANK)
    expected = jax.jit(sketch)(per_example_gradients(output, weights, batch))
    probed = ProbedOutput(of_adapters, adapters, sketch, SCALE)
    found = gradient_features(probed, probed.zeros(), [batch], IdentitySketch(), rows=5)
    assert found.shape == (5, 24)
    assert relative(found, expected) < 1e-5
    np.testing.assert_allclose(probed(probed.zeros(), batch), output(weights, batch), rtol=1e-6)


def shapes_in(fn, *args):
    """The shapes of everything that the program of ``fn`` computes, inner programs included, read off its text."""
    text = str(jax.make_jaxpr(fn)(*args))
    return {tuple(map(int, found.split(","))) for found in re.findall(r"\b[a-z]+\d*\[(\d+(?:,\d+)*)\]", text)}


def test_no_gradient_of_a_layer_is_formed(layers):
    of_adapters, output, adapters, weights, batch = layers
    probed = ProbedOutput(of_adapters, adapters, KroneckerSketch(24, 1, left=RANK), SCALE)

    def formed(output_fn, params):
        """Whether some array holds a matrix [in, out] for each of the 5 examples."""
        shapes = shapes_in(lambda p: per_example_gradients(output_fn, p, batch), params)
        matrices = (SHAPES["up"][1:], SHAPES["down"][1:])
        return any(shape[0] == 5 and shape[-2:] in matrices for shape in shapes if len(shape) > 2)

    assert formed(output, weights)
    assert not formed(probed, probed.zeros())


def test_what_is_no_pair_of_factors_is_refused(layers):
    of_adapters, _, adapters, _, _ = layers
    with pytest.raises(ConfigError, match="probes of rank 8"):
        ProbedOutput(of_adapters, adapters, KroneckerSketch(48, 1, left=8)).lift(jnp.zeros((8, 6)))
