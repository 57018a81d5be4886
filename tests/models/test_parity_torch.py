"""Live comparison with torch transformers and peft, run by `make test-torch`; skipped where they are not installed.

Other shapes and seeds than the golden files, bfloat16, and what we write read back by torch.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from ntkjax.data import TokenisedDataset  # noqa: E402
from ntkjax.errors import CheckpointError  # noqa: E402
from ntkjax.models import LanguageModel, LoraConfig, load_lm  # noqa: E402
from ntkjax.models.export import save_merged  # noqa: E402
from ntkjax.models.generate import generate  # noqa: E402
from ntkjax.models.peft import adapter_lora_config, load_adapter, save_adapter  # noqa: E402

SIZES = {"vocab_size": 61, "num_hidden_layers": 3, "intermediate_size": 44, "max_position_embeddings": 96}
HEADS = {"hidden_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e5,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}


def configs() -> dict:
    t, common = transformers, {**SIZES, **HEADS}
    gpt2 = {"vocab_size": 61, "n_layer": 3, "n_embd": 36, "n_head": 4, "n_positions": 96}
    return {
        "llama": t.LlamaConfig(**common, rope_parameters=LLAMA3_ROPE, attention_bias=True, hidden_act="gelu"),
        "mistral": t.MistralConfig(**common, head_dim=14, sliding_window=None, tie_word_embeddings=True),
        "qwen2": t.Qwen2Config(**common, rms_norm_eps=1e-3),
        "qwen3": t.Qwen3Config(**common, head_dim=16, attention_bias=True, tie_word_embeddings=True),
        "mixtral": t.MixtralConfig(**common, num_local_experts=8, hidden_act="gelu"),
        "qwen3-moe": t.Qwen3MoeConfig(
            **common,
            head_dim=16,
            num_experts=16,
            num_experts_per_tok=4,
            moe_intermediate_size=20,
            tie_word_embeddings=True,
        ),
        "gpt2": t.GPT2Config(**gpt2, tie_word_embeddings=False, activation_function="gelu_pytorch_tanh"),
    }


NAMES = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3-moe", "gpt2")


def checkpoint(name: str, folder: Path) -> Path:
    """A fresh random checkpoint of that configuration."""
    return made(configs()[name], folder / name)


def made(config, folder: Path, seed: int = 7) -> Path:
    """A fresh random checkpoint, norms and biases away from 1 and 0."""
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.data.copy_(p.data + 0.3 * noise if p.ndim == 1 else noise / p.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    return folder


def tokens(seed: int = 0, length: int = 60) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 61, (2, length)).astype(np.int32)


def torch_model(folder: Path, adapter: Path | None = None, dtype=torch.float32):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return (peft.PeftModel.from_pretrained(model, adapter) if adapter else model).eval()


def torch_logits(model, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(ids).long()).logits.float().numpy()


def largest_difference(name: str, ours, theirs: np.ndarray) -> float:
    difference = float(np.abs(np.asarray(ours, np.float32) - theirs).max())
    print(f"{name}: largest difference {difference:.2g}, largest logit {np.abs(theirs).max():.2f}")
    return difference


def adapted(folder: Path, lora: LoraConfig) -> LanguageModel:
    """The checkpoint with an adapter whose factors are both non-zero, every A its own."""
    model = load_lm(folder, lora=lora)
    random = np.random.default_rng(5)
    return model.with_params(
        jax.tree.map(lambda x: jax.numpy.asarray(0.15 * random.normal(size=x.shape), x.dtype), model.lora)
    )


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_greedy_tokens(name: str, tmp_path: Path) -> None:
    folder = checkpoint(name, tmp_path)
    model, theirs = load_lm(folder, lora=None), torch_model(folder)
    assert largest_difference(name, model.logits(tokens()), torch_logits(theirs, tokens())) < 1e-5
    prompt = tokens(1, 9)[0]
    out = theirs.generate(
        input_ids=torch.tensor(prompt[None]).long(),
        attention_mask=torch.ones(1, 9),
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=0,
    )
    assert generate(model, {}, [prompt.tolist()], max_new_tokens=8) == [out[0, 9:].tolist()]


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_bfloat16_is_as_close_as_torch_s_own_rounding(name: str, tmp_path: Path) -> None:
    """Both err from the float32 logits by bfloat16's rounding; ours by at most twice torch's."""
    folder = checkpoint(name, tmp_path)
    exact = torch_logits(torch_model(folder), tokens())
    theirs = torch_logits(torch_model(folder, dtype=torch.bfloat16), tokens())
    ours = np.asarray(load_lm(folder, lora=None, dtype="bfloat16").logits(tokens()), np.float32)
    error, torch_error = np.abs(ours - exact), np.abs(theirs - exact)
    print(f"{name} bfloat16: mean error {error.mean():.3g}, torch's {torch_error.mean():.3g}")
    assert error.mean() < 2 * torch_error.mean()
    assert error.max() < 0.1 * np.abs(exact).max()


ADAPTERS = {
    "all-linear": LoraConfig(4, 6.0),
    "some layers, rslora": LoraConfig(3, 5.0, ("attention/q", "attention/v", "mlp/down"), rslora=True),
}


@pytest.mark.parametrize("lora", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral", "qwen3-moe", "gpt2"])
def test_peft_reads_our_adapter_and_transformers_our_merge(name: str, lora: LoraConfig, tmp_path: Path) -> None:
    """GPT-2's three different A for q, k and v go through PEFT's one fused layer."""
    folder = checkpoint(name, tmp_path)
    model = adapted(folder, lora)
    ours = np.asarray(model.logits(tokens()))
    save_adapter(tmp_path / "adapter", model, model.lora)
    theirs = torch_logits(torch_model(folder, tmp_path / "adapter"), tokens())
    assert largest_difference(f"{name} adapter", ours, theirs) < 1e-5
    save_merged(tmp_path / "merged", model, {}, max_shard_size=30_000)
    merged = torch_logits(torch_model(tmp_path / "merged"), tokens())
    assert largest_difference(f"{name} merged", ours, merged) < 1e-5
    assert np.abs(torch_logits(torch_model(folder), tokens()) - theirs).max() > 0.1


def draw_adapter(model, size: float) -> None:
    """Both factors of every adapter, normal of this standard deviation."""
    torch.manual_seed(3)
    for key, p in model.named_parameters():
        if "lora_" in key:
            p.data.copy_(size * torch.randn(p.shape))


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_we_read_adapters_that_peft_wrote(name: str, tmp_path: Path) -> None:
    folder = checkpoint(name, tmp_path)
    options = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True} if name == "gpt2" else {}
    options = options or {"target_modules": ["q_proj", "o_proj", "up_proj"], "use_rslora": True}
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=5, lora_alpha=7, **options)
    theirs = peft.get_peft_model(torch_model(folder), config)
    draw_adapter(theirs, 0.15)
    theirs.save_pretrained(tmp_path / "adapter")
    model = load_lm(folder, lora=adapter_lora_config(tmp_path / "adapter"))
    model = model.with_params(load_adapter(tmp_path / "adapter", model))
    difference = largest_difference(name, model.logits(tokens()), torch_logits(theirs.eval(), tokens()))
    assert difference < 1e-5


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_what_peft_writes_of_a_model_with_experts_is_read_or_refused_by_name(name: str, tmp_path: Path) -> None:
    """Adapters on attention are read. Under transformers 5 PEFT adapts fused experts: gate and up share one A."""
    folder = checkpoint(name, tmp_path)
    for targets in (["q_proj", "o_proj"], "all-linear"):
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=7, target_modules=targets)
        theirs = peft.get_peft_model(torch_model(folder), config)
        draw_adapter(theirs, 0.08)
        theirs.save_pretrained(tmp_path / "adapter")
        if targets == "all-linear":
            with pytest.raises(CheckpointError, match=r"target_parameters = .*gate_up_proj.*fused experts"):
                adapter_lora_config(tmp_path / "adapter")
            theirs.merge_and_unload().save_pretrained(tmp_path / "merged")  # what the error says to do
            model, right = load_lm(tmp_path / "merged", lora=None), torch_model(tmp_path / "merged")
        else:
            model, right = load_lm(folder, lora=adapter_lora_config(tmp_path / "adapter")), theirs.eval()
            model = model.with_params(load_adapter(tmp_path / "adapter", model))
        assert largest_difference(name, model.logits(tokens()), torch_logits(right, tokens())) < 1e-5


def test_experts_that_transformers_saved_together_are_read_after_what_the_error_says(tmp_path: Path) -> None:
    folder = checkpoint("mixtral", tmp_path)
    torch_model(folder).save_pretrained(tmp_path / "fused", save_original_format=False)
    with pytest.raises(CheckpointError, match=r"from_config\(old.config\); new.load_state_dict\(old.state_dict"):
        load_lm(tmp_path / "fused")
    old = torch_model(tmp_path / "fused")
    new = transformers.AutoModelForCausalLM.from_config(old.config)
    new.load_state_dict(old.state_dict())
    new.save_pretrained(tmp_path / "apart")
    again, first = load_lm(tmp_path / "apart", lora=None), load_lm(folder, lora=None)
    jax.tree.map(np.testing.assert_array_equal, again.params, first.params)


LONG = {"short_factor": [1.0, 1.1, 1.5, 2.0], "long_factor": [1.0, 2.5, 4.0, 9.0]}


def stretched(kind: str):
    """A checkpoint's configuration whose rotary frequencies change at 24 tokens."""
    if kind == "phi3":
        parameters = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.8, **LONG}
        own = {"original_max_position_embeddings": 24, "sliding_window": None, "pad_token_id": None}
        return transformers.Phi3Config(**SIZES, **HEADS, **own, rope_parameters=parameters)
    parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    return transformers.LlamaConfig(**{**SIZES, "max_position_embeddings": 24}, **HEADS, rope_parameters=parameters)


@pytest.mark.parametrize("kind", ["phi3", "llama-dynamic"])
def test_frequencies_by_length_are_torch_s_of_each_example_alone(kind: str, tmp_path: Path) -> None:
    """On both sides of the switch and at it: alone, padded on the right, packed in rows, and continued with a cache.

    torch takes the longest row of a batch, so it is asked one by one; for dynamic frequencies without a cache, whose
    keys would keep the turns of shorter sequences.
    """
    folder = made(stretched(kind), tmp_path / kind)
    model, theirs = load_lm(folder, lora=None), torch_model(folder)
    texts = [tokens(n, n)[0] for n in (7, 23, 24, 25, 40)]
    expected = [torch_logits(torch_model(folder), text[None])[0] for text in texts]
    for text, right in zip(texts, expected):
        assert largest_difference(f"{kind} {len(text)}", model.logits(text[None])[0], right) < 1e-5
    fixed = torch_logits(torch_model(folder), texts[-1][None, :24])[0]
    assert np.abs(fixed - expected[-1][:24]).max() > 0.1  # the same tokens, turned by another length
    data = TokenisedDataset.from_sequences([text.tolist() for text in texts], [1] * len(texts))
    nll = [-(np.take_along_axis(np.asarray(jax.nn.log_softmax(right[:-1])), text[1:, None], 1)).mean()
           for text, right in zip(texts, expected)]  # fmt: skip
    for packing in (False, True):
        for batch in data.packed(packing).batches(token_budget=256, max_buckets=1):
            got, index = np.asarray(model.nll_fn({}, batch)), np.asarray(batch.index)
            np.testing.assert_allclose(got[index >= 0], np.asarray(nll)[index[index >= 0]], atol=1e-5)
    prompts = [text[:n].tolist() for text in texts for n in [min(len(text), 30)]]
    got = generate(model, {}, prompts, max_new_tokens=6)
    for prompt, ours in zip(prompts, got):
        out = theirs.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
            use_cache=kind == "phi3",
        )
        assert ours == out[0, len(prompt) :].tolist()


_spec = importlib.util.spec_from_file_location("family_checks", Path(__file__).with_name("family_checks.py"))
assert _spec is not None and _spec.loader is not None
checks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(checks)


@pytest.mark.parametrize("name", [names[-1] for names in checks.cases_by_family().values()])
def test_every_family_s_files_are_read_by_peft_and_transformers(name: str, tmp_path: Path) -> None:
    """And in a batch that is padded on the right our logits are torch's, beyond windows too."""
    differences = checks.torch_differences(name, tmp_path)
    print(name, differences)
    assert max(differences.values()) < 2e-5
