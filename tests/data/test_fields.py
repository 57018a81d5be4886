"""No field is lost in silence: every one is used, refused with its place, or counted under its name."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from ntkjax.data import read_records
from ntkjax.data.messages import SPEAKERS
from ntkjax.data.schema import CUT_MESSAGES
from ntkjax.errors import DataError

USER, ASSISTANT = {"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def read(tmp_path, *records, **options):
    path = tmp_path / "f.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return read_records(path, cache_dir=tmp_path / "cache", **options)


def one(tmp_path, record, **options):
    """(the example, the fields that are not used) of one record; the example survives writing and reading."""
    records = read(tmp_path, record, **options)
    (tmp_path / "again").mkdir(exist_ok=True)
    again = read(tmp_path / "again", records[0].to_json(), **options)
    assert again[0] == records[0] and again.fingerprint == records.fingerprint
    return records[0], records.report["ignored_fields"]


# What is written -> (the roles and texts before the response, the response).
FORMATS = {
    "prompt, response": ({"prompt": "p", "response": "r"}, ["p"]),
    "prompt, completion": ({"prompt": "p", "completion": "r"}, ["p"]),
    "prompt, output": ({"prompt": "p", "output": "r"}, ["p"]),
    "question, response": ({"question": "p", "response": "r"}, ["p"]),
    "query, response": ({"query": "p", "response": "r"}, ["p"]),
    "input, output": ({"input": "p", "output": "r"}, ["p"]),
    "instruction, output": ({"instruction": "p", "input": "", "output": "r"}, ["p"]),
    "instruction, context, response": ({"instruction": "p", "context": "c", "response": "r"}, ["p\nc"]),
    "messages": ({"messages": [USER, ASSISTANT]}, ["p"]),
    "messages of parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "p"}, {"text": "q"}]}, ASSISTANT]},
        ["pq"],
    ),
    "prompt and completion of messages": ({"prompt": [USER], "completion": [ASSISTANT]}, ["p"]),
    "prompt of messages": ({"prompt": [USER], "response": "r"}, ["p"]),
    "from, value": ({"conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "r"}]}, ["p"]),
    "conversations with role": ({"conversations": [USER, ASSISTANT]}, ["p"]),
    "conversation": ({"conversation": [{"speaker": "Human", "text": "p"}, {"speaker": "Bot", "text": "r"}]}, ["p"]),
    "null and NaN": ({"prompt": "p", "response": "r", "answer": float("nan"), "id": None, "x": float("nan")}, ["p"]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_column_of_a_known_format_is_used(tmp_path, name):
    record, prompt = FORMATS[name]
    example, unused = one(tmp_path, record)
    assert ([example.prompt], example.response, example.messages) == (prompt, "r", None)
    assert (example.answer, example.response_fields, example.tools, unused) == (None, None, None, {})


SYSTEM = {"role": "system", "content": "s"}
TURN = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "p", "output": "r", "system": "s", "history": [["q", "a"]]},
        {"prompt": "p", "response": "r", "system": "s", "history": [["q", "a"]]},
        {"messages": [*TURN, USER, ASSISTANT], "system": "s"},
        {"messages": [SYSTEM, *TURN, USER, ASSISTANT], "system": "s"},
    ],
)
def test_system_and_history_columns_are_messages(tmp_path, record):
    example, unused = one(tmp_path, record)
    assert example.messages == (SYSTEM, *TURN, USER) and example.response == "r" and unused == {}
    assert example.prompt == "system: s\nuser: q\nassistant: a\nuser: p"


def test_empty_system_and_history_columns_say_nothing(tmp_path):
    example, unused = one(tmp_path, {"prompt": "p", "response": "r", "system": "", "history": []})
    assert example.messages is None and unused == {}


@pytest.mark.parametrize(
    ("extra", "names"),
    [
        ({"system": "s", "messages": [{"role": "system", "content": "own"}, USER, ASSISTANT]}, ["system"]),
        ({"history": [["q", "a"]], "messages": [USER, ASSISTANT]}, ["history"]),
        ({"messages": [USER, ASSISTANT], "prompt": "x"}, ["prompt"]),
        ({"prompt": "p", "response": "r", "input": "x", "text": 0, "lang": "en", "empty": "", "gap": None},
         ["input", "lang", "text"]),
    ],
)  # fmt: skip
def test_columns_that_another_one_stands_for_are_named(tmp_path, extra, names):
    assert list(read(tmp_path, extra, extra).report["ignored_fields"].items()) == [(name, 2) for name in names]


def test_fields_of_messages_are_kept_and_named(tmp_path):
    think = ASSISTANT | {"reasoning_content": "because"}
    record = {"messages": [USER | {"name": "Ann"}, think], "tools": json.dumps([CALL])}
    example, unused = one(tmp_path, record)
    assert example.messages == (USER | {"name": "Ann"},) and example.prompt == "p"
    assert example.response_fields == {"reasoning_content": "because"} and example.tools == (CALL,)
    assert example.conversation() == record["messages"]
    assert unused == {"messages[].name": 1, "messages[].reasoning_content": 1, "tools": 1}
    plain = read(tmp_path / "again", {"messages": [USER, ASSISTANT]})
    prints = {read(tmp_path / "again", {"messages": [USER, ASSISTANT | more]}).fingerprint
              for more in ({}, {"reasoning_content": "a"}, {"reasoning_content": "b"})}  # fmt: skip
    assert len(prints) == 3 and plain.fingerprint in prints


def test_calls_of_tools_need_no_text(tmp_path):
    calls = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    result = {"role": "tool", "content": "18 C", "tool_call_id": "c1"}
    example, _ = one(tmp_path, {"messages": [USER, calls, result, ASSISTANT]})
    assert example.messages == (USER, calls | {"content": ""}, result)
    example, _ = one(tmp_path, {"messages": [USER, calls]})
    assert (example.response, example.response_fields) == ("", {"tool_calls": [CALL]})
    turns = [("human", "p"), ("function_call", '{"name": "f", "arguments": {}}'), ("observation", "1"), ("gpt", "r")]
    example, unused = one(tmp_path, {"conversations": [{"from": who, "value": text} for who, text in turns]})
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    assert example.messages is not None and [m["role"] for m in example.messages] == ["user", "assistant", "tool"]
    assert example.messages[1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert unused == {"conversations[].tool_calls": 1}
    turns[1] = ("function_call", "call f")
    example, _ = one(tmp_path, {"conversations": [{"from": who, "value": text} for who, text in turns]})
    assert example.messages is not None and example.messages[1] == {"role": "assistant", "content": "call f"}


def test_nulls_that_a_table_fills_in_are_left_out(tmp_path):
    messages = [[USER | {"weight": None, "args": {"x": 1}}, ASSISTANT | {"weight": 1, "args": {"y": 2}}]]
    pyarrow.parquet.write_table(pa.table({"messages": messages}), tmp_path / "f.parquet")
    example = read_records(tmp_path / "f.parquet", cache_dir=tmp_path / "cache")[0]
    assert example.messages == (USER | {"args": {"x": 1}},)
    assert example.response_fields == {"weight": 1, "args": {"y": 2}}


@pytest.mark.parametrize("off", [{"weight": 0}, {"weight": 0.0}, {"train": False}])
def test_what_follows_the_last_trained_message_is_cut_and_counted(tmp_path, off):
    on = ASSISTANT | {"weight": 1}
    example, unused = one(tmp_path, {"messages": [USER, TURN[1] | off, USER, on]})
    assert example.messages == (USER, TURN[1] | off, USER) and example.response == "r" and unused == {}
    records = read(tmp_path, {"messages": [USER, on, USER, ASSISTANT | off]})
    assert (records[0].prompt, records[0].response, records[0].messages) == ("p", "r", None)
    assert records.report["ignored_fields"] == {CUT_MESSAGES: 1}
    with pytest.raises(DataError, match=r"f\.jsonl:1: no assistant message is to be trained"):
        read(tmp_path, {"messages": [USER, ASSISTANT | off]})


def test_a_prompt_of_messages_is_not_trained(tmp_path):
    example, _ = one(tmp_path, {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]})
    assert example.messages == (USER, ASSISTANT | {"train": False}, USER)


@pytest.mark.parametrize("name", SPEAKERS)
@pytest.mark.parametrize("change", [str, str.upper, str.title])
def test_speakers_are_known_in_any_case(tmp_path, name, change):
    chat = [{"from": change(name), "value": "x"}, USER, ASSISTANT]
    example = read(tmp_path, {"conversations": chat})[0]
    assert example.messages is not None and example.messages[0]["role"] == SPEAKERS[name]


BAD = {
    "unknown speaker": ({"messages": [USER, ASSISTANT | {"role": "sydney"}]}, "'sydney', an unknown .*gpt.*rename"),
    "no speaker": ({"messages": [{"content": "x"}, ASSISTANT]}, r"messages\[0\]\.role is missing"),
    "no value": ({"conversations": [{"from": "human"}]}, r"conversations\[0\]\.value is missing"),
    "an image": ({"messages": [USER | {"content": [{"type": "image_url"}]}, ASSISTANT]}, "'image_url'.*images"),
    "null content": ({"messages": [USER | {"content": None}, ASSISTANT]}, r"\.content is null"),
    "weight 0.5": ({"messages": [USER, ASSISTANT | {"weight": 0.5}]}, r"messages\[1\]\.weight is 0\.5.*0 .*or 1"),
    "weight true": ({"messages": [USER, ASSISTANT | {"weight": True}]}, "weight is True"),
    "weight text": ({"messages": [USER, ASSISTANT | {"weight": "0"}]}, "weight is text"),
    "train 0": ({"messages": [USER, ASSISTANT | {"train": 0}]}, "train is 0; expected true or false"),
    "history": ({"prompt": "p", "response": "r", "history": [["q"]]}, "'history' is a list with an item that"),
    "system": ({"prompt": "p", "response": "r", "system": 3}, "'system' is a number"),
    "tools": ({"prompt": "p", "response": "r", "tools": "hammer"}, "'tools' is text that is no JSON list"),
    "tools as object": ({"prompt": "p", "response": "r", "tools": {"a": 1}}, "'tools' is an object"),
    "place of a number": (
        {"prompt": "p", "response": "r", "choices": ["1", "2"], "answer": 1},
        "the answer is the number 1, .*write the text of the choice",
    ),
    "place of a text": ({"prompt": "p", "response": "r", "choices": ["a", "b"], "answer": 0}, "text of the choice"),
    "letter": ({"prompt": "p", "response": "r", "choices": ["x", "y"], "answer": "B"}, "in place of its letter"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_used_is_refused_with_its_place(tmp_path, case):
    record, says = BAD[case]
    with pytest.raises(DataError, match=r"f\.jsonl:2: .*" + says) as caught:
        read(tmp_path, {"prompt": "p", "response": "r"}, record)
    assert str(caught.value).count(";") >= 2
    assert read(tmp_path, {"prompt": "p", "response": "r"}, record, on_bad_record="skip").report["skipped"] == 1


def test_letters_and_numbers_that_are_choices_are_answers(tmp_path):
    for choices, answer in ((["A", "B"], "B"), (["1", "2"], "2")):
        record = {"prompt": "p", "response": "r", "choices": choices, "answer": answer}
        assert one(tmp_path, record)[0].answer == answer
    assert one(tmp_path, {"prompt": "p", "response": "r", "answer": 4.0, "id": 3.0})[0].answer == "4"


def test_integers_of_any_size(tmp_path):
    long = "1" + "0" * 5000
    text = f'{{"prompt": "p", "response": "r", "answer": {long}, "n": -{long}}}'
    for name, content in (("a.jsonl", text), ("b.json", f"[{text}]"), ("c.json", text.replace(",", ",\n"))):
        (tmp_path / name).write_text(content)
        records = read_records(tmp_path / name, cache_dir=tmp_path / "cache")
        assert records[0].answer == long and records.report["ignored_fields"] == {"n": 1}


def test_files_that_number_alike_are_both_kept(tmp_path):
    (tmp_path / "x").mkdir()
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "x" / "b.jsonl"]
    for k, path in enumerate(paths):
        rows = [{"id": i, "prompt": f"{k} {i}", "response": "r"} for i in range(k, 3)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = read_records(paths, cache_dir=tmp_path / "cache")
    assert list(records.ids) == ["0", "1", "2", "b:1", "b:2", "b-2:2"]
    assert (records.report["renamed_ids"], records.report["skipped"]) == (3, 0)
    assert [records.location(i) for i in range(6)] == [
        f"{paths[0]}:1", f"{paths[0]}:2", f"{paths[0]}:3", f"{paths[1]}:1", f"{paths[1]}:2", f"{paths[2]}:1",
    ]  # fmt: skip
    paths[2].write_text(json.dumps({"id": "b:1", "prompt": "x", "response": "r"}))
    assert list(read_records(paths, cache_dir=tmp_path / "cache").ids) == ["0", "1", "2", "b:1-2", "b:2", "b:1"]
    with paths[1].open("a") as file:
        file.write('{"id": 2, "prompt": "y", "response": "r"}\n')
    with pytest.raises(DataError, match=r"b\.jsonl:3: the id '2' was already used at .*b\.jsonl:2"):
        read_records(paths, cache_dir=tmp_path / "cache")
    skipped = read_records(paths, cache_dir=tmp_path / "cache", on_bad_record="skip")
    assert skipped.report["skipped"] == 1 and skipped.report["renamed_ids"] == 2


def test_locations_where_records_were_skipped(tmp_path):
    good = {"prompt": "p", "response": "r"}
    (tmp_path / "a.jsonl").write_text("\n".join(["{", json.dumps(good), "", "[]", json.dumps(good)]))
    (tmp_path / "b.json").write_text(json.dumps([good, {}, good], indent=1))
    records = read_records([tmp_path / "a.jsonl", tmp_path / "b.json"], on_bad_record="skip", cache_dir=tmp_path / "c")
    assert [records.location(i).rpartition("/")[2] for i in range(4)] == [
        "a.jsonl:2",
        "a.jsonl:5",
        "b.json:2",
        "b.json:7",
    ]
    files, lines = records.subset([3, 0]).locations([0, 1])
    assert files == [str(tmp_path / "b.json"), str(tmp_path / "a.jsonl")] and lines.tolist() == [7, 2]


@pytest.mark.parametrize("calls", ["f(1)", 3, {"name": "f"}, ["f"], [CALL, 1], [[]], [{}], True])
def test_tool_calls_that_are_none_are_refused(tmp_path, calls):
    for content in ("", "words"):
        message = {"role": "assistant", "content": content, "tool_calls": calls}
        with pytest.raises(DataError, match=r"f\.jsonl:1: messages\[1\]\.tool_calls is .*expected a list of calls"):
            read(tmp_path, {"messages": [USER, message]})


def test_tool_calls_as_json_text_are_read(tmp_path):
    example = read(tmp_path, {"messages": [USER, {**ASSISTANT, "tool_calls": json.dumps([CALL])}]})[0]
    assert example.response_fields == {"tool_calls": [CALL]}


def nested(levels):
    value = 1
    for k in range(levels):
        value = [value] if k % 2 else {"a": value}
    return value


def test_deep_nesting_is_refused_where_a_template_would_see_it(tmp_path):
    where = [
        lambda v: {"messages": [{**USER, "x": v}, ASSISTANT]},
        lambda v: {"messages": [USER, ASSISTANT], "tools": [v]},
    ]
    for make in where:
        assert len(read(tmp_path, make(nested(99)))) == 1
        for levels in (101, 300, 700):
            with pytest.raises(DataError, match=r"f\.jsonl:1: \S+ is nested too deeply; expected at most 100 levels"):
                read(tmp_path, make(nested(levels)))
    assert len(read(tmp_path, {"prompt": "p", "response": "r", "meta": nested(300)})) == 1  # nothing reads it


def test_half_surrogate_pairs_in_names_and_messages(tmp_path):
    lone, good = "\ud800", {"prompt": "p", "response": "r"}
    records = read(tmp_path, {**good, lone: 1})
    assert records.report["ignored_fields"] == {r"\ud800": 1}
    bad = [{lone: 1}, {"messages": [{"role": lone, "content": "x"}]}, {**good, "id": lone}, {**good, "answer": lone}]
    skipped = read(tmp_path, good, *bad, on_bad_record="skip")
    assert skipped.report["skipped"] == 4
    assert "\n".join(skipped.report["skipped_lines"]).encode()  # can be written to any file
