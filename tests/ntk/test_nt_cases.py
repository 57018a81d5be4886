"""The situations in which neural-tangents tests its own empirical kernels, stated anew for this interface.

There: functions of every primitive, networks of several kinds, batches of unequal size, traces over chosen axes, inputs
and outputs in pieces, arguments per example, kernel-vector products, infinite width. Here each is one function
``apply_fn(params, rows) -> [B, O]``; every backend must give the contraction of explicit Jacobians.
"""

from __future__ import annotations

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ntkjax.ntk import neural_tangents
from ntkjax.ntk.exact import centred_trace_ntk, empirical_ntk, mean_trace_ntk, trace_ntk

EVERY = ("jacobian", "vector_products", "neural-tangents", "neural-tangents-vector-products")
BACKENDS = [name for name in EVERY if "neural" not in name or neural_tangents.is_installed()]
every_backend = pytest.mark.parametrize("backend", BACKENDS)

pytestmark = pytest.mark.usefixtures("x64")


@jax.jit
def jacobian_of(fn, params, x):
    return jax.jacobian(lambda p: fn(p, x))(params)


def explicit(fn, params, x1, x2):
    """J(x1) J(x2)^T [n1, n2, O, O], contracted on the host."""

    def rows(x):
        leaves = jax.tree.leaves(jacobian_of(jax.tree_util.Partial(fn), params, x))
        return np.concatenate([np.asarray(leaf).reshape(*leaf.shape[:2], -1) for leaf in leaves], axis=2)

    return np.einsum("ikp,jlp->ijkl", rows(x1), rows(x2))


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-10 * np.abs(wanted).max(initial=0.0))


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape))


# Functions of three matrices p and one matrix x.
FUNCTIONS = {
    "constant": lambda p, x: jnp.ones((2, 2)),
    "input alone": lambda p, x: x @ x.T,
    "parameter alone": lambda p, x: p["b"],
    "sum with a transpose": lambda p, x: p["a"] + p["b"].T,
    "twice the same": lambda p, x: p["a"] + p["a"].T,
    "affine": lambda p, x: -p["a"] + 2 / p["b"] - p["c"] / 3,
    "products and quotients": lambda p, x: p["a"] * p["b"] / p["c"],
    "quotient with itself": lambda p, x: p["b"] / p["b"],
    "power": lambda p, x: jnp.abs(p["a"]) ** (p["b"] + x),
    "scaled input": lambda p, x: p["c"] * x + p["c"] / x,
    "chain of products": lambda p, x: (p["a"] @ p["b"].T) @ (p["c"].T @ p["b"]) @ x,
    "product with a transpose": lambda p, x: p["b"].T @ p["a"],
    "square": lambda p, x: p["a"] @ p["a"],
    "total": lambda p, x: sum(jnp.sum(leaf) for leaf in p.values()),
    "product of all": lambda p, x: jnp.prod(p["c"]),
    "sum over rows": lambda p, x: jnp.sum(p["a"], axis=0),
    "sum over columns, kept": lambda p, x: jnp.sum(p["a"] * x, axis=1, keepdims=True),
    "maximum": lambda p, x: jnp.max(p["a"] * x, axis=1),
    "one entry": lambda p, x: p["b"] * p["a"][1, 0],
    "rows of both": lambda p, x: x[1] * p["c"][:1, 0],
    "reshaped and back": lambda p, x: p["a"].reshape(-1).reshape(3, 3).T,
    "inner product as matrices": lambda p, x: p["a"].reshape(1, -1) @ (p["b"] * x).reshape(-1, 1),
    "stretched": lambda p, x: jnp.expand_dims(jnp.arange(3.0), 0) * p["b"] * jnp.expand_dims(p["a"][0], 1),
    "reversed": lambda p, x: lax.rev(p["a"], (0,)) * lax.rev(p["b"], (1,)) - lax.rev(p["c"], (0, 1)) ** 2,
    "padded": lambda p, x: lax.pad(p["a"] * x, jnp.zeros(()), [(0, 0, 0), (0, 1, 1)]),
    "wrapped around": lambda p, x: jnp.pad(p["a"], [(1, 1), (0, 0)], "wrap"),
    "joined": lambda p, x: (jnp.concatenate([p["a"], x], 1) @ jnp.concatenate([p["b"], p["c"]], 0)) ** 2,
    "stacked and turned": lambda p, x: jnp.transpose(jnp.stack([p["a"], p["b"] * x]), (2, 0, 1)),
    "outer product": lambda p, x: jnp.tensordot(p["a"][0], x[0], axes=0),
    "batched product": lambda p, x: lax.dot_general(p["a"], x, (((1,), (1,)), ((0,), (0,)))),
    "contraction of both axes": lambda p, x: lax.dot_general(x, p["b"], (((0, 1), (0, 1)), ((), ()))),
    "windows": lambda p, x: lax.reduce_window(p["a"] * x, 0.0, lax.add, (2, 1), (1, 1), "VALID"),
    "mapped": lambda p, x: lax.map(lambda s: -s / 2, p["a"]) * jnp.sum(p["b"]),
    "scanned": lambda p, x: lax.scan(lambda c, s: (jnp.tanh(c @ p["a"] + s), c), x[0], p["b"])[0],
    "rematerialised": lambda p, x: jax.checkpoint(lambda q: jnp.tanh(q["a"] @ x))(p),
    "complex inside": lambda p, x: jnp.abs(lax.complex(p["a"], x) * lax.complex(x, p["b"])),
}


def of_row(params, x):
    return [jnp.ravel(function(params, x)) for function in FUNCTIONS.values()]


def all_functions(params, x):
    """All of them side by side: one program, and every cross term between any two."""
    return jax.vmap(lambda row: jnp.concatenate(of_row(params, row)))(x)


@functools.cache
def function_case():
    with jax.enable_x64(True):
        params = {name: draw(3, 3, seed=i) for i, name in enumerate("abc")}
        x1, x2 = draw(2, 3, 3, seed=7), draw(3, 3, 3, seed=8)
        owner = np.repeat(list(FUNCTIONS), [part.size for part in jax.eval_shape(of_row, params, x1[0])])
        return params, x1, x2, owner, explicit(all_functions, params, x1, x2)


@every_backend
def test_functions_of_every_primitive(backend):
    params, x1, x2, owner, wanted = function_case()
    found = empirical_ntk(all_functions, params, x1, x2, backend=backend)
    wrong = np.abs(found - wanted).max(axis=(0, 1)) > 1e-10 * np.abs(wanted).max(axis=(0, 1)).clip(1.0)
    assert not wrong.any(), {(str(owner[i]), str(owner[j])) for i, j in np.argwhere(wrong)}
    for name in ("constant", "input alone"):
        assert not found[:, :, owner == name].any()  # nothing to differentiate
    alone = found[:, :, owner == "parameter alone"][..., owner == "parameter alone"]
    np.testing.assert_array_equal(alone, np.broadcast_to(np.eye(9), alone.shape))


def linear(params, x):
    return x @ params["w"] + params["b"][None]


def dense(params, x):
    for name in sorted(params)[:-1]:
        x = jax.nn.relu(linear(params[name], x))
    return linear(params[sorted(params)[-1]], x)


def dense_params(*widths):
    pairs = enumerate(itertools.pairwise(widths))
    return {f"layer {i}": {"w": draw(a, b, seed=i), "b": draw(b, seed=i) / 10} for i, (a, b) in pairs}


@pytest.mark.parametrize(("n1", "n2", "features", "outputs"), [(4, 2, 4, 1), (4, 6, 8, 2), (8, 5, 8, 3)])
def test_batches_of_unequal_size_and_one_to_three_logits(n1, n2, features, outputs):
    params, x1, x2 = dense_params(features, 5, outputs), draw(n1, features, seed=1), draw(n2, features, seed=2)
    wanted = explicit(dense, params, x2, x1)
    for backend in BACKENDS:
        close(empirical_ntk(dense, params, x2, x1, backend=backend), wanted)
    close(empirical_ntk(dense, params, x1), explicit(dense, params, x1, x1))


def convolve(x, w, groups=1):
    dimensions = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=dimensions, feature_group_count=groups)


def flattened(params, x):
    return jnp.tanh(convolve(x, params["c1"])).reshape(len(x), -1) @ params["w"]


def pooled(params, x):
    return convolve(jnp.tanh(convolve(x, params["c1"])), params["c2"], groups=2).mean(axis=(1, 2))


def image(params, x):
    """Outputs that are themselves an image [H, W, C], laid out as one axis."""
    return jnp.tanh(convolve(x, params["c1"])).reshape(len(x), -1)


IMAGES = {
    flattened: {"c1": (3, 3, 3, 2), "w": (3 * 4 * 2, 3)},
    pooled: {"c1": (2, 1, 3, 4), "c2": (2, 2, 2, 4)},
    image: {"c1": (1, 2, 3, 2)},
}


@pytest.mark.parametrize("network", IMAGES, ids=lambda fn: fn.__name__)
def test_convolutions(network):
    params = {name: draw(*shape) for name, shape in IMAGES[network].items()}
    x1, x2 = draw(3, 3, 4, 3, seed=1), draw(2, 3, 4, 3, seed=2)
    wanted = explicit(network, params, x1, x2)
    for backend in BACKENDS:
        close(empirical_ntk(network, params, x1, x2, backend=backend), wanted)


def channel(params, x):
    """One channel of `image`; every row says which."""
    image, which = x
    return jnp.tanh(convolve(image, params["c1"]))[..., which[0]].reshape(len(image), -1)


def test_traces_over_chosen_axes():
    """A trace over some output axes is the sum of the kernels of the slices along them; over all axes, trace_ntk."""
    params, x1, x2 = {"c1": draw(1, 2, 3, 2)}, draw(2, 3, 4, 3, seed=1), draw(3, 3, 4, 3, seed=2)
    full = empirical_ntk(image, params, x1, x2).reshape(2, 3, 3, 4, 2, 3, 4, 2)
    rows = lambda x, c: (x, np.full(len(x), c))
    slices = [empirical_ntk(channel, params, rows(x1, c), rows(x2, c)) for c in range(2)]
    close(np.einsum("ijhwcHWc->ijhwHW", full), sum(slices).reshape(2, 3, 3, 4, 3, 4))
    for backend in BACKENDS:
        close(trace_ntk(image, params, x1, x2, backend=backend), np.einsum("ijhwchwc->ij", full))
        close(mean_trace_ntk(image, params, x1, x2, backend=backend), np.einsum("ijhwchwc->ij", full) / 24)
    ones = np.einsum("ijhwcHWC->ij", full) / 24
    close(centred_trace_ntk(image, params, x1, x2), np.einsum("ijhwchwc->ij", full) - ones)


def in_pieces(params, x):
    """Nested inputs and outputs, an argument per example, and a batch axis that is moved to the front."""
    (first, second), third, pattern = x["pair"], x["third"], x["pattern"]
    left = jnp.tanh(first @ params["w"][0]) @ params["w"][1]
    right = jnp.einsum("bhk,bkc,cd->bd", pattern, second, params["v"])
    last = jax.scipy.special.erf(jnp.einsum("bwc,wd->bcd", third, params["u"]))
    outputs = {"sum": left + right, "rest": [last, left * right]}
    return jnp.concatenate([leaf.reshape(len(first), -1) for leaf in jax.tree.leaves(outputs)], axis=1)


def pieces(n, seed):
    third = jnp.moveaxis(draw(2, n, 3, seed=seed), 1, 0)
    pair = (draw(n, 4, seed=seed), draw(n, 5, 3, seed=seed))
    return {"pair": pair, "third": third, "pattern": draw(n, 5, 5, seed=seed)}


@every_backend
def test_inputs_outputs_and_parameters_in_pieces(backend):
    """Among the parameters: lists, a scalar, empty arrays, one that nothing uses."""
    params = {
        "w": [draw(4, 6), draw(6, 2)], "v": draw(3, 2), "u": draw(2, 2),
        "empty": jnp.zeros((0, 3)), "unused": (jnp.ones(()), draw(1, 1)),
    }  # fmt: skip
    x1, x2 = pieces(3, 1), pieces(2, 2)
    close(empirical_ntk(in_pieces, params, x1, x2, backend=backend), explicit(in_pieces, params, x1, x2))


def test_no_second_argument_means_the_first():
    params, x = dense_params(4, 5, 3), draw(4, 4)
    for backend in BACKENDS:
        close(trace_ntk(dense, params, x, None, backend=backend), trace_ntk(dense, params, x, x, backend=backend))


def test_kernel_vector_products():
    """sum_jl K[i, j, k, l] v[j, l] = J(x1) (J(x2)^T v), from one reverse and one forward pass."""
    params, x1, x2, v = dense_params(7, 8, 3), draw(4, 7, seed=1), draw(6, 7, seed=2), draw(6, 3, seed=3)
    pulled = jax.vjp(lambda p: dense(p, x2), params)[1](v)
    pushed = jax.jvp(lambda p: dense(p, x1), (params,), pulled)[1]
    for backend in BACKENDS:
        close(np.einsum("ijkl,jl->ik", empirical_ntk(dense, params, x1, x2, backend=backend), np.asarray(v)), pushed)


class Mixer(nn.Module):
    """Patches, a token-mixing and a channel-mixing layer, and a head: as in MLP-Mixer, with layer norms."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (2, 2), strides=(2, 2), param_dtype=jnp.float64)(x)
        x = x.reshape(x.shape[0], -1, 4)
        y = jnp.swapaxes(nn.LayerNorm(param_dtype=jnp.float64)(x), 1, 2)
        x = x + jnp.swapaxes(nn.gelu(nn.Dense(4, param_dtype=jnp.float64)(y)), 1, 2)
        x = x + nn.Dense(4, param_dtype=jnp.float64)(nn.LayerNorm(param_dtype=jnp.float64)(x))
        return nn.log_softmax(nn.Dense(3, param_dtype=jnp.float64)(x.mean(axis=1)))


def test_modules_of_another_library():
    model, x = Mixer(), draw(3, 4, 4, 2)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # flax relies on both
        params = model.init(jax.random.key(0), x)
        wanted = explicit(model.apply, params, x, x)
        for backend in BACKENDS[:3]:
            close(empirical_ntk(model.apply, params, x, backend=backend), wanted)


def autoencoder(params, x):
    code = jnp.tanh(x @ params["encoder"])
    return jax.nn.sigmoid(code @ params["decoder"])


def decoder(params, code):
    return jax.nn.sigmoid(code @ params["decoder"])


def test_parts_of_a_network():
    """The kernel of the whole with the decoder alone trained is the decoder's kernel on the codes."""
    params, x = {"encoder": draw(6, 2), "decoder": draw(2, 6)}, draw(4, 6)
    whole = lambda p, x: autoencoder({**params, **p}, x)
    trained = {"decoder": params["decoder"]}
    found = empirical_ntk(whole, trained, x)
    close(found, empirical_ntk(decoder, trained, jnp.tanh(x @ params["encoder"])))
    assert np.abs(found).max() > 0.01


@every_backend
def test_linear_regression_has_a_closed_form(backend):
    """f = W x + b: K = (x.x' + 1) I, for any W."""
    params, x1, x2 = {"w": draw(5, 3), "b": draw(3)}, draw(4, 5, seed=1), draw(2, 5, seed=2)
    inner = np.asarray(x1 @ x2.T) + 1
    close(empirical_ntk(linear, params, x1, x2, backend=backend), inner[:, :, None, None] * np.eye(3))
    close(trace_ntk(linear, params, x1, x2, backend=backend), 3 * inner)
    close(mean_trace_ntk(linear, params, x1, x2, backend=backend), inner)
    close(centred_trace_ntk(linear, params, x1, x2, backend=backend), 2 * inner)


def deep_linear(params, x):
    return x @ params["first"] @ params["second"]


def test_deep_linear_network_has_a_closed_form():
    """f = B^T A^T x: K = (B^T B) x.x' + (A^T x).(A^T x') I."""
    params, x = {"first": draw(5, 4), "second": draw(4, 3)}, draw(3, 5, seed=1)
    inner, hidden = np.asarray(x @ x.T), np.asarray(x @ params["first"])
    through = np.asarray(params["second"].T @ params["second"])
    wanted = inner[:, :, None, None] * through + (hidden @ hidden.T)[:, :, None, None] * np.eye(3)
    for backend in BACKENDS:
        close(empirical_ntk(deep_linear, params, x, backend=backend), wanted)


def wide(params, x):
    """One hidden layer of ReLU in the parametrisation whose kernel has a limit at infinite width."""
    hidden = jax.nn.relu(x @ params["w"] / np.sqrt(x.shape[1]))
    return hidden @ params["v"] * np.sqrt(2 / len(params["v"]))


def test_a_wide_network_approaches_its_limit():
    """k = |x||x'|/d (sin t + (pi - t) cos t)/pi + x.x'/d (pi - t)/pi, t the angle (Cho and Saul 2009; Jacot 2018)."""
    x = draw(5, 3)
    norms = np.linalg.norm(x, axis=1)
    inner, scale = np.asarray(x @ x.T) / 3, np.outer(norms, norms) / 3
    angle = np.arccos(np.clip(inner / scale, -1, 1))
    limit = scale * (np.sin(angle) + (np.pi - angle) * np.cos(angle)) / np.pi + inner * (np.pi - angle) / np.pi
    error = {}
    for width in (100, 40_000):
        params = {"w": draw(3, width), "v": draw(width, 1)}
        error[width] = np.abs(trace_ntk(wide, params, x) - limit).max() / limit.max()
    assert error[40_000] < 0.03 and error[40_000] < error[100] / 3
