"""Accuracy over choices: packed scores against one plain forward pass per choice, and a unigram by hand."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from ntkjax.data import render
from ntkjax.errors import ConfigError, DataError, UserError
from ntkjax.evaluation import Batching
from ntkjax.evaluation import choices as module
from ntkjax.evaluation.choices import (
    TIE_TOLERANCE,
    check_template,
    gold_choice,
    pick,
    score_choices,
    token_log_probs,
)

TEMPLATE = "So the answer is {}."


def one_by_one(model, example, max_length):
    """The oracle: one unpacked sequence per choice through ``model.logits``, right-padded so as to compile once."""
    sums, counts = [], []
    rendered = [render(model.tokenizer, example, response=TEMPLATE.format(c)) for c in example.choices]
    drop = max(0, max(len(r.tokens) for r in rendered) - max_length)
    for r in rendered:
        tokens, start = r.tokens[drop:], r.response_start - drop
        padded = np.zeros((1, 120), np.int64)
        padded[0, : len(tokens)] = tokens
        logp = log_softmax(np.asarray(model.logits(padded)[0]), axis=-1)
        picked = [float(logp[t - 1, tokens[t]]) for t in range(start, len(tokens))]
        sums.append(sum(picked))
        counts.append(len(picked))
    return np.array(sums), np.array(counts)


def scores_of(model, records, params=None, **options):
    batching = {"max_length": 200, "token_budget": 300}
    batching |= {name: options.pop(name) for name in ("max_length", "token_budget", "packing") if name in options}
    settings = {"batching": Batching(**batching), "max_buckets": 1, **options}
    return {s.row: s for batch in score_choices(model, params or {}, records, **settings) for s in batch}


@pytest.mark.parametrize(("family", "chat"), [("qwen3", True), ("gpt2", False)])
def test_packed_equals_one_sequence_per_choice(family, chat, toys, write_records):
    model = toys.make_model(toys.make_tokenizer(chat=chat), family)
    records = write_records(toys.choice_rows(7))
    got = scores_of(model, records)
    assert sorted(got) == list(range(7))
    for row, s in got.items():
        raw, tokens = one_by_one(model, records[row], 200)
        assert s.tokens.tolist() == tokens.tolist()
        np.testing.assert_allclose(s.norm, raw / tokens, atol=1e-5, rtol=0)
        # The sums reach hundreds of nats, so float32 is held to a relative error there.
        np.testing.assert_allclose(s.raw, raw, rtol=1e-5)


def test_packed_equals_one_sequence_per_choice_x64(x64, toys, write_records):
    model = toys.make_model(toys.make_tokenizer(chat=True), "qwen2", dtype="float64")
    records = write_records(toys.choice_rows(5))
    for row, s in scores_of(model, records, max_buckets=1).items():
        raw, _ = one_by_one(model, records[row], 200)
        np.testing.assert_allclose(s.raw, raw, atol=1e-10, rtol=1e-12)


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_several_examples_in_a_row_score_as_alone(family, x64, toys, write_records, monkeypatch):
    """One program whatever the examples; gpt2: a row longer than the table of learned positions."""
    model = toys.make_model(toys.make_tokenizer(chat=True), family, dtype="float64", max_positions=200)
    records = write_records(toys.choice_rows(9))
    alone = scores_of(model, records)
    before = token_log_probs._cache_size()
    packed = scores_of(model, records, packing=True, token_budget=512)
    assert sorted(packed) == list(range(9)) and token_log_probs._cache_size() == before + 1
    for row, scores in packed.items():
        np.testing.assert_allclose(scores.raw, alone[row].raw, atol=1e-10, rtol=1e-12)
        assert (scores.tokens.tolist(), scores.dropped) == (alone[row].tokens.tolist(), alone[row].dropped)
    scores_of(model, records, packing=True, token_budget=512, rows=[1, 5, 7])
    assert token_log_probs._cache_size() <= before + 2  # fewer scored tokens a row may be another shape


def test_truncated_prompts_are_counted_and_exact(model, nine):
    records = nine
    longest = {
        row: max(
            len(render(model.tokenizer, records[row], response=TEMPLATE.format(c)).tokens) for c in records[row].choices
        )
        for row in range(9)
    }
    limit = sorted(longest.values())[2]
    got = scores_of(model, records, max_length=limit)
    assert {row: s.dropped for row, s in got.items()} == {row: max(0, n - limit) for row, n in longest.items()}
    assert sum(s.dropped > 0 for s in got.values()) >= 2
    for row, s in got.items():
        np.testing.assert_allclose(s.raw, one_by_one(model, records[row], limit)[0], rtol=1e-5)


def test_scores_do_not_depend_on_the_batch(model, nine):
    records = nine
    together = scores_of(model, records)
    for options in ({"token_budget": 1}, {"token_budget": 200, "max_buckets": 2}):
        other = scores_of(model, records, **options)
        for row in together:
            np.testing.assert_allclose(other[row].raw, together[row].raw, rtol=1e-6)
    assert list(scores_of(model, records, rows=[4], token_budget=1)) == [4]


def test_params_are_laid_over_the_model(model, nine):
    records = nine
    changed = {"head": {"kernel": model.params["head"]["kernel"] * 0.5}}
    through_params = scores_of(model, records, params=changed)
    through_model = scores_of(model.with_params(changed), records)
    base = scores_of(model, records)
    for row in base:
        np.testing.assert_allclose(through_params[row].raw, through_model[row].raw, rtol=1e-6)
        assert np.abs(through_params[row].raw - base[row].raw).max() > 0.1


def test_unigram_by_hand(toys, tokenizer, write_records):
    """With the same logits everywhere, log p is a sum over the response's tokens, end token included."""
    scores = jnp.asarray(np.random.default_rng(0).normal(size=len(tokenizer)), jnp.float32)
    stub = toys.unigram_stub(tokenizer, scores)
    records = write_records(toys.choice_rows(3))
    logp = np.asarray(jax.nn.log_softmax(scores), dtype=np.float64)
    for row, s in scores_of(stub, records).items():
        for c, choice in enumerate(records[row].choices):
            ids = tokenizer(TEMPLATE.format(choice), add_special_tokens=False)["input_ids"]
            ids = [*ids, tokenizer.eos_token_id]
            assert s.tokens[c] == len(ids)
            np.testing.assert_allclose(s.raw[c], logp[ids].sum(), rtol=1e-6)
            np.testing.assert_allclose(s.norm[c], logp[ids].mean(), rtol=1e-6)


def test_head_in_blocks_changes_nothing(toys, tokenizer, nine, monkeypatch):
    scores = jnp.asarray(np.random.default_rng(1).normal(size=len(tokenizer)), jnp.float32)
    whole = scores_of(toys.unigram_stub(tokenizer, scores), nine)
    monkeypatch.setattr(module, "LOGIT_ELEMENTS", 5 * len(tokenizer))
    token_log_probs.clear_cache()  # the block size is read while tracing
    blocks = scores_of(toys.unigram_stub(tokenizer, scores), nine)
    for row in whole:
        np.testing.assert_allclose(blocks[row].raw, whole[row].raw, rtol=1e-6)


def test_one_compilation_per_bucket_and_none_for_other_weights(toys, tokenizer, nine):
    stub = toys.unigram_stub(tokenizer, jnp.zeros(len(tokenizer)))
    other = dataclasses.replace(stub, head_fn=jax.tree.map(lambda w: w + 1, stub.head_fn))
    token_log_probs.clear_cache()
    scores_of(stub, nine, token_budget=100, max_buckets=2)
    assert 1 <= token_log_probs._cache_size() <= 2
    first = token_log_probs._cache_size()
    scores_of(other, nine, token_budget=100, max_buckets=2)
    assert token_log_probs._cache_size() == first


def test_pick():
    assert pick(np.array([-3.0, -1.0, -2.0])) == (1, False)
    assert pick(np.array([-3.0, -1.0, -1.0])) == (1, True)
    # Closer than rounding: the first listed wins, whichever rounding favours.
    assert pick(np.array([-1.0 - TIE_TOLERANCE / 2, -1.0])) == (0, True)


def test_gold_choice():
    example = lambda **fields: SimpleNamespace(**{"id": "a", "choices": ["No", "Yes"], "answer": "Yes", **fields})
    assert gold_choice(example()) == 1
    assert gold_choice(example(answer=" yes ")) == 1
    assert gold_choice(example(choices=["yes", "Yes"])) == 1
    assert gold_choice(example(choices=None)) is None
    assert gold_choice(example(answer=None)) is None
    with pytest.raises(DataError, match=r"'a'.*'Maybe' is not among"):
        gold_choice(example(answer="Maybe"))
    with pytest.raises(DataError, match="expected at least two"):
        gold_choice(example(choices=["Yes"]))
    assert gold_choice(example(answer=" ")) is None
    assert gold_choice(example(answer="5 mW", choices=["5 MW", "5 mW"])) == 1
    assert gold_choice(example(answer="1,000", choices=["100", "1000"])) == 1
    with pytest.raises(DataError, match=r"'a'.*'5 mw' could be any of \['5 MW', '5 mW'\], among"):
        gold_choice(example(answer="5 mw", choices=["5 MW", "5 mW"]))


def test_no_choices_anywhere_is_refused(model, write_records):
    records = write_records([{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d", "answer": "d"}])
    with pytest.raises(UserError, match="none of the 2 examples has choices and an answer"):
        list(score_choices(model, {}, records, batching=Batching(100, 100)))


def test_learned_positions_are_a_limit(toys, write_records):
    model = toys.make_model(toys.make_tokenizer(), "gpt2", max_positions=32)
    records = write_records(toys.choice_rows(4))
    with pytest.raises(UserError, match=r"32 learned positions; set max_length to 32"):
        scores_of(model, records)
    assert len(scores_of(model, records, max_length=32)) == 4


@pytest.mark.parametrize("template", ["So the answer is", "{} or {}", "{answer}", "{"])
def test_templates_that_cannot_work(template):
    with pytest.raises(ConfigError, match=r"answer_template: expected text with one \{\}"):
        check_template(template)
