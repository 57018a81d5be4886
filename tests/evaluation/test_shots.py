"""Few-shot prompts: the tokens by hand, which examples are drawn, and that results of other shots are not these."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from ntkjax.data import Example, render
from ntkjax.data.prompts import render_prompt
from ntkjax.errors import ConfigError, DataError
from ntkjax.evaluation import Batching, EvaluationSettings, evaluate_model
from ntkjax.evaluation.generation import generate_answers
from ntkjax.evaluation.shots import ShotRecords, Shots, check_separable, describe_shots, draw_shots, with_shots

ONE = Example("one", "s", "1+1?", None, "2")
TWO = Example("two", "s", "x", ({"role": "user", "content": "2+2?"},), "4")
QUESTION = Example("q", "s", "3+3?", None, "6", "6", ("5", "6"))
SETTINGS: dict[str, Any] = {"batching": Batching(400, 800), "progress": False}


def file_of(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pairs(start, stop):
    return [{"id": f"p{i}", "prompt": f"{i}?", "response": f"it is {i}."} for i in range(start, stop)]


def test_the_tokens_without_a_template(toys):
    tokenizer = toys.make_tokenizer(bos=True)
    shown = render(tokenizer, with_shots(QUESTION, [ONE, TWO], tokenizer))
    text = "1+1?\n2\n\nuser: 2+2?\n4\n\n3+3?\n6"
    assert shown.tokens == tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]
    assert shown.trained == [(len(shown.tokens) - 2, len(shown.tokens))]  # the question's own response and its end


def test_the_tokens_under_a_template(toys):
    tokenizer = toys.make_tokenizer(chat=True)
    shown = render(tokenizer, with_shots(QUESTION, [ONE, TWO], tokenizer))
    text = "<|user|>1+1?<|assistant|>2<|end|><|user|>2+2?<|assistant|>4<|end|><|user|>3+3?<|assistant|>6<|end|>"
    assert shown.tokens == tokenizer.encode(text, add_special_tokens=False)
    assert shown.trained == [(len(shown.tokens) - 2, len(shown.tokens))]


def test_a_conversation_keeps_its_system_message_in_front_and_its_own_turns_are_learned(toys):
    said = [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c")]
    chat = Example("c", "s", "", tuple({"role": role, "content": text} for role, text in said), "d")
    shown = with_shots(chat, [ONE], toys.make_tokenizer(chat=True))
    texts = [(m["role"], m["content"]) for m in shown.conversation()]
    assert texts == [said[0], ("user", "1+1?"), ("assistant", "2"), *said[1:], ("assistant", "d")]
    assert len(render(toys.make_tokenizer(chat=True), shown).trained) == 2
    plain = toys.make_tokenizer()
    alone, behind = render(plain, chat), render(plain, with_shots(chat, [ONE], plain))
    moved = len(behind.tokens) - len(alone.tokens)
    assert behind.tokens[moved:] == alone.tokens
    assert behind.trained == [(a + moved, b + moved) for a, b in alone.trained] and len(alone.trained) == 2


def test_a_shot_with_another_system_message_is_refused(toys):
    shot = Example("z", "s", "", ({"role": "system", "content": "Lie."}, {"role": "user", "content": "a"}), "b")
    with pytest.raises(DataError, match=r"shot 'z': its system message 'Lie\.' is not that of the question 'q'"):
        with_shots(QUESTION, [shot], toys.make_tokenizer(chat=True))


def test_which_are_drawn(write_records, tmp_path):
    test = write_records(pairs(0, 3))
    path = file_of(tmp_path / "shots.jsonl", pairs(1, 10))
    drawn = lambda k: draw_shots(EvaluationSettings(shots=k, shots_from=path), test)
    assert drawn(2).examples == drawn(7).examples[:2]
    assert {e.id for e in drawn(7).examples} == {f"p{i}" for i in range(3, 10)}  # p1 and p2 are asked in the test
    assert drawn(7).left_out == 2 and "2 of its examples ask what the test data ask" in describe_shots(drawn(7))
    with pytest.raises(ConfigError, match=r"shots.jsonl: 8 shots were asked for, and of its 9 examples 2 ask"):
        drawn(8)


@pytest.mark.parametrize("options", [{"shots": 2}, {"shots_from": "x"}, {"shots": -1}])
def test_options_that_cannot_be(options):
    with pytest.raises(ConfigError, match="--shots"):
        EvaluationSettings(**options)


@pytest.mark.parametrize("chat", [False, True])
def test_choices_likelihood_and_generation_all_get_them(toys, write_records, tmp_path, chat, monkeypatch):
    """Each of the three equals that of one example whose prompt already holds the shots, and differs from no shots."""
    tokenizer = toys.make_tokenizer(chat=chat)
    model = toys.make_model(tokenizer)
    row = {"id": "q", "prompt": "3+3?", "response": "it is six", "answer": "6", "choices": ["5", "6"]}
    path = file_of(tmp_path / "shots.jsonl", pairs(0, 3))
    wanted = EvaluationSettings(shots=2, shots_from=path, generation=True, max_new_tokens=6)
    got = evaluate_model(model, {}, write_records([row]), wanted, **SETTINGS)
    shots = got.shots.examples
    if chat:
        context = [m for e in shots for m in e.conversation()] + [{"role": "user", "content": "3+3?"}]
        by_hand = {**row, "messages": [*context, {"role": "assistant", "content": row["response"]}]}
        del by_hand["prompt"], by_hand["response"]
    else:
        by_hand = {**row, "prompt": "".join(f"{e.prompt}\n{e.response}\n\n" for e in shots) + "3+3?"}
    options = EvaluationSettings(generation=True, max_new_tokens=6, loss_turns="last")
    expected = evaluate_model(model, {}, write_records([by_hand]), options, **SETTINGS).outcomes[0]
    found = got.outcomes[0]
    np.testing.assert_allclose(found.logprobs, expected.logprobs, rtol=1e-5)
    np.testing.assert_allclose(found.nll, expected.nll, rtol=1e-5)
    own = expected.generated if chat else expected.generated.partition("\n\n")[0].rstrip()
    assert found.generated == own
    none = evaluate_model(model, {}, write_records([row]), **SETTINGS).outcomes[0]
    assert abs(none.nll - found.nll) > 1e-3 and np.abs(np.subtract(none.logprobs, found.logprobs)).max() > 1e-3
    prompt = render_prompt(tokenizer, with_shots(QUESTION, shots, tokenizer))
    seen = []
    monkeypatch.setattr(
        "ntkjax.evaluation.generation.generate", lambda m, p, prompts, **k: seen.extend(prompts) or [[]]
    )
    records = ShotRecords(write_records([row]), shots, tokenizer)
    list(generate_answers(model, {}, records, EvaluationSettings(max_new_tokens=6), batching=Batching(400, 800)))
    assert seen[0] == prompt


def test_too_long_is_cut_from_the_left_and_counted(toys, write_records, tmp_path):
    model = toys.make_model(toys.make_tokenizer(chat=True))
    row = {"id": "q", "prompt": "3+3?", "response": "So the answer is 6.", "answer": "6", "choices": ["5", "6"]}
    settings = EvaluationSettings(shots=3, shots_from=file_of(tmp_path / "shots.jsonl", pairs(0, 3)))
    whole = evaluate_model(model, {}, write_records([row]), settings, **SETTINGS).outcomes[0]
    short = {**SETTINGS, "batching": Batching(40, 800)}
    cut = evaluate_model(model, {}, write_records([row]), settings, **short).outcomes[0]
    assert whole.dropped_choices == 0 and cut.dropped_choices > 0


def test_a_made_up_question_is_no_part_of_the_answer(toys, write_records, monkeypatch):
    tokenizer = toys.make_tokenizer()
    model = toys.make_model(tokenizer)
    text = tokenizer.encode("So the answer is 5.\n\n9?\nSo the answer is 6.", add_special_tokens=False)
    monkeypatch.setattr("ntkjax.evaluation.generation.generate", lambda m, p, prompts, **k: [text for _ in prompts])
    row = {"id": "q", "prompt": "3+3?", "response": "6", "answer": "6", "choices": ["5", "6"]}
    for shots, predicted in (((ONE,), "5"), ((), "6")):
        records = ShotRecords(write_records([row]), shots, tokenizer)
        settings = EvaluationSettings(max_new_tokens=64)
        (answers,) = generate_answers(model, {}, records, settings, batching=Batching(400, 800))
        assert answers[0].predicted == predicted
    torn = dataclasses.replace(ONE, response="well\n\n2")
    shots = Shots("shots.jsonl", (torn,), 0)
    check_separable(shots, toys.make_tokenizer(chat=True))
    with pytest.raises(DataError, match="shot 'one' holds a blank line"):
        check_separable(shots, tokenizer)


def test_results_of_other_shots_are_not_these(toys, write_records, tmp_path):
    model, records = toys.make_model(toys.make_tokenizer()), write_records(pairs(20, 22))
    path = file_of(tmp_path / "shots.jsonl", pairs(0, 4))
    run = lambda **options: evaluate_model(
        model, {}, records, EvaluationSettings(**options), path=tmp_path / "o.jsonl", **SETTINGS
    )
    run(shots=2, shots_from=path)
    run(shots=2, shots_from=path)
    for other in ({"shots": 1, "shots_from": path}, {}):
        with pytest.raises(ConfigError, match="holds an evaluation with another shots"):
            run(**other)
    changed = [{**row, "response": "no"} for row in pairs(0, 4)]
    with pytest.raises(ConfigError, match="holds an evaluation with another shots"):
        run(shots=2, shots_from=file_of(tmp_path / "shots.jsonl", changed))
