"""`evaluate_model` end to end: outcomes and summary by hand, and a killed run that goes on where it stopped."""

import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from ntkjax.errors import ConfigError, UserError
from ntkjax.evaluation import Batching, EvaluationSettings, evaluate_model, read_outcomes, summarise
from ntkjax.evaluation import run as module
from ntkjax.evaluation.outcomes import Outcome

SETTINGS: dict[str, Any] = {"batching": Batching(200, 150), "progress": False}


@pytest.fixture
def stub(toys, tokenizer):
    """Logits that are the same everywhere; the letters of "yes" are likelier."""
    import jax

    scores = jnp.zeros(len(tokenizer)).at[jnp.asarray(tokenizer.convert_tokens_to_ids(list("yes")))].set(5.0)

    def nll(weights, params, batch):
        logp = jax.nn.log_softmax(weights)
        mask = jnp.asarray(batch.response_mask).astype(logp.dtype)
        return -(mask * logp[jnp.asarray(batch.tokens)]).sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1)

    stub = toys.unigram_stub(tokenizer, scores)
    object.__setattr__(stub, "nll_fn", jax.tree_util.Partial(nll, scores))
    object.__setattr__(stub, "params", {"scores": scores})
    return stub


def yes_no(n):
    rows = []
    for i in range(n):
        answer = "yes" if i % 4 else "no"
        rows.append(
            {
                "id": f"x{i}",
                "source": "s" if i < n - 2 else "t",
                "prompt": f"is {i} so?",
                "response": f"So the answer is {answer}.",
                "answer": answer,
                "choices": ["no", "yes"],
            }
        )
    return rows


def test_outcomes_and_summary_by_hand(stub, write_records):
    records = write_records([*yes_no(8), {"id": "free", "prompt": "why?", "response": "Because."}])
    result = evaluate_model(stub, {}, records, **SETTINGS)
    assert [o.id for o in result.outcomes] == [*(f"x{i}" for i in range(8)), "free"]
    assert all(o.predicted_raw == "yes" and not o.tie_raw for o in result.outcomes[:8])
    assert [o.correct_raw for o in result.outcomes] == [bool(i % 4) for i in range(8)] + [None]
    free = result.outcomes[8]
    assert free.nll is not None and free.logprobs is None and free.gold is None
    s = result.summary
    assert (s["n"], s["accuracy"], s["accuracy_kind"]) == (9, 0.75, "raw")
    assert s["accuracy_interval"][0] < 0.75 < s["accuracy_interval"][1]
    c = s["choices"]
    assert (c["n"], c["without_choices"], c["majority_answer"], c["majority_accuracy"]) == (8, 1, "yes", 0.75)
    assert c["majority_accuracy_by_source"] == 0.75 and c["chance"] == 0.5
    assert c["gold_shares"] == {"yes": 0.75, "no": 0.25} and c["predicted_raw_shares"] == {"yes": 1.0}
    assert c["by_source"]["t"] == {"n": 2, "accuracy_raw": 1.0, "accuracy_norm": 1.0}
    assert s["likelihood"]["n"] == 9 and s["likelihood"]["without_tokens"] == 0
    assert s["generation"] is None
    json.dumps(s, allow_nan=False)
    # The NLL of a gold response is minus its log-probability per token.
    o = result.outcomes[1]
    assert o.nll == pytest.approx(-o.logprobs[1] / o.logprob_tokens[1], rel=1e-5)
    assert o.nll_tokens == o.logprob_tokens[1]


def test_likelihood_is_the_same_with_and_without_choices(stub, write_records, monkeypatch):
    """Responses that a choice has already scored take no second pass, and come out the same."""
    rows = [*yes_no(4), {**yes_no(5)[4], "response": "Because. So the answer is no."}, yes_no(6)[5]]
    rows[5]["prompt"] = "long " * 40
    records = write_records(rows)
    limited = {**SETTINGS, "batching": Batching(100, 150)}
    alone = evaluate_model(stub, {}, records, EvaluationSettings(choices=False), **limited)
    passes, real = [], module.response_nll
    monkeypatch.setattr(module, "response_nll", lambda *a, **o: passes.extend(o["indices"]) or real(*a, **o))
    together = evaluate_model(stub, {}, records, **limited)
    assert sorted(passes) == [4, 5]  # another text, and a prompt that was cut
    for a, b in zip(alone.outcomes, together.outcomes):
        assert a.nll_tokens == b.nll_tokens
        assert a.nll == pytest.approx(b.nll, rel=1e-5)


def test_by_likelihood_the_index_decides(stub, write_records):
    """Choices that differ in case only: one of them is right, whichever the gold answer is."""
    rows = [{**row, "choices": ["YES", "yes"], "answer": answer} for row, answer in zip(yes_no(2), ("YES", "yes"))]
    result = evaluate_model(stub, {}, write_records(rows), **SETTINGS)
    assert [o.predicted_raw for o in result.outcomes] == ["yes", "yes"]
    assert [(o.correct_raw, o.correct_norm) for o in result.outcomes] == [(False, False), (True, True)]
    c = result.summary["choices"]
    assert c["majority_accuracy"] == 0.5 and c["gold_shares"] == {"YES": 0.5, "yes": 0.5}


def test_ties_and_truncation_are_counted(toys, tokenizer, write_records):
    flat = toys.unigram_stub(tokenizer, jnp.zeros(len(tokenizer)))
    rows = [{**row, "choices": ["ab", "cd"], "answer": "cd"} for row in yes_no(3)]
    rows[0]["prompt"] = "long " * 30
    limited = {**SETTINGS, "batching": Batching(60, 150)}
    result = evaluate_model(flat, {}, write_records(rows), EvaluationSettings(likelihood=False), **limited)
    c = result.summary["choices"]
    assert (c["ties_raw"], c["ties_norm"], c["truncated_prompts"]) == (3, 3, 1)
    assert c["predicted_raw_shares"] == {"ab": 1.0} and c["accuracy_raw"] == 0.0


def test_a_killed_run_goes_on(stub, write_records, tmp_path, monkeypatch):
    records = write_records(yes_no(12))
    whole = evaluate_model(stub, {}, records, path=tmp_path / "whole.jsonl", **SETTINGS)
    path, scored = tmp_path / "o.jsonl", []
    real = module.score_choices

    def dies(*args, **options):
        for number, batch in enumerate(real(*args, **options)):
            if number == 2:
                raise KeyboardInterrupt
            scored.extend(s.row for s in batch)
            yield batch

    monkeypatch.setattr(module, "score_choices", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluate_model(stub, {}, records, path=path, **SETTINGS)
    assert scored and not path.exists()

    asked = []

    def watched(*args, **options):
        asked.extend(options["rows"])
        return real(*args, **options)

    monkeypatch.setattr(module, "score_choices", watched)
    again = evaluate_model(stub, {}, records, path=path, **SETTINGS)
    assert sorted(asked + scored) == list(range(12))
    assert again.outcomes == whole.outcomes == read_outcomes(path)
    assert again.summary == whole.summary
    asked.clear()
    third = evaluate_model(stub, {}, records, path=path, **SETTINGS)
    assert not asked and third.outcomes == whole.outcomes and third.summary == whole.summary


def test_another_model_at_the_same_path_is_refused(stub, write_records, tmp_path):
    records = write_records(yes_no(4))
    evaluate_model(stub, {}, records, path=tmp_path / "o.jsonl", **SETTINGS)
    with pytest.raises(ConfigError, match="another weights"):
        evaluate_model(stub, {"more": jnp.ones(2)}, records, path=tmp_path / "o.jsonl", **SETTINGS)
    with pytest.raises(ConfigError, match="another examples"):
        evaluate_model(stub, {}, records.subset([0, 1]), path=tmp_path / "o.jsonl", **SETTINGS)


def test_no_choices(stub, write_records):
    """Without choices the likelihood stands alone; only where they are asked for is it an error."""
    records = write_records([{"id": "a", "prompt": "why?", "response": "Because."}])
    result = evaluate_model(stub, {}, records, **SETTINGS)
    assert result.summary["accuracy"] is None and result.summary["likelihood"]["n"] == 1
    assert evaluate_model(stub, {}, records, EvaluationSettings(choices=False), **SETTINGS).outcomes == result.outcomes
    with pytest.raises(UserError, match=r"none of the 1 examples has choices and an answer"):
        evaluate_model(stub, {}, records, EvaluationSettings(choices=True), **SETTINGS)
    with pytest.raises(UserError, match=r"nothing to evaluate: of 1 examples 1 have a response, and 0 have choices"):
        evaluate_model(stub, {}, records, EvaluationSettings(likelihood=False), **SETTINGS)


def test_broken_weights_are_reported(toys, tokenizer, write_records):
    broken = toys.unigram_stub(tokenizer, jnp.full(len(tokenizer), jnp.nan))
    with pytest.raises(UserError, match=r"example 'x\d'.*not finite.*did training diverge"):
        evaluate_model(broken, {}, write_records(yes_no(2)), **SETTINGS)


def test_empty_records(stub, write_records):
    with pytest.raises(UserError, match="no examples to evaluate"):
        evaluate_model(stub, {}, write_records(yes_no(2)).subset([]), **SETTINGS)


def test_everything_with_a_real_model(model, nine, tmp_path):
    """Choices, likelihood and generation together, and the counts add up."""
    settings = {**SETTINGS, "batching": Batching(200, 2000)}
    wanted = EvaluationSettings(generation=True, max_new_tokens=4)
    result = evaluate_model(model, {}, nine, wanted, path=tmp_path / "o.jsonl", **settings)
    g = result.summary["generation"]
    assert g["n"] == 9 and g["parsed"] + g["forced"] + g["unmatched"] == 9
    assert g["accuracy"] == np.mean([o.correct_generated for o in result.outcomes])
    assert all(o.nll is not None and o.logprobs is not None for o in result.outcomes)
    assert len(read_outcomes(tmp_path / "o.jsonl")) == 9


def test_packed_rows_give_the_same_outcomes(model, nine):
    """Choices, and the likelihood of responses that are none of them."""
    options = [{**SETTINGS, "batching": Batching(200, 1024, packing)} for packing in (False, True)]
    wanted = EvaluationSettings(answer_template="It is {}")
    padded, packed = (evaluate_model(model, {}, nine, wanted, **each).outcomes for each in options)
    for one, other in zip(padded, packed, strict=True):
        assert one.logprobs is not None and one.nll is not None
        np.testing.assert_allclose(other.logprobs, one.logprobs, rtol=5e-6)
        np.testing.assert_allclose(other.nll, one.nll, rtol=5e-6)


def test_generation_summary_by_hand():
    outcomes = [
        Outcome(
            "a",
            "s",
            "4",
            generated_how="parsed",
            predicted_generated="4",
            correct_generated=True,
            generated_tokens=2,
        ),
        Outcome(
            "b",
            "s",
            "5",
            generated_how="forced",
            predicted_generated="4",
            correct_generated=False,
            generated_tokens=4,
        ),
        Outcome("c", "s", None, generated_how="forced", predicted_generated=None, generated_tokens=6),
    ]
    s = summarise(outcomes)
    assert (s["accuracy"], s["accuracy_kind"]) == (0.5, "generated")
    g = s["generation"]
    assert (g["n"], g["without_gold"], g["accuracy_parsed"], g["parsed"], g["forced"]) == (2, 1, 1.0, 1, 2)
    assert (g["unreadable"], g["tokens_per_answer"]) == (1, 4.0)
