"""Tokenising: equal to rendering one by one, truncation exact and counted, the cache keyed by its inputs."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ntkjax.data import read_records, render, tokenise
from ntkjax.data.encode import truncate
from ntkjax.data.prompts import Rendered
from ntkjax.errors import ConfigError, DataError


@pytest.fixture
def records(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "f.jsonl"
    with path.open("w") as file:
        for i in range(40):
            prompt, response = "p" * rng.integers(1, 40), "r" * rng.integers(1, 30)
            file.write(
                json.dumps({"id": f"e{i}", "source": f"s{i % 3}", "prompt": prompt, "response": response}) + "\n"
            )
    return read_records(path)


@pytest.mark.parametrize("chat", [False, True])
def test_equal_to_rendering_one_by_one(records, toy_tokenizer, toy_chat_tokenizer, chat, monkeypatch):
    monkeypatch.setattr("ntkjax.data.encode.BLOCK", 7)
    tokenizer = toy_chat_tokenizer if chat else toy_tokenizer
    data = tokenise(records, tokenizer)
    assert len(data) == len(records) == data.report["examples"]
    for i, example in enumerate(records):
        tokens, start = data.tokens(i)
        expected = render(tokenizer, example)
        assert tokens.dtype == np.int32
        assert (tokens.tolist(), start) == (expected.tokens, expected.response_start)
        assert data.response_lengths[i] == len(example.response) + 1
    assert data.report["tokens"] == data.lengths.sum()
    assert not any(value for name, value in data.report.items() if name not in ("examples", "tokens"))
    assert list(data.ids) == list(records.ids)
    assert list(data.sources) == list(records.sources)
    assert data.records is records


def test_truncation_is_counted(records, toy_tokenizer):
    limit = 24
    whole, cut = tokenise(records, toy_tokenizer), tokenise(records, toy_tokenizer, max_length=limit)
    prompts = responses = lost_prompt = lost_response = 0
    for i in range(len(records)):
        (tokens, start), (short, at) = whole.tokens(i), cut.tokens(i)
        prompt, response = tokens[:start].tolist(), tokens[start:].tolist()
        kept = response[: limit - 1]
        kept_prompt = prompt[max(0, len(prompt) - (limit - len(kept))) :]
        assert short.tolist() == kept_prompt + kept
        assert at == len(kept_prompt) >= 1
        prompts += len(kept_prompt) < len(prompt)
        responses += len(kept) < len(response)
        lost_prompt += len(prompt) - len(kept_prompt)
        lost_response += len(response) - len(kept)
    assert prompts and responses
    report = cut.report
    assert (report["prompt_truncated"], report["response_truncated"]) == (prompts, responses)
    assert report["cut"] == int((whole.lengths > cut.lengths).sum())
    assert (report["prompt_tokens_lost"], report["response_tokens_lost"]) == (lost_prompt, lost_response)
    assert whole.lengths.sum() - cut.lengths.sum() == lost_prompt + lost_response


def test_truncation_keeps_the_bos():
    rendered = Rendered([9, 1, 2, 3, 4, 50, 51], 5)
    assert truncate(rendered, 5, bos=9).tokens == [9, 3, 4, 50, 51]
    assert truncate(rendered, 5, bos=None).tokens == [2, 3, 4, 50, 51]
    assert truncate(rendered, 3, bos=9).tokens == [4, 50, 51]
    short = truncate(rendered, 2, bos=9)
    assert (short.tokens, short.response_start, short.prompt_lost, short.response_lost) == ([4, 50], 1, 4, 1)
    assert truncate(rendered, 7, bos=9).tokens == rendered.tokens


def test_the_cache_knows_tokenizer_length_and_content(
    records, toy_tokenizer, toy_chat_tokenizer, tmp_path, monkeypatch
):
    from ntkjax.data import encode

    made, build = [], encode._write
    monkeypatch.setattr(encode, "_write", lambda *arguments: (made.append(1), build(*arguments)))
    fingerprints = set()
    for tokenizer in (toy_tokenizer, toy_chat_tokenizer):
        for length in (16, 64):
            for part in (records, records.subset([1, 2])):
                for _ in range(2):
                    fingerprints.add(tokenise(part, tokenizer, max_length=length, cache_dir=tmp_path / "c").fingerprint)
    assert len(made) == len(fingerprints) == 8


def test_end_tokens_inside_a_response_are_reported(tmp_path, toy_tokenizer):
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps({"prompt": "p", "response": "one<|end|>two"}))
    assert tokenise(read_records(path), toy_tokenizer).report["end_token_inside"] == 1


def test_a_template_that_renders_apart_is_reported(records, toy_chat_tokenizer):
    import copy

    tokenizer = copy.deepcopy(toy_chat_tokenizer)
    tokenizer.chat_template = "{{ messages | length }}{{ messages[0]['content'] }}"
    assert tokenise(records, tokenizer).report["rendered_apart"] == len(records)


def test_errors(records, toy_tokenizer):
    with pytest.raises(ConfigError, match="max_length is 1"):
        tokenise(records, toy_tokenizer, max_length=1)
    with pytest.raises(DataError, match="no records"):
        tokenise(records.subset([]), toy_tokenizer)


def chat(*texts, **fields):
    """A conversation of alternating user and assistant texts."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[k % 2], "content": text, **fields} for k, text in enumerate(texts)]}


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return read_records(path)


def test_every_turn_is_marked(tmp_path, toy_chat_tokenizer):
    records = write(tmp_path / "f.jsonl", chat("a", "bb", "c", "dd"), chat("e", "f"))
    data = tokenise(records, toy_chat_tokenizer)
    for i, texts in enumerate((["bb<|end|>", "dd<|end|>"], ["f<|end|>"])):
        tokens, start = data.tokens(i)
        mark = data.trained(i)
        assert toy_chat_tokenizer.decode(tokens[mark]) == "".join(texts)
        assert toy_chat_tokenizer.decode(tokens[start:]) == texts[-1]
        assert data.response_lengths[i] == mark.sum()
        batch = data.collate([i], rows=2)
        assert batch.response_mask[0, : len(tokens)].tolist() == mark.tolist()
        assert batch.response_mask.sum() == mark.sum()
    last = tokenise(records, toy_chat_tokenizer, loss_turns="last")
    assert last.response_lengths.tolist() == [3, 2]
    assert last.fingerprint != data.fingerprint


def test_whole_turns_are_cut_from_the_front(tmp_path, toy_chat_tokenizer):
    records = write(tmp_path / "f.jsonl", chat("a", "bb", "c", "dd", "e", "ff"))
    whole = tokenise(records, toy_chat_tokenizer)
    exchange = len(whole.tokens(0)[0]) // 3
    for room, turns in ((exchange * 2 + 3, 1), (exchange * 2, 1), (exchange, 2)):
        cut = tokenise(records, toy_chat_tokenizer, max_length=room)
        tokens = cut.tokens(0)[0]
        assert tokens.tolist() == whole.tokens(0)[0][turns * exchange :].tolist()
        assert toy_chat_tokenizer.decode(tokens[cut.trained(0)]) == ["", "dd<|end|>ff<|end|>", "ff<|end|>"][turns]
        assert (cut.report["turns_truncated"], cut.report["prompt_tokens_lost"]) == (turns, turns * exchange)


def test_refused_records_are_skipped_by_name(tmp_path, toy_chat_tokenizer):
    import copy

    tokenizer = copy.deepcopy(toy_chat_tokenizer)
    rule = "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('not this') }}{% endif %}{% endfor %}"
    tokenizer.chat_template = rule + tokenizer.chat_template
    records = write(tmp_path / "f.jsonl", chat("a", "b"), chat("no", "b"), chat("c", "d"))
    with pytest.raises(DataError, match=r"f\.jsonl:2: record .*refuses it \(not this; roles: user, assistant\)"):
        tokenise(records, tokenizer)
    data = tokenise(records, tokenizer, on_bad_record="skip")
    assert [example.prompt for example in data.records] == ["a", "c"]
    assert (len(data), data.report["examples"], data.report["skipped"]) == (2, 2, 1)
    assert "f.jsonl:2" in data.report["skipped_lines"][0]
    with pytest.raises(DataError, match="no record is left"):
        tokenise(records.subset([1]), tokenizer, on_bad_record="skip")


def test_fields_that_the_template_reads_are_counted(tmp_path, toy_tokenizer):
    import copy

    tokenizer = copy.deepcopy(toy_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.mood }}{{ m.content }}<|end|>{% endfor %}"
    records = write(tmp_path / "f.jsonl", chat("a", "b", mood="glad"), chat("a", "c"))
    assert tokenise(records, tokenizer).report["template_fields"] == {"mood": 1}
    assert tokenise(records, toy_tokenizer).report["template_fields"] == {}
