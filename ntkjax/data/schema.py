"""One raw record of any known schema to a `Row`, the one form that the rest of ntkjax reads, or to a named fault.

Formats: ``prompt``/``response`` (or ``completion``); ``instruction``/``input``/``output``; ``question`` or ``query``
and ``response``; ``input``/``output``; chat ``messages``, ``conversations`` or ``conversation``, each message with
role and content, from and value, or speaker and text. Optional fields: ``system`` and ``history``
(``[[question, answer], ...]``), which become messages; ``tools``; ``id``, ``source``, ``answer``, ``choices``. A field
that is null or NaN counts as absent. Every other field is named in ``Row.unused``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from ntkjax.data.messages import (
    Message,
    calls_a_tool,
    is_absent,
    is_trained,
    read_messages,
    storable,
    unused_fields,
)
from ntkjax.data.problems import RecordProblem, kind_of, printable

OWN_ID = "ntkjax_id"
"""The id where a record written by ``ntkjax select`` has another one of its own in ``id``."""
CUT_MESSAGES = "messages after the last that is trained (weight > 0)"
"""What ``Row.unused`` calls messages behind the last assistant message that is trained: no loss can depend on them."""

_BASE = frozenset(("id", OWN_ID, "source", "answer", "choices"))
_AROUND = _BASE | {"system", "history"}
# A pair of texts: names of the prompt and of the response, those first that are looked for first.
_PAIRS = (
    ("prompt", ("response", "completion")),
    ("instruction", ("output", "response", "completion")),
    ("question", ("response", "output", "completion")),
    ("query", ("response", "output", "completion")),
    ("input", ("output",)),
    ("prompt", ("output",)),
)
_ASKED = ("prompt", "instruction", "question", "query")  # what may stand without a response
_CHATS = ("messages", "conversations", "conversation")
_PLAIN = _AROUND | {"prompt", "response"}
_CONTEXTS = ("input", "context")  # texts that belong to an instruction
KNOWN_FIELDS = _AROUND.union(
    _CHATS, _CONTEXTS, ("tools",), *([prompt, *responses] for prompt, responses in _PAIRS)
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """A validated record.

    Attributes:
      id, source: None where the data gives none.
      messages: the context before the response; None where it is one user message with the text ``prompt``.
      response_fields: fields of the last assistant message besides role and content; None where it has none.
      tools: None where the record names none.
      unused: names of the fields that nothing here uses: columns, fields of messages (``messages[].name``) and
        ``tools``, which only a chat template may read, and `CUT_MESSAGES`.
    """

    id: str | None
    source: str | None
    prompt: str
    messages: list[Message] | None
    response: str
    answer: str | None
    choices: list[str] | None
    response_fields: Message | None = None
    tools: list[Any] | None = None
    unused: tuple[str, ...] | list[str] = ()


@dataclasses.dataclass
class _Talk:
    """Context, response and what was used while a record is read; ``unused`` are names besides columns."""

    context: list[Message]
    response: str
    used: frozenset[str]
    response_fields: Message | None = None
    unused: list[str] = dataclasses.field(default_factory=list)


def parse_record(value: Any, *, allow_missing_response: bool = False, filled: bool = False) -> Row:
    """Validate one decoded JSON value or table row.

    With ``allow_missing_response`` (data to generate answers for) the response may be absent or empty and
    becomes the empty string. ``filled``: the value comes from a table, where every object of a column has all fields
    that one of them has, absent ones as null: such nulls are left out.

    Raises:
      RecordProblem: the record cannot be used.
    """
    if not isinstance(value, Mapping):
        raise RecordProblem(
            f"the record is {kind_of(value)}", "an object with named fields", "write one JSON object per record"
        )
    record = {name: field for name, field in value.items() if not is_absent(field)}
    talk = _talk(record, allow_missing_response, filled)
    if "system" in record or "history" in record:
        _surround(talk, record)
    prompt, messages = _prompt(talk.context)
    if not prompt.strip():
        raise RecordProblem("the prompt is empty", "some text", "fill it in or remove the record")
    calls = talk.response_fields is not None and calls_a_tool(talk.response_fields)
    if not (talk.response.strip() or calls or allow_missing_response):
        raise RecordProblem("the response is empty", "some text to learn", "fill it in or remove the record")
    answer, choices = _answer_and_choices(record)
    tools = _tools(record["tools"], filled) if "tools" in record else None
    return Row(
        id=_label(record, OWN_ID if OWN_ID in record else "id", (str, int, float)),
        source=_label(record, "source", (str,)),
        prompt=prompt,
        messages=messages,
        response=talk.response,
        answer=answer,
        choices=choices,
        response_fields=talk.response_fields,
        tools=tools,
        unused=talk.unused + [printable(str(n)) for n in record if n not in talk.used and not _blank(record[n])],
    )


def _blank(value: Any) -> bool:
    """Whether a column says nothing: an empty text, list or object."""
    return isinstance(value, str | list | dict) and not (value.strip() if isinstance(value, str) else value)


def _talk(record: dict[str, Any], optional: bool, filled: bool) -> _Talk:
    if "prompt" in record and "response" in record and isinstance(record["prompt"], str):
        return _Talk([{"role": "user", "content": record["prompt"]}], _text(record, "response"), _PLAIN)
    for prompt, responses in _PAIRS[:1]:
        response = next((name for name in responses if name in record), None)
        if prompt in record and response is not None:
            return _pair(record, prompt, response, filled)
    for name in _CHATS:
        if name in record:
            return _chat(read_messages(record, name, filled), name, optional)
    for prompt, responses in _PAIRS[1:]:
        response = next((name for name in responses if name in record), None)
        if prompt in record and response is not None:
            return _pair(record, prompt, response, filled)
    for prompt in _ASKED:
        if optional and prompt in record:
            return _pair(record, prompt, None, filled)
    raise _missing(record)


def _missing(record: dict[str, Any]) -> RecordProblem:
    absent = "prompt"
    if not any(name in record for _, responses in _PAIRS for name in responses) or "prompt" in record:
        absent = next((responses[0] for prompt, responses in _PAIRS if prompt in record and prompt in _ASKED), absent)
    elif "output" in record:
        absent = "instruction"
    remedy = "rename the fields or add the missing one"
    if absent != "prompt" and "answer" in record:
        remedy = f"if 'answer' is the text to learn, rename it to {absent!r} (answer is what evaluation compares with)"
    return RecordProblem(
        f"the field {absent!r} is missing (fields seen: {', '.join(sorted(map(str, record))) or 'none'})",
        "prompt and response (or completion), instruction (and input) and output, question and response, or messages",
        remedy,
    )


def _pair(record: dict[str, Any], prompt: str, response: str | None, filled: bool) -> _Talk:
    """A prompt and a response that are texts, or lists of messages each."""
    names = [name for name in (prompt, response) if name is not None]
    if prompt == "prompt" and isinstance(record[prompt], list) and record[prompt]:
        context = read_messages(record, prompt, filled)
        for message in context:  # only the completion of such data is trained
            if message["role"] == "assistant":
                message["train"] = False
        if response is None:
            return _Talk(context, "", _AROUND | set(names))
        ending = record[response]
        if isinstance(ending, list) and ending:
            return _chat(context + read_messages(record, response, filled), "messages", False, _AROUND | set(names))
        return _Talk(context, _text(record, response), _AROUND | set(names))
    text = _text(record, prompt)
    if prompt == "instruction":
        extra = next((name for name in _CONTEXTS if isinstance(record.get(name), str)), None)
        if extra is None and "input" in record:
            extra = "input"
        if extra is not None:
            names.append(extra)
            text += f"\n{more}" if (more := _text(record, extra)).strip() else ""
    answer = "" if response is None else _text(record, response)
    return _Talk([{"role": "user", "content": text}], answer, _AROUND | set(names))


def _surround(talk: _Talk, record: dict[str, Any]) -> None:
    """The ``system`` and ``history`` columns as messages before the last one of ``talk``."""
    turns: list[Message] = []
    history = record.get("history", []) if "history" in talk.used else []
    pairs = isinstance(history, list) and all(isinstance(p, list | tuple) and len(p) == 2 for p in history)
    if not pairs or not all(isinstance(text, str) for pair in history for text in pair):
        raise RecordProblem(
            f"'history' is {kind_of(history)}" + (" with an item that is no pair of texts" if history else ""),
            "earlier turns as [[question, answer], ...]",
            "write it so, or rename the column",
        )
    for question, answer in history:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    system = _text(record, "system") if "system" in record else ""
    own = talk.context[0] if talk.context and talk.context[0]["role"] == "system" else None
    if own is not None and system.strip() and own["content"] != system:
        talk.unused.append("system")  # the conversation brings another one
    if own is None and system.strip():
        talk.context.insert(0, {"role": "system", "content": system})
    start = 1 if talk.context and talk.context[0]["role"] == "system" else 0
    talk.context[start:start] = turns


def _prompt(context: list[Message]) -> tuple[str, list[Message] | None]:
    """The context as one text; the context itself unless it is one plain user message."""
    if len(context) == 1 and context[0]["role"] == "user":
        return context[0]["content"], context if len(context[0]) > 2 else None
    if not any(message["content"].strip() for message in context):
        return "", None
    return "\n".join(f"{m['role']}: {m['content']}" for m in context), context


# -- chats and labels --


def _chat(messages: list[Message], name: str, optional: bool, used: frozenset[str] | None = None) -> _Talk:
    """The last assistant message that is trained is the response; what follows it is cut off and counted."""
    used = _BASE | {name, "system"} if used is None else used
    extra = any(len(message) > 2 for message in messages)
    unused = unused_fields(messages, name) if extra else []
    if messages[-1]["role"] != "assistant":
        if optional:
            return _Talk(messages, "", used, None, unused)
        raise RecordProblem(
            f"the last message comes from {messages[-1]['role']!r}",
            "an assistant message at the end, the response",
            "remove what follows the last assistant message, or name its speaker assistant",
        )
    if extra:
        trained = [k for k, m in enumerate(messages) if m["role"] == "assistant" and is_trained(m)]
        if not trained:
            raise RecordProblem(
                "no assistant message is to be trained (weight 0 or train false on each)",
                "at least one with weight 1, or without weight and train",
                "mend the weights or remove the record",
            )
        if trained[-1] + 1 < len(messages):
            unused.append(CUT_MESSAGES)
            messages = messages[: trained[-1] + 1]
    last = messages[-1]
    fields = {key: value for key, value in last.items() if key not in ("role", "content")} if extra else None
    return _Talk(messages[:-1], last["content"], used, fields or None, unused)


def _tools(value: Any, filled: bool) -> list[Any] | None:
    """The tools of a record: a list, or the JSON text of one; None where there are none."""
    parsed = value
    if isinstance(value, str):
        try:
            parsed = json.loads(value) if value.strip() else []
        except (ValueError, RecursionError):
            parsed = None
    if not isinstance(parsed, list):
        raise RecordProblem(
            f"'tools' is {kind_of(value)}{' that is no JSON list' if isinstance(value, str) else ''}",
            "a list of tools, or the JSON text of one",
            "mend it, or rename the column if it is about something else",
        )
    return storable(parsed, "tools", filled) or None


def _answer_and_choices(record: dict[str, Any]) -> tuple[str | None, list[str] | None]:
    choices = record.get("choices")
    if choices is None:
        return _label(record, "answer", (str, int, float)), None
    if not isinstance(choices, list) or not all(isinstance(c, str) and c.strip() for c in choices):
        detail = " with an item that is no text" if isinstance(choices, list) else ""
        raise RecordProblem(
            f"'choices' is {kind_of(choices)}{detail}",
            "a list of texts",
            "write the choices as strings, or leave the field out",
        )
    if len(choices) < 2 or len(set(choices)) < len(choices):
        raise RecordProblem(
            f"'choices' is {choices!r}",
            "at least two different texts",
            "mend the choices or leave the field out",
        )
    answer = record.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        raise RecordProblem(
            f"the answer is the number {answer}, which may be a place among the choices {choices!r}",
            "the text of one of them",
            f'write the text of the choice, such as "answer": {json.dumps(choices[0], ensure_ascii=False)}',
        )
    answer = _label(record, "answer", (str,))
    if answer is not None and answer not in choices:
        label = answer.strip().strip("().").upper()
        letter = len(label) == 1 and "A" <= label <= "Z"
        raise RecordProblem(
            f"the answer {answer!r} is not among the choices {choices!r}",
            "an answer that equals one of them exactly",
            "write the text of the choice in place of its letter" if letter else "mend the answer or the choices",
        )
    return answer, choices


def _text(record: dict[str, Any], name: str) -> str:
    if not isinstance(record[name], str):
        raise RecordProblem(f"{name!r} is {kind_of(record[name])}", "text", "write it as a string")
    return record[name]


def _label(record: dict[str, Any], name: str, types: tuple[type, ...]) -> str | None:
    value = record.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, types):
        raise RecordProblem(f"{name!r} is {kind_of(value)}", "text", "write it as a string")
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # whole numbers of a column with gaps
    text = str(value)
    if not text.strip():
        raise RecordProblem(f"{name!r} is empty", "some text", "fill it in or leave the field out")
    return text
