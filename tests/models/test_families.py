"""A family is one file and one line: no other module names one, and one from outside loads, trains, saves, exports."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ntkjax
from ntkjax.errors import CheckpointError, ConfigError
from ntkjax.models import LoraConfig, ModelConfig, generate, init_lm, load_lm
from ntkjax.models.export import save_merged
from ntkjax.models.families import FAMILIES
from ntkjax.models.families.base import Family
from ntkjax.models.names import sources
from ntkjax.models.peft import adapter_lora_config, load_adapter, save_adapter

_spec = importlib.util.spec_from_file_location("toy_family", Path(__file__).with_name("toy_family.py"))
assert _spec is not None and _spec.loader is not None
toy_family = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy_family)
TOY: Family = toy_family.TOY

PACKAGE = Path(ntkjax.__file__).parent
GOLDEN = Path(__file__).resolve().parents[1] / "golden"
TOKENS = np.random.default_rng(0).integers(0, 90, (2, 10)).astype(np.int32)
NAMES = {
    "model.embed_tokens.": "body.words.",
    "model.norm.": "body.last_norm.",
    "lm_head.": "words_out.",
    "model.layers.": "body.block.",
    "input_layernorm": "norm_a",
    "post_attention_layernorm": "norm_b",
    "self_attn.o_proj": "mixer.out",
    "mlp.down_proj": "ff.back",
}


def asks_for_a_family(text: str, names: list[str]) -> list[str]:
    """Comparisons of a family, and strings that are a family's, an architecture's or a tensor's name."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Compare) and re.search(r"\bfamily$", ast.unparse(node.left)):
            found.append(ast.unparse(node))
        if isinstance(node, ast.Constant) and node.value in names:
            found.append(repr(node.value))
    return found


def test_no_module_but_its_own_names_a_family() -> None:
    names = [*FAMILIES, *(name for family in FAMILIES.values() for name in family.architectures)]
    names += ["q_proj", "c_attn", "self_attn.q_proj", "transformer.", "transformer.h", "model.layers", "lm_head.weight"]
    # The recipe of the demo's model makes a Qwen3; kinds of tokenizers in GGUF files are called gpt2 and llama.
    # gemma3 is also what a package of real weights is called.
    own = {"assets/make_tiny_lm.py", "models/gguf_tokenizer.py", "assets/make_real_model.py", "models/real.py"}
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        where = path.relative_to(PACKAGE).as_posix()
        if not where.startswith("models/families/") and where not in own:
            found[where] = asks_for_a_family(path.read_text(), names)
    assert {where: lines for where, lines in found.items() if lines} == {}
    assert not re.search(r"attention/|mlp/", (PACKAGE / "parallel.py").read_text())
    for bad in ("x = config.family == kind", "{'LlamaForCausalLM': 1}", "c.family in kinds", "a = 'c_attn'"):
        assert len(asks_for_a_family(bad, names)) == 1


def test_a_family_declares_all_that_is_asked_of_it() -> None:
    """Every parameter of a model of each family has a tensor, and the family reads what it writes."""
    shape = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_layers": 2, "num_heads": 2}
    for name, family in FAMILIES.items():
        assert family.name == name
        routed = {"num_experts": 4, "experts_per_token": 2} if "layers/mlp/router" in family.tensors else {}
        config = ModelConfig(family=name, num_kv_heads=2, head_dim=4, **shape, **family.fixed, **routed)
        assert config.architecture == next(iter(family.architectures))
        places = sources(init_lm(config, seed=0, lora=None).spec)
        assert len({(source.name, source.share) for source in places.values()}) == len(places)
        for architecture in family.architectures:
            read = ModelConfig.from_hf(dataclasses.replace(config, architecture=architecture).to_hf())
            assert (read.family, read.architecture) == (name, architecture)
            untyped = {k: v for k, v in read.to_hf().items() if k != "architectures"}
            assert ModelConfig.from_hf(untyped) == read  # by model_type alone


@pytest.fixture
def toy(monkeypatch, tmp_path) -> Path:
    """A directory with the weights of golden/llama3 as the toy family stores them; the family is one entry."""
    monkeypatch.setitem(FAMILIES, "toy", TOY)
    return write_toy(tmp_path / "toy")


def write_toy(folder: Path) -> Path:
    folder.mkdir()
    weights = dict(load_file(GOLDEN / "llama3" / "model.safetensors"))
    config = json.loads((GOLDEN / "llama3" / "config.json").read_text())
    for i in range(config["num_hidden_layers"]):
        take = lambda name, i=i: weights.pop(f"model.layers.{i}.{name}_proj.weight")
        qkv, gate_up = [take(f"self_attn.{n}") for n in "qkv"], [take(f"mlp.{n}") for n in ("gate", "up")]
        weights[f"body.block.{i}.mixer.qkv.weight"] = np.concatenate(qkv)
        weights[f"body.block.{i}.ff.gate_up.weight"] = np.concatenate(gate_up)
    renamed = {}
    for name, value in weights.items():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        renamed[name] = value - 1 if "norm" in name else value
    save_file(renamed, folder / "model.safetensors")
    config |= {"architectures": ["ToyForCausalLM"], "model_type": "toy"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_family_from_outside_gives_the_logits_of_the_same_llama(toy) -> None:
    ours, llama = load_lm(toy, lora=None), load_lm(GOLDEN / "llama3", lora=None)
    assert ours.config.family == "toy" and ours.config.block.norm_offset == 1
    np.testing.assert_allclose(ours.logits(TOKENS), llama.logits(TOKENS), atol=2e-6)
    prompts = [[3, 4, 5], [6, 7, 8, 9]]
    assert generate(ours, {}, prompts, max_new_tokens=5) == generate(llama, {}, prompts, max_new_tokens=5)
    fresh = init_lm(ours.config, seed=0, lora=None)
    assert np.all(fresh.params["norm"]["scale"] == 0) and np.all(fresh.params["layers"]["norm_1"]["scale"] == 0)
    again = init_lm(llama.config, seed=0, lora=None)  # 1 + 0 is what a new Llama has
    np.testing.assert_array_equal(fresh.logits(TOKENS), again.logits(TOKENS))


def test_it_is_saved_and_exported_under_its_names(toy, tmp_path) -> None:
    model = load_lm(toy, lora=None)
    save_merged(tmp_path / "m", model, {})
    source, written = (load_file(folder / "model.safetensors") for folder in (toy, tmp_path / "m"))
    assert written.keys() == source.keys() and all(np.array_equal(written[k], source[k]) for k in source)
    assert load_lm(tmp_path / "m", lora=None).config == model.config
    (toy / "config.json").write_text(json.dumps(json.loads((toy / "config.json").read_text()) | {"toy_dropout": True}))
    with pytest.raises(CheckpointError, match=r"config\.json: toy_dropout = True is not supported"):
        load_lm(toy)


def test_its_adapter_is_a_peft_adapter_of_its_modules(toy, tmp_path) -> None:
    with pytest.raises(ConfigError, match="q_proj_of_nobody"):
        load_lm(toy, lora=LoraConfig(rank=2, targets=("q_proj_of_nobody",)))
    model = load_lm(toy, lora=LoraConfig(rank=2, targets=("qkv", "ff.gate_up", "back")))
    assert set(model.lora["layers"]["attention"]) == {"q", "k", "v"}
    assert set(model.lora["layers"]["mlp"]) == {"gate", "up", "down"}
    random = np.random.default_rng(0)
    lora = jax.tree.map(lambda x: 0.3 * random.normal(size=x.shape).astype(x.dtype), model.lora)
    save_adapter(tmp_path / "adapter", model, lora)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name.split(".", 5)[-1] for name in tensors} == {
        f"{module}.lora_{part}.weight" for module in ("mixer.qkv", "ff.gate_up", "ff.back") for part in "AB"
    }
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["back", "gate_up", "qkv"] and config["fan_in_fan_out"] is False
    again = load_lm(toy, lora=adapter_lora_config(tmp_path / "adapter"))
    read = again.with_params(load_adapter(tmp_path / "adapter", again))
    np.testing.assert_allclose(read.logits(TOKENS), model.with_params(lora).logits(TOKENS), atol=2e-5)
    save_merged(tmp_path / "merged", model, lora)
    merged, base = (load_file(d / "model.safetensors") for d in (tmp_path / "merged", toy))
    stem, at = "base_model.model.body.block.0.mixer.qkv", "body.block.0.mixer.qkv.weight"
    pattern = config["alpha_pattern"]["mixer.qkv"] / config["rank_pattern"]["mixer.qkv"]
    delta = pattern * (tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"])
    np.testing.assert_allclose(merged[at], base[at] + delta, atol=1e-5)


def test_heads_that_alternate_in_a_fused_tensor_come_apart_in_order(monkeypatch, tmp_path) -> None:
    """GPT-NeoX keeps q, k and v of a head together: [heads, 3, head_dim, hidden]."""
    by_head = dataclasses.replace(TOY, fused_by_head=True)
    monkeypatch.setitem(FAMILIES, "toy", by_head)
    config = ModelConfig(
        family="toy", vocab_size=11, hidden_size=8, intermediate_size=12, num_layers=2, num_heads=4, num_kv_heads=4,
        head_dim=2, initializer_range=0.3,
    )  # fmt: skip
    model = init_lm(config, seed=0, lora=LoraConfig(rank=2, targets=("qkv",)))
    lora = jax.tree.map(lambda x: np.random.default_rng(0).normal(size=x.shape).astype(x.dtype), model.lora)
    save_merged(tmp_path / "m", model, {})
    qkv = load_file(tmp_path / "m" / "model.safetensors")["body.block.1.mixer.qkv.weight"].reshape(4, 3, 2, 8)
    for j, name in enumerate("qkv"):
        kernel = np.asarray(model.params["layers"]["attention"][name]["kernel"][1])
        np.testing.assert_array_equal(qkv[:, j].reshape(8, 8), kernel.T)
    again = load_lm(tmp_path / "m", lora=LoraConfig(rank=2, targets=("qkv",)))
    for name in "qkv":
        kernels = (m.params["layers"]["attention"][name]["kernel"] for m in (model, again))
        np.testing.assert_array_equal(*kernels)
    save_adapter(tmp_path / "a", model, lora)
    save_merged(tmp_path / "merged", model, lora)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    stem = "base_model.model.body.block.1.mixer.qkv.lora"
    delta = 16.0 * (tensors[f"{stem}_B.weight"] @ tensors[f"{stem}_A.weight"])  # alpha / r = 32 / 2
    merged = load_file(tmp_path / "merged" / "model.safetensors")["body.block.1.mixer.qkv.weight"]
    np.testing.assert_allclose(merged.reshape(4, 3, 2, 8), qkv + delta.reshape(4, 3, 2, 8), atol=1e-4)
    read = load_adapter(tmp_path / "a", again)
    jax.tree.map(np.testing.assert_array_equal, read, lora)
