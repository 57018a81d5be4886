"""A small model with every function that a method may ask for, and one whose gradients are given; see conftest.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ntkjax.data import TokenisedDataset
from ntkjax.selection import SelectionProblem
from ntkjax.selection.base import WarmupCheckpoint
from ntkjax.types import predict_mask, valid_mask

VOCAB, WIDTH = 11, 4


def states(params, batch):
    x = params["embed"][batch.tokens]
    return x + jnp.tanh(jnp.cumsum(x, axis=1) @ params["mix"])


def pooled(x, mask):
    mask = mask.astype(x.dtype)
    return jnp.einsum("bt,btd->bd", mask, x) / jnp.maximum(mask.sum(axis=1), 1)[:, None]


def hidden_fn(params, batch):
    return pooled(states(params, batch), predict_mask(batch))


def embed_fn(params, batch):
    return pooled(states(params, batch), valid_mask(batch))


def head_fn(params):
    return params["head"]


def nll_fn(params, batch):
    """Mean over S(x) of -log p(next token)."""
    logits = jax.nn.log_softmax(states(params, batch) @ params["head"].T, axis=-1)[:, :-1]
    targets = jax.nn.one_hot(batch.tokens[:, 1:], VOCAB, dtype=logits.dtype)
    mask = predict_mask(batch)[:, :-1].astype(logits.dtype)
    return -jnp.einsum("btv,btv,bt->b", logits, targets, mask) / jnp.maximum(mask.sum(axis=1), 1)


def entropy_fn(params, batch):
    """Mean over S(x) of the entropy of the prediction."""
    logp = jax.nn.log_softmax(states(params, batch) @ params["head"].T, axis=-1)
    return pooled(-jnp.sum(jnp.exp(logp) * logp, axis=-1, keepdims=True), predict_mask(batch))[:, 0]


def margins(params, batch):
    """log(p / (1 - p)) of the next token at every position but the last, and which count."""
    logp = jax.nn.log_softmax(states(params, batch) @ params["head"].T, axis=-1)[:, :-1]
    chosen = jnp.take_along_axis(logp, batch.tokens[:, 1:, None], axis=-1)
    return chosen - jnp.log1p(-jnp.exp(chosen)), predict_mask(batch)[:, :-1]


def margin_fn(params, batch):
    """Mean over S(x) of log(p / (1 - p))."""
    return pooled(*margins(params, batch))[:, 0]


def error_fn(params, batch):
    """Mean over S(x) of 1 - p."""
    found, mask = margins(params, batch)
    return pooled(1 - jax.nn.sigmoid(found), mask)[:, 0]


def sum_of_logits(params, batch):
    return (hidden_fn(params, batch) @ params["head"].T).sum(axis=1)


def dataset(rows, seed):
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(0, VOCAB, rng.integers(4, 9)).tolist() for _ in range(rows)]
    starts = [int(rng.integers(1, len(row))) for row in tokens]
    return TokenisedDataset.from_sequences(
        tokens, starts, sources=["even" if i % 2 == 0 else "odd" for i in range(rows)]
    )


def texts(rows, seed):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(["red", "blue", "green", "ball"], 5)) for _ in range(rows)]


def make(n=5, rows=24, **changes):
    rng = np.random.default_rng(7)
    shapes = {"embed": (VOCAB, WIDTH), "mix": (WIDTH, WIDTH), "head": (VOCAB, WIDTH)}
    draw = lambda: {k: jax.device_put(rng.normal(size=s).astype(np.float32)) for k, s in shapes.items()}
    params = draw()
    moments = lambda: (draw(), jax.tree.map(lambda x: x * x, draw()))
    checkpoints = [WarmupCheckpoint(draw(), *moments(), 1e-3, 2), WarmupCheckpoint(params, *moments(), 4e-4, 4)]
    fields = {
        "hidden_fn": hidden_fn, "head": head_fn, "nll_fn": nll_fn, "embed_fn": embed_fn, "params": params, "n": n,
        "token_budget": 64, "domain": dataset(6, 1), "pool": dataset(rows, 2),
        "domain_texts": texts(6, 1), "pool_texts": texts(rows, 2), "weighted_embed_fn": embed_fn,
        "checkpoints": tuple(checkpoints), "entropy_fn": entropy_fn, "states_fn": states,
        "margin_fn": margin_fn, "error_fn": error_fn,
        "start_params": checkpoints[0].params,
    }  # fmt: skip
    return SelectionProblem(**{**fields, **changes})


@jax.tree_util.Partial
def unused(params, batch):
    raise AssertionError("this method needs no such function")


def linear(table, params, batch):
    """w . g_x with g_x the row of the table that the first token names: the gradient of row x is g_x, at every w."""
    return table[batch.tokens[:, 0]] @ params["w"]


def look_up(table, params, batch):
    return table[batch.tokens[:, 0]]


def given_gradients(domain, pool, n, sources=None, **fields):
    """A problem whose loss has the gradients ``domain`` [M, P] and ``pool`` [N, P] at every theta; they are the
    embeddings too. A sparse sketch of 4 P numbers or more changes no inner product of them."""
    domain, pool = np.asarray(domain, np.float32), np.asarray(pool, np.float32)
    table = jnp.asarray(np.concatenate([domain, pool]))

    def rows(first, count, names):
        tokens = [[first + i, 0, 0] for i in range(count)]
        return TokenisedDataset.from_sequences(tokens, [1] * count, sources=names or ["here"] * count)

    zero = {"w": jnp.zeros(domain.shape[1], jnp.float32)}
    plain = WarmupCheckpoint(zero, zero, {"w": jnp.ones(domain.shape[1], jnp.float32)}, 1e-3, 1)
    return SelectionProblem(**{
        "hidden_fn": unused, "head": unused, "nll_fn": jax.tree_util.Partial(linear, table),
        "embed_fn": jax.tree_util.Partial(look_up, table), "params": zero, "domain": rows(0, len(domain), sources),
        "pool": rows(len(domain), len(pool), None), "n": n, "token_budget": 64, "checkpoints": (plain,), **fields,
    })  # fmt: skip


def explicit_gradients(problem, data, output_fn=None, params=None):
    """g_j of every row by jax.jacobian, float64 [N, P], leaves in tree order."""
    output_fn, params = output_fn or problem.nll_fn, problem.params if params is None else params
    differentiate = jax.jit(lambda p, batch: jax.jacobian(lambda q: output_fn(q, batch))(p))
    rows = None
    for batch in data.batches(token_budget=64):
        leaves = jax.tree.leaves(differentiate(params, batch))
        flat = np.concatenate([np.asarray(leaf, np.float64).reshape(len(batch.index), -1) for leaf in leaves], axis=1)
        rows = np.zeros((len(data), flat.shape[1])) if rows is None else rows
        real = np.asarray(batch.index) >= 0
        rows[np.asarray(batch.index)[real]] = flat[real]
    return rows
