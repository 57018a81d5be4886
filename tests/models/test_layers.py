"""Properties of a layer (norms, positions, windows, soft caps, scales) against a decoder written out in numpy."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkjax.errors import CheckpointError
from ntkjax.models import KVCache, LoraConfig, ModelConfig, generate, init_lm
from ntkjax.models.attention import attend
from ntkjax.models.families import FAMILIES
from ntkjax.models.families.base import LayerSpec, RopeConfig, layer_of
from ntkjax.models.families.llama import LLAMA
from ntkjax.models.functions import forward
from ntkjax.types import Batch

SHAPE = {
    "vocab_size": 19, "hidden_size": 16, "intermediate_size": 12, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2,
    "head_dim": 4, "initializer_range": 0.5, "activation": "relu",
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 19, (2, 11)).astype(np.int32)
ALTERNATING = ("sliding_attention", "full_attention") * 2


def make_family(name: str, scale=None, **changes):
    layer = functools.partial(layer_of, **changes)
    return dataclasses.replace(LLAMA, name=name, layer=layer, embed_scale=scale, fixed={})


def without_positions(shape, index):
    return layer_of(shape, index, **({"rope": None} if index % 2 else {}))


CASES = {  # what the next families have: family and fields of the shape
    "gemma": (
        make_family("gemma", scale=lambda c: c.hidden_size**0.5, norm_offset=1.0, norms="both"),
        {"qk_norm": True, "window": 3, "layer_types": ALTERNATING, "local_rope": RopeConfig(theta=50.0),
         "rope": RopeConfig(theta=1e3, kind="linear", factor=2.0), "soft_cap": 0.7, "query_scale": 0.9},
    ),
    "olmo": (make_family("olmo", norms="after", qk_norm="full"), {"window": 4, "layer_types": ALTERNATING}),
    "neox": (
        make_family("neox", norm="layer", mlp="plain", parallel=True),
        {"rope": RopeConfig(partial=0.5), "qkv_bias": True, "o_bias": True, "mlp_bias": True},
    ),
    "smollm": (dataclasses.replace(make_family("smollm"), layer=without_positions), {}),
    "mistral": (make_family("mistral"), {"window": 5}),
    "granite": (
        make_family("granite", scale=lambda c: c.embed_factor),
        {"embed_factor": 3.0, "residual_scale": 0.6, "state_divisor": 0.8, "unrotated": (1, 2)},
    ),
}  # fmt: skip


@pytest.fixture
def config(request, monkeypatch) -> ModelConfig:
    family, fields = CASES[request.param]
    monkeypatch.setitem(FAMILIES, family.name, family)
    return ModelConfig(family=family.name, **SHAPE | fields)


every_case = pytest.mark.parametrize("config", CASES, indirect=True)
windowed = pytest.mark.parametrize("config", ["gemma", "olmo", "mistral"], indirect=True)


def norm(x, node, layer: LayerSpec, eps: float):
    if layer.norm == "layer":
        x = x - x.mean(-1, keepdims=True)
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * (layer.norm_offset + node["scale"])
    return y + node["bias"] if "bias" in node else y


def rotated(x, rope: RopeConfig | None, positions):
    """[T, N, H]: pairs (i, i + R/2) of the first R dimensions as complex numbers, turned by position * frequency."""
    if rope is None:
        return x
    r = int(x.shape[-1] * rope.partial)
    angle = positions[:, None] * rope.theta ** (-np.arange(0, r, 2) / r) / (rope.factor if rope.kind == "linear" else 1)
    z = (x[..., : r // 2] + 1j * x[..., r // 2 : r]) * np.exp(1j * angle)[:, None]
    return np.concatenate([z.real, z.imag, x[..., r:]], -1)


def attention(x, p, c: ModelConfig, layer: LayerSpec, positions, visible):
    linear = lambda name, x: x @ p[name]["kernel"] + p[name].get("bias", 0)
    q, k, v = (linear(name, x) for name in "qkv")
    rms = dataclasses.replace(layer, norm="rms")
    if layer.qk_norm == "full":
        q, k = norm(q, p["q_norm"], rms, c.norm_eps), norm(k, p["k_norm"], rms, c.norm_eps)
    q, k, v = (y.reshape(len(x), -1, c.head_dim) for y in (q, k, v))
    if layer.qk_norm == "head":
        q, k = norm(q, p["q_norm"], rms, c.norm_eps), norm(k, p["k_norm"], rms, c.norm_eps)
    q, k = rotated(q, layer.rope, positions), rotated(k, layer.rope, positions)
    out = np.zeros_like(q)
    for head in range(c.num_heads):
        of = head // (c.num_heads // c.num_kv_heads)
        scores = q[:, head] @ k[:, of].T * (layer.query_scale or c.head_dim**-0.5)
        if layer.soft_cap:
            scores = layer.soft_cap * np.tanh(scores / layer.soft_cap)
        seen = visible & (positions[:, None] - positions[None] < (layer.window or 10**6))
        weights = np.where(seen, np.exp(scores), 0)
        out[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, of]
    return linear("o", out.reshape(len(x), -1))


def mlp(x, p, layer: LayerSpec):
    linear = lambda name, x: x @ p[name]["kernel"] + p[name].get("bias", 0)
    up = linear("up", x)
    return linear("down", np.maximum(linear("gate", x), 0) * up if layer.mlp == "gated" else np.maximum(up, 0))


def reference(model, tokens, layers=None, scale=None, positions=None, visible=None):
    """Hidden states after the last norm of one row [T, D], in float64."""
    c, params = model.config, jax.tree.map(lambda x: np.asarray(x, np.float64), model.params)
    layers = c.layers if layers is None else layers
    positions = np.arange(len(tokens)) if positions is None else positions
    visible = np.tril(np.ones((len(tokens), len(tokens)), bool)) if visible is None else visible
    x = params["embed"]["weight"][tokens] * (scale or c.embed_scale or 1)
    same = lambda y, *_: y
    for i, layer in enumerate(layers):
        p = jax.tree.map(lambda w, i=i: w[i], params["layers"])
        of = lambda name, p=p, layer=layer: (lambda y: norm(y, p[name], layer, c.norm_eps)) if name in p else same
        scale_of = layer.residual_scale
        a = scale_of * of("post_norm_1")(attention(of("norm_1")(x), p["attention"], c, layer, positions, visible))
        inner = x if layer.parallel else x + a
        x = x + a + scale_of * of("post_norm_2")(mlp(of("norm_2")(inner), p["mlp"], layer))
    return norm(x, params["norm"], layers[0], c.norm_eps) / c.state_divisor


def random_model(config, lora=None):
    """Every leaf moved, norms and biases included, so that nothing passes for being 0 or 1."""
    model, rng = init_lm(config, seed=0, lora=lora), np.random.default_rng(1)
    move = lambda x: x + jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype)
    return dataclasses.replace(model, params=jax.tree.map(move, model.params))


@every_case
def test_states_are_those_of_the_formula(config):
    model = random_model(config)
    got, _ = jax.jit(lambda p, t: forward(model.spec, p, t))(model.params, TOKENS)
    expected = np.stack([reference(model, row) for row in TOKENS])
    np.testing.assert_allclose(got, expected, atol=2e-4 * np.abs(expected).max())
    # Each property counts: without it the formula gives something else.
    plain = LayerSpec()
    for field in ("norm_offset", "parallel", "rope", "window", "soft_cap", "query_scale", "residual_scale"):
        values = [getattr(layer, field) for layer in config.layers]
        if any(value != getattr(plain, field) for value in values):
            other = [dataclasses.replace(layer, **{field: getattr(plain, field)}) for layer in config.layers]
            assert np.abs(reference(model, TOKENS[0], other) - expected[0]).max() > 1e-2, field
    if config.embed_scale is not None:
        assert np.abs(reference(model, TOKENS[0], scale=1.0) - expected[0]).max() > 1e-2


@every_case
def test_a_cache_gives_the_states_of_the_whole_sequence(config):
    """Right-padded prompts of 4 and 7 tokens, then one token at a time, beyond every window."""
    model = random_model(config)
    step = jax.jit(lambda tokens, cache: forward(model.spec, model.params, tokens, cache=cache))
    expected, _ = step(jnp.asarray(TOKENS), None)
    scale = np.abs(expected).max()
    prompts = np.where(np.arange(7)[None] < np.array([[4], [7]]), TOKENS[:, :7], 0).astype(np.int32)
    states, cache = step(jnp.asarray(prompts), KVCache.zeros(model.spec, 2, 13))
    np.testing.assert_allclose(states[0, :4], expected[0, :4], atol=1e-4 * scale)
    np.testing.assert_allclose(states[1], expected[1, :7], atol=1e-4 * scale)
    cache = dataclasses.replace(cache, lengths=jnp.asarray([4, 7], jnp.int32))
    for n in range(4):
        tokens = np.stack([TOKENS[0, 4 + n : 5 + n], TOKENS[1, 7 + n : 8 + n]])
        states, cache = step(jnp.asarray(tokens), cache)
        np.testing.assert_allclose(states[0, 0], expected[0, 4 + n], atol=1e-4 * scale)
        np.testing.assert_allclose(states[1, 0], expected[1, 7 + n], atol=1e-4 * scale)


@windowed
def test_packed_choices_under_a_window_equal_separate_rows(config):
    model = random_model(config)
    prompt, first, second = [3, 4, 5, 6], [6, 7, 1, 2], [8, 9, 3]
    tokens = jnp.asarray([prompt + first + second], jnp.int32)
    positions = jnp.asarray([[*range(8), 4, 5, 6]], jnp.int32)
    segments = jnp.asarray([[0] * 4 + [1] * 4 + [2] * 3], jnp.int32)
    packed = jax.jit(lambda *args: forward(model.spec, model.params, *args)[0])(tokens, positions, None, segments)
    for choice, at in ((first, 4), (second, 8)):
        alone = reference(model, np.asarray(prompt + choice))
        tolerance = 2e-4 * np.abs(alone).max()
        np.testing.assert_allclose(packed[0, at : at + len(choice)], alone[4:], atol=tolerance)


@pytest.mark.parametrize("config", ["gemma", "neox"], indirect=True)
def test_scores_and_gradients_are_those_of_finite_differences(config, x64):
    """In forward and in reverse mode, through windows, soft caps and norms, with an adapter on every layer."""
    smooth = dataclasses.replace(config, activation="gelu", initializer_range=0.2)
    model = init_lm(smooth, seed=0, lora=LoraConfig(rank=1, alpha=1.0), dtype="float64")
    rng = np.random.default_rng(3)
    lora = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape)), model.lora)
    step = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), lora)
    mask = np.arange(11)[None] >= np.array([[4], [6]])
    batch = Batch(TOKENS, mask, np.full(2, 11, np.int32), np.arange(2, dtype=np.int32))
    loss = jax.jit(lambda p: model.nll_fn(p, batch).sum())
    moved = lambda t: loss(jax.tree.map(lambda p, d: p + t * d, lora, step))
    numeric = (moved(1e-5) - moved(-1e-5)) / 2e-5
    _, along = jax.jvp(loss, (lora,), (step,))
    gradient = jax.grad(loss)(lora)
    dot = sum(jnp.vdot(g, s) for g, s in zip(jax.tree.leaves(gradient), jax.tree.leaves(step)))
    np.testing.assert_allclose([along, dot], numeric, rtol=1e-6)


@pytest.mark.parametrize("config", ["gemma"], indirect=True)
def test_generation_continues_as_the_whole_sequence_would(config):
    model = random_model(config)
    prompt = [3, 4, 5, 6, 7]
    got = generate(model, {}, [prompt], max_new_tokens=6)[0]
    table = np.asarray(model.params["head"]["kernel"], np.float64)
    for n, token in enumerate(got):
        assert np.argmax(table @ reference(model, np.asarray(prompt + got[:n]))[-1]) == token


@pytest.mark.parametrize("length", [7, 70])
def test_a_window_and_a_soft_cap_in_blocks_equal_one_block_and_the_formula(length, x64):
    rng = np.random.default_rng(0)
    values = tuple(jnp.asarray(rng.normal(size=(1, length, n, 4))) for n in (4, 2, 2))
    moved = tuple(jnp.asarray(rng.normal(size=x.shape)) for x in values)
    row = jnp.arange(length)
    seen = (row[None] <= row[:, None]) & (row[:, None] - row[None] < 5)

    def formula(q, k, v):
        scores = 2.0 * jnp.tanh(0.8 * jnp.einsum("btnh,bsnh->bnts", q, jnp.repeat(k, 2, axis=2)) / 2.0)
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
        return jnp.einsum("bnts,bsnh->btnh", weights, jnp.repeat(v, 2, axis=2))

    blocks = lambda *x: attend(*x, None, "xla", scale=0.8, soft_cap=2.0, window=jnp.int32(5))
    one = lambda *x: attend(*x, seen[None], "xla", scale=0.8, soft_cap=2.0)
    weigh = jnp.asarray(rng.normal(size=values[0].shape))

    def derivatives(run):
        gradient = jax.grad(lambda x: jnp.vdot(run(*x), weigh))
        return jax.jvp(run, values, moved), gradient(values), jax.jvp(gradient, (values,), (moved,))[1]

    expected = derivatives(formula)
    for run in (blocks, one):
        got = derivatives(run)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9), got, expected)


def test_layers_that_one_compiled_body_cannot_run_are_refused(monkeypatch):
    def differ(shape, index):
        return layer_of(shape, index, norms="both" if index else "before")

    def partly(shape, index):
        return layer_of(shape, index, rope=RopeConfig(partial=1.0 if index else 0.5))

    for name, layer, words in (("differ", differ, "layers differ"), ("partly", partly, "rotate")):
        monkeypatch.setitem(FAMILIES, name, dataclasses.replace(make_family(name), layer=layer))
        with pytest.raises(CheckpointError, match=words):
            ModelConfig(family=name, **SHAPE)
    for fields, words in (
        ({"layer_types": ("full_attention",)}, "layer_types has 1 entries for 4 layers"),
        ({"layer_types": ("full_attention",) * 3 + ("linear_attention",)}, "linear_attention"),
        ({"window": 0}, "window = 0"),
        ({"rope": RopeConfig(partial=0.25)}, "is odd"),
        ({"family": "nobody"}, "family 'nobody' is not supported; supported: llama"),
    ):
        with pytest.raises(CheckpointError, match=words):
            ModelConfig(**{"family": "llama"} | SHAPE | fields)


def test_settings_that_came_later_leave_the_digest_of_a_config_alone():
    config = ModelConfig(family="llama", **SHAPE)
    first = {"theta", "kind", "factor", "low_freq_factor", "high_freq_factor", "original_max_positions"}
    later = {field.name for field in dataclasses.fields(config) if field.metadata.get("later")}
    assert {"layer_types", "window", "local_rope", "soft_cap", "query_scale"} <= later
    assert not later & config.settings().keys() and config.settings()["rope"].keys() == first
    changed = dataclasses.replace(config, window=3, rope=RopeConfig(partial=0.5)).settings()
    assert changed["window"] == 3 and changed["rope"]["partial"] == 0.5
    rest = {k: v for k, v in dataclasses.asdict(config).items() if k not in later}
    rest["rope"] = {name: rest["rope"][name] for name in first}
    assert config.settings() == rest
