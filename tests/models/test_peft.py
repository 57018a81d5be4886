"""PEFT adapter directories: round trips, GPT-2's fused layer, scales, refusals that name the cause."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ntkjax.errors import CheckpointError
from ntkjax.models import LanguageModel, LoraConfig, ModelConfig, init_lm
from ntkjax.models.peft import adapter_lora_config, load_adapter, save_adapter

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
SHAPE = {
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_layers": 2,
    "num_heads": 4,
    "head_dim": 2,
}
LLAMA = ModelConfig(family="llama", num_kv_heads=2, **SHAPE)
GPT2 = ModelConfig(
    family="gpt2",
    num_kv_heads=4,
    qkv_bias=True,
    o_bias=True,
    mlp_bias=True,
    tied=True,
    activation="gelu",
    **SHAPE,
)


@functools.cache
def make(config: ModelConfig, lora: LoraConfig | None, seed: int = 0) -> LanguageModel:
    """A random model whose adapter has both factors non-zero."""
    model = init_lm(config, seed=0, lora=lora)
    random = np.random.default_rng(seed)
    noise = jax.tree.map(lambda x: random.normal(size=x.shape).astype(x.dtype), model.lora)
    return model.with_params(noise) if noise else model


def equal(a, b) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))
    )


def products(model: LanguageModel, lora) -> dict[str, np.ndarray]:
    """scale A B of every adapted layer."""
    return {
        name: model.lora_config.scale * np.matmul(node["lora_a"], node["lora_b"])
        for layers in lora["layers"].values()
        for name, node in layers.items()
    }


def edit(folder: Path, **changes) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


CONFIGS = [
    (LLAMA, LoraConfig(4, 8.0)),
    (LLAMA, LoraConfig(3, 8.0, ("q_proj", "down"), rslora=True)),
    (GPT2, LoraConfig(4, 8.0)),
    (GPT2, LoraConfig(2, 3.0, ("q", "v", "mlp.c_proj"))),
    (GPT2, LoraConfig(2, 3.0, ("k",), rslora=True)),
    (GPT2, LoraConfig(3, 5.0, ("c_attn",), rslora=True)),
]


@pytest.mark.parametrize(("config", "lora"), CONFIGS)
def test_round_trip_is_exact(config: ModelConfig, lora: LoraConfig, tmp_path: Path) -> None:
    model = make(config, lora)
    save_adapter(tmp_path / "a", model, model.lora)
    other = make(config, lora, seed=1)
    loaded = load_adapter(tmp_path / "a", other)
    assert equal(loaded, model.lora)
    assert not equal(loaded, other.lora)


@pytest.mark.parametrize(("config", "lora"), CONFIGS[:3])
def test_written_files_are_what_peft_reads(config: ModelConfig, lora: LoraConfig, tmp_path: Path) -> None:
    """Names and shapes are those of the golden adapters that peft itself wrote."""
    model = make(config, lora)
    save_adapter(tmp_path / "a", model, {})
    gpt2 = config.family == "gpt2"
    golden = load_file(GOLDEN / ("gpt2-lora" if gpt2 else "llama-lora") / "adapter" / "adapter_model.safetensors")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert set(tensors) <= set(golden)
    assert "all-linear" not in lora.targets or set(tensors) == set(golden)
    written = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert written["peft_type"] == "LORA" and written["task_type"] == "CAUSAL_LM"
    assert (written["r"], written["lora_alpha"]) == (lora.rank, lora.alpha)
    assert written["fan_in_fan_out"] is gpt2 and written["use_rslora"] is lora.rslora
    for module in written["target_modules"]:
        assert any(f".{module}.lora_A" in name for name in tensors)


def test_fused_layer_is_block_diagonal_and_its_product_exact(tmp_path: Path) -> None:
    """Three different A for q, k and v become one adapter of rank 3 r with the same scale."""
    model = make(GPT2, LoraConfig(2, 3.0, rslora=True))
    save_adapter(tmp_path / "a", model, model.lora)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    key = "base_model.model.transformer.h.1.attn.c_attn"
    a, b = tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"]
    rank = config["rank_pattern"]["attn.c_attn"]
    assert a.shape == (rank, 8) == (6, 8)
    scale = config["alpha_pattern"]["attn.c_attn"] / np.sqrt(rank)
    expected = products(model, model.lora)
    np.testing.assert_allclose(
        scale * (b @ a).T,
        np.concatenate([expected[name][1] for name in "qkv"], axis=-1),
        rtol=1e-5,
        atol=1e-6,
    )


def test_shared_a_stays_one_adapter_of_rank_r(tmp_path: Path) -> None:
    """What peft wrote comes back from us tensor for tensor."""
    source = GOLDEN / "gpt2-lora" / "adapter"
    config = ModelConfig.from_hf(json.loads((GOLDEN / "gpt2-lora" / "config.json").read_text()))
    model = init_lm(config, seed=0, lora=adapter_lora_config(source))
    loaded = load_adapter(source, model)
    q, k = (loaded["layers"]["attention"][name]["lora_a"] for name in "qk")
    assert np.array_equal(q, k)
    save_adapter(tmp_path / "a", model, loaded)
    written, golden = (load_file(d / "adapter_model.safetensors") for d in (tmp_path / "a", source))
    assert written.keys() == golden.keys()
    assert all(np.array_equal(written[name], golden[name]) for name in golden)


@pytest.mark.parametrize("case", ["llama-lora", "gpt2-lora"])
def test_adapter_lora_config_reads_rank_alpha_and_layers(case: str) -> None:
    lora = adapter_lora_config(GOLDEN / case / "adapter")
    written = json.loads((GOLDEN / case / "adapter" / "adapter_config.json").read_text())
    assert (lora.rank, lora.alpha) == (written["r"], written["lora_alpha"])
    assert len(lora.targets) == (7 if case == "llama-lora" else 6)


def test_another_alpha_keeps_the_product(tmp_path: Path) -> None:
    """Also through alpha_pattern and use_rslora: scale A B is what counts."""
    model = make(LLAMA, LoraConfig(4, 8.0))
    save_adapter(tmp_path / "a", model, model.lora)
    edit(tmp_path / "a", lora_alpha=6, use_rslora=True, alpha_pattern={"layers.1.self_attn.q_proj": 5})
    other = init_lm(LLAMA, seed=0, lora=LoraConfig(4, 20.0))
    got, before = products(other, load_adapter(tmp_path / "a", other)), products(model, model.lora)
    np.testing.assert_allclose(got["up"], before["up"] / 2 * 6 / 2, rtol=1e-4)
    np.testing.assert_allclose(got["q"][0], before["q"][0] / 2 * 6 / 2, rtol=1e-4)
    np.testing.assert_allclose(got["q"][1], before["q"][1] / 2 * 5 / 2, rtol=1e-4)


def test_half_precision_adapters_are_read_as_float32(tmp_path: Path) -> None:
    model = make(LLAMA, LoraConfig(4, 8.0))
    save_adapter(tmp_path / "a", model, model.lora)
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({name: x.astype(ml_dtypes.bfloat16) for name, x in load_file(file).items()}, file)
    loaded = load_adapter(tmp_path / "a", model)
    assert {str(x.dtype) for x in jax.tree.leaves(loaded)} == {"float32"}
    expected = jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float32), model.lora)
    assert equal(jax.tree.map(np.asarray, loaded), expected)


def drop(tensors):
    del tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]


def misshape(tensors):
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    tensors[key] = tensors[key][:, :-1].copy()


def add_head(tensors):
    tensors["base_model.model.lm_head.lora_A.weight"] = np.zeros((4, 8), np.float32)


def poison(tensors):
    tensors["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"][0, 0] = np.nan


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (drop, r"layers\.1\.mlp\.up_proj\.lora_B\.weight' is missing"),
        (misshape, r"layers\.0\.self_attn\.q_proj\.lora_A\.weight' has shape \(4, 7\), expected \(4, 8\)"),
        (add_head, r"lm_head\.lora_A\.weight"),
        (poison, "mlp/up .*not finite"),
    ],
)
def test_bad_tensors_are_named(change, named: str, tmp_path: Path) -> None:
    model = make(LLAMA, LoraConfig(4, 8.0))
    save_adapter(tmp_path / "a", model, model.lora)
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = {name: x.copy() for name, x in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=named):
        load_adapter(tmp_path / "a", model)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("peft_type", "IA3"),
        ("bias", "lora_only"),
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("init_lora_weights", "pissa"),
        ("layer_replication", [[0, 2]]),
        ("trainable_token_indices", [1]),
        ("an_option_of_tomorrow", "on"),
        ("r", "four"),
    ],
)
def test_options_with_other_mathematics_are_named(option: str, value, tmp_path: Path) -> None:
    model = make(LLAMA, LoraConfig(4, 8.0))
    save_adapter(tmp_path / "a", model, model.lora)
    edit(tmp_path / "a", **{option: value})
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json: .*\b{option} = "):
        load_adapter(tmp_path / "a", model)


def test_models_and_adapters_that_do_not_fit(tmp_path: Path) -> None:
    model = make(LLAMA, LoraConfig(4, 8.0))
    save_adapter(tmp_path / "a", model, model.lora)
    with pytest.raises(CheckpointError, match=r"rank 4, the model's has rank 2.*--lora-rank 4"):
        load_adapter(tmp_path / "a", make(LLAMA, LoraConfig(2, 8.0)))
    with pytest.raises(CheckpointError, match="has no place in the model's adapter"):
        load_adapter(tmp_path / "a", make(LLAMA, LoraConfig(4, 8.0, ("q", "v"))))
    with pytest.raises(CheckpointError, match="without an adapter"):
        load_adapter(tmp_path / "a", make(LLAMA, None))
    with pytest.raises(CheckpointError, match="without an adapter"):
        save_adapter(tmp_path / "b", make(LLAMA, None), {})
    only_q = make(GPT2, LoraConfig(4, 8.0, ("q",)))
    all_three = make(GPT2, LoraConfig(4, 8.0, ("c_attn",)))
    save_adapter(tmp_path / "qkv", all_three, {})
    with pytest.raises(CheckpointError, match=r"c_attn: adapts attention/k"):
        load_adapter(tmp_path / "qkv", only_q)


def test_changed_base_weights_are_refused_unchanged_ones_are_not(tmp_path: Path) -> None:
    model = make(LLAMA, LoraConfig(4, 8.0))
    save_adapter(tmp_path / "a", model, model.params)
    save_adapter(tmp_path / "a", model, jax.tree.map(np.asarray, model.params))
    changed = {"norm": {"scale": model.params["norm"]["scale"] + 1}}
    with pytest.raises(CheckpointError, match=r"norm/scale was changed.*save_merged"):
        save_adapter(tmp_path / "b", model, changed)
    assert not (tmp_path / "b").exists()


def test_missing_and_pickled_files(tmp_path: Path) -> None:
    model = make(LLAMA, LoraConfig(4, 8.0))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        load_adapter(tmp_path, model)
    shutil.copy(GOLDEN / "llama-lora" / "adapter" / "adapter_config.json", tmp_path)
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: missing"):
        load_adapter(tmp_path, model)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="pickle"):
        load_adapter(tmp_path, model)
