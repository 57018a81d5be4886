"""Where the assistant's turns stand in the chat template's rendering of a conversation.

A template is a program, so nothing is assumed of its text. A turn's place is found by rendering the conversation again
with a mark in the place of the turn's own text: what surrounds the mark is the template's.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from ntkjax.data.messages import calls_a_tool
from ntkjax.data.records import Example
from ntkjax.data.schema import Message
from ntkjax.errors import DataError

TEMPLATE_DATE = "26 Jul 2024"  # the default of the Llama 3 templates
MARK = "\ue000mark\ue001"
"""Stands for a message's text: private-use characters, which no template tests for. See `Chat.mark`."""
OPENING_TAG = re.compile(r"<[^<>|/\s][^<>|\s]*>\s*\Z")
"""An opening tag at the end of a generation prompt, such as ``<think>``."""
_UNFINISHED_TAG = re.compile(r"[<\[][^<>\[\]\s]*\Z")


@dataclasses.dataclass(frozen=True)
class Chat:
    """A conversation and its rendering. ``complete`` is false where ``full`` stops before the last turn."""

    tokenizer: Any
    example: Example
    messages: list[Message]
    full: str
    complete: bool = True

    @property
    def mark(self) -> str:
        """`MARK`, or another text of the kind where the conversation holds that one."""
        return next(m for m in (MARK, *(f"\ue000{n}\ue001" for n in range(len(self.full)))) if m not in self.full)

    def apply(self, messages: list[Message], **options: Any) -> str:
        """The rendering of other messages under the same template."""
        return apply_template(self.tokenizer, self.example, messages, **options)

    def rendered(self, message: Message, k: int) -> str:
        """``full`` with ``message`` in the place of message ``k``."""
        messages = [*self.messages[:k], message, *self.messages[k + 1 :]]
        return self.apply(messages) if self.complete else self.apply(messages[:-1], add_generation_prompt=True)


@dataclasses.dataclass(frozen=True)
class Turn:
    """An assistant turn in a rendering: its text begins at ``start`` (behind the header) and its end token, where
    ``ended``, stops at ``end``."""

    start: int
    end: int
    ended: bool


def locate(chat: Chat, k: int) -> Turn | None:
    """Where message ``k``, an assistant's, stands in ``chat.full``; None where it is not rendered as written.

    The conversation is rendered again with a mark in the place of the message's text: what surrounds the mark is the
    template's. A template may move blanks, and take the reasoning out of turns before the last.
    """
    message, full, last = chat.messages[k], chat.full, k == len(chat.messages) - 1
    if calls_a_tool(message) and not message["content"].strip():
        return _calls(chat, k)
    before, mark, after = chat.rendered({**message, "content": chat.mark}, k).partition(chat.mark)
    if not mark or mark in after:
        return None
    header = header_end(chat, k, before)
    if not full.startswith(before[:header]) or not full.endswith(after):
        return None
    stop = len(full) - len(after)
    body, written = squeeze(full[header:stop]), squeeze(message["content"])
    tag = OPENING_TAG.search(before[:header])  # the generation prompt opens the reasoning
    opened = squeeze(tag[0]) + body if tag is not None else body
    whole = written in (body, opened) or body == squeeze(before[header:]) + written
    # In turns that are answered already, reasoning in front of the answer may go.
    if stop < header or not (whole or (not last and body and written.endswith(body))):
        return None
    if calls_a_tool(message):
        length, ended = _end_of_calls(chat, k, after)
        return Turn(header, stop + length, ended)
    end = _end_of_turn(chat.tokenizer, before, after)
    return Turn(header, stop + (end or 0), end is not None)


def _calls(chat: Chat, k: int) -> Turn | None:
    """Where message ``k``, calls of tools without text, stands in ``chat.full``; None where the template writes none.

    As `locate`, with the mark in the arguments of the last call.
    """
    full = chat.full
    marked, marks = _with_marked_calls(chat.messages[k], chat.mark)
    before, mark, after = chat.rendered(marked, k).partition(marks[-1])
    if not mark or mark in after:
        return None
    header = header_end(chat, k, before)
    length, ended = _end_of_calls(chat, k, after)
    stop = len(full) - len(after) + length
    if not full.startswith(before[:header]) or not full.endswith(after[length:]) or stop <= header:
        return None
    return Turn(header, stop, ended)


def calls_lost(chat: Chat, k: int) -> int:
    """How many tool calls of message ``k`` the template leaves out: their arguments are not in the rendering."""
    if not calls_a_tool(chat.messages[k]):
        return 0
    marked, marks = _with_marked_calls(chat.messages[k], chat.mark)
    text = chat.rendered(marked, k)
    return sum(mark not in text for mark in marks)


def calls_of(message: Message) -> int:
    """The number of tool calls of a message."""
    return len(message.get("tool_calls") or ()) or int(calls_a_tool(message))


def _with_marked_calls(message: Message, mark: str) -> tuple[Message, list[str]]:
    """The message with a mark of its own, made of ``mark``, in the arguments of each of its tool calls; the marks."""
    marks = [f"{mark}{n}." for n in range(calls_of(message))]
    if not message.get("tool_calls"):
        return {**message, "function_call": _with_arguments(message["function_call"], marks[0])}, marks
    calls = []
    for call, own in zip(message["tool_calls"], marks):
        inner = call.get("function")
        calls.append({**call, "function": _with_arguments(inner, own)} if inner else _with_arguments(call, own))
    return {**message, "tool_calls": calls}, marks


def _with_arguments(call: Any, mark: str) -> Any:
    if not isinstance(call, dict):
        return mark
    return {**call, "arguments": mark if isinstance(call.get("arguments"), str) else {"mark": mark}}


def _end_of_calls(chat: Chat, k: int, after: str) -> tuple[int, bool]:
    """Length of what is turn ``k``'s in ``after``, which begins in its last call, and whether an end token is in it.

    That is all up to a known end token; else up to the first added token, with it unless it opens the next message.
    """
    following = chat.messages[k + 1]["content"] if k + 1 < len(chat.messages) else ""
    limit = after.find(following) if following and following in after else len(after)
    known = "|".join(map(re.escape, sorted(turn_ends(chat.tokenizer).known)))
    match = re.compile(known).search(after, 0, limit) if known else None
    if match is not None:
        return match.end(), True
    added = [(after.index(name), -len(name), name) for name in _added_texts(chat.tokenizer) if name in after[:limit]]
    if not added:
        return len(after[:limit].rstrip()), False
    start, _, name = min(added)
    if following and name == _last_added(chat.tokenizer, after[:limit]):
        return start, False
    return start + len(name), True


def header_end(chat: Chat, k: int, before: str) -> int:
    """Where the header of turn ``k`` ends in ``before``, the rendering up to the turn's text.

    That is where the generation prompt ends, or where the two part if that goes on (opens the reasoning, say). A
    template that writes earlier messages differently as long as they are the last is compared from the end of the
    message before.
    """
    try:
        prompt = chat.apply(chat.messages[:k], add_generation_prompt=True)
        if before.startswith(prompt):
            return len(prompt)
        written = chat.apply(chat.messages[:k])
    except DataError:  # the conversation up to there is refused, as the template refuses no message at all
        return len(before)
    said = str(chat.messages[k - 1]["content"]).strip() if k else ""
    messages = prompt[: shared_prefix(written, prompt)]
    # What was said may stand in the header and in the generation prompt too: it is the last one among the messages.
    count = messages.count(said) if said else 0
    ours, theirs = _end_of(before, said, count), _end_of(prompt, said, count)
    if ours is None or theirs is None:
        return len(before)
    if shared_prefix(before, prompt) >= len(messages):
        ours = theirs = 0  # all messages are written alike
    elif _ends_in(before[ours:], prompt[len(messages) :]):
        return len(before)  # something stands between the last message and the generation prompt
    shared = before[ours : ours + shared_prefix(before[ours:], prompt[theirs:])]
    if ours + len(shared) < len(before):  # not within a tag, which may be another one
        shared = _UNFINISHED_TAG.sub("", shared)
    return ours + len(shared)


def _end_of(text: str, part: str, count: int) -> int | None:
    """Where the ``count``-th ``part`` of ``text`` ends; None where there are fewer, or for a count of 0."""
    at = 0
    for _ in range(count):
        if (start := text.find(part, at)) < 0:
            return None
        at = start + len(part)
    return at or None


def _ends_in(text: str, start: str) -> bool:
    """Whether ``text`` ends in what ``start`` begins with, blanks alone not counted."""
    return any(start.startswith(text[at:]) for at in range(max(0, len(text) - len(start)), len(text.rstrip())))


def _end_of_turn(tokenizer: Any, before: str, after: str) -> int | None:
    """Length of ``after``, what follows a turn's text, up to and with the token that ends it; None: none is written."""
    known = turn_ends(tokenizer).known
    match = re.match(rf"\s*(?:{'|'.join(map(re.escape, known))})", after) if known else None
    if match is None:
        other = _written_end(tokenizer, before, after, ())
        match = None if other is None else re.match(rf"\s*{re.escape(other)}", after)
    return None if match is None else match.end()


def _written_end(tokenizer: Any, before: str, after: str, openings: tuple[str, ...]) -> str | None:
    """The added token that follows a turn's text at once, unless it opens turns: one of ``openings``, or the token in
    front of this turn's text."""
    names = _added_texts(tokenizer)
    rest = after.lstrip()
    ends = [name for name in names if rest.startswith(name)]
    if not ends:
        return None
    end = max(ends, key=len)
    opens = end in openings or end == _last_added(tokenizer, before)
    return None if opens and end != tokenizer.eos_token else end


def _last_added(tokenizer: Any, text: str) -> str | None:
    """The added token that stands last in ``text``."""
    return max((name for name in _added_texts(tokenizer) if name in text), key=text.rfind, default=None)


def shared_prefix(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Length of the longest common prefix."""
    ends = (i for i, (a, b) in enumerate(zip(first, second)) if a != b)
    return next(ends, min(len(first), len(second)))


def squeeze(text: str) -> str:
    """The text without its blanks and line breaks, which templates move."""
    return "".join(text.split())


def with_objects(message: Message) -> Message:
    """The message with the arguments of its tool calls as objects, as templates want them, not as JSON text."""
    calls = message.get("tool_calls")
    if not isinstance(calls, (list, tuple)):
        return message

    def call(item: Any) -> Any:
        inner = item.get("function") if isinstance(item, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("arguments"), str):
            return item
        try:
            arguments = json.loads(inner["arguments"])
        except (ValueError, RecursionError):
            return item
        return {**item, "function": {**inner, "arguments": arguments}}

    return {**message, "tool_calls": [call(item) for item in calls]}


def has_template(tokenizer: Any) -> bool:
    """True if the tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def template_options(example: Example) -> dict[str, Any]:
    """What a template is told besides the messages: a fixed date, and the tools of the record."""
    # Llama 3 templates write today's date unless given one; the same data must give the same tokens.
    tools = {} if example.tools is None else {"tools": list(example.tools)}
    return {"date_string": TEMPLATE_DATE, **tools}


def apply_template(tokenizer: Any, example: Example, messages: list[Message], **options: Any) -> str:
    """The text that the chat template makes of ``messages``; DataError naming the record where it refuses them."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **template_options(example), **options)
    except Exception as error:  # templates raise what they like
        roles = ", ".join(str(message["role"]) for message in messages)
        raise DataError(
            f"record {example.id!r}: the chat template of the tokenizer refuses it ({error}; roles: {roles}"
            "); expected messages the template knows; change the roles, or remove the template for plain "
            "prompts"
        ) from error


@dataclasses.dataclass(frozen=True)
class TurnEnds:
    """Tokens behind an assistant's text: the one that ends the ``last`` turn (None: none is written), and all ``known``
    ones, eos among them."""

    last: str | None
    known: tuple[str, ...]


_TURN_ENDS: WeakKeyDictionary[Any, dict[tuple[str, str | None], TurnEnds]] = WeakKeyDictionary()
_ADDED: WeakKeyDictionary[Any, tuple[int, tuple[str, ...]]] = WeakKeyDictionary()


def turn_ends(tokenizer: Any) -> TurnEnds:
    """What ends a turn, found by rendering a conversation of one answer and one of two."""
    key = (str(getattr(tokenizer, "chat_template", None) or ""), tokenizer.eos_token)
    known = _TURN_ENDS.setdefault(tokenizer, {})
    if key not in known:
        eos = () if tokenizer.eos_token is None else (tokenizer.eos_token,)
        last = _probed(tokenizer, (), "") if key[0] else None
        inner = _probed(tokenizer, ({"role": "user", "content": "Hi"},), "Well") if key[0] else None
        known[key] = TurnEnds(last, tuple(dict.fromkeys([*filter(None, (last, inner)), *eos])))
    return known[key]


def _probed(tokenizer: Any, more: tuple[Message, ...], answer: str) -> str | None:
    """The token that ends an answer with ``more`` messages (and another ``answer``) behind it; None without one, or
    where the template refuses the conversation."""
    first = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": MARK}]
    second = [{"role": "assistant", "content": answer}] if more else []
    try:
        text = apply_template(tokenizer, Example("probe", "", "Hi", None, ""), [*first, *more, *second])
    except DataError:
        return None
    before, _, after = text.partition(MARK)
    user = _last_added(tokenizer, before[: before.find("Hi")])
    return _written_end(tokenizer, before, after, () if user is None else (user,))


def _added_texts(tokenizer: Any) -> tuple[str, ...]:
    """Texts of all special and added tokens. They are slow to collect, so they are kept while their number stays."""
    size = len(getattr(tokenizer, "added_tokens_decoder", {}))
    if tokenizer not in _ADDED or _ADDED[tokenizer][0] != size:
        added = [token.content for token in getattr(tokenizer, "added_tokens_decoder", {}).values()]
        _ADDED[tokenizer] = (size, tuple({*tokenizer.all_special_tokens, *added}))
    return _ADDED[tokenizer][1]
