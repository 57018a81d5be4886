"""One raw record, whatever its format, to the one form that the rest of ntkjax knows; or a plain statement of
what is wrong with it.

Formats: ``prompt``/``response``; ``instruction``/``input``/``output``; chat ``messages`` (role, content) or
``conversations`` (from, value), whose last message is the response. Optional fields: ``id``, ``source``,
``answer``, ``choices``. A field that is null counts as absent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ntkjax.errors import DataError

KNOWN_FIELDS = frozenset(
    ("id", "source", "prompt", "response", "instruction", "input", "output")
    + ("messages", "conversations", "answer", "choices")
)
_SPEAKERS = {"human": "user", "gpt": "assistant"}

Message = dict[str, Any]


class RecordProblem(Exception):
    """What is wrong with one record: what was found, what was expected, what to do."""

    def __init__(self, found: str, expected: str, remedy: str):
        super().__init__(f"{found}; expected {expected}; {remedy}")

    def at(self, place: str) -> DataError:
        """The error for the user, with its place in front: ``FILE:LINE: ...``."""
        return DataError(f"{place}: {self}")


@dataclasses.dataclass(frozen=True)
class Row:
    """A validated record. ``id`` and ``source`` are None where the data gives none; ``messages`` is the
    context before the response, None where it is one user message with the text ``prompt``.
    """

    id: str | None
    source: str | None
    prompt: str
    messages: list[Message] | None
    response: str
    answer: str | None
    choices: list[str] | None


def parse_record(value: Any, *, allow_missing_response: bool = False) -> Row:
    """Validate one decoded JSON value or Parquet row.

    With ``allow_missing_response`` (data to generate answers for) the response may be absent or empty and
    becomes the empty string.

    Raises:
      RecordProblem: the record cannot be used.
    """
    if not isinstance(value, Mapping):
        raise RecordProblem(
            f"the record is {_kind(value)}", "an object with named fields", "write one JSON object per record"
        )
    record = {name: field for name, field in value.items() if field is not None}
    prompt, messages, response = _prompt_and_response(record, allow_missing_response)
    if not prompt.strip():
        raise RecordProblem("the prompt is empty", "some text", "fill it in or remove the record")
    if not response.strip() and not allow_missing_response:
        raise RecordProblem("the response is empty", "some text to learn", "fill it in or remove the record")
    answer, choices = _answer_and_choices(record)
    return Row(
        id=_label(record, "id", (str, int)),
        source=_label(record, "source", (str,)),
        prompt=prompt,
        messages=messages,
        response=response,
        answer=answer,
        choices=choices,
    )


def _prompt_and_response(record: dict[str, Any], optional: bool) -> tuple[str, list[Message] | None, str]:
    if "prompt" in record and "response" in record:
        return _text(record, "prompt"), None, _text(record, "response")
    if "messages" in record:
        return _chat(record, "messages", "role", "content", optional)
    if "conversations" in record:
        return _chat(record, "conversations", "from", "value", optional)
    if "instruction" in record and ("output" in record or (optional and "prompt" not in record)):
        extra = _text(record, "input") if "input" in record else ""
        prompt = _text(record, "instruction") + (f"\n{extra}" if extra.strip() else "")
        return prompt, None, _text(record, "output") if "output" in record else ""
    if "prompt" in record and optional:
        return _text(record, "prompt"), None, ""
    missing = {"prompt": "response", "response": "prompt", "instruction": "output", "output": "instruction"}
    absent = next((missing[name] for name in missing if name in record), "prompt")
    seen = ", ".join(sorted(map(str, record))) or "none"
    raise RecordProblem(
        f"the field {absent!r} is missing (fields seen: {seen})",
        "prompt and response, or instruction (and input) and output, or messages",
        "rename the fields or add the missing one",
    )


def _chat(
    record: dict[str, Any], name: str, role_key: str, text_key: str, optional: bool
) -> tuple[str, list[Message] | None, str]:
    raw = record[name]
    if not isinstance(raw, list) or not raw:
        raise RecordProblem(
            f"{name!r} is {_kind(raw) if raw != [] else 'an empty list'}",
            "a list of messages",
            f'write {name} as [{{"{role_key}": ..., "{text_key}": ...}}, ...]',
        )
    messages = [_message(item, f"{name}[{k}]", role_key, text_key) for k, item in enumerate(raw)]
    answered = messages[-1]["role"] == "assistant"
    if not answered and not optional:
        raise RecordProblem(
            f"the last message comes from {messages[-1]['role']!r}",
            "an assistant message at the end, the response",
            "remove what follows the last assistant message",
        )
    response = messages[-1]["content"] if answered else ""
    context = messages[:-1] if answered else messages
    if len(context) == 1 and context[0]["role"] == "user":
        return context[0]["content"], None, response
    if not any(message["content"].strip() for message in context):
        return "", None, response
    return "\n".join(f"{m['role']}: {m['content']}" for m in context), context, response


def _message(item: Any, where: str, role_key: str, text_key: str) -> Message:
    if not isinstance(item, Mapping):
        raise RecordProblem(
            f"{where} is {_kind(item)}",
            f"an object with {role_key} and {text_key}",
            "write messages as objects",
        )
    for key in (role_key, text_key):
        if not isinstance(item.get(key), str):
            found = f"{where}.{key} is {_kind(item[key]) if key in item else 'missing'}"
            raise RecordProblem(found, "text", "only messages of plain text can be used")
    if not item[role_key].strip():
        raise RecordProblem(f"{where}.{role_key} is empty", "system, user or assistant", "name the speaker")
    role, text = str(item[role_key]), str(item[text_key])
    return {"role": _SPEAKERS.get(role, role), "content": text}


def _answer_and_choices(record: dict[str, Any]) -> tuple[str | None, list[str] | None]:
    answer = _label(record, "answer", (str, int, float))
    choices = record.get("choices")
    if choices is None:
        return answer, None
    if not isinstance(choices, list) or not all(isinstance(c, str) and c.strip() for c in choices):
        detail = " with an item that is no text" if isinstance(choices, list) else ""
        raise RecordProblem(
            f"'choices' is {_kind(choices)}{detail}",
            "a list of texts",
            "write the choices as strings, or leave the field out",
        )
    if len(choices) < 2 or len(set(choices)) < len(choices):
        raise RecordProblem(
            f"'choices' is {choices!r}",
            "at least two different texts",
            "mend the choices or leave the field out",
        )
    if answer is not None and answer not in choices:
        raise RecordProblem(
            f"the answer {answer!r} is not among the choices {choices!r}",
            "an answer that equals one of them exactly",
            "mend the answer or the choices",
        )
    return answer, choices


def _text(record: dict[str, Any], name: str) -> str:
    if not isinstance(record[name], str):
        raise RecordProblem(f"{name!r} is {_kind(record[name])}", "text", "write it as a string")
    return record[name]


def _label(record: dict[str, Any], name: str, types: tuple[type, ...]) -> str | None:
    value = record.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, types):
        raise RecordProblem(f"{name!r} is {_kind(value)}", "text", "write it as a string")
    text = str(value)
    if not text.strip():
        raise RecordProblem(f"{name!r} is empty", "some text", "fill it in or leave the field out")
    return text


def _kind(value: Any) -> str:
    names = {str: "text", bool: "true or false", int: "a number", float: "a number"}
    names |= {list: "a list", dict: "an object", type(None): "null"}
    return names.get(type(value), f"of type {type(value).__name__}")
