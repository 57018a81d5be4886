"""The selected records, as others read them: every field as it was, beside where it came from."""

from __future__ import annotations

import json
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest

from ntkjax.data import TokenisedDataset, read_records
from ntkjax.errors import DataError
from ntkjax.pipeline import selection_io
from ntkjax.pipeline.load import Loaded
from ntkjax.pipeline.selection_io import FILES, write_selected, write_selection
from ntkjax.selection import Selection

TURNS = [("human", "Hi"), ("gpt", "Hello"), ("human", "Why?"), ("gpt", "So.")]
CHAT = [{"from": who, "value": text} for who, text in TURNS]
# Formats as the documentation of trl and LLaMA-Factory gives them, with a column of the user's own.
POOLS = {
    "trl messages": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    "trl prompt-completion": {"prompt": "The sky is", "completion": " blue."},
    "trl conversational prompt-completion": {
        "prompt": [{"role": "user", "content": "Sky?"}],
        "completion": [{"role": "assistant", "content": "Blue."}],
    },
    "alpaca": {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief.", "history": [["q", "a"]]},
    "sharegpt": {"conversations": CHAT, "system": "Be brief.", "tools": "[]"},
    "answers": {"prompt": "p", "response": "So the answer is x.", "answer": "x", "choices": ["x", "y"]},
}


def pool_of(tmp_path, *rows, name="pool.jsonl"):
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_records(tmp_path / name, cache_dir=tmp_path / "cache")


def selection(n, rows):
    scores = np.full(n, np.nan)
    ranks = np.zeros(n, np.int64)
    for rank, row in enumerate(rows[:-1], 1):  # the last was not scored
        scores[row], ranks[row] = 1 / rank, rank
    return Selection("x", scores, ranks, np.asarray(rows, np.int64))


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def content(example):
    return (example.prompt, example.messages, example.response, example.answer, example.choices, example.tools)


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("kind", FILES)
def test_every_format_is_written_as_it_was_and_reads_back_the_same(tmp_path, name, kind):
    rows = [POOLS[name] | {"licence": f"CC-{i}", "nested": {"a": [i, None]}} for i in range(4)]
    records = pool_of(tmp_path, *rows)
    path = write_selected(tmp_path, records, selection(4, [3, 1, 0]), kind)
    assert path == tmp_path / FILES[kind] and not list(tmp_path.glob(".selected*"))
    again = read_records(path, cache_dir=tmp_path / "cache")
    assert [content(e) for e in again] == [content(records[i]) for i in (3, 1, 0)]
    assert list(again.ids) == [records.ids[i] for i in (3, 1, 0)] and list(again.sources) == ["pool"] * 3
    if kind == "ntkjax":
        return
    found: list[Any]
    if kind == "original":
        found = lines(path)
        assert [list(row)[: len(rows[0])] for row in found] == [list(rows[0])] * 3
        loaded = datasets.load_dataset("json", data_files=str(path), cache_dir=str(tmp_path / "hub"))["train"]
    elif kind == "hf":
        loaded = datasets.load_from_disk(str(path))
        found = list(loaded)
    else:
        found = pq.read_table(path).to_pylist()
        loaded = datasets.load_dataset("parquet", data_files=str(path), cache_dir=str(tmp_path / "hub"))["train"]
    assert [{key: row[key] for key in rows[0]} for row in found] == [rows[3], rows[1], rows[0]]
    assert [(row["score"], row["rank"], row["line"]) for row in found] == [(1.0, 1, 4), (0.5, 2, 2), (None, None, 1)]
    assert {row["file"] for row in found} == {str(tmp_path / "pool.jsonl")}
    assert set(rows[0]) | {"id", "source", "score", "rank", "file", "line"} == set(loaded.column_names)
    assert len(loaded) == 3


def test_fields_that_are_called_like_ours_are_left_alone(tmp_path):
    rows = [{"id": 7, "prompt": "p", "response": "r", "score": "high"}, {"prompt": "q", "response": "r", "source": "s"}]
    records = pool_of(tmp_path, *rows)
    found = lines(write_selected(tmp_path, records, selection(2, [0, 1])))
    where = {"ntkjax_score": 1.0, "rank": 1, "file": str(tmp_path / "pool.jsonl"), "line": 1}
    assert found[0] == rows[0] | {"source": "pool"} | where
    assert found[1] == rows[1] | {
        "id": records.ids[1],
        "ntkjax_score": None,
        "rank": None,
        "file": where["file"],
        "line": 2,
    }
    # Selected once more, their names are taken; ours are written anew.
    (tmp_path / "again").mkdir()
    again = read_records(tmp_path / "selected.jsonl", cache_dir=tmp_path / "cache")
    twice = lines(write_selected(tmp_path / "again", again, selection(2, [1, 0])))
    assert twice[0]["line"] == 2 and twice[0]["ntkjax_line"] == 2 and twice[0]["ntkjax_score"] == 1.0


def test_files_that_number_alike(tmp_path):
    for name in "ab":
        pool_of(tmp_path, {"id": 0, "prompt": name, "response": "r"}, name=f"{name}.jsonl")
    records = read_records([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], cache_dir=tmp_path / "cache")
    path = write_selected(tmp_path, records, selection(2, [1, 0]))
    assert [(row["id"], row["ntkjax_id"]) for row in lines(path)] == [(0, "b:0"), (0, "0")]
    again = read_records(path, cache_dir=tmp_path / "cache")
    assert list(again.ids) == ["b:0", "0"] and [e.prompt for e in again] == ["b", "a"]
    assert "id" not in again.report["ignored_fields"]


def test_values_that_json_cannot_hold_are_written_so_that_every_reader_takes_them(tmp_path):
    (tmp_path / "pool.jsonl").write_text(
        '{"prompt": "p", "response": "r", "x": NaN, "y": [Infinity, 1.5], "big": 1%s, "half": "\\ud800"}' % ("0" * 5000)
    )
    records = read_records(tmp_path / "pool.jsonl", cache_dir=tmp_path / "cache")
    (row,) = lines(write_selected(tmp_path, records, selection(1, [0])))
    assert (row["x"], row["y"], row["big"], row["half"]) == (None, [None, 1.5], "1" + "0" * 5000, "\ud800")


def test_columns_of_many_kinds_need_json_lines(tmp_path):
    records = pool_of(tmp_path, {"prompt": "p", "response": "r", "x": 1}, {"prompt": "q", "response": "r", "x": "one"})
    for kind in ("parquet", "hf"):
        with pytest.raises(DataError, match=r"column 'x' .*--selected-format original"):
            write_selected(tmp_path, records, selection(2, [0, 1]), kind)
        assert not (tmp_path / FILES[kind]).exists() and not list(tmp_path.glob(".selected*"))
    assert [row["x"] for row in lines(write_selected(tmp_path, records, selection(2, [0, 1])))] == [1, "one"]


@pytest.mark.parametrize("count", [2, 3, 9])
def test_scores_written_in_parts_are_the_file_that_one_process_writes(tmp_path, monkeypatch, count):
    records = pool_of(tmp_path, *({"prompt": f"p{i}", "response": "r" * (i % 7 + 1)} for i in range(53)))
    tokens = TokenisedDataset.from_sequences([[1, 2, 3]] * 53, [1] * 53)
    pool, chosen = Loaded(records, tokens), selection(53, list(range(0, 50, 3)))
    monkeypatch.setattr(selection_io, "ROW_GROUP", 8)
    write_selection(tmp_path / "one", chosen, pool)
    held = []

    def watched(parts, path):
        held.extend(pq.read_metadata(part).num_rows for part in parts)
        assert pq.read_table(path.parent / "scores").num_rows == 53  # the parts are one data set
        merge(parts, path)

    merge = selection_io.merge_scores
    monkeypatch.setattr(selection_io, "merge_scores", watched)
    for index in reversed(range(count)):  # the first last, as barriers would have it
        monkeypatch.setattr(selection_io, "process", lambda index=index: (index, count))
        write_selection(tmp_path / "job", chosen, pool)
    assert len(held) == count and sum(held) == 53 and max(held) < 53
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert sorted(path.name for path in (tmp_path / "job").iterdir()) == names
    for name in names:
        assert (tmp_path / "job" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name
