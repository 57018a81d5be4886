"""Imported GGUF files against transformers' own GGUF loader, run by `make test-torch`; skipped without torch."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from ntkjax.models import ModelConfig, RopeConfig, init_lm, load_lm  # noqa: E402
from ntkjax.models.export import save_merged  # noqa: E402
from ntkjax.models.gguf import import_gguf  # noqa: E402

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


@pytest.fixture(scope="module")
def writing(load_file):
    return load_file(Path(__file__).with_name("gguf_writing.py"))


def with_whole_vocabulary(keys: dict, tensors: dict) -> tuple[dict, dict]:
    """The content of a file with a token for each row of the embedding: transformers counts the tokens for the rows."""
    tokens = keys["tokenizer.ggml.tokens"]
    rows = len(tensors["token_embd.weight"])
    more = ["<|endoftext|>", *(f"<{i}>" for i in range(len(tokens) + 1, rows))]  # the padding of some tokenizer classes
    types = keys["tokenizer.ggml.token_type"] + [1] * len(more)
    return {**keys, "tokenizer.ggml.tokens": tokens + more, "tokenizer.ggml.token_type": types}, tensors


def torch_logits(file: Path, ids: np.ndarray) -> np.ndarray:
    """With our config.json: transformers does not read every size (key_length, context_length)."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.float32,
        config=transformers.AutoConfig.from_pretrained(file.parent / "hf"),
    )
    with torch.no_grad():
        return model.eval()(torch.tensor(ids).long()).logits.numpy()


# Without llama-head-dim: transformers ignores key_length of this architecture.
@pytest.mark.parametrize("name", ["llama3", "smollm2", "qwen2", "qwen3", "gpt2"])
def test_logits_equal_those_of_transformers_loader(name: str, writing, tmp_path: Path) -> None:
    file = writing.write(tmp_path / "m.gguf", *with_whole_vocabulary(*writing.content(GOLDEN / name)))
    import_gguf(file, tmp_path / "hf")
    ids = np.random.default_rng(0).integers(0, 96, (2, 20)).astype(np.int32)
    ours, theirs = np.asarray(load_lm(tmp_path / "hf", lora=None).logits(ids)), torch_logits(file, ids)
    difference = np.abs(ours - theirs).max()
    print(f"{name}: largest difference {difference:.2g}, largest logit {np.abs(theirs).max():.2f}")
    assert difference < 1e-5


def test_gemma_3_s_logits_equal_those_of_transformers_loader(writing, tmp_path: Path) -> None:
    """Norms other than 0, beyond the window, with both bases of rotary positions."""
    kinds = ("sliding_attention",) * 5 + ("full_attention", "sliding_attention")
    config = ModelConfig(
        "gemma3", vocab_size=32, hidden_size=24, intermediate_size=16, num_layers=7, num_heads=4, num_kv_heads=2,
        head_dim=4, activation="gelu_pytorch_tanh", tied=True, qk_norm=True, window=5, layer_types=kinds,
        rope=RopeConfig(1e6), local_rope=RopeConfig(1e4), initializer_range=0.3, eos_token_ids=(0,),
    )  # fmt: skip
    model, random = init_lm(config, seed=0, lora=None), np.random.default_rng(0)
    norm = lambda x: np.asarray(0.3 * random.normal(size=x.shape), np.float32)
    drawn = lambda path, x: norm(x) if path[-1].key == "scale" else x
    save_merged(tmp_path / "source", model.with_params(jax.tree_util.tree_map_with_path(drawn, model.params)), {})
    file = writing.write(tmp_path / "m.gguf", *with_whole_vocabulary(*writing.content(tmp_path / "source")))
    import_gguf(file, tmp_path / "hf")
    ids = np.random.default_rng(0).integers(0, 32, (2, 20)).astype(np.int32)
    ours, theirs = np.asarray(load_lm(tmp_path / "hf", lora=None).logits(ids)), torch_logits(file, ids)
    print(f"gemma3: largest difference {np.abs(ours - theirs).max():.2g}, largest logit {np.abs(theirs).max():.2f}")
    assert np.abs(ours - theirs).max() < 1e-5 * max(1, np.abs(theirs).max()) and np.abs(theirs).max() > 0.5


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_logits_equal_those_of_transformers_loader(kind: str, writing, tmp_path: Path) -> None:
    shape = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "num_heads": 4}
    config = ModelConfig("llama", num_kv_heads=2, head_dim=16, eos_token_ids=(0,), **shape)
    save_merged(tmp_path / "source", init_lm(config, seed=0, lora=None), {})
    file = writing.write(tmp_path / "m.gguf", *with_whole_vocabulary(*writing.content(tmp_path / "source")), kind)
    import_gguf(file, tmp_path / "hf")
    ids = np.random.default_rng(0).integers(0, 64, (2, 20)).astype(np.int32)
    ours, theirs = np.asarray(load_lm(tmp_path / "hf", lora=None).logits(ids)), torch_logits(file, ids)
    assert np.abs(ours - theirs).max() < 1e-5 * max(1, np.abs(theirs).max())
