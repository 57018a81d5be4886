"""Files in other clothes: compressed, keyed objects, folders of save_to_disk; and what cannot be read."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma

import pyarrow as pa
import pytest

from ntkjax.data import formats, read_records
from ntkjax.data.mapping import FieldMapping, Source, prepare
from ntkjax.data.sources import count_records, list_sources
from ntkjax.errors import DataError

MANY = [{"id": f"n{i}", "prompt": f"Why {i}?", "response": "é " * (i % 7 + 1)} for i in range(50)]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in MANY)
PACK = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.Codec("zstd").compress(data, asbytes=True),
}


def texts(path, tmp_path, **options):
    records = read_records(path, cache_dir=tmp_path / "cache", **options)
    return [(example.prompt, example.response) for example in records]


EXPECTED = [(record["prompt"], record["response"]) for record in MANY]


@pytest.mark.parametrize("packed", PACK)
def test_compressed_files(tmp_path, packed, monkeypatch):
    monkeypatch.setattr(formats, "_JSON_CHUNK", 200)
    for name, text in (("f.jsonl", LINES), ("f.json", json.dumps(MANY, indent=1)), ("f.NDJSON", LINES)):
        path = tmp_path / (name + packed)
        half = len(text.encode()) // 2
        data = text.encode()
        path.write_bytes(PACK[packed](data[:half]) + PACK[packed](data[half:]))  # several streams behind each other
        assert texts(path, tmp_path) == EXPECTED
        records = read_records(path, cache_dir=tmp_path / "cache")
        line = 12 if name == "f.json" else 3  # an object takes five lines there
        assert records.sources[0] == "f" and records.location(2).endswith(f"{name}{packed}:{line}")
        assert count_records(str(path)) == (None if name == "f.json" else 50)
        assert formats.unpacked_bytes(str(path)) == len(data)


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_damaged_compressed_files_are_named(tmp_path, packed, suffix):
    path = tmp_path / f"f{suffix}{packed}"
    path.write_bytes(PACK[packed](LINES.encode())[:-9])
    with pytest.raises(DataError, match=rf"f{suffix}{packed}:\d+: not a readable {packed} file .*copy or download"):
        read_records(path, cache_dir=tmp_path / "cache", on_bad_record="skip")
    path.write_bytes(b"no such format at all")
    with pytest.raises(DataError, match=rf"not a readable {packed} file"):
        read_records(path, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("packed", [".gz", ".bz2", ".xz", ".zst"])
def test_what_stands_behind_a_compressed_stream_is_no_silence(tmp_path, packed):
    path = tmp_path / f"f.jsonl{packed}"
    path.write_bytes(PACK[packed](LINES.encode()) + b"no stream at all")
    with pytest.raises(DataError, match=rf"not a readable {packed} file"):
        read_records(path, cache_dir=tmp_path / "cache")
    if packed != ".zst":  # zeros may pad the others
        path.write_bytes(PACK[packed](LINES.encode()) + b"\0" * 8)
        assert texts(path, tmp_path) == EXPECTED


def test_a_keyed_object_is_read_whatever_its_keys_are(tmp_path, monkeypatch):
    rows = {f'key {i} "{{': record for i, record in enumerate(MANY)}
    path = tmp_path / "f.json"
    for chunk in (16, 150, 2**20):
        monkeypatch.setattr(formats, "_JSON_CHUNK", chunk)
        for indent in (None, 1):
            path.write_text(json.dumps(rows, indent=indent))
            if chunk > 16:  # the first value must be seen to tell one record from many
                assert texts(path, tmp_path) == EXPECTED


# Text of a .json file that is no keyed object -> how many records it holds.
NOT_KEYED = {
    "one record whose first field is an object": ('{"meta": {"a": 1}, "prompt": "p", "response": "r"}', 1),
    "over several lines": ('{\n"meta": {"a": 1},\n"prompt": "p", "response": "r"}', 1),
    "lines of such records": ('{"meta": {"a": 1}, "prompt": "p", "response": "r"}\n' * 3, 3),
}


@pytest.mark.parametrize("name", NOT_KEYED)
def test_a_record_that_begins_with_an_object_is_a_record(tmp_path, name):
    text, count = NOT_KEYED[name]
    (tmp_path / "f.json").write_text(text)
    records = read_records(tmp_path / "f.json", cache_dir=tmp_path / "cache")
    assert len(records) == count and records.report["ignored_fields"] == {"meta": count}


@pytest.mark.parametrize("text", ['{"a": ' * 100_000, "[" * 100_000, '{"a": {' + '"b": {' * 100_000])
def test_json_nested_too_deeply_is_named(tmp_path, text):
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(DataError, match=r"f\.json:1: .*(nested too deeply|not valid JSON)"):
        read_records(tmp_path / "f.json", cache_dir=tmp_path / "cache")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    import datasets

    folder = tmp_path_factory.mktemp("saved")
    whole = datasets.Dataset.from_list(MANY)
    whole.save_to_disk(str(folder / "one"), num_shards=3)
    datasets.DatasetDict({"train": whole, "test": whole.select(range(2))}).save_to_disk(str(folder / "dict"))
    return folder


def test_saved_data_sets_are_read(saved, tmp_path):
    records = read_records(saved / "one", cache_dir=tmp_path / "cache")
    assert [(e.id, e.prompt, e.response) for e in records] == [(r["id"], r["prompt"], r["response"]) for r in MANY]
    assert records.location(30) == f"{saved / 'one'}:31" and records.sources[0] == "one"
    assert count_records(str(saved / "one")) == 50
    assert texts(saved / "dict", tmp_path) == EXPECTED
    assert texts(saved / "dict", tmp_path, split="test") == EXPECTED[:2] == texts(saved / "dict" / "test", tmp_path)
    with pytest.raises(DataError, match=r"without a split 'dev' \(its splits: .*dict/test, .*dict/train\)"):
        read_records(saved / "dict", split="dev", cache_dir=tmp_path / "cache")
    # Beside files in a directory it is one source; none of its own files is taken for data.
    assert list_sources(saved) == [str(saved / "dict" / "train"), str(saved / "one")]
    mapped, _ = prepare([Source(str(saved / "dict"), split="test", mapping=FieldMapping("{prompt}", "{response}"))],
                        tmp_path / "out")  # fmt: skip
    assert texts(mapped[0], tmp_path) == EXPECTED[:2]


def test_an_incomplete_saved_data_set_is_named(tmp_path):
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match=r"not a readable folder of Dataset\.save_to_disk"):
        read_records(tmp_path, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("x.csv", r"unknown extension '\.csv'; expected one of \.jsonl.*; convert it"),
        ("x.tar.gz", r"unknown extension '\.tar\.gz'.*; unpack it"),
        ("x.zip", r"unknown extension '\.zip'.*; unpack it"),
        ("x.parquet.gz", r"unknown extension '\.parquet\.gz'.*; unpack it"),
    ],
)
def test_unknown_extensions_say_what_to_do(tmp_path, name, says):
    (tmp_path / name).write_text("a,b\n")
    with pytest.raises(DataError, match=says):
        read_records(tmp_path / name, cache_dir=tmp_path / "cache")
