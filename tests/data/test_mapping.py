"""Records of other schemas: templates, labels, choices, which rows, what is left out and what is refused."""

from __future__ import annotations

import json

import pytest

from ntkjax.data import read_records
from ntkjax.data.mapping import FieldMapping, Source, prepare
from ntkjax.errors import ConfigError, DataError


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(tmp_path, records, mapping, **options):
    paths, reports = prepare(
        [Source(write(tmp_path / "raw.jsonl", records), mapping=mapping, **options)], tmp_path / "out"
    )
    return list(read_records(paths, cache_dir=tmp_path / "cache")), reports[0]


def test_options_from_fields_and_an_answer_by_place(tmp_path):
    row = {"id": "q7", "question": "Why?", "opa": "A1", "opb": " B2 ", "cop": 1, "subject_name": "Anatomy"}
    mapping = FieldMapping(
        prompt="{question} {{sic}}\n{options}", choices=("{opa}", "{opb}"), answer="{cop}", answer_is="index",
        id="{id}", source="{subject_name}",
    )  # fmt: skip
    (example,), report = read(tmp_path, [row], mapping)
    assert example.prompt == "Why? {sic}\n- A1\n- B2"
    assert example.response == "So the answer is B2." and example.answer == "B2"
    assert example.choices == ("A1", "B2") and (example.id, example.source) == ("q7", "Anatomy")
    assert (report["records"], report["left_out"], report["skipped"]) == (1, 0, 0)


def test_a_list_of_choices_nested_fields_lists_of_text_and_labels(tmp_path):
    row = {"context": {"contexts": ["One.", "Two."]}, "options": ["yes", "no"], "decision": "no", "long": "As seen."}
    mapping = FieldMapping(
        prompt="{context.contexts}\n{options}", response="{long} {answer}", choices=("{options}",),
        answer="{decision}", labels={"yes": "Yes", "no": "No"},
    )  # fmt: skip
    # {options} of a prompt is ours, the choices; as a choice template it names the record's field
    with pytest.raises(ConfigError, match="no choices"):
        FieldMapping(prompt="{options}")
    (example,), _ = read(tmp_path, [row], mapping)
    assert example.prompt == "One.\nTwo.\n- Yes\n- No" and example.choices == ("Yes", "No")
    assert example.answer == "No" and example.response == "As seen. No"
    assert example.id == "raw-1" and example.source == "raw"


def test_free_text_without_choices_and_rows_after_a_shuffle(tmp_path):
    rows = [{"q": f"question {i}", "a": f"answer {i}", "kind": "odd" if i % 2 else "even"} for i in range(20)]
    mapping = FieldMapping(prompt="{q}", response="{a}", where={"kind": ("odd",)})
    whole, report = read(tmp_path, rows, mapping)
    assert [e.prompt for e in whole] == [f"question {i}" for i in range(1, 20, 2)] and report["left_out"] == 10
    parts = [read(tmp_path, rows, mapping, shuffle=3, rows=span)[0] for span in ((0, 4), (4, 10))]
    first, second = ({e.prompt for e in part} for part in parts)
    assert len(first) == 4 and first | second == {e.prompt for e in whole} and not first & second
    assert [e.prompt for e in parts[0]] != [e.prompt for e in whole][:4]


def test_groups_stay_together_in_every_split(tmp_path):
    rows = [{"q": f"question {i % 7}", "a": f"answer {i}"} for i in range(30)]
    mapping = FieldMapping(prompt="{q}", response="{a}")
    whole = {"shuffle": 1, "group": "{q}"}
    train, test = (read(tmp_path, rows, mapping, rows=span, **whole)[0] for span in ((0, 5), (5, 99)))
    asked = [{e.prompt for e in part} for part in (train, test)]
    assert [len(part) for part in asked] == [5, 2] and not asked[0] & asked[1]
    assert len(train) + len(test) == 30
    assert all(sum(e.prompt == q for e in train) == sum(r["q"] == q for r in rows) for q in asked[0])


def test_a_file_of_the_hub_is_downloaded_once_and_numbered_records_are_read(tmp_path, monkeypatch):
    import huggingface_hub

    asked, local = [], tmp_path / "download.json"
    local.write_text(json.dumps({"0": {"source": "p", "target": "r"}, "1": {"source": "q", "target": "s"}}))

    def download(repo, filename, *, repo_type, revision):
        asked.append((repo, filename, repo_type, revision))
        return str(local)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    source = Source("hf://datasets/owner/name/data/file_en.json", mapping=FieldMapping("{source}", "{target}"))
    paths, _ = prepare([source], tmp_path / "out")
    prepare([source], tmp_path / "out")
    assert asked == [("owner/name", "data/file_en.json", "dataset", None)]
    found = list(read_records(paths, cache_dir=tmp_path / "cache"))
    assert [(e.prompt, e.response, e.source) for e in found] == [("p", "r", "file_en"), ("q", "s", "file_en")]
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: (_ for _ in ()).throw(OSError("offline")))
    with pytest.raises(DataError, match=r"hub did not give this file \(offline"):
        prepare([Source("hf://datasets/owner/name/other.json")], tmp_path / "out")


def test_plain_sources_keep_their_path_and_a_prepared_file_is_made_once(tmp_path, monkeypatch):
    raw = write(tmp_path / "raw.jsonl", [{"prompt": "p", "response": "r"}, {"prompt": "q", "response": "r"}])
    assert prepare([Source(raw)], tmp_path / "out") == ([raw], [])
    (first,), _ = prepare([Source(raw, rows=(1, 2))], tmp_path / "out")
    assert [e.prompt for e in read_records(first, cache_dir=tmp_path / "cache")] == ["q"]
    with monkeypatch.context() as patch:
        patch.setattr("ntkjax.data.mapping.iter_source", None)
        assert prepare([Source(raw, rows=(1, 2))], tmp_path / "out")[0] == [first]
    write(tmp_path / "raw.jsonl", [{"prompt": "new", "response": "r"}, {"prompt": "newer", "response": "r"}])
    (second,), _ = prepare([Source(raw, rows=(1, 2))], tmp_path / "out")
    assert second != first


def test_a_hub_source_asks_for_its_split_and_revision_once(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load(name, config, *, split, revision):
        asked.append((name, config, split, revision))
        return datasets.Dataset.from_list([{"sentence": "up", "label": 2}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    mapping = FieldMapping(
        prompt="{sentence}", choices=("negative", "neutral", "positive"), answer="{label}", answer_is="index"
    )
    source = Source("someone/data:part", split="test", revision="refs/x", mapping=mapping)
    paths, _ = prepare([source], tmp_path)
    prepare([source], tmp_path)
    assert asked == [("someone/data", "part", "test", "refs/x")]
    (example,) = read_records(paths, cache_dir=tmp_path / "cache")
    assert example.answer == "positive" and example.source == "data" and example.id == "data-part-test-1"


GOOD = {"q": "w", "a": "x", "place": 0}
INDEX = FieldMapping(prompt="{q}", choices=("x", "y"), answer="{place}", answer_is="index")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"q": "w"}, "field 'place' is missing (fields seen: q)"),
        ({"q": {"r": 1}, "place": 0}, "field 'q' is a dict"),
        ({"q": "w", "place": -1}, "place is '-1'"),
        ({"q": "w", "place": 2}, "from 0 to 1"),
        (["w"], "the record is no object"),
    ],
)
def test_a_record_that_does_not_fit_is_named_or_skipped(tmp_path, row, said):
    path = write(tmp_path / "raw.jsonl", [GOOD, row])
    with pytest.raises(DataError) as error:
        prepare([Source(path, mapping=INDEX)], tmp_path / "out")
    assert str(error.value).startswith(f"{path}:2: ") and said in str(error.value)
    _, (report,) = prepare([Source(path, mapping=INDEX)], tmp_path / "out", on_bad_record="skip")
    assert report["skipped"] == 1 and report["skipped_lines"][0].startswith(f"{path}:2: ")


def test_nothing_left_is_an_error_and_leaves_no_file(tmp_path):
    path = write(tmp_path / "raw.jsonl", [GOOD])
    with pytest.raises(DataError, match="no record is left"):
        prepare([Source(path, rows=(5, 6))], tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: FieldMapping(prompt="{q"), "braces"),
        (lambda: FieldMapping(prompt="{}", response="r"), "braces"),
        (lambda: FieldMapping(prompt="{q}"), "no answer"),
        (lambda: FieldMapping(prompt="{q}", answer="{a}", answer_is="index"), "needs choices"),
        (lambda: Source("x.jsonl", rows=(3, 3)), "first < last"),
    ],
)
def test_a_mapping_that_cannot_work_is_refused_when_made(make, said):
    with pytest.raises(ConfigError, match=said):
        make()
