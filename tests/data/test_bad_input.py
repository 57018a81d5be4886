"""Bad input: each case names its place, what is wrong, what was expected and a remedy."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from ntkjax.data import read_records, sources
from ntkjax.errors import DataError, UserError

GOOD = {"id": "a", "prompt": "p", "response": "r"}
USER, ASSISTANT = {"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}

# What the second line holds, and what the message says of it.
BAD_LINES = {
    "malformed": ('{"prompt": "p", "resp', "not valid JSON"),
    "two objects": (json.dumps(GOOD) * 2, "not valid JSON"),
    "nested too deeply": ("[" * 100_000, "nested too deeply"),
    "a list": ("[1, 2]", "the record is a list"),
    "text": ('"hello"', "the record is text"),
    "null": ("null", "the record is null"),
    "no response": ({"prompt": "p", "text": 1}, r"'response' is missing \(fields seen: prompt, text\)"),
    "no prompt": ({"response": "r"}, "'prompt' is missing"),
    "no output": ({"instruction": "i", "input": "x"}, "'output' is missing"),
    "nothing known": ({"text": "q"}, r"'prompt' is missing \(fields seen: text\)"),
    "a question alone": ({"question": "q"}, r"'response' is missing \(fields seen: question\)"),
    "an answer for a response": ({"question": "q", "answer": "a"}, "if 'answer' is the text to learn, rename it"),
    "no fields": ({}, r"fields seen: none"),
    "null response": ({"prompt": "p", "response": None}, "'response' is missing"),
    "prompt is a number": ({"prompt": 1, "response": "r"}, "'prompt' is a number"),
    "response is a list": ({"prompt": "p", "response": ["r"]}, "'response' is a list"),
    "empty response": ({"prompt": "p", "response": " \n"}, "the response is empty"),
    "empty prompt": ({"prompt": "", "response": "r"}, "the prompt is empty"),
    "empty output": ({"instruction": "i", "output": ""}, "the response is empty"),
    "surrogate": ('{"prompt": "\\ud800", "response": "r"}', "surrogate"),
    "surrogate in choices": ('{"prompt": "p", "response": "r", "choices": ["\\udfff", "b"]}', "surrogate"),
    "id is a list": (GOOD | {"id": ["a"]}, "'id' is a list"),
    "id is true": (GOOD | {"id": True}, "'id' is true or false"),
    "empty id": (GOOD | {"id": " "}, "'id' is empty"),
    "source is a number": (GOOD | {"id": "b", "source": 3}, "'source' is a number"),
    "choices is text": (GOOD | {"id": "b", "choices": "yes"}, "'choices' is text"),
    "choices of numbers": (GOOD | {"id": "b", "choices": [1, 2]}, "item that is no text"),
    "one choice": (GOOD | {"id": "b", "choices": ["x"]}, "at least two"),
    "equal choices": (GOOD | {"id": "b", "choices": ["x", "x"]}, "at least two different"),
    "answer not offered": (
        GOOD | {"id": "b", "answer": "z", "choices": ["x", "y"]},
        "'z' is not among the choices",
    ),
    "duplicate id": (GOOD | {"prompt": "other"}, r"'a' was already used at .*f\.jsonl:1"),
    "messages is text": ({"messages": "hi"}, "'messages' is text"),
    "no messages": ({"messages": []}, "'messages' is an empty list"),
    "message is text": ({"messages": ["hi", ASSISTANT]}, r"messages\[0\] is text"),
    "message without content": (
        {"messages": [{"role": "user"}, ASSISTANT]},
        r"messages\[0\].content is missing",
    ),
    "content is a list": (
        {"messages": [USER, ASSISTANT | {"content": []}]},
        r"messages\[1\].content is a list",
    ),
    "empty role": ({"messages": [USER | {"role": ""}, ASSISTANT]}, r"messages\[0\].role is empty"),
    "user at the end": ({"messages": [USER, ASSISTANT, USER]}, "last message comes from 'user'"),
    "assistant alone": ({"messages": [ASSISTANT]}, "the prompt is empty"),
    "empty answer of a chat": ({"messages": [USER, ASSISTANT | {"content": ""}]}, "the response is empty"),
}


def assert_complete(message: str) -> None:
    """The message says what was expected and then what to do."""
    assert "; expected" in message
    assert message.split("; expected", 1)[1].count(";") >= 1


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_lines_are_named(tmp_path, case):
    bad, says = BAD_LINES[case]
    path = tmp_path / "f.jsonl"
    path.write_text("\n".join([json.dumps(GOOD), bad if isinstance(bad, str) else json.dumps(bad), ""]))
    with pytest.raises(DataError, match=says) as caught:
        read_records(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert_complete(str(caught.value))
    report = read_records(path, on_bad_record="skip").report
    assert (report["records"], report["skipped"]) == (1, 1)
    assert report["skipped_lines"] == [str(caught.value)]


def test_invalid_utf8(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "caf\xe9", "response": "r"}\n')
    with pytest.raises(DataError, match=r"f\.jsonl:2: byte 0xe9 at position 16 is not UTF-8"):
        read_records(path)
    path.with_suffix(".json").write_bytes(b'[{"prompt": "caf\xe9", "response": "r"}]')
    with pytest.raises(DataError, match="0xe9"):
        read_records(path.with_suffix(".json"))


def test_a_file_given_twice_repeats_its_ids(tmp_path):
    (tmp_path / "f.jsonl").write_text(json.dumps(GOOD))
    with pytest.raises(DataError, match=r"f\.jsonl:1: the id 'a' was already used at .*f\.jsonl:1"):
        read_records([tmp_path / "f.jsonl", tmp_path / "f.jsonl"])


BAD_FILES = {
    "empty.jsonl": (b"", "the file is empty"),
    "blank.jsonl": (b"\n \n", "holds no records"),
    "blank.json": (b"[]", "holds no records"),
    "data.csv": (b"a,b\n", r"unknown extension '\.csv'; expected one of \.jsonl"),
    "cut.json": (b'[{"prompt": "p", "response": "r"}, {"prom', "cut.json:1: not valid JSON"),
    "open.json": (b'[{"prompt": "p", "response": "r"}', "the file ends"),
    "comma.json": (
        b'[{"prompt": "p", "response": "r"}\n{"prompt": "p", "response": "r"}]',
        "json:2: .*no comma",
    ),
    "tail.json": (b'[{"prompt": "p", "response": "r"}] []', "text after the closing bracket"),
    "trailing.json": (b'[{"prompt": "p", "response": "r"},]', "not valid JSON"),
    "broken.json": (b'{\n"prompt": "p",\n"response" "r"}', "broken.json:3: not valid JSON"),
    "text.parquet": (b"not parquet at all", "not a readable Parquet file"),
    "all-bad.jsonl": (
        b'{"prompt": 1}\n',
        "no usable record; the first of 1 bad records is .*all-bad.jsonl:1: ",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_named_whatever_is_skipped(tmp_path, name):
    content, says = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says) as caught:
        read_records(tmp_path / name, on_bad_record="skip")
    assert str(caught.value).startswith(str(tmp_path / name))


def test_cut_off_parquet(tmp_path):
    path = tmp_path / "f.parquet"
    pyarrow.parquet.write_table(pa.table({"prompt": ["p"] * 50, "response": ["r"] * 50}), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"not a readable Parquet file.*may be cut off"):
        read_records(path)


def test_bad_parquet_row_is_named(tmp_path):
    path = tmp_path / "f.parquet"
    pyarrow.parquet.write_table(pa.table({"prompt": ["p", "q"], "response": ["r", None]}), path)
    with pytest.raises(DataError, match=r"f\.parquet:2: the field 'response' is missing"):
        read_records(path)


def test_bad_paths(tmp_path):
    with pytest.raises(DataError, match="no such file or directory"):
        read_records(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="no such file or directory"):
        read_records("data/absent.jsonl")  # looks like a hub id, but for its extension
    with pytest.raises(DataError, match="no data in this directory"):
        read_records(tmp_path)
    with pytest.raises(DataError, match="no data was given"):
        read_records([])


def test_a_directory_of_everything_is_refused(tmp_path, monkeypatch):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f.jsonl").write_text(json.dumps(GOOD | {"id": name}))
    monkeypatch.setattr(sources, "MAX_ENTRIES", 6)
    assert len(read_records(tmp_path)) == 3
    monkeypatch.setattr(sources, "MAX_ENTRIES", 5)
    with pytest.raises(DataError, match=f"{tmp_path}: more than 5 files and folders.*name the files"):
        read_records(tmp_path)


def test_hub_id_without_the_hub():
    with pytest.raises(DataError, match=r"someone/no-such-data: no such file here.*download the data"):
        read_records("someone/no-such-data")


def test_bad_options(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps(GOOD))
    with pytest.raises(UserError):
        read_records(path, limit=0)
    (tmp_path / "cache").write_text("a file where a directory should be")
    with pytest.raises(DataError, match="cache directory cannot be written"):
        read_records(path, cache_dir=tmp_path / "cache")


def test_on_bad_record_must_be_known(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps(GOOD))
    # The type annotation refuses it first where beartype is on; without it, our own check does.
    with pytest.raises(Exception, match="on_bad_record"):
        read_records(path, on_bad_record="ignore")


def saved_without(name, folder):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"prompt": "p", "response": "r"}]).save_to_disk(str(folder))
    (folder / name).unlink()
    return folder


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json"])
def test_an_incomplete_saved_data_set_is_named(name, tmp_path):
    with pytest.raises(DataError, match=rf"saved: a folder of Dataset\.save_to_disk without {re.escape(name)}"):
        read_records(saved_without(name, tmp_path / "saved"), cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("path", "words"), [("", "the path of the data is empty"), ("a" * 5000 + ".jsonl", "not a usable path")]
)
def test_paths_that_can_be_none(path, words, tmp_path):
    with pytest.raises(DataError, match=words):
        read_records(path, cache_dir=tmp_path)


def test_names_that_are_not_in_utf_8(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    file = Path(os.fsdecode(os.fsencode(folder) + b"/\xff.jsonl"))
    try:
        file.write_text('{"prompt": "p", "response": "r"}')
    except OSError:
        pytest.skip("this file system has names in UTF-8 alone")
    for path in (folder, file):
        with pytest.raises(DataError, match=r"the name is not in UTF-8; expected a name that is; rename it") as error:
            read_records(path, cache_dir=tmp_path / "cache")
        assert str(error.value).encode()
