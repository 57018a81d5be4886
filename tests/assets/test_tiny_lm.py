"""The model that ships: it loads, is small, knows the format, half knows the skills, and not the domain."""

import dataclasses

import numpy as np
import pytest

from ntkjax.assets import DEMO, planted_task, tiny_lm_path
from ntkjax.assets.make_tiny_lm import BASE_DOMAIN_ACCURACY, HELD_OUT_NLL, Recipe, encode, make
from ntkjax.assets.planted import final_sentence, pretraining_rows
from ntkjax.models import load_lm
from ntkjax.types import Batch


@pytest.fixture(scope="module")
def model():
    return load_lm(tiny_lm_path(), lora=None)


@pytest.fixture(scope="module")
def task():
    return planted_task(0)


def nll(model, rows, length=48) -> np.ndarray:
    batch = encode(model.tokenizer, rows, length)
    parts = [slice(i, i + 200) for i in range(0, len(rows), 200)]
    take = lambda part: Batch(batch.tokens[part], batch.response_mask[part], batch.lengths[part], batch.index[part])
    return np.concatenate([np.asarray(model.nll_fn({}, take(part))) for part in parts])


def choice_accuracy(model, rows) -> float:
    """Share of rows whose right answer has the least NLL; one token of each response differs, so means will do."""
    hits = []
    options = [{"prompt": row["prompt"], "response": final_sentence(c)} for row in rows for c in row["choices"]]
    scores = iter(nll(model, options))
    for row in rows:
        values = [next(scores) for _ in row["choices"]]
        hits.append(row["choices"][int(np.argmin(values))] == row["answer"])
    return float(np.mean(hits))


def test_directory_is_small_and_holds_what_hugging_face_expects():
    files = {path.name: path.stat().st_size for path in tiny_lm_path().iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(files)
    assert sum(files.values()) < 3_000_000


def test_tokenizer_gives_any_text_back_and_knows_the_task(model, task):
    for text in ("So the answer is 42.", "Grüße, 東京!\n\ttab", task.pool[0]["prompt"]):
        assert model.tokenizer.decode(model.tokenizer(text)["input_ids"]) == text
    assert len(model.tokenizer("So the answer is 42.")["input_ids"]) == 6


def test_chat_template_ends_turns_with_the_end_token(model):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    text = model.tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|user|>hi<|end|><|assistant|>yes<|end|>"
    prompt = model.tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt) and prompt.endswith("<|assistant|>")
    assert model.tokenizer.eos_token == "<|end|>"


def test_likelihood_on_unseen_text_is_what_the_recipe_says(model, task):
    fresh = np.mean(nll(model, pretraining_rows(99, 300)))
    assert fresh < HELD_OUT_NLL
    # The pool asks for more than the pre-training text does: new arguments, longer lists.
    assert np.mean(nll(model, task.pool[:300])) > 5 * fresh


def test_base_accuracy_is_what_the_recipe_says(model, task):
    assert abs(choice_accuracy(model, task.test) - BASE_DOMAIN_ACCURACY) < 0.06
    told = [row for row in pretraining_rows(99, 300) if row["form"] == "story"]
    assert choice_accuracy(model, told) > 0.9


def test_demo_fits_the_lengths_of_the_task(model, task):
    rows = task.pool + task.train + task.dev + task.test
    assert encode(model.tokenizer, rows, DEMO.max_length).lengths.max() <= DEMO.max_length
    assert len(task.pool) == DEMO.pool_size and len(task.train) == DEMO.domain_size


@pytest.mark.slow
def test_recipe_runs_and_gives_the_same_model_twice(tmp_path):
    recipe = Recipe(rows=200, steps=3, warmup_steps=1, batch_size=8, length=64, hidden_size=32, num_layers=2)
    for name in ("a", "b"):
        make(tmp_path / name, recipe)
    one, two = (load_lm(tmp_path / name, lora=None) for name in ("a", "b"))
    tokens = np.arange(12, dtype=np.int32)[None]
    np.testing.assert_array_equal(one.logits(tokens), two.logits(tokens))
    other = dataclasses.replace(recipe, seed=1)
    make(tmp_path / "c", other)
    assert not np.array_equal(one.logits(tokens), load_lm(tmp_path / "c", lora=None).logits(tokens))
