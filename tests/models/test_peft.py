"""PEFT adapter directories: round trips, GPT-2's fused layer, scales, refusals that name the cause."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ntkjax.errors import CheckpointError
from ntkjax.models import LanguageModel, LoraConfig, ModelConfig, init_lm, load_lm
from ntkjax.models.export import save_merged
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


LLAMA4 = dataclasses.replace(LLAMA, num_layers=4)
PATTERNS = {
    "layers_to_transform": {"layers_to_transform": [0, 2]},
    "layers_to_transform, a number": {"layers_to_transform": 3},
    "layers_pattern": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "target_modules, a regular expression": {"target_modules": r".*layers\.(0|3)\..*(q_proj|down_proj)"},
    "target_modules, whole names": {"target_modules": ["layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj"]},
    "exclude_modules": {"exclude_modules": r".*layers\.[12]\..*"},
    "rank_pattern": {"rank_pattern": {"down_proj": 2}},
    "rank_pattern, larger, rslora": {"rank_pattern": {"q_proj": 7}, "use_rslora": True},
    "ranks of layers": {"rank_pattern": {r"layers\.2\.self_attn\.q_proj": 5, "layers.1.mlp.down_proj": 1}},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 64, r"layers\.3\.mlp\.down_proj": 0.7}},
    "all": {"layers_to_transform": [0, 3], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 9},
            "use_rslora": True},
}  # fmt: skip


def by_peft_s_rules(options: dict, folder: Path) -> dict[str, np.ndarray]:
    """An adapter directory in float64 with these options; scale B A of every full module name, made without ntkjax.

    What PEFT does with the options is written out for each module here: fullmatch of expressions, ends of names.
    """
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **options}
    random, tensors, deltas = np.random.default_rng(2), {}, {}
    named = lambda keys, full: (
        re.fullmatch(keys, full) if isinstance(keys, str) else any(f".{full}".endswith(f".{key}") for key in keys)
    )
    first = lambda key, full, value: next(
        (v for k, v in config.get(key, {}).items() if re.match(rf"(.*\.)?({k})$", full)), value
    )
    layers = config.get("layers_to_transform", range(4))
    for i in range(4):
        for module, shape in (("self_attn.q_proj", (8, 8)), ("mlp.down_proj", (8, 12))):
            full = f"model.layers.{i}.{module}"
            inside = i in ([layers] if isinstance(layers, int) else layers)
            if (
                not named(config["target_modules"], full)
                or not inside
                or named(config.get("exclude_modules", []), full)
            ):
                continue
            rank = first("rank_pattern", full, 4)
            a, b = random.normal(size=(rank, shape[1])), random.normal(size=(shape[0], rank))
            key = f"base_model.model.{full}.lora"
            tensors |= {f"{key}_A.weight": a, f"{key}_B.weight": b}
            size = np.sqrt(rank) if config.get("use_rslora") else rank
            deltas[full] = first("alpha_pattern", full, 6) / size * b @ a
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return deltas


@pytest.mark.parametrize("name", PATTERNS)
def test_adapters_of_some_layers_ranks_and_scales_are_w_plus_scale_b_a(name: str, tmp_path: Path, x64) -> None:
    expected = by_peft_s_rules(PATTERNS[name], tmp_path / "a")
    assert 1 < len(expected) <= 8
    lora = adapter_lora_config(tmp_path / "a")
    model = init_lm(LLAMA4, seed=0, lora=lora, dtype="float64")
    found = products(model, load_adapter(tmp_path / "a", model))
    assert set(found) == {"q", "down"}
    for i in range(4):
        for short, module in (("q", "self_attn.q_proj"), ("down", "mlp.down_proj")):
            delta = expected.get(f"model.layers.{i}.{module}", np.zeros(1))
            np.testing.assert_allclose(found[short][i].T, delta + np.zeros_like(found[short][i].T), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["layers_to_transform", "rank_pattern", "alpha_pattern"])
def test_logits_are_those_of_the_merged_weights_and_writing_keeps_them(name: str, tmp_path: Path, x64) -> None:
    deltas = by_peft_s_rules(PATTERNS[name], tmp_path / "a")
    model = init_lm(LLAMA4, seed=0, lora=adapter_lora_config(tmp_path / "a"), dtype="float64")
    model = model.with_params(load_adapter(tmp_path / "a", model))
    plain = init_lm(LLAMA4, seed=0, dtype="float64")
    tree = jax.tree.map(np.array, plain.params)
    for full, delta in deltas.items():
        _, _, i, group, module = full.split(".")
        short = module.removesuffix("_proj")
        tree["layers"]["attention" if group == "self_attn" else "mlp"][short]["kernel"][int(i)] += delta.T
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    expected = np.asarray(plain.with_params(tree).logits(tokens))
    np.testing.assert_allclose(model.logits(tokens), expected, rtol=0, atol=1e-10)
    assert np.abs(expected - np.asarray(plain.logits(tokens))).max() > 1e-3
    save_adapter(tmp_path / "b", model, model.lora)
    again = init_lm(LLAMA4, seed=0, lora=adapter_lora_config(tmp_path / "b"), dtype="float64")
    again = again.with_params(load_adapter(tmp_path / "b", again))
    np.testing.assert_allclose(again.logits(tokens), expected, rtol=0, atol=1e-10)


def test_a_tensor_of_a_layer_that_the_config_names_is_still_missing(tmp_path: Path) -> None:
    by_peft_s_rules({"layers_to_transform": [0, 2]}, tmp_path)
    edit(tmp_path, layers_to_transform=[0, 1, 2])
    model = init_lm(LLAMA4, seed=0, lora=adapter_lora_config(tmp_path))
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.q_proj\.lora_A\.weight' is missing.*PEFT"):
        load_adapter(tmp_path, model)


def test_gpt2_s_fused_layer_with_a_rank_of_its_own(tmp_path: Path) -> None:
    """c_attn of rank 5 beside layers of rank 2: all of q, k and v get 5."""
    model = make(GPT2, LoraConfig(2, 3.0, ("c_attn", "c_fc")))
    save_adapter(tmp_path / "a", model, model.lora)
    assert adapter_lora_config(tmp_path / "a").rank == 2  # three blocks of rank 2, as we write them
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    random, expected = np.random.default_rng(3), []
    for i in range(2):
        key = f"base_model.model.transformer.h.{i}.attn.c_attn.lora"
        a, b = (random.normal(size=s).astype(np.float32) for s in ((5, 8), (24, 5)))
        tensors |= {f"{key}_A.weight": a, f"{key}_B.weight": b}
        expected.append(10 / 5 * (b @ a).T)
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    edit(tmp_path / "a", rank_pattern={"attn.c_attn": 5}, alpha_pattern={"attn.c_attn": 10})
    lora = adapter_lora_config(tmp_path / "a")
    assert (lora.rank, lora.scale) == (5, 1.5)
    other = init_lm(GPT2, seed=0, lora=lora)
    got = products(other, load_adapter(tmp_path / "a", other))
    np.testing.assert_allclose(np.concatenate([got[n] for n in "qkv"], -1), np.stack(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("layers_to_transform", ["x"]),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"(": 2}),
        ("alpha_pattern", {"q_proj": "much"}),
        ("target_modules", "(q_proj"),
        ("target_modules", 3),
        ("layers_pattern", [1]),
        ("layers_pattern", "(?P<layer>x)"),
        ("exclude_modules", "("),
        ("layers_to_transform", [float("inf")]),
        ("rank_pattern", {"q_proj": float("inf")}),
        ("alpha_pattern", {"q_proj": float("nan")}),
    ],
)
def test_patterns_that_cannot_be_read(option: str, value, tmp_path: Path) -> None:
    by_peft_s_rules({"layers_to_transform": [0]}, tmp_path)
    edit(tmp_path, **{option: value})
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json: .*{option}.*expected"):
        adapter_lora_config(tmp_path)


@pytest.mark.parametrize("option", ["use_dora", "modules_to_save", "bias", "trainable_token_indices", "peft_type"])
def test_what_is_not_supported_says_so_and_what_to_do(option: str, tmp_path: Path) -> None:
    by_peft_s_rules({}, tmp_path)
    edit(tmp_path, **{option: "all"})
    with pytest.raises(CheckpointError, match=rf"{option} = 'all' is not supported.*merge_and_unload.*--model"):
        adapter_lora_config(tmp_path)


def test_an_adapted_embedding_is_not_supported(tmp_path: Path) -> None:
    by_peft_s_rules({}, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    more = {"base_model.model.model.embed_tokens.lora_embedding_A": np.zeros((4, 20), np.float32)}
    save_file(load_file(file) | more, file)
    with pytest.raises(CheckpointError, match=r"embed_tokens.*not supported.*merge_and_unload"):
        adapter_lora_config(tmp_path)


def test_a_model_given_as_adapter(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: missing .*--model"):
        adapter_lora_config(tmp_path)


def test_the_base_model_is_named_so_that_the_adapter_finds_it(tmp_path: Path, monkeypatch) -> None:
    """The absolute path of a directory, however it was given; nothing for a model that was never on disk."""
    model = make(LLAMA, LoraConfig(4, 8.0))
    save_adapter(tmp_path / "a", model, {})
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    save_merged(tmp_path / "model", make(LLAMA, None), {})
    monkeypatch.chdir(tmp_path)
    loaded = load_lm("model", lora=LoraConfig(4, 8.0))
    save_adapter(tmp_path / "b", loaded, {})
    named = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == str(tmp_path / "model") and named["task_type"] == "CAUSAL_LM"


def test_a_hub_id_is_named_as_it_was_given(tmp_path: Path, monkeypatch) -> None:
    import huggingface_hub

    save_merged(tmp_path / "snapshot", make(LLAMA, None), {})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(tmp_path / "snapshot"))
    assert load_lm("owner/model-that-is-nowhere", lora=None).report.name == "owner/model-that-is-nowhere"


@pytest.mark.parametrize("name", PATTERNS)
def test_torch_agrees_on_patterns_and_auto_peft_loads_what_we_write(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    by_peft_s_rules(PATTERNS[name], tmp_path / "a")
    model = make(LLAMA4, None)
    save_merged(tmp_path / "model", model, {})
    edit(tmp_path / "a", base_model_name_or_path=str(tmp_path / "model"), task_type="CAUSAL_LM")
    ours = load_lm(tmp_path / "model", lora=adapter_lora_config(tmp_path / "a"))
    ours = ours.with_params(load_adapter(tmp_path / "a", ours))
    save_adapter(tmp_path / "b", ours, ours.lora)
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    expected = np.asarray(ours.logits(tokens))
    assert np.abs(expected - np.asarray(model.logits(tokens))).max() > 1e-3
    for folder in (tmp_path / "a", tmp_path / "b"):
        theirs = peft.AutoPeftModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            logits = theirs(torch.tensor(tokens).long()).logits.float().numpy()
        np.testing.assert_allclose(expected, logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("option", "value"),
    [("r", True), ("r", 2.0), ("r", 10**400), ("lora_alpha", float("nan")), ("lora_alpha", "4"), ("lora_alpha", True)],
)
def test_rank_and_alpha_that_are_no_numbers(option: str, value, tmp_path: Path) -> None:
    by_peft_s_rules({"layers_to_transform": [0]}, tmp_path)
    edit(tmp_path, **{option: value})
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: r = .*expected a positive integer and a number"):
        adapter_lora_config(tmp_path)
