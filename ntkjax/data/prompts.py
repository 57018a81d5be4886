"""Text of an example to tokens, with the positions S(x) that are to be learned.

With a chat template the tokens are those of the template's rendering of the whole conversation, tokenised once and cut
after the token that ends the last assistant turn. Without one the text is ``prompt + "\\n" + response`` and the end
token. S(x) is every assistant turn, from the end of its header (where the template's generation prompt ends) to the
token that ends the turn; a message with ``weight: 0`` or ``train: false`` is left out.
"""

from __future__ import annotations

import dataclasses
import re
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, Literal, get_args

from ntkjax.data.messages import calls_a_tool
from ntkjax.data.records import Example
from ntkjax.data.schema import Message
from ntkjax.data.turns import (
    Chat,
    apply_template,
    calls_lost,
    calls_of,
    has_template,
    header_end,
    locate,
    shared_prefix,
    squeeze,
    template_options,
    turn_ends,
    with_objects,
)
from ntkjax.errors import ConfigError, DataError

LossTurns = Literal["all", "last"]


@dataclasses.dataclass(frozen=True)
class Rendered:
    """Tokens of one example.

    Attributes:
      tokens: prompt and response, up to the token that ends the last assistant turn.
      response_start: first token of the last assistant turn.
      trained: S(x) as half-open spans of tokens, ascending, one for each assistant turn that is trained. Empty
        where no turn is (weights of 0).
      turn_ends: position behind each assistant turn before the last: where the conversation may be cut.
      crossing: tokens that lie across the border of a span, half in it. They count as inside at its start and as
        outside at its end.
      apart, turns_lost, messages_lost, calls_lost: see `RenderedText`.
    """

    tokens: list[int]
    response_start: int
    trained: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    turn_ends: list[int] = dataclasses.field(default_factory=list)
    crossing: int = 0
    apart: bool = False
    turns_lost: int = 0
    messages_lost: int = 0
    calls_lost: int = 0


@dataclasses.dataclass(frozen=True)
class RenderedText:
    """The text of an example before tokenisation; positions count characters.

    Attributes:
      text: the whole; special tokens in it (those of the template) are recognised.
      response_start: where the last assistant turn begins.
      trained: S(x), half-open, ascending; the last span ends with the text.
      turn_ends: end of each assistant turn before the last.
      add_end: whether the end token must still be appended.
      apart: the template does not render the conversation whole (it strips the reasoning of the response, say, or
        leaves out the system message once there is a response), so the response was put behind the prompt as text.
      turns_lost: earlier assistant turns that the template does not render as they are written; they are not trained.
      messages_lost: messages of others (system, user, tool) whose text the template leaves out.
      calls_lost: tool calls of assistant messages, of the last and of earlier ones, that are not in the text.
    """

    text: str
    response_start: int
    trained: tuple[tuple[int, int], ...]
    turn_ends: tuple[int, ...] = ()
    add_end: bool = True
    apart: bool = False
    turns_lost: int = 0
    messages_lost: int = 0
    calls_lost: int = 0


def render(tokenizer: Any, example: Example, response: str | None = None, loss_turns: LossTurns = "all") -> Rendered:
    """Tokens of the conversation that ends with ``response`` (the example's own by default).

    Args:
      loss_turns: ``all``: S(x) is every assistant turn; ``last``: the last alone.

    Raises:
      DataError: the chat template refuses the messages.
      ConfigError: the tokenizer has no token that ends a turn; an unknown ``loss_turns``.
    """
    return encode(tokenizer, [render_text(tokenizer, example, response, loss_turns)])[0]


def render_prompt(tokenizer: Any, example: Example) -> list[int]:
    """Tokens of what stands before the response, ready for generation: where training and likelihoods start too."""
    return render_beginning(tokenizer, example, "")


def render_beginning(tokenizer: Any, example: Example, beginning: str) -> list[int]:
    """Tokens of the prompt and of a response that is not finished, as one text, to be continued."""
    rendered = render_text(tokenizer, example)
    text = rendered.text[: rendered.response_start] + beginning
    return [*_prefix(tokenizer), *_tokens(tokenizer, [text])[0]]


def render_text(
    tokenizer: Any, example: Example, response: str | None = None, loss_turns: LossTurns = "all"
) -> RenderedText:
    """The text that ``render`` tokenises. Arguments and errors as there."""
    if loss_turns not in get_args(LossTurns):
        raise ConfigError(f"loss_turns is {loss_turns!r}; expected one of {', '.join(get_args(LossTurns))}")
    messages = [with_objects(message) for message in example.conversation(response)]
    earlier = [k for k, message in enumerate(messages[:-1]) if message["role"] == "assistant"]
    if not has_template(tokenizer):
        rendered, spans = _plain(example, messages)
        lost = sum(map(calls_of, messages))
        if calls_of(messages[-1]) and not messages[-1]["content"].strip():
            raise _unwritten_calls(example, "without a chat template no text holds")
    else:
        chat = Chat(tokenizer, example, messages, apply_template(tokenizer, example, messages))
        rendered, spans = _last_turn(chat), {}
        lost = calls_of(messages[-1]) if rendered.apart else calls_lost(chat, len(messages) - 1)
        if rendered.apart:  # the text begins with the prompt, in which the earlier turns stand too
            prompt = chat.apply(messages[:-1], add_generation_prompt=True)
            chat = dataclasses.replace(chat, full=prompt, complete=False)
        for k in earlier:
            turn = locate(chat, k)
            if turn is not None and turn.end <= rendered.response_start:
                spans[k] = (turn.start, turn.end)
        lost += sum(calls_lost(chat, k) for k in earlier)
    wanted = [k for k in earlier if loss_turns == "all" and _counts(messages[k])]
    chosen = [spans[k] for k in wanted if k in spans]
    if _marks_generation(tokenizer):
        rendered, chosen = _as_marked(chat, rendered, chosen)
    last = [rendered.trained[0]] if rendered.trained and _counts(messages[-1]) else []
    return dataclasses.replace(
        rendered,
        trained=(*chosen, *last),
        turn_ends=tuple(end for _, end in spans.values()),
        turns_lost=sum(k not in spans for k in wanted),
        calls_lost=lost,
    )


def encode(tokenizer: Any, texts: Sequence[RenderedText]) -> list[Rendered]:
    """Tokenise many texts at once (in parallel, where the tokenizer can), each as a whole."""
    prefix = _prefix(tokenizer)
    end = end_token(tokenizer) if any(text.add_end for text in texts) else -1
    added = set(getattr(tokenizer, "added_tokens_decoder", {}))
    tokens, offsets = _tokens_and_offsets(tokenizer, texts)
    return [_rendered(text, prefix, ids, pairs, end, added) for text, ids, pairs in zip(texts, tokens, offsets)]


def end_token(tokenizer: Any) -> int:
    """Id of the token that ends a response: the one that the chat template writes, else eos.

    Raises:
      ConfigError: there is none.
    """
    written = turn_ends(tokenizer).last
    if written is not None:
        return int(tokenizer.convert_tokens_to_ids(written))
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"{tokenizer.name_or_path or 'the tokenizer'}: no eos_token; expected one, so that the model can "
            "learn where a response ends; add eos_token to its tokenizer_config.json"
        )
    return int(tokenizer.eos_token_id)


def stop_tokens(tokenizer: Any, others: Sequence[int] = ()) -> frozenset[int]:
    """Every token at which generation stops: those that end a turn in training, eos, and ``others`` (those of
    generation_config.json and config.json)."""
    return frozenset({*(tokenizer.convert_tokens_to_ids(end) for end in turn_ends(tokenizer).known), *map(int, others)})


def writes_the_date(tokenizer: Any) -> bool:
    """True if the chat template writes today's date and takes no other: its tokens change every day."""
    template = str(getattr(tokenizer, "chat_template", None))
    return "strftime_now" in template and "date_string" not in template


def template_reads(tokenizer: Any, field: str) -> bool:
    """True if the chat template names ``field`` (of a message, or ``tools``)."""
    return re.search(rf"\b{re.escape(field)}\b", str(getattr(tokenizer, "chat_template", None) or "")) is not None


def pad_token(tokenizer: Any) -> int:
    """Id of the token in padded positions, which nothing reads: pad, else the end token."""
    return int(tokenizer.pad_token_id) if tokenizer.pad_token_id is not None else end_token(tokenizer)


def _last_turn(chat: Chat) -> RenderedText:
    """The rendering up to the end of the last turn, which is the only one in ``trained`` yet."""
    said = [squeeze(m["content"]) for m in chat.messages[:-1] if m["role"] != "assistant" and m["content"]]
    if chat.example.messages is None:  # one message of a user is what every template renders
        said = []
    lost = lambda text: sum(part not in text for part in said) if said else 0
    turn = locate(chat, len(chat.messages) - 1)
    if turn is not None:
        text = chat.full[: turn.end]
        missing = lost(squeeze(text))
        whole = RenderedText(text, turn.start, ((turn.start, turn.end),), add_end=not turn.ended, messages_lost=missing)
        if not missing:
            return whole
    prompt = chat.apply(chat.messages[:-1], add_generation_prompt=True)
    still = lost(squeeze(prompt))
    if turn is not None and still >= whole.messages_lost:
        return whole
    if calls_a_tool(chat.messages[-1]):
        raise _unwritten_calls(chat.example, "the chat template does not render")
    return _put_behind(chat, prompt, still)


def _unwritten_calls(example: Example, what: str) -> DataError:
    whole = "both the text and the tool calls" if example.response.strip() else "the tool calls"
    remedy = "remove one of the two, or the record" if example.response.strip() else "write the calls as text"
    return DataError(
        f"record {example.id!r}: {what} {whole} of the last message; expected a template that does; {remedy}, or skip "
        "such records"
    )


def _put_behind(chat: Chat, prompt: str, lost: int) -> RenderedText:
    """The response as plain text behind the prompt.

    The prompt ends where that of a plain response ends, so that all responses to it begin at one place. A generation
    prompt that goes on from there opens the reasoning: what it writes is put in front of a response that closes a
    reasoning which it does not open.
    """
    response, end = chat.messages[-1]["content"], turn_ends(chat.tokenizer).last
    plain = {"role": "assistant", "content": chat.mark}
    before, mark, _ = chat.apply([*chat.messages[:-1], plain]).partition(chat.mark)
    header = header_end(chat, len(chat.messages) - 1, before) if mark else len(prompt)
    start = header if prompt.startswith(before[:header]) else len(prompt)
    opened = prompt[start:]
    tag = opened.strip()
    if tag and not response.lstrip().startswith(tag) and tag.replace("<", "</", 1) in response:
        response = opened + response
    text = prompt[:start] + response + (end or "")
    span = (start, len(text))
    return RenderedText(text, start, (span,), add_end=end is None, apart=True, messages_lost=lost)


def _counts(message: Message) -> bool:
    return message.get("weight", 1) != 0 and message.get("train", True) is not False


# {% generation %}: the template's own marks


def _marks_generation(tokenizer: Any) -> bool:
    return re.search(r"\{%-?\s*generation\b", str(getattr(tokenizer, "chat_template", None) or "")) is not None


def _as_marked(
    chat: Chat, rendered: RenderedText, earlier: list[tuple[int, int]]
) -> tuple[RenderedText, list[tuple[int, int]]]:
    """S(x) as the template marks it: a turn begins no earlier than its mark, and one without a mark is not trained.

    Headers inside a mark and what follows the end token stay out; an end token behind a mark stays in.
    """
    if rendered.apart or not getattr(chat.tokenizer, "is_fast", False):
        return rendered, earlier
    try:
        encoded = chat.tokenizer.apply_chat_template(
            chat.messages,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
            **template_options(chat.example),
        )
    except OverflowError as error:  # transformers looks for the last character of a mark in front of the first one
        raise DataError(
            f"record {chat.example.id!r}: the chat template begins with an assistant's turn of no text, marked by "
            "{% generation %}; expected text before or inside the mark; give the turn text, or leave it out"
        ) from error
    marks = [span for span, inside in zip(encoded["offset_mapping"], encoded["assistant_masks"]) if inside]

    def narrowed(span: tuple[int, int]) -> list[tuple[int, int]]:
        starts = [start for start, stop in marks if span[0] < stop and start < span[1]]
        return [(max(span[0], min(starts)), span[1])] if starts else []

    last = tuple(piece for span in rendered.trained for piece in narrowed(span))
    return dataclasses.replace(rendered, trained=last), [piece for span in earlier for piece in narrowed(span)]


# Without a chat template


def _plain(example: Example, messages: list[Message]) -> tuple[RenderedText, dict[int, tuple[int, int]]]:
    """``prompt``, line break, response; a chat as ``role: text`` lines. And where its earlier assistant turns stand."""
    prompt, spans = example.before + example.prompt, {}
    if example.messages is not None:
        prompt = example.before
        for k, message in enumerate(messages[:-1]):
            prompt += ("\n" if k else "") + f"{message['role']}: "
            if message["role"] == "assistant":
                spans[k] = (len(prompt), len(prompt) + len(message["content"]))
            prompt += message["content"]
    prompt += "\n"
    text = prompt + messages[-1]["content"]
    return RenderedText(text, len(prompt), ((len(prompt), len(text)),)), spans


def _prefix(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that the tokenizer itself puts in front of a text (bos), where no template does."""
    if has_template(tokenizer):
        return ()
    with_special = tokenizer("a", add_special_tokens=True)["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    for start in range(len(with_special) - len(plain) + 1):
        if with_special[start : start + len(plain)] == plain:
            return tuple(with_special[:start])
    return ()


def _tokens(tokenizer: Any, texts: list[str], **options: Any) -> Any:
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
        **options,
    )
    return (encoded["input_ids"], encoded["offset_mapping"]) if options else encoded["input_ids"]


def _tokens_and_offsets(
    tokenizer: Any, texts: Sequence[RenderedText]
) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
    """Tokens of each text, and the characters [start, stop) of each token."""
    whole = [text.text for text in texts]
    if getattr(tokenizer, "is_fast", False):
        return _tokens(tokenizer, whole, return_offsets_mapping=True)
    # A tokenizer that tells no offsets: a token ends where the tokens of the text up to there end.
    tokens = _tokens(tokenizer, whole)
    return tokens, [_offsets_by_prefixes(tokenizer, text, ids) for text, ids in zip(texts, tokens)]


def _offsets_by_prefixes(tokenizer: Any, text: RenderedText, ids: list[int]) -> list[tuple[int, int]]:
    borders = sorted({edge for span in text.trained for edge in span} | {text.response_start, *text.turn_ends})
    ends, done = [len(text.text)] * len(ids), 0
    for border in borders:
        shared = shared_prefix(_tokens(tokenizer, [text.text[:border]])[0], ids)
        ends[done:shared] = [border] * max(0, shared - done)
        done = max(done, shared)
    return list(zip([0, *ends], ends))


def _rendered(
    text: RenderedText,
    prefix: tuple[int, ...],
    ids: list[int],
    offsets: list[tuple[int, int]],
    end: int,
    added: set[int],
) -> Rendered:
    """Spans of characters to spans of tokens. A token lies between the end of the one before it and its own end."""
    stops = [stop for _, stop in offsets]

    def first(character: int) -> tuple[int, int]:
        """The first token that ends behind ``character``, and 1 where it begins before it."""
        at = bisect_right(stops, character)
        if at < len(ids) and ids[at] in added and offsets[at][0] < character:
            return at + 1 + len(prefix), 0  # an added token that takes the blanks behind it
        return at + len(prefix), int(at < len(stops) and (stops[at - 1] if at else 0) < character)

    tokens = [*prefix, *ids, *([end] if text.add_end else [])]
    start, _ = first(text.response_start)
    spans, crossing = [], 0
    for a, b in text.trained:
        (begin, early), (stop, late) = first(a), (len(tokens), 0) if b == len(text.text) else first(b)
        spans.append((begin, stop))
        crossing += early + late
    return Rendered(
        tokens=tokens,
        response_start=start,
        trained=spans,
        turn_ends=[first(position)[0] for position in text.turn_ends],
        crossing=crossing,
        apart=text.apart,
        turns_lost=text.turns_lost,
        messages_lost=text.messages_lost,
        calls_lost=text.calls_lost,
    )
