"""``ntkjax show``: the tokens are those that training gets, and the marks are S(x)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import ntkjax
from ntkjax.cli import main
from ntkjax.errors import ConfigError
from ntkjax.models import load_lm

TINY = str(Path(ntkjax.__file__).parent / "assets" / "tiny-lm")


@pytest.fixture
def chats(tmp_path):
    texts = ("I lost.", "It happens.", "I trained.", "It will pay off.")
    turns = [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(texts)]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"id": name, "messages": turns[:n]}) + "\n" for name, n in (("a", 2), ("b", 4))))
    return str(path)


def test_what_is_shown_is_what_is_trained(chats):
    shown = ntkjax.show(model=TINY, data=chats, row=(1,))
    (record,) = shown.records
    tokenizer = load_lm(TINY).tokenizer
    data = ntkjax.tokenise(ntkjax.read_records(chats), tokenizer)
    np.testing.assert_array_equal(record.tokens, data.tokens(1)[0])
    np.testing.assert_array_equal(record.trained, data.trained(1))
    assert (record.row, record.name, record.place) == (1, "b", f"{chats}:2")
    assert shown.stops == ["<|end|>"]
    assert [text for (mark, _), text in zip(record.parts(), shown.decoded[0]) if mark] == [
        "It happens.<|end|>",
        "It will pay off.<|end|>",
    ]


def test_the_command_prints_parts_and_tokens(chats, capsys):
    assert main(["show", "--model", TINY, "--data", chats, "--row", "0", "1", "--loss-turns", "last"]) == 0
    said = capsys.readouterr().out
    assert f"{chats}:1, id a" in said and f"{chats}:2, id b" in said
    assert said.count("learned [") == 2
    assert "'It will pay off.<|end|>'" in said
    assert "generation stops at: <|end|>" in said
    assert main(["show", "--model", TINY, "--data", chats, "--no-tokens"]) == 0
    assert len(capsys.readouterr().out.splitlines()) < 8


def test_a_row_that_is_not_there_is_named(chats):
    with pytest.raises(ConfigError, match=r"--row 2: there are 2 records; expected 0 to 1"):
        ntkjax.show(model=TINY, data=chats, row=(2,))
    with pytest.raises(ConfigError, match=r"--row names no record"):
        ntkjax.show(model=TINY, data=chats, row=())


def test_what_was_lost_and_where_generation_stops(tmp_path, capsys):
    model, data = tmp_path / "m", tmp_path / "d.jsonl"
    shutil.copytree(TINY, model)
    (model / "generation_config.json").write_text('{"eos_token_id": [4, 5000]}')
    call = {"function": {"name": "f", "arguments": {}}}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [call]}]
    data.write_text(json.dumps({"messages": turns, "lang": "en"}) + "\n{\n")
    assert main(["show", "--model", str(model), "--data", str(data), "--no-tokens", "--on-bad-record", "skip"]) == 0
    said = capsys.readouterr().out
    fourth = load_lm(TINY).tokenizer.convert_ids_to_tokens(4)
    assert f"generation stops at: <|end|>, {fourth}, 5000 (no token of the tokenizer)" in said
    assert "data: read 1, skipped 1, cut 0, columns not used: lang, messages[].tool_calls" in said
    assert f"first skipped: {data}:2: not valid JSON" in said and "tokens: calls_lost 1" in said
