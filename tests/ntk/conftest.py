"""A toy language model in plain JAX: embedding, causal attention, MLP, one adapter; right-padded batches."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkjax.ntk import sum_logits
from ntkjax.types import Batch, predict_mask

VOCAB, WIDTH, RANK, LONGEST = 13, 6, 2, 9


def hidden_fn(params, batch):
    """Final hidden states [B, D], mean over S(x); 0 where S(x) is empty."""
    x = params["embed"][batch.tokens]
    steps = jnp.arange(x.shape[1], dtype=jnp.int32)
    waves = np.sin(np.arange(x.shape[1])[:, None] * np.arange(1, WIDTH + 1) * 0.3)
    x = x + jnp.asarray(waves, x.dtype)[None]
    q, v = x @ params["q"] + (x @ params["lora_a"]) @ params["lora_b"], x @ params["v"]
    weights = jnp.einsum("btd,bsd->bts", q, x)
    causal = steps[None, :] <= steps[:, None]
    weights = jax.nn.softmax(jnp.where(causal[None], weights, -1e9), axis=-1)
    x = x + weights @ v
    x = x + jnp.tanh(x @ params["up"]) @ params["down"]
    mask = predict_mask(batch).astype(x.dtype)
    return jnp.einsum("bt,btd->bd", mask, x) / jnp.maximum(mask.sum(axis=1), 1)[:, None]


def init(seed: int, dtype=jnp.float32):
    shapes = {
        "embed": (VOCAB, WIDTH), "q": (WIDTH, WIDTH), "v": (WIDTH, WIDTH), "up": (WIDTH, 2 * WIDTH),
        "down": (2 * WIDTH, WIDTH), "lora_a": (WIDTH, RANK), "lora_b": (RANK, WIDTH), "head": (VOCAB, WIDTH),
    }  # fmt: skip
    rng = np.random.default_rng(seed)
    return {name: jax.device_put((rng.normal(size=shape) * 0.5).astype(dtype)) for name, shape in shapes.items()}


def sequences(count: int, seed: int, longest: int = LONGEST):
    """(tokens, response_start) pairs of mixed lengths."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, longest + 1, count)
    return [(rng.integers(0, VOCAB, n).astype(np.int32), int(rng.integers(1, n))) for n in lengths]


def collate(rows, index, length: int | None = None, fill: int = 0) -> Batch:
    """One right-padded batch; ``fill`` filler rows of length 1 and index -1 at the end."""
    length = length or max(LONGEST, *(len(tokens) for tokens, _ in rows))  # few shapes, few compilations
    count = len(rows) + fill
    tokens, mask = np.zeros((count, length), np.int32), np.zeros((count, length), bool)
    for i, (row, start) in enumerate(rows):
        tokens[i, : len(row)] = row
        mask[i, start : len(row)] = True
    lengths = [len(row) for row, _ in rows] + [1] * fill
    return Batch(tokens, mask, np.array(lengths, np.int32), np.array([*index] + [-1] * fill, np.int32))


def batches(rows, size: int, index=None):
    """Batches of ``size`` rows in the order given, the last one filled up."""
    index = list(range(len(rows))) if index is None else list(index)
    starts = range(0, len(rows), size)
    parts = [(rows[s : s + size], index[s : s + size]) for s in starts]
    return [collate(part, where, fill=size - len(part)) for part, where in parts]


def jacobian_kernel(output_fn, params, first, second):
    """The explicit kernel [n1, n2] from jax.jacobian, rows concatenated over all leaves (the oracle)."""

    def jacobian(rows):
        trees = [_jacobian(output_fn, params, batch) for batch in batches(rows, 4)]
        flat = [[np.asarray(leaf).reshape(4, -1) for leaf in jax.tree.leaves(tree)] for tree in trees]
        return np.concatenate([np.concatenate(leaves, axis=1) for leaves in flat])[: len(rows)]

    return jacobian(first) @ jacobian(second).T


@jax.jit
def _jacobian(output_fn, params, batch):
    return jax.jacobian(lambda p: output_fn(p, batch))(params)


def logits_sum(params, batch):
    """sum_k f_k(x) with every logit built: the definition that the folded head must equal."""
    return jnp.sum(hidden_fn(params, batch) @ params["head"].T, axis=1)


def hidden_of_adapter(base, params, batch):
    return hidden_fn({**base, **params}, batch)


def own_head(params):
    return params["head"]


def output(which, dtype=jnp.float32):
    """(output_fn, trained params): the adapter alone ("lora"), or everything with the head ("all")."""
    params = init(3, dtype)
    if which == "all":
        return sum_logits(hidden_fn, own_head), params
    adapter = {name: leaf for name, leaf in params.items() if name.startswith("lora_")}
    return sum_logits(jax.tree_util.Partial(hidden_of_adapter, params), params["head"]), adapter


@pytest.fixture
def toy():
    return SimpleNamespace(
        hidden_fn=hidden_fn, init=init, sequences=sequences, collate=collate, batches=batches,
        jacobian_kernel=jacobian_kernel, logits_sum=logits_sum, output=output, jacobian=_jacobian,
        vocab=VOCAB, width=WIDTH,
    )  # fmt: skip
