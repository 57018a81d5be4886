"""What reading lost is said at the end of a command."""

from __future__ import annotations

import json
from pathlib import Path

from ntkjax.cli import main
from ntkjax.data import read_records
from ntkjax.data.schema import CUT_MESSAGES
from ntkjax.pipeline.reading import reading, unused_columns


def records(**more):
    return {"records": 200, "skipped": 0, "skipped_lines": [], "ignored_fields": {}, **more}


def test_one_line_for_each_role_names_everything():
    tokens = {"examples": 200, "tokens": 999, "cut": 3, "prompt_truncated": 3, "response_truncated": 1}
    tokens |= {"rendered_apart": 0}
    ignored = {"lang": 200, "topic": 3, CUT_MESSAGES: 4}
    said = reading({"pool": {"records": records(ignored_fields=ignored), "tokens": tokens}, "dev": None})
    assert said.splitlines() == [
        "pool: read 200, skipped 0, cut 7, columns not used: lang, topic",
        "  tokens: prompt_truncated 3, response_truncated 1",
    ]
    assert reading({"test": {"records": records()}}) == "test: read 200, skipped 0, cut 0, columns not used: none"


def test_what_was_skipped_comes_with_the_first_reason():
    lost = records(skipped=2, skipped_lines=["f.jsonl:3: bad; expected", "f.jsonl:9: worse"], renamed_ids=5)
    mapped = [{"skipped": 1, "skipped_lines": ["raw.jsonl:1: no"], "left_out": 7}]
    said = reading({"a": {"records": lost}, "b": {"records": records(), "mapped": mapped}, "c duplicates": {"x": 1}})
    assert said.splitlines() == [
        "a: read 200, skipped 2, cut 0, ids of two files renamed 5, columns not used: none",
        "  first skipped: f.jsonl:3: bad; expected",
        "b: read 200, skipped 1, cut 0, left out by where 7, columns not used: none",
        "  first skipped: raw.jsonl:1: no",
    ]


def test_fields_that_the_template_reads_are_used():
    ignored = {"messages[].reasoning_content": 3, "messages[].name": 1, "tools": 2, "lang": 9}
    assert unused_columns(ignored, {}) == list(ignored)
    assert unused_columns(ignored, {"reasoning_content": 3, "tools": 2}) == ["messages[].name", "lang"]


def test_many_columns_are_counted():
    said = reading({"pool": {"records": records(ignored_fields={f"c{i:02}": 1 for i in range(20)})}})
    assert said.endswith("c10, c11, and 8 more")


def test_commands_say_what_they_read(files, tmp_path, capsys):
    """evaluate and select; the others print through the same helper."""
    test = [json.loads(line) | {"lang": "en"} for line in Path(files.test).read_text().splitlines()][:4]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*test, {"prompt": "p"}]))
    flags = [*files.flags("model"), "--on-bad-record", "skip"]
    assert main(["evaluate", *flags, "--test", str(tmp_path / "test.jsonl"), "--out", str(tmp_path / "e")]) == 0
    said = capsys.readouterr().out
    names = ", ".join(read_records(tmp_path / "test.jsonl", on_bad_record="skip").report["ignored_fields"])
    assert f"test: read 4, skipped 1, cut 0, columns not used: {names}" in said and "lang" in names
    assert f"first skipped: {tmp_path / 'test.jsonl'}:5: the field 'response' is missing" in said
    out = tmp_path / "s"
    more = [*files.flags("domain", "pool"), "--n", "3", "--method", "length", "--skip-warmup", "--out", str(out)]
    assert main(["select", *flags, *more, "--test", str(tmp_path / "test.jsonl"), "--selected-format", "hf"]) == 0
    said = capsys.readouterr().out
    assert "pool: read 40, skipped 0" in said and "domain: read" in said and "test: read 5, skipped 0" in said
    assert f"selected 3 examples: {out / 'selected'}" in said and (out / "selected" / "state.json").exists()
