"""A tiny model over a tiny byte-level tokenizer, and records written to disk and read back as a user's would be."""

from __future__ import annotations

import json
from dataclasses import dataclass
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ntkjax.data import read_records
from ntkjax.data.prompts import stop_tokens
from ntkjax.models import ModelConfig, init_lm

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if m['role']=='assistant' %}<|end|>{% "
    "endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(*, chat: bool = False, bos: bool = False) -> PreTrainedTokenizerFast:
    """Bytes plus a few specials; "th" and "he" are merged, so tokens and characters differ."""
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|bos|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*special, *alphabet, "th", "he", "Ġthe"])}
    vocab |= {"Ġth": len(vocab), "in": len(vocab) + 1}
    merges = [("t", "h"), ("h", "e"), ("i", "n"), ("Ġ", "th"), ("Ġth", "e")]
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        bos_token="<|bos|>" if bos else None,
        additional_special_tokens=["<|user|>", "<|assistant|>"],
    )
    if chat:
        tokenizer.chat_template = CHAT
    return tokenizer


def make_model(tokenizer, family: str = "llama", *, dtype: str = "float32", max_positions: int = 512):
    config = ModelConfig(
        family=family,
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2 if family == "gpt2" else 1,
        head_dim=8,
        max_positions=max_positions,
        tied=family == "gpt2",
        qk_norm=family == "qwen3",
        qkv_bias=family in ("gpt2", "qwen2"),
        o_bias=family == "gpt2",
        mlp_bias=family == "gpt2",
        activation="gelu_new" if family == "gpt2" else "silu",
        initializer_range=0.4,
    )
    return init_lm(config, seed=3, lora=None, dtype=dtype, tokenizer=tokenizer)


@dataclass(frozen=True)
class Stub:
    """Functions in place of a model: a unigram or a constant, for scores that can be worked out by hand."""

    tokenizer: object
    states_fn: object
    head_fn: object

    @property
    def stop_tokens(self) -> frozenset[int]:
        return stop_tokens(self.tokenizer)


def unigram_stub(tokenizer, scores) -> Stub:
    """A model whose logits are ``scores`` [V] everywhere."""
    states = lambda params, batch: jnp.ones((*batch.tokens.shape, 1), scores.dtype)
    head = lambda weights, params: weights[:, None]
    return Stub(tokenizer, jax.tree_util.Partial(states), jax.tree_util.Partial(head, scores))


@pytest.fixture(scope="session")
def toys():
    """The helpers above, for test files to use."""
    return SimpleNamespace(
        make_tokenizer=make_tokenizer,
        make_model=make_model,
        unigram_stub=unigram_stub,
        choice_rows=choice_rows,
    )


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def model(tokenizer):
    return make_model(tokenizer)


def records_in(folder, rows: list[dict], **options):
    """Rows (dicts) to records, through a file."""
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_records([str(path)], cache_dir=folder / "cache", **options)


@pytest.fixture
def write_records(tmp_path):
    """`records_in` a folder of the test's own."""
    return lambda rows, **options: records_in(tmp_path, rows, **options)


@pytest.fixture(scope="session")
def nine(tmp_path_factory):
    """Nine records with choices, the same in many tests so that they compile once."""
    return records_in(tmp_path_factory.mktemp("nine"), choice_rows(9))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("NTKJAX_CACHE", str(tmp_path_factory.mktemp("cache")))


def choice_rows(n: int) -> list[dict]:
    """Records with choices of several lengths and prompts of several lengths."""
    sets = [["no", "yes"], ["negative", "neutral", "positive"], ["a", "the thing", "in there, then"]]
    rows = []
    for i in range(n):
        choices = sets[i % 3]
        answer = choices[i % len(choices)]
        prompt = "what is " + "the thing " * (i % 5) + f"number {i}?"
        response = f"So the answer is {answer}."
        rows.append(
            {
                "id": f"x{i}",
                "source": f"s{i % 2}",
                "prompt": prompt,
                "response": response,
                "answer": answer,
                "choices": choices,
            }
        )
    return rows
