"""A pool that several processes prepare together is the pool that one prepares: records, ids, tokens, duplicates.

The processes are threads here, with barriers of their own; tests/commands/test_mesh_of_processes.py has real ones.
"""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ntkjax.data import cache, read_records, tokenise
from ntkjax.data.cache import Shared
from ntkjax.data.dedup import find_duplicates
from ntkjax.data.sources import divide, iter_source
from ntkjax.errors import DataError
from ntkjax.pipeline.inputs import file_digests

COUNTS = (2, 3, 7)


@pytest.fixture
def crew(monkeypatch) -> Callable[[int, Callable[[int], Any]], list[Any]]:
    """``crew(count, do)``: what ``do(index)`` returns or raises in each of ``count`` threads that are processes to the
    cache."""
    here, state = threading.local(), {}

    def everyone(number: int) -> list[int]:
        state["said"][here.index] = number
        state["barrier"].wait()
        said = list(state["said"])
        state["barrier"].wait()
        return said

    monkeypatch.setattr(cache, "process", lambda: (getattr(here, "index", 0), state.get("count", 1)))
    monkeypatch.setattr(cache, "barrier", lambda name: state["barrier"].wait())
    monkeypatch.setattr(cache, "everyone", everyone)

    def run(count: int, do: Callable[[int], Any]) -> list[Any]:
        state.update(count=count, said=[0] * count, barrier=threading.Barrier(count, timeout=60))
        results: list[Any] = [None] * count

        def one(index: int) -> None:
            here.index = index
            try:
                results[index] = do(index)
            except Exception as error:
                results[index] = error
                if not isinstance(error, DataError):
                    state["barrier"].abort()

        threads = [threading.Thread(target=one, args=(index,)) for index in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        state["count"] = 1
        return results

    return run


WORDS = [first + last for first in ("ka", "lo", "mi", "ne", "su") for last in ("ra", "to", "vi", "pe")]


def record(i: int) -> dict[str, Any]:
    """Texts of some length, some of which repeat or nearly repeat others."""
    rng = np.random.default_rng(i % 23 if i % 5 == 0 else 1000 + i)
    prompt = " ".join(rng.choice(WORDS, size=30))
    return {"prompt": prompt if i % 10 else prompt + " again", "response": " ".join(rng.choice(WORDS, size=40))}


@pytest.fixture
def pool(tmp_path) -> list[str]:
    """Files of every kind: with blank lines, without ids, ids that two files share, repeated contents, packed."""
    folder = tmp_path / "pool"
    folder.mkdir()
    lines = [json.dumps({"id": f"n{i}"} | record(i)) for i in range(90)]
    lines[17:17] = ["", "   "]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "b.jsonl").write_text("".join(json.dumps(record(i)) + "\n" for i in range(60, 120)))  # no ids
    shards = [{"id": f"n{i}", "text": "unused"} | record(i + 300) for i in range(80)]
    pq.write_table(pa.Table.from_pylist(shards), folder / "c.parquet", row_group_size=13)
    (folder / "d.json").write_text(json.dumps([record(i) for i in range(40, 70)]))
    with gzip.open(folder / "e.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(record(i + 500)) + "\n" for i in range(25))
    datasets.Dataset.from_list([record(i + 700) for i in range(33)]).save_to_disk(str(folder / "f"))
    (folder / "g.jsonl").write_text(json.dumps({"id": "n3"} | record(900)) + "\n")
    return [str(folder / name) for name in ("a.jsonl", "b.jsonl", "c.parquet", "d.json", "e.jsonl.gz", "f", "g.jsonl")]


def everything(sources: list[str], tokenizer: Any, cache_dir: Any, **options: Any) -> dict[str, Any]:
    """All that preparing gives, in plain values."""
    records = read_records(sources, cache_dir=cache_dir, **options)
    tokens = tokenise(records, tokenizer, max_length=48, cache_dir=cache_dir, **options)
    held_out = {"test": records.subset(range(0, len(records), 17))}
    found = find_duplicates(records, held_out, held_out=("test",), cache_dir=cache_dir)
    assert tokens.records is not None
    return {
        "ids": list(records.ids),
        "places": [records.location(i) for i in range(len(records))],
        "records": [example.to_json() for example in records],
        "files": file_digests(records),
        "originals": list(records.originals(range(0, len(records), 9))),
        "report": records.report,
        "fingerprints": (records.fingerprint, tokens.fingerprint),
        "tokens": [(tokens.tokens(i)[0].tolist(), tokens.trained(i).tolist()) for i in range(len(tokens))],
        "token ids": list(tokens.ids),
        "columns": (tokens.lengths.tolist(), tokens.response_starts.tolist(), tokens.response_lengths.tolist()),
        "token report": tokens.report,
        "duplicates": found,
    }


def check_equal(found: dict[str, Any] | Exception, expected: dict[str, Any]) -> None:
    if isinstance(found, Exception):
        raise found
    for name, value in expected.items():
        assert found[name] == value, name


@pytest.mark.parametrize("count", COUNTS)
def test_all_prepare_what_one_prepares(count, crew, pool, toy_tokenizer, tmp_path):
    one = everything(pool, toy_tokenizer, tmp_path / "one")
    assert one["report"]["renamed_ids"] and one["report"]["duplicate_contents"] and one["duplicates"].pairs
    shared = Shared(tmp_path / "together")
    for found in crew(count, lambda _: everything(pool, toy_tokenizer, shared)):
        check_equal(found, one)
    # Each has read and tokenised a part, and with other numbers of processes the entries serve as they are.
    (made,) = (shared.path / "tokens").iterdir()
    assert len(list(made.glob("part-*"))) == count and all(p.stat().st_size for p in made.glob("part-*/tokens.bin"))
    before = {path: path.stat().st_mtime_ns for path in shared.path.rglob("*")}
    for found in [everything(pool, toy_tokenizer, shared), *crew(2, lambda _: everything(pool, toy_tokenizer, shared))]:
        check_equal(found, one)
    assert before == {path: path.stat().st_mtime_ns for path in shared.path.rglob("*")}


def test_no_process_decodes_what_is_anothers(crew, pool, tmp_path, monkeypatch):
    from ntkjax.data import ingest

    parsed: dict[int, int] = {}

    def counting(value: Any, **options: Any) -> Any:
        parsed[threading.get_ident()] = parsed.get(threading.get_ident(), 0) + 1
        return parse(value, **options)

    parse = ingest.parse_record
    monkeypatch.setattr(ingest, "parse_record", counting)
    (records, *_) = crew(3, lambda _: read_records(pool, cache_dir=Shared(tmp_path / "together")))
    assert len(parsed) == 3 and sum(parsed.values()) == len(records)


def test_skipped_records_are_those_of_one(crew, pool, toy_tokenizer, tmp_path):
    bad = tmp_path / "pool" / "bad.jsonl"
    good = [json.dumps({"id": f"x{i % 40}"} | record(i)) for i in range(50)]  # ten ids are given twice
    good[3], good[44] = '{"prompt": 1}', "{"
    bad.write_text("\n".join(good) + "\n")
    sources = [str(bad), *pool]
    one = everything(sources, toy_tokenizer, tmp_path / "one", on_bad_record="skip")
    assert one["report"]["skipped"] >= 10
    shared = Shared(tmp_path / "together")
    for found in crew(3, lambda _: everything(sources, toy_tokenizer, shared, on_bad_record="skip")):
        check_equal(found, one)
    with pytest.raises(DataError) as alone:
        read_records(sources, cache_dir=tmp_path / "one")
    for error in crew(3, lambda _: read_records(sources, cache_dir=Shared(tmp_path / "raised"))):
        assert isinstance(error, DataError) and str(error) == str(alone.value)
    assert not list((tmp_path / "raised" / "records").iterdir())


def test_a_processes_own_failure_is_everyones(crew, tmp_path):
    (tmp_path / "late.jsonl").write_text("".join(json.dumps(record(i)) + "\n" for i in range(30)) + "{\n")
    for error in crew(3, lambda _: read_records(tmp_path / "late.jsonl", cache_dir=Shared(tmp_path / "c"))):
        assert isinstance(error, DataError) and "late.jsonl:31: not valid JSON" in str(error)


def test_more_processes_than_records(crew, tmp_path, toy_tokenizer):
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(record(i)) + "\n" for i in range(3)))
    one = everything([str(tmp_path / "few.jsonl")], toy_tokenizer, tmp_path / "one")
    shared = Shared(tmp_path / "c")
    for found in crew(5, lambda _: everything([str(tmp_path / "few.jsonl")], toy_tokenizer, shared)):
        check_equal(found, one)


def test_processes_with_other_data_or_another_directory_are_named(crew, tmp_path):
    files = [tmp_path / f"{k}.jsonl" for k in range(2)]
    for k, file in enumerate(files):
        file.write_text(json.dumps(record(k)) + "\n")
    for error in crew(2, lambda index: read_records(files[index], cache_dir=Shared(tmp_path / "c"))):
        assert isinstance(error, DataError) and "process 1 of 2 reads other records than process 0" in str(error)
    apart = lambda index: Shared(tmp_path / f"cache-{index}")
    for error in crew(2, lambda index: read_records(files[0], cache_dir=apart(index))):
        assert isinstance(error, DataError) and "process 1 of 2 does not see this directory" in str(error)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 400])
def test_shares_are_all_records_once_in_order(count, pool):
    shares = divide(pool, "train", count)
    assert len(shares) == count
    whole = [(number, place) for number, source in enumerate(pool) for place, _ in enumerate(iter_source(source, ""))]
    read = []
    for number, places in (piece for share in shares for piece in share):
        found = [value for _, value in iter_source(pool[number], "", wanted=places)]
        chosen = range(len(found)) if places is None else places
        assert all(found[place] is not None for place in chosen)
        read += [(number, place) for place in chosen]
    assert read == whole
    if count in (2, 3):
        sizes = [sum(Path(pool[n]).stat().st_size for n, places in share if places is None) for share in shares]
        assert max(sizes) < sum(Path(s).stat().st_size for s in pool)


def test_a_range_of_a_parquet_file_reads_its_row_groups_alone(tmp_path, monkeypatch):
    rows = [{"prompt": str(i), "response": "r"} for i in range(100)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet", row_group_size=10)
    groups, read = [], pq.ParquetFile.iter_batches

    def watched(self: Any, *args: Any, row_groups: Any, **options: Any) -> Any:
        groups.extend(row_groups)
        return read(self, *args, row_groups=row_groups, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watched)
    values = [value for _, value in iter_source(str(tmp_path / "p.parquet"), "", wanted=range(35, 52))]
    assert groups == [3, 4, 5] and values[35:52] == rows[35:52]
    groups.clear()
    assert [v for _, v in iter_source(str(tmp_path / "p.parquet"), "") if v] == rows and groups == list(range(10))
