"""LoRA: which layers, which numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkjax.errors import ConfigError
from ntkjax.models.lora import (
    LoraConfig,
    adapted,
    adapted_half,
    init_lora_a,
    lora_delta,
    lora_subset,
    merge_lora,
)

LINEARS = tuple(f"attention/{n}" for n in "qkvo") + ("mlp/gate", "mlp/up", "mlp/down")


def test_delta_is_the_formula():
    rng = np.random.default_rng(0)
    x, a, b = (rng.normal(size=s).astype(np.float32) for s in ((2, 3, 8), (8, 4), (4, 5)))
    got = lora_delta(jnp.asarray(x), jnp.asarray(a), jnp.asarray(b), LoraConfig(rank=4, alpha=6.0).scale)
    np.testing.assert_allclose(got, 6.0 / 4 * (x.astype(np.float64) @ a @ b), rtol=1e-5, atol=1e-5)


def test_an_adapted_product_and_its_derivatives_are_those_of_the_formula(x64):
    rng = np.random.default_rng(1)
    shapes = ((6, 8), (8, 5), (8, 3), (3, 5))
    values = tuple(jnp.asarray(rng.normal(size=s)) for s in shapes)
    moved = tuple(jnp.asarray(rng.normal(size=s)) for s in shapes)
    plain = lambda x, w, a, b: x @ w + 1.5 * (x @ a) @ b
    ours = lambda *v: adapted(*v, 1.5)
    close = lambda got, expected: np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)
    jax.tree.map(close, jax.jvp(ours, values, moved), jax.jvp(plain, values, moved))
    for some in ((0,), (1,), (2, 3), (3,), (0, 1, 2, 3)):  # what is held fixed has a symbolic zero
        of = lambda f, some=some: jax.grad(lambda *v: jnp.sum(jnp.sin(f(*v))), argnums=some)(*values)
        jax.tree.map(close, of(ours), of(plain))
    one = lambda *v: adapted(*v, 1.5, True)  # one product of joined factors, by another program
    joined, split = (jax.make_jaxpr(lambda v, d, f=f: jax.jvp(f, v, d))(values, moved) for f in (one, ours))
    jax.tree.map(close, jax.jvp(one, values, moved), jax.jvp(plain, values, moved))
    adapter = lambda f: jax.jvp(lambda a, b: f(*values[:2], a, b), values[2:], moved[2:])
    jax.tree.map(close, adapter(one), adapter(plain))
    assert "concatenate" in str(joined) and "concatenate" not in str(split)
    # Per row, as per-example gradients are taken: the weights are not batched.
    rows = lambda f: jax.vmap(
        lambda x: jax.grad(lambda a: jnp.sum(f(x[None], values[1], a, values[3]) ** 2))(values[2])
    )
    close(rows(ours)(values[0]), rows(plain)(values[0]))


ROUNDING = 2.0**-8  # of bfloat16, by how much one number may move


@pytest.mark.parametrize("joined", [False, True])
def test_an_adapted_product_in_sixteen_bits_errs_by_its_rounding(joined):
    """Value and tangents against float64, an adapter that is 2^-12 of W included; one moved argument at a time too."""
    rng = np.random.default_rng(2)
    shapes, sizes = ((64, 256), (256, 96), (256, 8), (8, 96)), (1, 1, 2.0**-6, 2.0**-6)
    draw = lambda: [rng.normal(size=s) * size for s, size in zip(shapes, sizes, strict=True)]
    kinds = (jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.float32)
    half = lambda arrays: [jnp.asarray(x, kind) for x, kind in zip(arrays, kinds, strict=True)]
    values, moved = half(draw()), half(draw())
    (x, w, a, b), (dx, dw, da, db) = ([np.asarray(v, np.float64) for v in some] for some in (values, moved))
    ours = lambda *v: adapted_half(*v, 1.5, joined)
    parts = (dx @ w + 1.5 * dx @ a @ b, x @ dw, 1.5 * x @ da @ b, 1.5 * x @ a @ db)
    value = x @ w + 1.5 * x @ a @ b

    def close(got, expected):
        assert got.dtype == jnp.bfloat16
        error = np.linalg.norm(np.asarray(got, np.float64) - expected) / np.linalg.norm(expected)
        assert error < ROUNDING

    got, along = jax.jvp(ours, tuple(values), tuple(moved))
    close(got, value), close(along, sum(parts))
    for i, part in enumerate(parts):
        one = lambda v, i=i: ours(*values[:i], v, *values[i + 1 :])
        close(jax.jvp(one, (values[i],), (moved[i],))[1], part)


def test_gradients_of_an_adapter_in_sixteen_bits_err_by_its_rounding():
    rng = np.random.default_rng(3)
    x, w = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((64, 32), (32, 24)))
    a, b = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((32, 4), (4, 24)))
    ct = jnp.asarray(rng.normal(size=(64, 24)), jnp.bfloat16)
    _, pull = jax.vjp(lambda *v: adapted_half(*v, 1.5), x, w, a, b)
    wide = [np.asarray(v, np.float64) for v in (x, w, a, b, ct)]
    X, W, A, B, C = wide
    expected = (C @ W.T + 1.5 * C @ B.T @ A.T, X.T @ C, 1.5 * X.T @ (C @ B.T), 1.5 * (X @ A).T @ C)
    for got, right, kind in zip(
        pull(ct), expected, (jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.float32), strict=True
    ):
        assert got.dtype == kind
        assert np.linalg.norm(np.asarray(got, np.float64) - right) < 2 * ROUNDING * np.linalg.norm(right)


def test_scale_with_and_without_rank_stabilisation():
    assert LoraConfig(rank=16, alpha=32.0).scale == 2.0
    assert LoraConfig(rank=16, alpha=32.0, rslora=True).scale == 8.0


def test_a_is_uniform_with_bound_one_over_sqrt_inputs():
    a = np.asarray(init_lora_a(np.random.default_rng(0), (3, 64, 200), jnp.float32))
    bound = 1 / 8
    assert np.abs(a).max() <= bound
    # Standard deviation of U(-b, b) is b / sqrt(3); 38,400 draws pin it to well under 2 per cent.
    assert abs(a.std() * np.sqrt(3) / bound - 1) < 0.02
    assert abs(a.mean()) < 0.002


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("all-linear",), LINEARS),
        (("q", "v"), ("attention/q", "attention/v")),
        (("q_proj", "down_proj"), ("attention/q", "mlp/down")),
        (("attention/o",), ("attention/o",)),
        (("attention/.*", "gate"), LINEARS[:5]),
        (("c_attn",), LINEARS[:3]),
    ],
)
def test_targets_by_name_alias_and_pattern(targets, expected):
    assert LoraConfig(targets=targets).matches(LINEARS) == expected


@pytest.mark.parametrize("target", ["lm_head", "head", "w_pack"])
def test_a_target_that_matches_nothing_is_an_error_that_lists_the_layers(target):
    with pytest.raises(ConfigError, match=rf"{target}.*attention/q"):
        LoraConfig(targets=("q", target)).matches(LINEARS)


def test_a_target_that_is_no_regular_expression_is_an_error():
    with pytest.raises(ConfigError, match="regular expression"):
        LoraConfig(targets=("(",)).matches(LINEARS)


@pytest.mark.parametrize("keys", [{"rank": 0}, {"targets": ()}])
def test_impossible_settings_are_refused(keys):
    with pytest.raises(ConfigError):
        LoraConfig(**keys)


def test_subset_and_merge():
    rng = np.random.default_rng(0)
    arrays = {
        n: jnp.asarray(rng.normal(size=s), jnp.float32)
        for n, s in {"kernel": (2, 4, 6), "lora_a": (2, 4, 3), "lora_b": (2, 3, 6)}.items()
    }
    tree = {"layers": {"q": arrays, "k": {"kernel": arrays["kernel"]}}, "norm": {"scale": jnp.ones(4)}}
    assert lora_subset(tree) == {"layers": {"q": {n: arrays[n] for n in ("lora_a", "lora_b")}}}
    merged = merge_lora(tree, 0.5)
    expected = np.asarray(arrays["kernel"]) + 0.5 * np.einsum("lir,lro->lio", arrays["lora_a"], arrays["lora_b"])
    np.testing.assert_allclose(merged["layers"]["q"]["kernel"], expected, atol=1e-6)
    assert set(merged["layers"]["q"]) == {"kernel"}
    assert merged["norm"]["scale"] is tree["norm"]["scale"]
