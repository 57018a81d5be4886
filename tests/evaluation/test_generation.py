"""Generated answers: what is read, what is forced and how it is counted, with scripted text; then the generator."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from ntkjax.data import render_prompt
from ntkjax.errors import ConfigError
from ntkjax.evaluation import Batching, EvaluationSettings
from ntkjax.evaluation import generation as module
from ntkjax.evaluation.choices import pack_choices, score_packed
from ntkjax.evaluation.generation import forced_text, generate_answers, gold_answer
from ntkjax.models.generate import generate


def rows_of(n, choices=("no", "yes"), answer="yes"):
    rows = [
        {
            "id": f"x{i}",
            "prompt": f"what is {i}?",
            "response": f"So the answer is {answer}.",
            "answer": answer,
        }
        for i in range(n)
    ]
    return [row | ({"choices": list(choices)} if choices else {}) for row in rows]


class Script:
    """In place of ``generate``: what to say to which prompt, and a record of what was asked."""

    def __init__(self, tokenizer, say):
        self.tokenizer, self.say, self.calls = tokenizer, say, []

    def __call__(self, model, params, prompts, *, max_new_tokens, batch_size):
        self.calls.append(([self.tokenizer.decode(p) for p in prompts], max_new_tokens, batch_size))
        answers = [self.say(self.tokenizer.decode(p)) for p in prompts]
        return [[*self.tokenizer(a)["input_ids"], self.tokenizer.eos_token_id][:max_new_tokens] for a in answers]


def run(monkeypatch, model, records, say, **options):
    script = Script(model.tokenizer, say)
    monkeypatch.setattr(module, "generate", script)
    settings = {"max_length": 200, "token_budget": 400, "max_new_tokens": 60, **options}
    return answers_of(model, records, **settings), script


def answers_of(model, records, *, max_length, token_budget, **settings):
    """By row, under these settings of an evaluation."""
    generated = generate_answers(
        model, {}, records, EvaluationSettings(**settings), batching=Batching(max_length, token_budget)
    )
    return {a.row: a for batch in generated for a in batch}


def by_prompt(*texts):
    """Says ``texts[i]`` to the prompt "what is i?"."""
    return lambda prompt: texts[int(prompt.partition("what is ")[2].partition("?")[0])]


@pytest.fixture
def stub(toys, tokenizer):
    """Prefers the choice whose tokens are likelier: "n" is likelier than everything else."""
    scores = jnp.zeros(len(tokenizer)).at[tokenizer.convert_tokens_to_ids("n")].set(3.0)
    return toys.unigram_stub(tokenizer, scores)


def test_parsed_unmatched_and_wrong(monkeypatch, stub, write_records):
    records = write_records(rows_of(4))
    say = by_prompt(
        "I think. So the answer is Yes.",
        "So the answer is no.",
        "So the answer is maybe.",
        "So the answer is yes. So the answer is no.",
    )
    answers, script = run(monkeypatch, stub, records, say)
    assert [answers[i].how for i in range(4)] == ["parsed", "parsed", "unmatched", "parsed"]
    assert [answers[i].predicted for i in range(4)] == ["yes", "no", "maybe", "no"]
    assert [answers[i].correct for i in range(4)] == [True, False, False, False]
    assert answers[0].text == "I think. So the answer is Yes."
    assert answers[0].tokens == len(stub.tokenizer(answers[0].text)["input_ids"])
    assert len(script.calls) == 1


def test_choices_that_differ_in_case_or_signs(monkeypatch, stub, write_records):
    rows = [row | {"choices": ["<5 mW", "<5 MW", ">5 mW"]} for row in rows_of(4, choices=None, answer="<5 mW")]
    say = by_prompt(
        "So the answer is <5 mW, since.",
        "So the answer is **<5 MW**.",
        "So the answer is >5 mW.",
        "So the answer is <5 mw",
    )
    answers, _ = run(monkeypatch, stub, write_records(rows), say)
    assert [answers[i].predicted for i in range(4)] == ["<5 mW", "<5 MW", ">5 mW", "<5 mw"]
    assert [answers[i].how for i in range(4)] == ["parsed", "parsed", "parsed", "unmatched"]
    assert [answers[i].correct for i in range(4)] == [True, False, False, False]


def test_forced_choice_takes_the_likeliest(monkeypatch, stub, write_records):
    records = write_records(rows_of(2, answer="no"))
    answers, script = run(monkeypatch, stub, records, by_prompt("I do not know", ""))
    # "n" is likely, so "no" beats "yes" after whatever was generated.
    assert [(a.how, a.predicted, a.correct) for a in answers.values()] == [("forced", "no", True)] * 2
    assert answers[0].text == "I do not know" and answers[1].text == ""
    assert len(script.calls) == 1


def test_forced_choice_with_a_real_model_equals_whole_sequences(monkeypatch, toys, model, write_records):
    """The branch after the shared text decides alone: compare with scoring every token of every sequence."""
    records = write_records(rows_of(3, choices=["no", "yes", "the thing"]))
    answers, _ = run(monkeypatch, model, records, by_prompt("well", "in the end", "hm"))
    for i, text in enumerate(["well", "in the end", "hm"]):
        responses = [forced_text(text, "So the answer is {}.", c) for c in records[i].choices]
        packed = pack_choices(model.tokenizer, [records[i]], [responses], max_length=200)
        ((_, sums),) = next(score_packed(model, {}, packed, token_budget=400, max_buckets=1))
        assert answers[i].predicted == records[i].choices[int(np.argmax(sums))]


def test_without_choices_a_few_more_tokens_are_read(monkeypatch, stub, write_records):
    records = write_records(rows_of(3, choices=None, answer="18"))

    def say(prompt):
        if prompt.endswith("So the answer is"):
            return " 18. And more" if "what is 0?" in prompt else " ..."
        return "So the answer is 18.0." if "what is 2?" in prompt else "Let me think"

    answers, script = run(monkeypatch, stub, records, say)
    assert [answers[i].how for i in range(3)] == ["forced", "forced", "parsed"]
    assert [answers[i].predicted for i in range(3)] == ["18", None, "18.0"]
    assert [answers[i].correct for i in range(3)] == [True, False, True]
    prompts, new, _ = script.calls[1]
    assert prompts[0] == "what is 0?\nLet me think So the answer is" and new == 16


def test_fixed_rows_and_cut_prompts(monkeypatch, stub, write_records):
    records = write_records([{**row, "prompt": "long " * 60 + row["prompt"]} for row in rows_of(5)])
    say = lambda prompt: "So the answer is yes."
    answers, script = run(monkeypatch, stub, records, say, max_length=110, token_budget=260)
    assert sorted(answers) == list(range(5))
    # Five examples in batches of one size: the last one is filled up.
    assert {(len(prompts), size) for prompts, _, size in script.calls} == {(2, 2)}
    assert len(script.calls) == 3
    whole = [len(render_prompt(stub.tokenizer, records[i])) for i in range(5)]
    lengths = {len(stub.tokenizer(p)["input_ids"]) for prompts, _, _ in script.calls for p in prompts}
    assert lengths == {whole[0] - answers[0].dropped} and answers[0].dropped > 100
    # Prompt, new tokens and the longest forced answer together fit.
    assert max(lengths) + 60 + len(stub.tokenizer("So the answer is yes.")["input_ids"]) < 110


def test_a_forced_answer_fits_however_long_the_text(monkeypatch, model, write_records):
    records = write_records([{**row, "prompt": "long " * 60 + row["prompt"]} for row in rows_of(2)])
    answers, _ = run(monkeypatch, model, records, lambda prompt: "x " * 100, max_length=110)
    assert [a.how for a in answers.values()] == ["forced", "forced"]
    assert answers[0].tokens == 60


def test_examples_without_gold_are_not_judged(monkeypatch, stub, write_records):
    records = write_records([{"id": "a", "prompt": "what is 0?", "response": "nothing"}])
    answers, _ = run(monkeypatch, stub, records, by_prompt("So the answer is 4."))
    assert (answers[0].predicted, answers[0].correct) == ("4", None)


def test_gold_answer():
    from ntkjax.evaluation.answers import compile_pattern, default_pattern

    pattern = compile_pattern(default_pattern("So the answer is {}."))
    example = lambda answer, response, choices=None: SimpleNamespace(answer=answer, response=response, choices=choices)
    assert gold_answer(example("7", "So the answer is 8."), pattern) == "7"
    assert gold_answer(example(None, "So the answer is 8."), pattern) == "8"
    assert gold_answer(example(None, ""), pattern) is None
    assert gold_answer(example(None, "So the answer is U.S. Army."), pattern) == "U.S. Army"
    assert gold_answer(example(None, "So the answer is rr, not Rr.", ["Rr", "rr"]), pattern) == "rr"


def test_no_room_is_refused(monkeypatch, stub, write_records):
    records = write_records(rows_of(2))
    with pytest.raises(ConfigError, match=r"max_new_tokens: 60 new tokens .* max_length 70 .*raise max_length"):
        run(monkeypatch, stub, records, by_prompt("a", "b"), max_length=70)


def test_the_real_generator(model, write_records):
    """The text kept is what greedy generation gives, whatever the batches."""
    records = write_records(rows_of(3))
    settings = {"max_length": 100, "token_budget": 80, "max_new_tokens": 8}
    answers = answers_of(model, records, **settings)
    prompts = [render_prompt(model.tokenizer, records[i]) for i in range(3)]
    expected = generate(model, {}, prompts, max_new_tokens=8, batch_size=4)
    for i in range(3):
        assert answers[i].text == model.tokenizer.decode(expected[i], skip_special_tokens=True).strip()
        assert answers[i].predicted in ("no", "yes") or answers[i].how == "unmatched"
