"""Text of an example to tokens, so that the response starts at a clean token boundary, the same for any
response.

With a chat template: ``template(prompt + generation prompt)``, then what the template adds for the
  response. Without
one: ``prompt + "\\n"``, then the response. Both parts are tokenised on their own and joined, and the
response always ends with the token that ends a turn, so that a model learns to stop.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ntkjax.data.records import Example
from ntkjax.errors import ConfigError, DataError

TEMPLATE_DATE = "26 Jul 2024"  # the default of the Llama 3 templates


@dataclasses.dataclass(frozen=True)
class Rendered:
    """Tokens of one example; ``tokens[response_start:]`` is the response with its end token."""

    tokens: list[int]
    response_start: int


@dataclasses.dataclass(frozen=True)
class RenderedText:
    """The two texts of an example before tokenisation.

    Attributes:
      prompt, response: text; special tokens in it (those of the template) are recognised.
      add_end: whether the end token must still be appended to the response.
      apart: the template renders the prompt differently once a response follows, so the response is put
        behind the generation prompt as plain text.
    """

    prompt: str
    response: str
    add_end: bool = True
    apart: bool = False


def render(tokenizer: Any, example: Example, response: str | None = None) -> Rendered:
    """Tokens of the prompt and of ``response`` (the example's own by default).

    The tokens before ``response_start`` are the same for every response, and equal to ``render_prompt``.

    Raises:
      DataError: the chat template refuses the messages.
      ConfigError: the tokenizer has no end token.
    """
    return encode(tokenizer, [render_text(tokenizer, example, response)])[0]


def render_prompt(tokenizer: Any, example: Example) -> list[int]:
    """Tokens of the prompt alone, ready for generation."""
    text = _prompt_text(tokenizer, example)
    return [*_prefix(tokenizer), *_tokens(tokenizer, [text])[0]]


def render_text(tokenizer: Any, example: Example, response: str | None = None) -> RenderedText:
    """The texts that ``render`` tokenises. Errors as ``render``."""
    response = example.response if response is None else response
    if not _has_template(tokenizer):
        return RenderedText(_prompt_text(tokenizer, example), response)
    prompt = _prompt_text(tokenizer, example)
    full = _apply_template(tokenizer, example, [*_messages(example), {"role": "assistant", "content": response}])
    if not full.startswith(prompt):
        return RenderedText(prompt, response, apart=True)
    tail = full[len(prompt) :]
    # Some templates write a line break after the end token; what follows it is not for the model to learn.
    ended = tail.rstrip()
    end = tokenizer.eos_token
    # The list of all special tokens is slow to get, and mostly not needed.
    if (end and ended.endswith(end)) or ended.endswith(_special_texts(tokenizer)):
        return RenderedText(prompt, ended, add_end=False)
    return RenderedText(prompt, tail)


def encode(tokenizer: Any, texts: Sequence[RenderedText]) -> list[Rendered]:
    """Tokenise many texts at once (in parallel, where the tokenizer can)."""
    end, prefix, count = end_token(tokenizer), _prefix(tokenizer), len(texts)
    tokens = _tokens(tokenizer, [text.prompt for text in texts] + [text.response for text in texts])
    rendered = []
    for text, prompt, response in zip(texts, tokens[:count], tokens[count:]):
        tail = [end] if text.add_end else []
        rendered.append(Rendered([*prefix, *prompt, *response, *tail], len(prefix) + len(prompt)))
    return rendered


def end_token(tokenizer: Any) -> int:
    """Id of the token that ends a response.

    Raises:
      ConfigError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"{tokenizer.name_or_path or 'the tokenizer'}: no eos_token; expected one, so that the model can "
            "learn where a response ends; add eos_token to its tokenizer_config.json"
        )
    return int(tokenizer.eos_token_id)


def writes_the_date(tokenizer: Any) -> bool:
    """True if the chat template writes today's date and takes no other: its tokens change every day."""
    template = str(getattr(tokenizer, "chat_template", None))
    return "strftime_now" in template and "date_string" not in template


def pad_token(tokenizer: Any) -> int:
    """Id of the token in padded positions, which nothing reads: pad, else the end token."""
    return int(tokenizer.pad_token_id) if tokenizer.pad_token_id is not None else end_token(tokenizer)


def _has_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def _messages(example: Example) -> list[dict[str, str]]:
    if example.messages is None:
        return [{"role": "user", "content": example.prompt}]
    return list(example.messages)


def _prompt_text(tokenizer: Any, example: Example) -> str:
    if not _has_template(tokenizer):
        return example.prompt + "\n"
    return _apply_template(tokenizer, example, _messages(example), add_generation_prompt=True)


def _apply_template(tokenizer: Any, example: Example, messages: list[dict[str, str]], **options: Any) -> str:
    try:
        # Llama 3 templates write today's date unless given one; the same data must give the same tokens.
        return tokenizer.apply_chat_template(messages, tokenize=False, date_string=TEMPLATE_DATE, **options)
    except Exception as error:  # templates raise what they like
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"record {example.id!r}: the chat template of the tokenizer refuses it ({error}; roles: {roles}"
            "); expected messages the template knows; change the roles, or remove the template for plain "
            "prompts"
        ) from error


def _prefix(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that the tokenizer itself puts in front of a text (bos), where no template does."""
    if _has_template(tokenizer):
        return ()
    with_special = tokenizer("a", add_special_tokens=True)["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    for start in range(len(with_special) - len(plain) + 1):
        if with_special[start : start + len(plain)] == plain:
            return tuple(with_special[:start])
    return ()


def _special_texts(tokenizer: Any) -> tuple[str, ...]:
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return (*tokenizer.all_special_tokens, *(token.content for token in added if token.special))


def _tokens(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return encoded["input_ids"]
