"""Choices as outputs of the model: the numbers that evaluation has, centred; and what cannot be done is refused."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from ntkjax.commands.stability.outputs import ChoiceOutputs, choice_outputs, questions
from ntkjax.data import read_records
from ntkjax.data.records import Example
from ntkjax.errors import ConfigError, UserError
from ntkjax.evaluation import Batching
from ntkjax.evaluation.choices import score_choices
from ntkjax.models import LoraConfig, load_lm

TEMPLATE = "So the answer is {}."


@pytest.fixture(scope="module")
def model(files):
    return load_lm(files.model, lora=LoraConfig(rank=2))


def example(name, choices, answer):
    return Example(name, "test", "Which?", None, "", answer, choices and tuple(choices))


def ask(model, records, kind="likelihood"):
    return questions(model, records, kind=kind, max_length=128, answer_template=TEMPLATE)


def test_likelihoods_are_those_of_evaluation_centred(model, files):
    records = read_records([files.test])
    asked = ask(model, records)
    outputs = choice_outputs(
        ChoiceOutputs(model.states_fn, model.head_fn), model.lora, asked.rows, token_budget=200
    )  # two questions at a time
    scored = [s for batch in score_choices(model, model.lora, records, batching=Batching(128, 4096)) for s in batch]
    for score in scored:
        np.testing.assert_allclose(outputs[score.row], score.raw - score.raw.mean(), atol=2e-5)
    assert len(asked) == len(scored) == 10 and asked.cut == 0
    assert [records[row].choices[gold] for row, gold in zip(asked.kept, asked.gold)] == [r.answer for r in records]


def test_logits_are_those_of_the_first_tokens(model, files):
    records = read_records([files.test])
    asked = ask(model, records, "logits")
    outputs = choice_outputs(
        ChoiceOutputs(model.states_fn, model.head_fn, "logits"), model.lora, asked.rows, token_budget=4096
    )
    tokens = np.asarray(asked.rows.batch.tokens)
    for row in (0, 7):
        place = int(asked.rows.predictor[row, 0])
        logits = np.asarray(model.logits(tokens[row : row + 1, : place + 1]))[0, -1]
        wanted = logits[np.asarray(asked.rows.target[row])]
        np.testing.assert_allclose(outputs[row], wanted - wanted.mean(), atol=2e-5)


def test_missing_choices_are_zero_and_take_no_part(model):
    examples = [example("a", ["red", "blue", "green"], "blue"), example("b", ["red", "blue"], "red")]
    asked = ask(model, examples)
    alone = ask(model, examples[1:])
    fn = ChoiceOutputs(model.states_fn, model.head_fn)
    outputs = choice_outputs(fn, model.lora, asked.rows, token_budget=4096)
    np.testing.assert_allclose(
        outputs[1], [*choice_outputs(fn, model.lora, alone.rows, token_budget=4096)[0], 0.0], atol=2e-5
    )
    np.testing.assert_allclose(outputs.sum(axis=1), 0, atol=1e-5)
    wide = choice_outputs(fn, model.lora, alone.padded(4).rows, token_budget=4096)
    np.testing.assert_allclose(wide[0, 2:], 0)
    jacobian = jax.jacobian(lambda p: fn(p, alone.padded(3).rows)[0, 2])(model.lora)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(jacobian))


def test_what_cannot_be_asked_is_said(model):
    assert ask(model, [example("a", None, None)]) is None
    same = [example("twins", ["red", "rust", "blue"], "red")]
    assert ask(model, same) is not None
    with pytest.raises(UserError, match=r"'twins'.*--outputs likelihood"):
        ask(model, same, "logits")
    with pytest.raises(ConfigError, match="embedding"):
        ask(model, same, "embedding")
