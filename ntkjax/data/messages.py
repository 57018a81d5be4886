"""Chat messages as data sets write them, to messages with ``role``, ``content`` and whatever other fields they have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ntkjax.data.problems import RecordProblem, kind_of

ROLE_KEYS, TEXT_KEYS = ("role", "from", "speaker"), ("content", "value", "text")
_CALLS = ("function_call", "tool_call")  # speakers of ShareGPT whose text is the JSON of a call
_USER, _ASSISTANT = ("user", "human", "prompter"), ("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot")
SPEAKERS = {
    **dict.fromkeys(_USER, "user"),
    **dict.fromkeys((*_ASSISTANT, *_CALLS), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response", "tool_response"), "tool"),
    **{name: name for name in ("system", "developer", "function", "ipython", "document", "context", "control")},
}
"""Who speaks, as data calls them (in any case) -> the role of the message."""

Message = dict[str, Any]
DEEPEST = 100
"""Levels of objects and lists in the fields of messages and in tools: deeper ones are refused."""


def read_messages(record: dict[str, Any], name: str, filled: bool) -> list[Message]:
    """The messages of the column ``name``; ``filled`` as in `ntkjax.data.schema.parse_record`.

    Raises:
      RecordProblem: no list of messages, an unknown speaker, or content that is no text.
    """
    raw = record[name]
    if not isinstance(raw, list) or not raw:
        keys = ("from", "value") if name.startswith("conversation") else ("role", "content")
        raise RecordProblem(
            f"{name!r} is {kind_of(raw) if raw != [] else 'an empty list'}",
            "a list of messages",
            f'write {name} as [{{"{keys[0]}": ..., "{keys[1]}": ...}}, ...]',
        )
    return [_message(item, name, k, filled) for k, item in enumerate(raw)]


def is_trained(message: Mapping[str, Any]) -> bool:
    """Whether an assistant message is learned: not where ``weight`` is 0 or ``train`` is false."""
    return message.get("weight") != 0 and message.get("train") is not False


def unused_fields(messages: list[Message], name: str) -> list[str]:
    """Names of the fields of messages, ``messages[].field``, that only a chat template may read."""
    unused: dict[str, None] = {}
    for message in messages:
        for key, value in message.items():
            # weight and train say what is trained of an assistant; of others nothing is, whatever they say.
            settled = key in ("weight", "train") and (message["role"] == "assistant" or not value)
            if key not in ("role", "content") and not settled:
                unused[f"{name}[].{key}"] = None
    return list(unused)


def _message(item: Any, name: str, k: int, filled: bool) -> Message:
    if type(item) is dict and len(item) == 2:
        role, text = item.get("role"), item.get("content")
        if isinstance(role, str) and SPEAKERS.get(role) == role and isinstance(text, str):
            return {"role": role, "content": text}
    where = f"{name}[{k}]"
    if not isinstance(item, Mapping):
        raise RecordProblem(
            f"{where} is {kind_of(item)}",
            "an object with role and content (or from and value)",
            "write messages as objects",
        )
    fields = {str(key): value for key, value in item.items() if not is_absent(value)}
    role_key = next((key for key in ROLE_KEYS if key in fields), "from" if "value" in fields else "role")
    text_key = next((key for key in TEXT_KEYS if key in fields), "value" if role_key == "from" else "content")
    speaker = fields.pop(role_key, None)
    role = _role(speaker, f"{where}.{role_key}")
    if text_key not in fields and calls_a_tool(fields):
        text = ""
    else:
        text = _content(fields.pop(text_key, None), f"{where}.{text_key}", text_key in item)
    if str(speaker).strip().lower() in _CALLS and (calls := _parsed_calls(text)) is not None:
        text, fields["tool_calls"] = "", calls
    if fields.get("tool_calls"):
        fields["tool_calls"] = _calls(fields["tool_calls"], f"{where}.tool_calls")
    for key in ("weight", "train"):
        if key in fields:
            _check_switch(fields[key], key, where)
    return {"role": role, "content": text} | {key: storable(v, f"{where}.{key}", filled) for key, v in fields.items()}


def _role(speaker: Any, where: str) -> str:
    if not isinstance(speaker, str):
        kind = "missing" if speaker is None else kind_of(speaker)
        raise RecordProblem(
            f"{where} is {kind}", "the name of the speaker", 'write messages as {"role": ..., "content": ...}'
        )
    if not speaker.strip():
        raise RecordProblem(f"{where} is empty", "system, user or assistant", "name the speaker")
    role = SPEAKERS.get(speaker) or SPEAKERS.get(speaker.strip().lower())
    if role is None:
        raise RecordProblem(
            f"{where} is {speaker!r}, an unknown speaker",
            f"one of {', '.join(SPEAKERS)}",
            "rename the speaker to one of these, such as user or assistant",
        )
    return role


def _content(value: Any, where: str, given: bool) -> str:
    """The text of a message, whose content may be a list of parts of text."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        what = f"{kind_of(value)}{' without parts' if value == [] else ''}" if given else "missing"
        raise RecordProblem(f"{where} is {what}", "text", "write the text of the message there")
    texts = []
    for k, part in enumerate(value):
        text = part.get("text") if isinstance(part, Mapping) else part
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if kind != "text" or not isinstance(text, str):
            raise RecordProblem(
                f"{where}[{k}] is {f'of type {kind!r}' if kind != 'text' else 'without text'}",
                "parts of type text: images, audio and files cannot be read",
                "remove such parts or the record",
            )
        texts.append(text)
    return "".join(texts)


def calls_a_tool(fields: Mapping[str, Any]) -> bool:
    """Whether a message calls a tool, and so may be without text."""
    return bool(fields.get("tool_calls") or fields.get("function_call"))


def _parsed_calls(text: str) -> list[Any] | None:
    """The calls that a ShareGPT function_call message writes as JSON; None where it is none."""
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return None
    calls = parsed if isinstance(parsed, list) else [parsed]
    good = all(isinstance(c, dict) and set(c) == {"name", "arguments"} and isinstance(c["name"], str) for c in calls)
    return [{"type": "function", "function": call} for call in calls] if calls and good else None


def _calls(value: Any, where: str) -> list[Any]:
    """The tool calls of a message: a list of objects, or the JSON text of one."""
    parsed = value
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            parsed = None
    if not isinstance(parsed, list) or not all(isinstance(call, Mapping) and call for call in parsed):
        detail = " with an item that is no call" if isinstance(value, list) else ""
        raise RecordProblem(
            f"{where} is {kind_of(value)}{detail}",
            'a list of calls, [{"type": "function", "function": {"name": ..., "arguments": {...}}}], or its JSON text',
            "write the calls so, or remove the record",
        )
    return parsed


def _check_switch(value: Any, key: str, where: str) -> None:
    good = isinstance(value, bool) if key == "train" else not isinstance(value, bool) and value in (0, 1)
    if not good:
        shown = f"{value!r}" if isinstance(value, int | float) else kind_of(value)
        expected = "true or false" if key == "train" else "0 (not trained) or 1"
        raise RecordProblem(f"{where}.{key} is {shown}", expected, f"mend it or leave {key} out")


def storable(value: Any, where: str, filled: bool, levels: int = DEEPEST) -> Any:
    """``value`` as JSON can say it: NaN is left out of objects, and null too where ``filled``; dates become text.

    Raises:
      RecordProblem: a type that JSON does not have, or objects and lists in one another for more than ``levels``.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return None if value != value else value
    if not levels:
        raise RecordProblem(f"{where} is nested too deeply", f"at most {DEEPEST} levels", "flatten it or leave it out")
    if isinstance(value, Mapping):
        left_out = lambda field: field is None if filled else False
        return {
            str(key): storable(field, f"{where}.{key}" if levels == DEEPEST else where, filled, levels - 1)
            for key, field in value.items()
            if not left_out(field) and not (isinstance(field, float) and field != field)
        }
    if isinstance(value, list | tuple):
        return [storable(item, where, filled, levels - 1) for item in value]
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise RecordProblem(f"{where} is {kind_of(value)}", "text, numbers, lists or objects", "convert it or leave it out")


def is_absent(value: Any) -> bool:
    """Whether a value counts as absent: null or NaN."""
    return value is None or (type(value) is float and value != value)
