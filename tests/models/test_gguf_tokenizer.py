"""Tokenizers out of GGUF keys against the tokenizers that they were made from, and against SentencePiece's own rule."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

from ntkjax.errors import CheckpointError
from ntkjax.models.gguf_file import GgufFile
from ntkjax.models.gguf_tokenizer import PRE_TOKENISERS, tokenizer_files

TEXTS = [
    "Hello, world! It's 2024: I'll pay 1,234.50 (or 99½%) -- we've  two  spaces.",
    "def f(x):\n    return x ** 2  # 10\n\n\n\tif x >= 100:\r\n        pass   \n",
    "Größe naïve Ångström 你好，世界 12345 こんにちは Привет мир 🎉🎉 Ω≈ç√∫ 1２3",
    "A\u030angstro\u0308m cafe\u0301 HelloWorld camelCaseABC CAN'T don'T",
    "", " ", "  ", "\n", "a", " a", "a ", "<|user|>hi<|end|> there <tag>x</tag>",
]  # fmt: skip
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
split = lambda regex: {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
    ],
}
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
# As the tokenizer.json of GPT-2, SmolLM2, Llama 3 and Qwen2.5 have it.
PUBLISHED = {
    "gpt-2": (LEVEL, None, False),
    "smollm": (
        {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, LEVEL]},
        None,
        False,
    ),
    "llama-bpe": (split(WORDS + r"\p{N}{1,3}" + REST), None, True),
    "qwen2": (split(WORDS + r"\p{N}" + REST), {"type": "NFC"}, False),
}


def published(name: str) -> Tokenizer:
    """A byte-level tokenizer with the cutting of a published model, its merges learnt from the texts."""
    pre, normalizer, ignores = PUBLISHED[name]
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = ByteLevel(add_prefix_space=False)  # cuts otherwise, so that some merges cross the pieces
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|end|>", "<|user|>"],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    bare.train_from_iterator([text for text in TEXTS for _ in range(3)], trainer)
    content = json.loads(bare.to_str())
    content["pre_tokenizer"], content["normalizer"], content["model"]["ignore_merges"] = pre, normalizer, ignores
    made = Tokenizer.from_str(json.dumps(content))
    made.decoder = decoders.ByteLevel()
    return made


def keys_of(tokenizer: Tokenizer, name: str) -> dict:
    """What the converter writes for it."""
    content = json.loads(tokenizer.to_str())
    vocab = content["model"]["vocab"]
    tokens = sorted(vocab, key=vocab.get)
    special = {token["content"] for token in content["added_tokens"]}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in content["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
    }


def made(keys: dict, folder: Path):
    """The tokenizer that transformers reads."""
    files = tokenizer_files(GgufFile(Path("m.gguf"), keys, {}), context=77)
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(files.tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(files.settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", PUBLISHED)
def test_texts_have_the_tokens_of_the_published_tokenizer(name: str, tmp_path: Path) -> None:
    source = published(name)
    tokenizer = made(keys_of(source, name) | {"tokenizer.ggml.add_bos_token": False}, tmp_path)
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == source.encode(text).ids, text
        assert tokenizer.decode(source.encode(text).ids) == source.decode(
            source.encode(text).ids, skip_special_tokens=False
        )
    others = [published(other) for other in PUBLISHED if other != name]
    assert all(any(tokenizer(text)["input_ids"] != other.encode(text).ids for text in TEXTS) for other in others)


def sentencepiece(text: str, tokens: list[str], scores: list[float]) -> list[str]:
    """SentencePiece's BPE: of all neighbours that make a token join those of the highest score, the first of equals."""
    pieces, best = list("▁" + text.replace(" ", "▁")) if text else [], dict(zip(tokens, scores))
    while True:
        joined = [(best[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in best]
        if not joined:
            break
        at = -max(joined)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return [
        part for piece in pieces for part in ([piece] if piece in best else [f"<0x{b:02X}>" for b in piece.encode()])
    ]


def spm_keys() -> dict:
    """A vocabulary as SentencePiece has it: unknown and control tokens, bytes, then pieces with falling scores."""
    bare = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=260, show_progress=False)
    bare.train_from_iterator([text.replace(" ", "▁") for text in TEXTS[:2] for _ in range(3)], trainer)
    vocab = bare.get_vocab()
    pieces = sorted((piece for piece in vocab if len(piece) > 1), key=vocab.get) + sorted(
        p for p in vocab if len(p) == 1
    )
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(pieces))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def test_sentencepiece_joins_the_best_scores_and_spells_the_rest_in_bytes(tmp_path: Path) -> None:
    keys = spm_keys()
    tokenizer = made(keys, tmp_path)
    draw = random.Random(0)
    texts = TEXTS[:4] + ["".join(draw.choices("aeit onrs def 1", k=40)) for _ in range(50)]
    for text in texts:
        expected = sentencepiece(text, keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.scores"])
        assert tokenizer.tokenize(text) == expected, text
        assert tokenizer(text)["input_ids"][0] == 1  # the bos token, which these models have by default
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert any("<0x" in token for token in tokenizer.tokenize(TEXTS[2]))
    bare = made(keys | {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}, tmp_path)
    assert (
        bare.tokenize("d f")[0][0] == "d"
        and bare("d f")["input_ids"][0] != 1
        and bare.decode(bare("d f")["input_ids"]) == "d f"
    )


def test_special_tokens_roles_and_templates(tmp_path: Path) -> None:
    keys = keys_of(published("gpt-2"), "gpt-2")
    count = len(keys["tokenizer.ggml.tokens"])
    keys["tokenizer.ggml.tokens"] += ["<tag>", f"[PAD{count + 1}]", f"[PAD{count + 2}]"]
    keys["tokenizer.ggml.token_type"] += [4, 5, 5]
    keys |= {
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": True,
        "tokenizer.ggml.eot_token_id": 1,
    }
    keys["tokenizer.chat_template"] = "{{ messages[0]['content'] }}<|end|>"
    files = tokenizer_files(GgufFile(Path("m.gguf"), keys, {}), context=77)
    assert (files.bos, files.pad, files.ends) == (1, None, (0, 1))
    tokenizer = made(keys, tmp_path)
    assert len(tokenizer) == count + 1 and tokenizer.model_max_length == 77
    assert tokenizer("a")["input_ids"][0] == 1 and tokenizer("a")["input_ids"][-1] == 0
    ids = tokenizer("a<tag>b<|end|>", add_special_tokens=False)["input_ids"]
    assert ids[1] == count and ids[-1] == 0
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<tag>b"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|user|>", "<|end|>", None)
    chat = [{"role": "user", "content": "ab"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "ab<|end|>"
    keys |= {"tokenizer.chat_templates": ["short"], "tokenizer.chat_template.short": "-"}
    both = made(keys, tmp_path)
    assert both.apply_chat_template(chat, tokenize=False) == "ab<|end|>"
    assert both.apply_chat_template(chat, tokenize=False, chat_template="short") == "-"
    assert made(keys_of(published("llama-bpe"), "llama-bpe"), tmp_path)("a")["input_ids"][0] == 1  # not said: it has


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "bert"}, r"key 'tokenizer\.ggml\.model' is 'bert', which is not supported; expected one of gpt2,"),
        ({"model": None}, r"key 'tokenizer\.ggml\.model' is missing: expected a name"),
        ({"pre": "viking"}, r"key 'tokenizer\.ggml\.pre' is 'viking', a pre-tokeniser that is not known; .*smollm"),
        ({"pre": None}, r"key 'tokenizer\.ggml\.pre' is missing"),
        ({"tokens": None}, r"key 'tokenizer\.ggml\.tokens' is missing: expected a list of str"),
        ({"tokens": ["a", "b", "a"], "token_type": [1] * 3}, r"tokens' has 'a' twice, as 0 and 2"),
        ({"token_type": [1]}, r"token_type' has 1 entries for \d+ tokens"),
        ({"merges": ["abc"]}, r"merges' has at 0 \('abc',\): expected two tokens"),
        ({"merges": ["a zz"]}, r"merges' has at 0 'a' \+ 'zz', and 'zz' is no token"),
        ({"eos_token_id": 9999}, r"eos_token_id' is 9999: expected the id of one of"),
        ({"add_bos_token": 1}, r"add_bos_token' is 1: expected true or false"),
        ({"model": "llama", "scores": [0.5]}, r"scores' has 1 entries for"),
    ],
)  # fmt: skip
def test_a_key_that_cannot_be_used_is_named(change: dict, message: str) -> None:
    keys = keys_of(published("gpt-2"), "gpt-2") | {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    keys = {key: value for key, value in keys.items() if value is not None}
    with pytest.raises(CheckpointError, match=rf"m\.gguf: .*{message}"):
        tokenizer_files(GgufFile(Path("m.gguf"), keys, {}), context=77)


def test_the_published_cuttings_are_those_of_the_table() -> None:
    assert set(PUBLISHED) <= set(PRE_TOKENISERS)
