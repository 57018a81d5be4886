"""Reading: every format, ids, caching, reports; each against records written out by hand."""

from __future__ import annotations

import hashlib
import io
import json
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from ntkjax.data import Example, concat_records, formats, read_records
from ntkjax.data.table import BLOCK_ROWS
from ntkjax.errors import DataError

PLAIN = {"id": "a", "source": "s", "prompt": "Why?", "response": "So the answer is yes.", "answer": "yes"}
PLAIN["choices"] = ["yes", "no"]


def write(path: Path, *records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def test_prompt_and_response(tmp_path):
    records = read_records(write(tmp_path / "f.jsonl", PLAIN))
    assert len(records) == 1
    assert records[0] == Example("a", "s", "Why?", None, "So the answer is yes.", "yes", ("yes", "no"))
    assert records[-1] == records[0]
    with pytest.raises(IndexError):
        records[1]


@pytest.mark.parametrize("extra, prompt", [({}, "Add."), ({"input": ""}, "Add."), ({"input": "1 2"}, "Add.\n1 2")])
def test_instruction_input_output(tmp_path, extra, prompt):
    example = read_records(write(tmp_path / "f.jsonl", {"instruction": "Add.", "output": "3", **extra}))[0]
    assert (example.prompt, example.response, example.messages, example.source) == (prompt, "3", None, "f")


def test_one_user_message_is_a_plain_prompt(tmp_path):
    chat = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Yes."}]}
    shared = {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Yes."}]}
    for record in (chat, shared):
        example = read_records(write(tmp_path / "f.jsonl", record))[0]
        assert (example.prompt, example.response, example.messages) == ("Why?", "Yes.", None)


def test_longer_chats_keep_their_messages(tmp_path):
    texts = [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "Why?"),
        ("assistant", "Yes."),
    ]
    chat = [{"role": role, "content": text} for role, text in texts]
    example = read_records(write(tmp_path / "f.jsonl", {"messages": chat}))[0]
    assert example.messages == tuple(chat[:-1])
    assert example.response == "Yes."
    assert example.prompt == "system: Be brief.\nuser: Hi\nassistant: Hello\nuser: Why?"
    assert example.to_json()["messages"] == chat


@pytest.mark.parametrize("layout", ["array", "pretty", "compact", "object", "pretty object", "lines"])
def test_json_layouts(tmp_path, layout):
    many = [PLAIN | {"id": str(i), "prompt": f'Why {i}? [{{,]}} \\ " é'} for i in range(7)]
    texts = {
        "array": json.dumps(many),
        "pretty": "\n" + json.dumps(many, indent=2) + "\n",
        "compact": json.dumps(many, separators=(",", ":"), ensure_ascii=False),
        "object": json.dumps(many[0]),
        "pretty object": json.dumps(many[0], indent=2),
        "lines": "\n\n".join(map(json.dumps, many)),
    }
    path = tmp_path / "f.json"
    path.write_text(texts[layout], encoding="utf-8")
    expected = many[:1] if "object" in layout else many
    assert [example.to_json() for example in read_records(path)] == expected


def test_json_array_longer_than_the_buffer(tmp_path, monkeypatch):
    many = [PLAIN | {"id": str(i), "response": "x" * (5 * i)} for i in range(1, 60)]
    path = tmp_path / "f.json"
    path.write_text(json.dumps(many, indent=1), encoding="utf-8")
    for chunk in (1, 7, 64, 300):
        monkeypatch.setattr("ntkjax.data.formats._JSON_CHUNK", chunk)
        records = read_records(path, cache_dir=tmp_path / str(chunk))
        assert [example.to_json() for example in records] == many
        lines = path.read_text().splitlines()
        assert all(lines[int(records.location(i).rsplit(":")[-1]) - 1].strip() == "{" for i in range(len(many)))


@pytest.mark.parametrize("chunk", [1, 7, 2**20])
def test_an_object_of_numbered_records_is_read_like_an_array(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("ntkjax.data.formats._JSON_CHUNK", max(chunk, 32))
    rows = {str(i): {"prompt": f"p{i} {{}}", "response": 'r "x"', "n": {"m": [i]}} for i in range(40)}
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    records = read_records(tmp_path / "a.json", cache_dir=tmp_path / "cache")
    assert [e.prompt for e in records] == [f"p{i} {{}}" for i in range(40)]
    assert records.location(0).endswith("a.json:2")
    (tmp_path / "b.json").write_text(json.dumps(rows)[:-20])
    with pytest.raises(DataError, match="not valid JSON"):
        list(read_records(tmp_path / "b.json", cache_dir=tmp_path / "cache"))


def test_json_arrays_read_as_json_reads_them(monkeypatch):
    """Random arrays, whole, cut off or with a character too many or too few: the same values, or an error."""
    rng, outcomes = random.Random(0), set()
    for _ in range(600):
        value = [{"a": "x" * rng.randint(0, 9), "b": [1, {"c": '\n"],'}]} for _ in range(rng.randint(0, 4))]
        text = json.dumps(value, indent=rng.choice([None, 1]))
        i = rng.randrange(1, len(text) + 1)
        spoilt = [text, text[:i], text[:i] + rng.choice('],[{}x" 1') + text[i:], text[:i] + text[i + 1 :]]
        text = rng.choice(spoilt)
        monkeypatch.setattr(formats, "_JSON_CHUNK", rng.choice([1, 3, 10, 100]))
        try:
            expected = json.loads(text)
        except ValueError:
            expected = None
        try:
            found = [element for _, element in formats._JsonArray("f", io.StringIO(text))]
        except DataError:
            found = None
        assert found == expected, text
        outcomes.add(expected is None)
    assert outcomes == {True, False}


def test_parquet(tmp_path):
    rows = [PLAIN, {"id": 7, "prompt": "p", "response": "r"}]
    columns = {name: [str(v) if (v := row.get(name)) == 7 else v for row in rows] for name in PLAIN}
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "f.parquet")
    records = read_records(tmp_path / "f.parquet")
    assert records[0].to_json() == PLAIN
    assert records[1] == Example("7", "f", "p", None, "r")
    assert records.location(1) == f"{tmp_path / 'f.parquet'}:2"


def test_directory_and_several_paths_are_concatenated(tmp_path):
    folder = tmp_path / "pool"
    (folder / "sub").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    write(folder / ".hidden" / "x.jsonl", PLAIN | {"id": "hidden"})
    write(folder / "b.jsonl", PLAIN | {"id": "2"})
    write(folder / "a.jsonl", PLAIN | {"id": "1"})
    write(folder / "sub" / "c.jsonl", PLAIN | {"id": "3"})
    (folder / "README.md").write_text("not data")
    last = write(tmp_path / "z.jsonl", PLAIN | {"id": "4"})
    records = read_records([folder, last])
    assert list(records.ids) == ["1", "2", "3", "4"]
    assert records.report["records"] == 4


def test_made_ids_are_content_hashes_and_repeats_are_counted(tmp_path):
    same = {"prompt": "p", "response": "r"}
    records = read_records(write(tmp_path / "f.jsonl", same, same, {"prompt": "q", "response": "r"}, same))
    stem = hashlib.blake2b(b"p\0r", digest_size=8).hexdigest()
    other = hashlib.blake2b(b"q\0r", digest_size=8).hexdigest()
    assert list(records.ids) == [stem, f"{stem}-2", other, f"{stem}-3"]
    assert records.report["duplicate_contents"] == 2
    assert records.report["made_ids"] == 4


def test_made_ids_give_way_to_given_ones(tmp_path):
    stem = hashlib.blake2b(b"p\0r", digest_size=8).hexdigest()
    same = {"prompt": "p", "response": "r"}
    records = read_records(write(tmp_path / "f.jsonl", same, same | {"id": stem}, same | {"id": f"{stem}-2"}, same))
    assert list(records.ids) == [f"{stem}-3", stem, f"{stem}-2", f"{stem}-4"]
    assert len(set(records.ids)) == 4


def test_skipping_counts_and_lists(tmp_path):
    path = tmp_path / "f.jsonl"
    lines = [json.dumps(PLAIN), "{broken", json.dumps({"prompt": "p"}), json.dumps(PLAIN), '{"prompt": "é"}']
    path.write_bytes("\n".join(lines).encode() + b'\n{"prompt": "\xff"}\n' + json.dumps(PLAIN | {"id": "b"}).encode())
    records = read_records(path, on_bad_record="skip")
    assert list(records.ids) == ["a", "b"]
    assert records.report["skipped"] == 5 == len(records.report["skipped_lines"])
    places = {line.split(": ")[0] for line in records.report["skipped_lines"]}
    assert places == {f"{path}:{n}" for n in (2, 3, 4, 5, 6)}
    assert any(f"already used at {path}:1" in line for line in records.report["skipped_lines"])
    with pytest.raises(DataError, match=r"f\.jsonl:2: "):
        read_records(path)


def test_long_skip_lists_are_cut_and_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr("ntkjax.data.ingest.LISTED_SKIPS", 2)
    path = write(tmp_path / "f.jsonl", PLAIN, *[{"prompt": "p"}] * 5)
    report = read_records(path, on_bad_record="skip").report
    assert report["skipped"] == 5
    assert len(report["skipped_lines"]) == 3
    assert report["skipped_lines"][-1] == "and 3 more, not listed"


def test_unused_fields_are_named(tmp_path):
    records = read_records(write(tmp_path / "f.jsonl", PLAIN | {"task": "t"}, PLAIN | {"id": "b", "task": 1, "x": 2}))
    assert records.report["ignored_fields"] == {"task": 2, "x": 1}


def test_limit_counts_good_records(tmp_path):
    many = [PLAIN | {"id": str(i)} for i in range(5)]
    path = write(tmp_path / "f.jsonl", {"prompt": "no response"}, *many)
    assert list(read_records(path, limit=2, on_bad_record="skip").ids) == ["0", "1"]


def test_missing_responses_on_request(tmp_path):
    chat = {"messages": [{"role": "user", "content": "m"}]}
    path = write(tmp_path / "f.jsonl", {"prompt": "p"}, {"instruction": "i"}, chat)
    records = read_records(path, allow_missing_response=True)
    assert [(e.prompt, e.response) for e in records] == [("p", ""), ("i", ""), ("m", "")]
    with pytest.raises(DataError):
        read_records(path)


def test_the_cache_follows_the_file(tmp_path):
    path = write(tmp_path / "f.jsonl", PLAIN)
    first = read_records(path)
    assert read_records(path).fingerprint == first.fingerprint
    write(tmp_path / "f.jsonl", PLAIN | {"prompt": "Who?"})  # the same size
    assert read_records(path)[0].prompt == "Who?"
    assert first[0].prompt == "Why?"


def test_a_failed_read_leaves_nothing_behind(tmp_path):
    path = write(tmp_path / "f.jsonl", PLAIN, {"prompt": "p"})
    with pytest.raises(DataError):
        read_records(path, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    assert not list((tmp_path / "cache" / "records").iterdir())


def test_views_columns_and_round_trip_over_several_blocks(tmp_path):
    n = 2 * BLOCK_ROWS + 5
    many = [PLAIN | {"id": str(i), "prompt": f"Why {i}?"} for i in range(n)]
    records = read_records(write(tmp_path / "f.jsonl", *many))
    assert [e.to_json() for e in records] == many
    chosen = [n - 1, 0, BLOCK_ROWS, BLOCK_ROWS - 1, 7, 7]
    view = records.subset(chosen)
    assert [e.id for e in view] == [str(i) for i in chosen] == list(view.ids)
    assert view[2] == records[BLOCK_ROWS]
    assert view.ids[1] == "0"
    assert view.ids[[1, 3]].tolist() == ["0", str(BLOCK_ROWS - 1)]
    assert set(records.sources) == {"s"}
    out = tmp_path / "out" / "selected.jsonl"
    records.write_jsonl(out, chosen[:5], extra={"score": [0.5, 1, 2, 3, 4]})
    again = read_records(out)
    assert list(again) == list(records.subset(chosen[:5]))
    assert again.fingerprint == records.subset(chosen[:5]).fingerprint != view.fingerprint
    assert json.loads(out.read_text().splitlines()[0])["score"] == 0.5
    assert [p.name for p in out.parent.iterdir()] == ["selected.jsonl"]


def test_concatenated_records(tmp_path):
    first = read_records(write(tmp_path / "f.jsonl", PLAIN, PLAIN | {"id": "b"}))
    second = read_records(write(tmp_path / "g.jsonl", {"prompt": "p", "response": "r", "id": "c"}))
    both = concat_records(first.subset([1]), concat_records(second, first))
    assert list(both.ids) == ["b", "c", "a", "b"] == [e.id for e in both]
    assert list(both.subset([3, 1, 0]).ids) == ["b", "c", "b"]
    assert [both.location(i).rsplit("/")[-1] for i in range(4)] == [
        "f.jsonl:2",
        "g.jsonl:1",
        "f.jsonl:1",
        "f.jsonl:2",
    ]
    assert both.report["records"] == 4


def test_real_files(shared_dir):
    files = sorted((shared_dir / "data").glob("*/*.jsonl"))
    assert files
    for file in files:
        lines = sum(1 for _ in file.open("rb"))
        records = read_records(file, limit=2000)
        assert len(records) == min(lines, 2000)
        assert records.report["skipped"] == 0


def test_a_hub_id_is_read_through_datasets(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load(name, config, *, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list([{"prompt": "p", "response": "r"}, {"prompt": "q", "response": "r"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    records = read_records("someone/data:part", split="train[:2]", cache_dir=tmp_path)
    assert set(asked) == {("someone/data", "part", "train[:2]")}
    assert [e.prompt for e in records] == ["p", "q"]
    assert set(records.sources) == {"data"}
    assert records.location(1) == "someone/data:part:2"


@pytest.mark.slow
def test_reading_takes_no_memory_that_grows_with_the_data(tmp_path, monkeypatch):
    """150,000 records (90 MB as Python text) cost less than 40 MB of private memory, columns and one pass
    included. (Allocators give back what is freed: what they hold on to varies from run to run.)
    """
    monkeypatch.setenv("ARROW_DEFAULT_MEMORY_POOL", "system")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(128 * 1024))
    script = tmp_path / "read.py"
    script.write_text(
        "import sys, pyarrow\n"
        "from ntkjax.data import read_records\n"
        "def private():\n"
        "    status = open('/proc/self/status')\n"
        "    return next(int(line.split()[1]) for line in status if line.startswith('RssAnon'))\n"
        "before = private()\n"
        "records = read_records(sys.argv[1])\n"
        "total = sum(len(e.response) for e in records) + sum(map(len, records.ids))\n"
        "print(len(records), private() - before)\n"
    )
    data = tmp_path / "f.jsonl"
    with data.open("w") as file:
        for i in range(150_000):
            file.write(json.dumps({"prompt": f"{i} " + "p" * 250, "response": "r" * 250}) + "\n")
    done = subprocess.run(
        [sys.executable, script, data],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    count, kilobytes = map(int, done.stdout.split())
    assert count == 150_000
    print(kilobytes)
    assert kilobytes < 40_000


def test_texts_are_prompt_and_response_of_any_view(tmp_path):
    first = read_records(write(tmp_path / "a.jsonl", *({"prompt": f"p{i}", "response": f"r{i}"} for i in range(4))))
    second = read_records(write(tmp_path / "b.jsonl", {"instruction": "do", "output": "done"}))
    view = concat_records(first, second).subset([4, 2, 0])
    assert list(view.texts) == ["do\ndone", "p2\nr2", "p0\nr0"]
    assert view.texts[1] == "p2\nr2" and len(first.texts) == 4
