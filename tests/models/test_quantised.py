"""Weights in 8 and 4 bits against the same model in floating point whose kernels are what the integers stand for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from ntkjax.errors import ConfigError
from ntkjax.fingerprint import tree_digest, weights_fingerprint
from ntkjax.models import LoraConfig, init_lm, load_lm, save_merged
from ntkjax.models.lm import LanguageModel, paths, quantise, unflatten
from ntkjax.models.quantised import FORMATS, bytes_of, quantised, restored, scale_path, tiles
from ntkjax.pipeline.options import ModelOptions

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12) % 90


def matrix(shape=(3, 128, 5)) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def tiled(kernel) -> np.ndarray:
    """[..., in, out] -> [..., tiles, in / tiles, out]."""
    kernel = np.asarray(kernel, np.float64)
    count = tiles(kernel.shape[-2])
    return kernel.reshape(*kernel.shape[:-2], count, kernel.shape[-2] // count, kernel.shape[-1])


@pytest.mark.parametrize(("inputs", "count"), [(576, 9), (1536, 24), (24, 3), (7, 7)])
def test_a_tile_divides_the_inputs(inputs, count):
    assert tiles(inputs) == count


def test_eight_bits_round_to_the_nearest_of_256_steps():
    kernel = matrix()
    integers, scales = quantised(kernel, "int8")
    assert integers.dtype == jnp.int8 and scales.shape == (3, 2, 5)
    step = np.abs(tiled(kernel)).max(axis=-2, keepdims=True) / 127.5
    held = tiled(restored(integers, scales, "int8"))
    assert np.abs(held / step - np.round(held / step)).max() < 1e-4
    assert np.abs(held - tiled(kernel)).max() <= (0.5 + 1e-4) * step.max()  # the largest is a tie
    assert np.unique(np.asarray(integers)).size > 200


def normal_float() -> np.ndarray:
    """The 16 levels as QLoRA's appendix E derives them: quantiles of a normal distribution with an exact zero."""
    outer = 0.5 * (1 - 1 / 32 + 1 - 1 / 30)
    high = scipy.stats.norm.ppf(np.linspace(outer, 0.5, 9)[:-1])
    low = -scipy.stats.norm.ppf(np.linspace(outer, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([high, [0.0], low]))
    return levels / np.abs(levels).max()


def test_four_bits_take_the_nearest_normal_float():
    kernel = matrix()
    integers, scales = quantised(kernel, "nf4")
    assert integers.dtype == jnp.uint4
    largest = np.abs(tiled(kernel)).max(axis=-2, keepdims=True)
    ratio = tiled(kernel) / largest
    expected = normal_float()[np.abs(ratio[..., None] - normal_float()).argmin(axis=-1)] * largest
    np.testing.assert_allclose(tiled(restored(integers, scales, "nf4")), expected, atol=1e-6)


def pair(name: str, form: str) -> tuple[LanguageModel, LanguageModel]:
    """A golden checkpoint in double precision with kernels held in ``form``, and the same with what these stand for;
    both with one adapter, neither factor of it zero."""
    model = load_lm(GOLDEN / name, lora=LoraConfig(3, 6.0), dtype="float64")
    random = np.random.default_rng(1)
    model = model.with_params(jax.tree.map(lambda x: jnp.asarray(0.2 * random.normal(size=x.shape)), model.lora))
    held = quantise(model, form)
    leaves = paths(held.params)
    plain = {
        path: restored(leaf, leaves[scale_path(path)], form) if scale_path(path) in leaves else leaf
        for path, leaf in leaves.items()
        if not path.endswith("kernel_scale")
    }
    return held, dataclasses.replace(model, params=unflatten(plain))


@pytest.mark.parametrize(("name", "form"), [("qwen3", "nf4"), ("gpt2", "int8"), ("mixtral", "nf4")])
def test_values_and_both_derivatives_are_those_of_the_restored_kernels(name, form, x64):
    """Forward mode is what scores take, reverse mode what training and mean gradients do."""
    held, plain = pair(name, form)
    assert any(leaf.dtype == FORMATS[form] for leaf in jax.tree.leaves(held.params))
    random = np.random.default_rng(2)
    direction = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape)), held.lora)
    weigh = jnp.asarray(random.normal(size=(*TOKENS.shape, held.config.vocab_size)))

    def found(model):
        loss = lambda lora: jnp.sum(weigh * model.with_params(lora).logits(TOKENS))
        return jax.jit(lambda lora: (jax.jvp(loss, (lora,), (direction,)), jax.grad(loss)(lora)))(model.lora)

    got, expected = found(held), found(plain)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10), got, expected)


def test_a_checkpoint_is_loaded_layer_by_layer_to_the_same_integers():
    lora = LoraConfig(3, 6.0)
    # A tensor of the file for each kernel, one for q, k and v together, one for each expert.
    for name, form in (("qwen3", "nf4"), ("gpt2", "int8"), ("mixtral", "int8")):
        loaded, whole = load_lm(GOLDEN / name, lora=lora, dtype=form), load_lm(GOLDEN / name, lora=lora)
        assert loaded.spec.dtype == "bfloat16" and loaded.params["embed"]["weight"].dtype == jnp.bfloat16
        expected = paths(quantise(whole, form).params)
        assert paths(loaded.params).keys() == expected.keys()
        for path, leaf in paths(loaded.params).items():
            if path.startswith("layers") and "kernel" in path and "router" not in path:
                assert leaf.dtype == expected[path].dtype
                np.testing.assert_array_equal(*(np.asarray(x, np.float32) for x in (leaf, expected[path])), path)
        assert np.isfinite(np.asarray(loaded.logits(TOKENS))).all()


def test_routers_stay_as_they_are():
    router = load_lm(GOLDEN / "mixtral", dtype="nf4").params["layers"]["mlp"]["router"]
    assert router["kernel"].dtype == jnp.bfloat16 and "kernel_scale" not in router


def test_the_backward_pass_keeps_no_kernel_in_floating_point():
    """Four more layers keep their activations, and less than the MLP of one of them takes in float32."""
    wide = dataclasses.replace(load_lm(GOLDEN / "qwen3").config, hidden_size=128, intermediate_size=512)

    def temporary(layers: int) -> int:
        config = dataclasses.replace(wide, num_layers=layers)
        model = quantise(init_lm(config, seed=0, lora=LoraConfig(2, 4.0)), "int8")

        def loss(lora, params):
            return jnp.sum(dataclasses.replace(model, params=params).with_params(lora).logits(TOKENS[:, :3]) ** 2)

        compiled = jax.jit(jax.grad(loss)).lower(model.lora, model.params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(6) - temporary(2) < 3 * 128 * 512 * 4


def test_what_cannot_be_done_is_refused_with_a_remedy():
    model = load_lm(GOLDEN / "qwen3", lora=LoraConfig(2, 4.0), dtype="int8")
    for which in ("all", "attention/q/kernel$", "mlp/up/kernel_scale"):
        with pytest.raises(ConfigError, match=r"held as int8 and cannot be trained.*--dtype bfloat16"):
            model.select_params(which)
    assert model.select_params("norm_1").keys() == {"layers"}
    with pytest.raises(ConfigError, match="--parameters lora"):
        ModelOptions(model="m", dtype="nf4", parameters="all")
    with pytest.raises(ConfigError, match="'nf4' for weights in int8: expected"):
        quantise(model, "nf4")
    with pytest.raises(ConfigError, match="'int3'"):
        quantise(load_lm(GOLDEN / "qwen3"), "int3")
    with pytest.raises(ConfigError, match=r"supported:.*int8, nf4"):
        load_lm(GOLDEN / "qwen3", dtype="int4")


def test_a_merged_export_is_what_the_integers_stand_for(tmp_path):
    model = load_lm(GOLDEN / "qwen3", lora=LoraConfig(3, 6.0), dtype="nf4")
    random = np.random.default_rng(3)
    adapted = model.with_params(jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype), model.lora))
    save_merged(tmp_path / "m", adapted, {})
    up, written = adapted.params["layers"]["mlp"]["up"], load_lm(tmp_path / "m", lora=None)
    assert model.lora_config is not None
    kernel = np.asarray(restored(up["kernel"], up["kernel_scale"], "nf4"), np.float64)
    a, b = (np.asarray(up[name], np.float64) for name in ("lora_a", "lora_b"))
    merged = kernel + model.lora_config.scale * a @ b
    np.testing.assert_allclose(written.params["layers"]["mlp"]["up"]["kernel"], merged, rtol=2**-8, atol=1e-6)


def test_two_integers_of_four_bits_are_a_byte_and_count_in_digests():
    integers, scales = quantised(matrix(), "nf4")
    assert bytes_of(integers) == 3 * 128 * 5 // 2 and bytes_of(scales) == 3 * 2 * 5 * 4
    other = integers.at[0, 0, 0].set(jnp.uint4(7) - integers[0, 0, 0])
    for digest in (tree_digest, weights_fingerprint):
        assert digest({"w": integers}) != digest({"w": other})
