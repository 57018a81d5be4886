"""Methods of forward passes alone: perplexity, ifd, loss-drop and for-value, each by its definition, token by token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkjax.data import TokenisedDataset
from ntkjax.errors import ConfigError
from ntkjax.selection import METHODS
from ntkjax.selection.methods.for_value import Tokens, fold
from ntkjax.selection.methods.ifd import without_prompt
from ntkjax.types import Batch, capped, predict_mask


def sequences(data):
    """(tokens, whether each is of the response) of every example."""
    found = {}
    for batch in data.batches(token_budget=64):
        for i, row in enumerate(np.asarray(batch.index)):
            if row >= 0:
                size = int(batch.lengths[i])
                found[int(row)] = batch.tokens[i][:size].tolist(), batch.response_mask[i][:size].tolist()
    return [found[row] for row in range(len(data))]


def alone(tokens, mask):
    """One example as a batch."""
    arrays = np.asarray([tokens], np.int32), np.asarray([mask], bool), np.asarray([len(tokens)], np.int32)
    return Batch(*arrays, np.zeros(1, np.int32))


def token_nlls(small, params, tokens, mask):
    """-log p of every response token, one by one."""
    batch = alone(tokens, mask)
    logits = np.asarray(small.states(params, batch)[0] @ params["head"].T, np.float64)
    logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return [-logp[t - 1, tokens[t]] for t in range(1, len(tokens)) if mask[t]]


@pytest.fixture(scope="module")
def nlls(small):
    """Mean NLL of every pool row at theta, and at the start."""
    problem = small.make()
    rows = sequences(problem.pool)
    return tuple(
        np.array([np.mean(token_nlls(small, params, *row)) for row in rows])
        for params in (problem.params, problem.start_params)
    )


def test_perplexity(make, nlls):
    nll, order = nlls[0], np.argsort(nlls[0])
    high, low, middle = (METHODS["perplexity"](perplexity=which)(make()) for which in ("high", "low", "middle"))
    np.testing.assert_allclose(high.scores, nll, rtol=1e-5)
    np.testing.assert_allclose(low.scores, -nll, rtol=1e-5)
    assert high.selected.tolist() == order[::-1][:5].tolist() and low.selected.tolist() == order[:5].tolist()
    assert set(middle.selected.tolist()) < set(order[9:15].tolist())  # of 24: five of the six in the middle
    assert middle.diagnostics["lowest_nll_chosen"] > nll[order[8]]
    between = (nll[order[11]] + nll[order[12]]) / 2  # of 24 there is no one in the middle
    assert middle.diagnostics["median_nll_offered"] == pytest.approx(between, rel=1e-6)


def test_loss_drop(make, nlls):
    after, before = nlls
    chosen = METHODS["loss-drop"]()(make())
    np.testing.assert_allclose(chosen.scores, (before - after) / before, rtol=1e-4, atol=1e-5)
    assert chosen.selected.tolist() == np.argsort(-(before - after) / before)[:5].tolist()
    assert chosen.diagnostics["share_that_fell"] == np.mean(after < before)
    with pytest.raises(ConfigError, match="warm up first"):
        METHODS["loss-drop"]()(make(start_params=None))


def test_ifd(make, small, nlls):
    problem = make(n=24)
    bare = []
    for tokens, mask in sequences(problem.pool):
        answer = [token for token, own in zip(tokens, mask) if own]
        bare.append(np.mean(token_nlls(small, problem.params, [tokens[0], *answer], [False] + [True] * len(answer))))
    ifd = nlls[0] / np.array(bare)
    assert np.sum(ifd > 1) and np.sum(ifd < 1)
    chosen = METHODS["ifd"]()(problem)
    np.testing.assert_allclose(np.abs(chosen.scores), ifd, rtol=1e-4)
    clear = np.abs(ifd - 1) > 1e-5  # where the prompt is one token it is 1, up to rounding
    assert (np.sign(chosen.scores) == np.where(ifd <= 1, 1, -1))[clear].all()
    assert (np.diff(chosen.scores[chosen.selected]) <= 0).all() and chosen.scores[chosen.selected[0]] <= 1
    assert chosen.diagnostics["ifd_above_one"] == chosen.diagnostics["chosen_above_one"] == np.sum(chosen.scores < 0)


CONVERSATIONS = [([1, 2, 3, 4, 5], [0, 0, 1, 0, 1]), ([6, 7, 8], [0, 1, 1]), ([9, 10], [0, 1])]


@pytest.mark.parametrize("packed", [False, True])
def test_a_prompt_is_taken_out_and_earlier_answers_stay(packed):
    if packed:
        tokens, mask = (np.concatenate([np.asarray(c[i], np.int32) for c in CONVERSATIONS]) for i in (0, 1))
        fill = lambda x, value=0: np.asarray([[*x, *[value] * 3]], np.int32)
        owner, places = [0] * 5 + [1] * 3 + [2] * 2, [*range(5), *range(3), *range(2)]
        batch = Batch(
            fill(tokens), fill(mask).astype(bool), np.array([5, 3, 2, 0], np.int32), np.array([4, 1, 0, -1], np.int32),
            positions=fill(places), examples=fill(owner, -1),
        )  # fmt: skip
    else:
        wide = lambda x: [*x, *[0] * (6 - len(x))]
        rows = [np.array([wide(c[i]) for c in CONVERSATIONS], np.int32) for i in (0, 1)]
        batch = Batch(rows[0], rows[1].astype(bool), np.array([5, 3, 2], np.int32), np.array([4, 1, 0], np.int32))
    bare = jax.jit(without_prompt)(batch)
    expected = [[1, 3, 5], [6, 7, 8], [9, 10]]
    assert (
        np.asarray(bare.lengths)[:3].tolist() == [3, 3, 2] and np.asarray(bare.index).tolist() == batch.index.tolist()
    )
    if packed:
        assert np.asarray(bare.tokens)[0].tolist() == [1, 3, 5, 6, 7, 8, 9, 10] + [0] * 5
        assert np.asarray(bare.examples)[0].tolist() == [0] * 3 + [1] * 3 + [2] * 2 + [-1] * 5
        assert np.asarray(bare.positions)[0].tolist() == [0, 1, 2, 0, 1, 2, 0, 1] + [0] * 5
        assert np.asarray(predict_mask(bare))[0].tolist() == [1, 1, 0, 1, 1, 0, 1] + [0] * 6
        return
    for row, tokens in enumerate(expected):
        assert np.asarray(bare.tokens)[row].tolist() == tokens + [0] * (6 - len(tokens))
        assert np.asarray(predict_mask(bare))[row].sum() == len(tokens) - 1 == np.sum(CONVERSATIONS[row][1])


@pytest.mark.parametrize("cap", [None, 2.0])
def test_for_value_is_the_kernel_of_the_heads_gradients(cap, small, monkeypatch):
    """In 64 bits: against gradients of the head by jax, and against the sum over all pairs of tokens."""
    with jax.enable_x64(True):
        problem = small.make()
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), problem.params)

        def loss(head, batch):
            """Mean NLL of one example."""
            logits = capped(small.states(params, batch) @ head.T, cap)[0, :-1]
            logp = jax.nn.log_softmax(logits, axis=-1)[jnp.arange(logits.shape[0]), jnp.asarray(batch.tokens)[0, 1:]]
            mask = predict_mask(batch)[0, :-1]
            return -jnp.sum(jnp.where(mask, logp, 0.0)) / jnp.sum(mask, dtype=logp.dtype)

        pad = lambda row: [*row, *[0] * (8 - len(row))]  # one shape for all: what comes later changes nothing
        gradient = jax.jit(jax.grad(loss))
        gradients = [
            [gradient(params["head"], alone(pad(tokens), pad(mask))) for tokens, mask in sequences(data)]
            for data in (problem.domain, problem.pool)
        ]
        mean = sum(gradients[0]) / len(gradients[0])
        expected = np.array([jnp.sum(mean * g) for g in gradients[1]])
        for piece in (1 << 26, 3 * small.VOCAB):  # all tokens at once, and three at a time
            monkeypatch.setattr("ntkjax.selection.methods.for_value.MAX_LOGITS", piece)
            tokens = Tokens(jax.tree_util.Partial(small.states), params["head"], cap)
            outer, along = jax.jit(tokens.outer), jax.jit(tokens.along)  # made anew for this size of a piece
            folded = sum(outer(params, batch) for batch in problem.domain.batches(token_budget=64)) / 6.0
            np.testing.assert_allclose(folded, mean, rtol=1e-10, atol=1e-12)
            for batch in problem.pool.batches(token_budget=64):
                real = batch.index >= 0
                found = np.asarray(along(folded, params, batch))
                np.testing.assert_allclose(found[real], expected[batch.index[real]], rtol=1e-10, atol=1e-12)
        whole = fold(tokens, params, problem.domain.batches(token_budget=64), len(problem.domain))
        np.testing.assert_allclose(whole, mean, rtol=1e-10, atol=1e-12)
        if cap is None:
            np.testing.assert_allclose(by_pairs(small, params, problem), expected, rtol=1e-10, atol=1e-12)


def by_pairs(small, params, problem):
    """1/M sum_i 1/(|S_i| |S_j|) sum_t sum_t' <h_t, h_t'> <e_t, e_t'>, pair by pair."""

    def states_and_errors(tokens, mask):
        h = np.asarray(small.states(params, alone(tokens, mask))[0])
        logits = h @ np.asarray(params["head"]).T
        p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        places = [t - 1 for t in range(1, len(tokens)) if mask[t]]
        return h[places], p[places] - np.eye(small.VOCAB)[[tokens[t + 1] for t in places]]

    domain = [states_and_errors(*row) for row in sequences(problem.domain)]
    found = []
    for h, e in (states_and_errors(*row) for row in sequences(problem.pool)):
        found.append(np.mean([np.mean((h @ hi.T) * (e @ ei.T)) for hi, ei in domain]))
    return np.array(found)


def test_for_value_chooses_the_highest_and_needs_states(make, small, tmp_path):
    problem = make()
    expected = by_pairs(small, problem.params, problem)
    chosen = METHODS["for-value"]()(make(work_dir=tmp_path))
    np.testing.assert_allclose(chosen.scores, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert chosen.selected.tolist() == np.argsort(-expected)[:5].tolist()
    again = METHODS["for-value"]()(make(work_dir=tmp_path, domain=small.dataset(6, 9)))
    assert not np.array_equal(again.scores, chosen.scores)  # of another domain: not those on disk
    with pytest.raises(ConfigError, match="states_fn"):
        METHODS["for-value"]()(make(states_fn=None))


@pytest.mark.parametrize("method", ["perplexity", "ifd", "loss-drop", "for-value"])
def test_batches_do_not_matter_and_finished_rows_are_used_again(method, make, tmp_path, monkeypatch):
    whole = METHODS[method]()(make(shared_dir=tmp_path))
    parts = METHODS[method]()(make(token_budget=16))
    np.testing.assert_allclose(parts.scores, whole.scores, rtol=1e-4, atol=1e-6)
    monkeypatch.setattr("ntkjax.selection.forward.apply", lambda *a: 1 / 0)
    np.testing.assert_array_equal(METHODS[method]()(make(shared_dir=tmp_path)).scores, whole.scores)
    other = dataclasses.replace(make(shared_dir=tmp_path), params=make().start_params, start_params=make().params)
    if method != "loss-drop":  # whose passes over both are there already
        with pytest.raises(ZeroDivisionError):
            METHODS[method]()(other)


def test_methods_share_what_they_ask_of_the_model(make, tmp_path, monkeypatch):
    METHODS["loss-drop"]()(make(shared_dir=tmp_path))
    monkeypatch.setattr("ntkjax.selection.forward.apply", lambda *a: 1 / 0)
    assert METHODS["perplexity"]()(make(shared_dir=tmp_path)).scored.all()


def test_a_dataset_of_responses_alone_has_an_ifd_of_one(make):
    rows = [[3, 1, 2], [4, 5, 6, 7], [2, 2]]
    pool = TokenisedDataset.from_sequences(rows, [1, 1, 1], sources=["x"] * 3)
    np.testing.assert_allclose(METHODS["ifd"]()(make(n=2, pool=pool)).scores, 1, rtol=1e-6)
