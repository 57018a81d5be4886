"""The tokenizer inside a GGUF file as the files that transformers reads: tokenizer.json and tokenizer_config.json.

A GGUF file holds a vocabulary, the kind of each token, merges or scores, the ids of special tokens, a chat template,
and the *name* of the way in which text is cut before merging (``tokenizer.ggml.pre``). What such a name stands for is
in the table `PRE_TOKENISERS`: as the tokenizer.json of the models that it was given for has it, normalisation included.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from ntkjax.models.gguf_file import GgufFile

PREFIX = "tokenizer.ggml"
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # the kinds of tokens that matter here (gguf.TokenType)
_ROLES = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
"""Keys of tokens that end an answer: of a text, of a turn, of a message."""


@dataclasses.dataclass(frozen=True)
class PreTokeniser:
    """How byte-level text is cut before merging.

    Attributes:
      split: a regular expression whose matches are the pieces; None for GPT-2's, which is ByteLevel's own.
      digits: every digit is a piece, before anything else. nfc: text is brought into Unicode's form NFC first.
      ignore_merges: a piece that is a token is that token, whether or not merges lead there.
      adds_bos: whether texts begin with the bos token where the file does not say.
    """

    split: str | None = None
    digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False


_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_WORDS}|\p{{N}}{{1,3}}{_REST}"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

PRE_TOKENISERS: dict[str, PreTokeniser] = {
    "gpt-2": PreTokeniser(),
    "smollm": PreTokeniser(digits=True),
    "llama-bpe": PreTokeniser(_LLAMA3, ignore_merges=True, adds_bos=True),
    "qwen2": PreTokeniser(rf"{_WORDS}|\p{{N}}{_REST}", nfc=True),
    "dbrx": PreTokeniser(_LLAMA3),
    "tekken": PreTokeniser(_TEKKEN, ignore_merges=True, adds_bos=True),
}
"""Values of ``tokenizer.ggml.pre`` that are known."""


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """Contents of tokenizer.json and tokenizer_config.json, and the ids of special tokens.

    Attributes:
      bos, pad: None where the file names none. ends: tokens that end an answer; the first is the eos token.
    """

    tokenizer: dict[str, Any]
    settings: dict[str, Any]
    bos: int | None
    pad: int | None
    ends: tuple[int, ...]


def tokenizer_files(file: GgufFile, *, context: int) -> TokenizerFiles:
    """The tokenizer of ``file``. ``context``: the longest text, in tokens, that tokenizer_config.json names.

    Byte-level BPE (``tokenizer.ggml.model`` gpt2) and SentencePiece's BPE (llama), whose merges follow from the scores.

    Raises CheckpointError naming the file and the key: missing, of another form, a kind of tokenizer or a pre-tokeniser
    that is not known.
    """
    vocabulary = _Vocabulary(file)
    kinds = {"gpt2": _byte_level, "llama": _sentencepiece}
    kind = vocabulary.text("model")
    if kind not in kinds:
        raise file.fail(
            f"key '{PREFIX}.model' is {kind!r}, which is not supported; expected one of {', '.join(kinds)}: take the "
            "model in Hugging Face format"
        )
    tokenizer, adds_bos = kinds[kind](vocabulary)
    roles = {role: vocabulary.token(key) for role, key in _ROLES.items()}
    _add_special(tokenizer, vocabulary, {token for token in roles.values() if token is not None})
    begins, ends = vocabulary.flag("add_bos_token", adds_bos), vocabulary.flag("add_eos_token", False)
    _add_ends(tokenizer, vocabulary, roles["bos"] if begins else None, roles["eos"] if ends else None)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "add_bos_token": begins and roles["bos"] is not None,
        "add_eos_token": ends and roles["eos"] is not None,
        **{f"{role}_token": vocabulary.tokens[token] for role, token in roles.items() if token is not None},
    }
    if (template := _chat_template(file)) is not None:
        settings["chat_template"] = template
    answers = tuple(dict.fromkeys(token for key in _ENDS if (token := vocabulary.token(key)) is not None))
    return TokenizerFiles(json.loads(tokenizer.to_str()), settings, roles["bos"], roles["pad"], answers)


class _Vocabulary:
    """Typed access to the keys about the tokenizer; every error starts with the file's name.

    Attributes:
      tokens: text of each id. kinds: the kind of each. ids: text -> id, without the rows that fill up an embedding.
    """

    def __init__(self, file: GgufFile):
        self.file = file
        self.tokens: list[str] = self.list("tokens", str)
        self.kinds: list[int] = self.list("token_type", int, [1] * len(self.tokens))
        if len(self.kinds) != len(self.tokens):
            raise self.fail("token_type", f"has {len(self.kinds)} entries for {len(self.tokens)} tokens")
        self.ids: dict[str, int] = {}
        for token, (text, kind) in enumerate(zip(self.tokens, self.kinds)):
            if kind == _UNUSED and text == f"[PAD{token}]":  # no token of the model: its embedding is longer
                continue
            if text in self.ids:
                raise self.fail("tokens", f"has {text!r} twice, as {self.ids[text]} and {token}")
            self.ids[text] = token

    def fail(self, key: str, what: str) -> Exception:
        return self.file.fail(f"key '{PREFIX}.{key}' {what}; convert the model again")

    def list(self, key: str, kind: type, default: Any = None) -> list[Any]:
        value = self.file.fields.get(f"{PREFIX}.{key}", default)
        if value is None:
            raise self.fail(key, f"is missing: expected a list of {kind.__name__}")
        if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
            raise self.fail(key, f"is no list of {kind.__name__}")
        return value

    def text(self, key: str) -> str:
        value = self.file.fields.get(f"{PREFIX}.{key}")
        if not isinstance(value, str):
            raise self.fail(key, "is missing: expected a name" if value is None else f"is {value!r}: expected a name")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.file.fields.get(f"{PREFIX}.{key}", default)
        if not isinstance(value, bool):
            raise self.fail(key, f"is {value!r}: expected true or false")
        return value

    def token(self, key: str) -> int | None:
        value = self.file.fields.get(f"{PREFIX}.{key}")
        if value is None:
            return None
        if not isinstance(value, int) or not 0 <= value < len(self.tokens):
            raise self.fail(key, f"is {value!r}: expected the id of one of {len(self.tokens)} tokens")
        return value

    def bpe(self, merges: list[tuple[str, str]], **options: Any) -> Tokenizer:
        """A tokenizer of these merges; they must be made of tokens."""
        for i, (left, right) in enumerate(merges):
            for part in (left, right, left + right):
                if part not in self.ids:
                    raise self.fail("merges", f"has at {i} {left!r} + {right!r}, and {part!r} is no token")
        return Tokenizer(models.BPE(vocab=self.ids, merges=merges, **options))


def _byte_level(vocabulary: _Vocabulary) -> tuple[Tokenizer, bool]:
    """Byte-level BPE, and whether its texts begin with the bos token where the file does not say."""
    name = vocabulary.text("pre")
    if name not in PRE_TOKENISERS:
        raise vocabulary.file.fail(
            f"key '{PREFIX}.pre' is {name!r}, a pre-tokeniser that is not known; expected one of "
            f"{', '.join(PRE_TOKENISERS)}: take the model in Hugging Face format, whose tokenizer.json says how it "
            "cuts text"
        )
    pre = PRE_TOKENISERS[name]
    merges = [tuple(merge.split(" ")) for merge in vocabulary.list("merges", str)]
    if wrong := [i for i, merge in enumerate(merges) if len(merge) != 2]:
        raise vocabulary.fail(
            "merges", f"has at {wrong[0]} {merges[wrong[0]]!r}: expected two tokens with a space between"
        )
    tokenizer = vocabulary.bpe(merges, ignore_merges=pre.ignore_merges)  # pyright: ignore[reportArgumentType]
    prefix = vocabulary.flag("add_space_prefix", False)
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if pre.digits else []
    if pre.split is not None:
        steps.append(pre_tokenizers.Split(Regex(pre.split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=pre.split is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre.adds_bos


def _sentencepiece(vocabulary: _Vocabulary) -> tuple[Tokenizer, bool]:
    """SentencePiece's BPE with bytes for what no token covers; texts begin with the bos token by default."""
    if vocabulary.flag("remove_extra_whitespaces", False):
        raise vocabulary.fail("remove_extra_whitespaces", "is true, which is not supported")
    unknown = vocabulary.token("unknown_token_id")
    options = {} if unknown is None else {"unk_token": vocabulary.tokens[unknown], "fuse_unk": True}
    tokenizer = vocabulary.bpe(_merges_by_score(vocabulary), byte_fallback=True, **options)
    prefix = vocabulary.flag("add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer, True


def _merges_by_score(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Every way to put a token together from two, the highest score first: SentencePiece takes the best pair each time.

    Tokens with equal scores, and the ways to one token, stay in the order of ids.
    """
    scores = vocabulary.list("scores", float)
    if len(scores) != len(vocabulary.tokens):
        raise vocabulary.fail("scores", f"has {len(scores)} entries for {len(vocabulary.tokens)} tokens")
    ids = vocabulary.ids
    merges: list[tuple[float, str, str]] = []
    for text, token in ids.items():
        halves = [(text[:k], text[k:]) for k in range(1, len(text)) if text[:k] in ids and text[k:] in ids]
        merges += [(-scores[token], *pair) for pair in sorted(halves, key=lambda pair: (ids[pair[0]], ids[pair[1]]))]
    first: Callable[[tuple[float, str, str]], float] = lambda merge: merge[0]
    return [(left, right) for _, left, right in sorted(merges, key=first)]


def _add_special(tokenizer: Tokenizer, vocabulary: _Vocabulary, roles: set[int]) -> None:
    """Control tokens, and those of a role, are special; tokens that a user defined are found whole in any text."""
    for token, (text, kind) in enumerate(zip(vocabulary.tokens, vocabulary.kinds)):
        if kind == _CONTROL or token in roles:
            tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(text, normalized=False, special=False)])


def _add_ends(tokenizer: Tokenizer, vocabulary: _Vocabulary, bos: int | None, eos: int | None) -> None:
    """Texts get these tokens in front and behind."""
    if bos is None and eos is None:
        return
    named = {vocabulary.tokens[token]: token for token in (bos, eos) if token is not None}
    front = [] if bos is None else [vocabulary.tokens[bos]]
    behind = [] if eos is None else [vocabulary.tokens[eos]]
    part = lambda name, number: [f"{text}:{number}" for text in front] + [f"{name}:{number}"] + [
        f"{text}:{number}" for text in behind
    ]  # fmt: skip
    tokenizer.post_processor = processors.TemplateProcessing(
        single=part("$A", 0), pair=part("$A", 0) + part("$B", 1), special_tokens=list(named.items())
    )


def _chat_template(file: GgufFile) -> str | list[dict[str, str]] | None:
    """The template, or several with their names as tokenizer_config.json holds them; None where there is none."""
    default, names = file.fields.get("tokenizer.chat_template"), file.fields.get("tokenizer.chat_templates", [])
    templates = {} if default is None else {"default": default}
    templates |= {name: file.fields.get(f"tokenizer.chat_template.{name}") for name in names}
    if wrong := [name for name, text in templates.items() if not isinstance(text, str)]:
        raise file.fail(f"the chat template {wrong[0]!r} is no text; convert the model again")
    if not templates or set(templates) == {"default"}:
        return default
    return [{"name": name, "template": text} for name, text in templates.items()]
