"""Response NLL against logits token by token, and its means by hand."""

import numpy as np
import pytest
from scipy.special import log_softmax

from ntkjax.data import render, tokenise
from ntkjax.errors import UserError
from ntkjax.evaluation.likelihood import response_nll, summarise_nll


def by_hand(model, example):
    r = render(model.tokenizer, example)
    padded = np.zeros((1, 120), np.int64)  # right padding is never seen: one compilation
    padded[0, : len(r.tokens)] = r.tokens
    logp = log_softmax(np.asarray(model.logits(padded)[0]), axis=-1)
    picked = [-float(logp[t - 1, r.tokens[t]]) for t in range(r.response_start, len(r.tokens))]
    return np.mean(picked), len(picked)


def test_every_example_once_and_right(model, nine):
    records = nine
    dataset = tokenise(records, model.tokenizer, max_length=200)
    got = {s.row: s for batch in response_nll(model, {}, dataset, token_budget=300, max_buckets=1) for s in batch}
    assert sorted(got) == list(range(9))
    for row, s in got.items():
        nll, tokens = by_hand(model, records[row])
        assert s.tokens == tokens == dataset.response_lengths[row]
        np.testing.assert_allclose(s.nll, nll, rtol=1e-5)


def test_packed_rows_give_the_same(model, nine):
    dataset = tokenise(nine, model.tokenizer, max_length=200)
    run = lambda data: {
        s.row: s for batch in response_nll(model, {}, data, token_budget=512, max_buckets=1) for s in batch
    }
    padded, packed = run(dataset), run(dataset.packed(True))
    assert sorted(packed) == list(range(9))
    for row, s in packed.items():
        assert s.tokens == padded[row].tokens
        np.testing.assert_allclose(s.nll, padded[row].nll, rtol=2e-6)


def test_some_rows_only(model, nine):
    dataset = tokenise(nine, model.tokenizer, max_length=200)
    rows = [
        s.row
        for batch in response_nll(model, {}, dataset, token_budget=300, indices=[4, 1], max_buckets=1)
        for s in batch
    ]
    assert sorted(rows) == [1, 4]


def test_means_by_hand():
    summary = summarise_nll([1.0, 4.0, 0.0], [3, 1, 0])
    assert summary["nll_per_example"] == 2.5
    assert summary["nll_per_token"] == 7 / 4
    assert summary["perplexity"] == pytest.approx(np.exp(7 / 4))
    assert (summary["tokens"], summary["n"], summary["without_tokens"]) == (4, 2, 1)


def test_nothing_to_predict_is_refused():
    with pytest.raises(UserError, match="no example has a response token"):
        summarise_nll([0.0], [0])
