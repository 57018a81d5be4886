"""Records as their files hold them, read again from where they came."""

from __future__ import annotations

import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from ntkjax.data import concat_records, read_records
from ntkjax.errors import DataError

MANY = [{"x": {"n": i}, "prompt": f"p{i}", "response": "r", **({"extra": None} if i % 2 else {})} for i in range(9)]


def write(kind, path):
    lines = "\n\n".join(json.dumps(record) for record in MANY)
    if kind == "jsonl":
        path.write_text("{broken\n" + lines)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(("{broken\n" + lines).encode()))
    elif kind == "json":
        path.write_text(json.dumps([{"bad": 1}, *MANY]))  # all of them on one line
    elif kind == "parquet":
        table = pa.Table.from_pylist([{"x": None, "prompt": None, "response": "r", "extra": None}, *MANY])
        pyarrow.parquet.write_table(table, path)
    else:
        datasets.Dataset.from_list([{"x": {"n": 0}, "prompt": "", "response": "", "extra": None}, *MANY]).save_to_disk(
            str(path)
        )
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "parquet", "saved"])
def test_records_come_back_as_they_were_in_any_order(tmp_path, kind):
    records = read_records(write(kind, tmp_path / f"f.{kind}"), on_bad_record="skip", cache_dir=tmp_path / "cache")
    assert records.report["skipped"] == 1
    chosen = [7, 0, 8, 3, 7]
    filled = {"extra": None} if kind in ("parquet", "saved") else {}
    expected = [MANY[i] | filled for i in chosen]
    found = records.originals(chosen)
    assert list(found) == expected == list(found) and len(found) == 5
    assert [list(record) for record in found] == [list(record) for record in expected]
    assert list(found.names) == ["x", "prompt", "response", "extra"]


def test_views_over_several_files(tmp_path):
    paths = []
    for name in "ab":
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text("".join(json.dumps(r | {"file": name}) + "\n" for r in MANY))
    first, second = (read_records(path, cache_dir=tmp_path / "cache") for path in paths)
    both = read_records(paths, cache_dir=tmp_path / "cache")
    for view in (both, concat_records(first, second)):
        found = list(view.subset([10, 2, 17]).originals([2, 0, 1]))
        assert [(record["file"], record["prompt"]) for record in found] == [("b", "p8"), ("b", "p1"), ("a", "p2")]
    assert list(both.originals([])) == []


def test_a_file_that_has_changed_is_named(tmp_path):
    path = tmp_path / "f.jsonl"
    write("jsonl", path)
    records = read_records(path, on_bad_record="skip", cache_dir=tmp_path / "cache")
    write("jsonl", path)  # the same content at another time
    assert len(list(records.originals([0]))) == 1
    path.write_text(path.read_text().replace("p8", "q8"))
    with pytest.raises(DataError, match=r"f\.jsonl: the file is gone or has changed since.*--selected-format ntkjax"):
        records.originals([0])
    path.unlink()
    with pytest.raises(DataError, match="gone or has changed"):
        records.originals([0])
