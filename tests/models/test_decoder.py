"""The decoders against formulas written out in NumPy, and against themselves: unrolled, rematerialised, cached."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ntkjax.errors import UserError
from ntkjax.models import KVCache, LoraConfig, ModelConfig, RopeConfig, init_lm
from ntkjax.models.attention import attend
from ntkjax.models.functions import forward, structure
from ntkjax.models.layers import (
    RMSNorm,
    attention_mask,
    make_context,
    scan_layers,
)
from ntkjax.models.rotary import rope_angles, rope_frequencies, rotate

SMALL = ModelConfig(
    family="llama", vocab_size=31, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=4,
    num_kv_heads=2, head_dim=4, initializer_range=0.3,
)  # fmt: skip
FAMILIES = {
    "llama": SMALL,
    "qwen3": dataclasses.replace(SMALL, family="qwen3", qk_norm=True, head_dim=6, tied=True),
    "gpt2": dataclasses.replace(
        SMALL, family="gpt2", num_kv_heads=4, tied=True, qkv_bias=True, o_bias=True, mlp_bias=True,
        activation="gelu_new", max_positions=16,
    ),
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 31, (2, 9)).astype(np.int32)


def test_rms_norm_is_the_formula():
    x = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
    norm = RMSNorm((8,), 1e-3, "float32")
    norm.scale[...] = jnp.arange(8, dtype=jnp.float32)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * np.arange(8)
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, atol=1e-6)


def test_rope_rotates_each_pair_by_position_times_frequency(x64):
    x = np.random.default_rng(0).normal(size=(1, 5, 2, 6))
    rope = RopeConfig(theta=100.0)
    positions = np.array([[0, 1, 2, 7, 1000]], np.int32)
    at = jnp.asarray(positions)
    cos, sin = rope_angles(rope, FAMILIES["qwen3"], at, jnp.full_like(at, 5), jnp.float64)
    got = np.asarray(rotate(jnp.asarray(x), cos, sin))
    for t, position in enumerate(positions[0]):
        for i in range(3):
            angle = position * np.float64(np.float32(100.0) ** np.float32(-i / 3))
            z = (x[0, t, :, i] + 1j * x[0, t, :, i + 3]) * np.exp(1j * angle)
            # Frequencies are float32, as in transformers: at position 1000 the angle is good to 1e-4.
            np.testing.assert_allclose(got[0, t, :, i], z.real, atol=1e-7 * max(1, position))
            np.testing.assert_allclose(got[0, t, :, i + 3], z.imag, atol=1e-7 * max(1, position))


def test_linear_scaling_divides_and_llama3_bends_the_frequencies():
    plain = rope_frequencies(RopeConfig(theta=1e4), 32)
    np.testing.assert_allclose(plain, 1e4 ** (-np.arange(16) / 16), rtol=1e-6)
    linear = rope_frequencies(RopeConfig(theta=1e4, kind="linear", factor=4.0), 32)
    np.testing.assert_allclose(linear, plain / 4, rtol=1e-6)
    bent = rope_frequencies(RopeConfig(1e4, "llama3", 8.0, 1.0, 4.0, 256), 32)
    for before, after in zip(plain, bent):
        wavelength = 2 * np.pi / before
        share = np.clip((256 / wavelength - 1.0) / (4.0 - 1.0), 0, 1)
        np.testing.assert_allclose(after, before * (share + (1 - share) / 8), rtol=1e-5)
    assert len(np.unique(np.round(plain / bent, 4))) > 3  # kept, bent and divided all occur


def test_attention_is_the_formula_and_agrees_with_jax():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, 5, n, 4)).astype(np.float32) for n in (4, 2, 2))
    got = attend(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), None, "xla")
    for b in range(2):
        for n in range(4):
            for t in range(5):
                scores = k[b, : t + 1, n // 2] @ q[b, t, n] / 2.0
                weights = np.exp(scores - scores.max())
                expected = weights / weights.sum() @ v[b, : t + 1, n // 2]
                np.testing.assert_allclose(got[b, t, n], expected, atol=1e-5)
    np.testing.assert_allclose(got, jax.nn.dot_product_attention(q, k, v, is_causal=True), atol=1e-5)


def test_the_tangent_of_attention_is_that_of_its_formula_in_every_mode(x64):
    rng = np.random.default_rng(0)
    values = tuple(jnp.asarray(rng.normal(size=(2, 40, n, 4))) for n in (4, 2, 2))
    moved = tuple(jnp.asarray(rng.normal(size=v.shape)) for v in values)
    weigh = jnp.asarray(rng.normal(size=values[0].shape))
    mask = jnp.tril(jnp.ones((40, 40), bool))

    def formula(q, k, v):
        k, v = jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2)
        scores = jnp.where(mask, jnp.einsum("btnh,bsnh->bnts", q, k) / 2.0, -jnp.inf)
        return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, axis=-1), v)

    def derivatives(run):
        gradient = jax.grad(lambda x: jnp.vdot(run(*x), weigh))
        batched = jax.vmap(lambda step: jax.jvp(run, values, jax.tree.map(lambda m: step * m, moved))[1])
        return (
            jax.jvp(run, values, moved),
            gradient(values),
            batched(jnp.asarray([1.0, -2.0])),
            jax.jvp(gradient, (values,), (moved,))[1],
            jax.jvp(lambda *x: jax.jvp(run, x, moved)[1], values, moved)[1],
        )

    got, expected = (derivatives(run) for run in (lambda q, k, v: attend(q, k, v, None, "xla"), formula))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10), got, expected)


@pytest.mark.parametrize("length", [31, 33, 70, pytest.param(140, marks=pytest.mark.slow)])
def test_causal_blocks_equal_one_block_under_a_causal_mask_with_both_derivatives(x64, length):
    rng = np.random.default_rng(length)
    values = [jnp.asarray(rng.normal(size=(2, length, n, 4))) for n in (4, 2, 2)]
    moved = [jnp.asarray(rng.normal(size=v.shape)) for v in values]
    mask = jnp.tril(jnp.ones((length, length), bool))[None]
    weigh = jnp.asarray(rng.normal(size=values[0].shape))

    def both(mask):
        run = lambda q, k, v: attend(q, k, v, mask, "xla")
        value, tangent = jax.jvp(run, tuple(values), tuple(moved))
        return value, tangent, jax.grad(lambda *x: jnp.vdot(run(*x), weigh), argnums=(0, 1, 2))(*values)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10), both(None), both(mask))


def test_segments_hide_other_choices_but_not_the_prompt():
    segments = jnp.asarray([[0, 0, 1, 1, 2, 2]], jnp.int32)
    seen = np.asarray(attention_mask(1, 6, segments, None))[0]
    expected = np.tril(np.ones((6, 6), bool))
    expected[4:, 2:4] = False
    np.testing.assert_array_equal(seen, expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_choices_equal_separate_rows(family):
    model = init_lm(FAMILIES[family], seed=0)
    prompt, first, second = [3, 4, 5], [6, 7], [8, 9]
    tokens = jnp.asarray([prompt + first + second], jnp.int32)
    positions = jnp.asarray([[0, 1, 2, 3, 4, 3, 4]], jnp.int32)
    segments = jnp.asarray([[0, 0, 0, 1, 1, 2, 2]], jnp.int32)
    run = jax.jit(lambda *args: forward(model.spec, model.params, *args)[0])
    packed = run(tokens, positions, None, segments)
    for choice, at in ((first, 3), (second, 5)):
        alone = run(jnp.asarray([prompt + choice], jnp.int32))
        np.testing.assert_allclose(packed[0, at : at + 2], alone[0, 3:5], atol=1e-5)


def test_scan_equals_a_loop_over_layers():
    model = init_lm(SMALL, seed=0)
    whole = nnx.merge(structure(model.spec)[0], model.params)
    x = whole.embed(jnp.asarray(TOKENS))
    _, context = make_context(SMALL, jnp.asarray(TOKENS), None, None, None, None, x.dtype)
    scanned, _ = scan_layers(whole.layers, x, context, None, model.spec)
    graph, stacked = nnx.split(whole.layers)
    looped, slice_of = x, lambda layer: jax.tree.map(lambda w: w[layer], stacked)
    for layer in range(3):
        looped, _ = nnx.merge(graph, slice_of(layer))(looped, context, None)
    np.testing.assert_allclose(scanned, looped, atol=1e-5)
    assert not np.allclose(scanned, x, atol=0.1)


def test_remat_changes_neither_values_nor_gradients():
    pair = [init_lm(SMALL, seed=0, lora=LoraConfig(rank=2, targets=("q",)), remat=remat) for remat in (False, True)]
    loss = lambda p, spec: jnp.sum(forward(spec, p, jnp.asarray(TOKENS))[0] ** 2)
    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    for a, b in zip(*(jax.tree.leaves(gradient(model.params, model.spec)) for model in pair)):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(a).max())


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_cache_gives_the_same_states_as_the_whole_sequence(family):
    """Prefill right-padded prompts of 4 and 6 tokens, then feed the rest one token at a time."""
    model = init_lm(FAMILIES[family], seed=1)
    step = jax.jit(lambda tokens, cache: forward(model.spec, model.params, tokens, cache=cache))
    expected, _ = step(jnp.asarray(TOKENS), None)
    prompts = np.where(np.arange(6)[None] < np.array([[4], [6]]), TOKENS[:, :6], 0).astype(np.int32)
    states, cache = step(jnp.asarray(prompts), KVCache.zeros(model.spec, 2, 12))
    np.testing.assert_allclose(states[0, :4], expected[0, :4], atol=1e-5)
    np.testing.assert_allclose(states[1], expected[1, :6], atol=1e-5)
    cache = dataclasses.replace(cache, lengths=jnp.asarray([4, 6], jnp.int32))
    for n in range(3):
        tokens = np.stack([TOKENS[0, 4 + n : 5 + n], TOKENS[1, 6 + n : 7 + n]])
        states, cache = step(jnp.asarray(tokens), cache)
        np.testing.assert_allclose(states[0, 0], expected[0, 4 + n], atol=1e-5)
        np.testing.assert_allclose(states[1, 0], expected[1, 6 + n], atol=1e-5)
    np.testing.assert_array_equal(cache.lengths, [7, 9])


def test_gpt2_refuses_what_its_positions_do_not_reach():
    model = init_lm(FAMILIES["gpt2"], seed=0)
    with pytest.raises(UserError, match=r"17 tokens.*16 learned positions"):
        model.logits(np.zeros((1, 17), np.int32))
    with pytest.raises(UserError, match="16 learned positions"):
        cache = KVCache.zeros(model.spec, 1, 17)
        forward(model.spec, model.params, jnp.zeros((1, 2), jnp.int32), cache=cache)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_keeps_norms_adapters_and_outputs_in_float32(dtype):
    lora = LoraConfig(rank=2, targets=("q",))
    full, half = init_lm(SMALL, seed=0, lora=lora), init_lm(SMALL, seed=0, lora=lora, dtype=dtype)
    attention = half.params["layers"]["attention"]["q"]
    assert attention["kernel"].dtype == jnp.dtype(dtype)
    assert attention["lora_a"].dtype == attention["lora_b"].dtype == jnp.float32
    assert half.params["layers"]["norm_1"]["scale"].dtype == jnp.float32
    states = jax.eval_shape(lambda p: forward(half.spec, p, jnp.asarray(TOKENS))[0], half.params)
    logits = half.logits(TOKENS)
    assert states.dtype == logits.dtype == jnp.float32
    error = np.abs(logits - full.logits(TOKENS)).max() / np.abs(full.logits(TOKENS)).max()
    assert 1e-5 < error < 0.05
    square = lambda p: jnp.sum(forward(half.spec, half.with_params(p).params, jnp.asarray(TOKENS))[0] ** 2)
    gradient = jax.jit(jax.grad(square))(half.lora)
    b = gradient["layers"]["attention"]["q"]["lora_b"]
    assert b.dtype == jnp.float32 and np.isfinite(b).all() and np.abs(b).max() > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_a_layer_adds_to_a_large_residual_stream_is_not_rounded_away_in_sixteen_bits(dtype):
    """What the layers add is about a thousandth of the embedding, of which bfloat16 holds steps of 2^-8."""
    half = init_lm(SMALL, seed=0, dtype=dtype)
    large = {"embed": {"weight": 4096 * half.params["embed"]["weight"]}}
    found = {}
    for name, kept in (("float32", jnp.float32), (dtype, dtype)):
        weights = jax.tree.map(lambda leaf, kept=kept: leaf.astype(kept), half.params | large)
        silent = jax.tree.map(jnp.zeros_like, {at: weights["layers"][at] for at in ("attention", "mlp")})
        run = lambda w, name=name: forward(dataclasses.replace(half.spec, dtype=name), w, jnp.asarray(TOKENS))[0]
        found[name] = run(weights) - run(weights | {"layers": weights["layers"] | silent})
    error = np.linalg.norm(found[dtype] - found["float32"]) / np.linalg.norm(found["float32"])
    assert error < 0.03
