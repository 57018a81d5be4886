"""Problems whose embeddings, lengths and texts are given, so that the right choice is known."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import jax.numpy as jnp
import numpy as np
import pytest

from ntkjax.data import TokenisedDataset
from ntkjax.selection import SelectionProblem


def look_up(params, batch):
    """The embedding of a row lies in the table under its first token."""
    return params["table"][batch.tokens[:, 0]]


def refuse(params, batch):
    raise AssertionError("this method needs no such function")


@pytest.fixture
def planted():
    """``planted(domain, pool, n, lengths=None, **fields)``: a problem with the embeddings ``domain`` [M, D] and
    ``pool`` [N, D], and responses of ``lengths`` tokens (3 by default)."""

    def build(domain, pool, n, lengths=None, **fields):
        table = np.concatenate([domain, pool]).astype(np.float32)
        lengths = np.full(len(pool), 3) if lengths is None else lengths

        def dataset(first, sizes):
            tokens = [[first + i, *[0] * int(size)] for i, size in enumerate(sizes)]
            return TokenisedDataset.from_sequences(tokens, [1] * len(tokens), sources=["here"] * len(tokens))

        return SelectionProblem(**{
            "hidden_fn": refuse, "head": refuse, "nll_fn": refuse, "embed_fn": look_up,
            "params": {"table": jnp.asarray(table)}, "domain": dataset(0, [3] * len(domain)),
            "pool": dataset(len(domain), lengths), "n": n, "token_budget": 64, **fields,
        })  # fmt: skip

    return build


@pytest.fixture(scope="session")
def small(load_file) -> ModuleType:
    """small_model.py beside this file."""
    return load_file(Path(__file__).with_name("small_model.py"))


@pytest.fixture(scope="session")
def make(small):
    """``make(n=5, rows=24, **fields)``: a problem on a small model that has every function."""
    return small.make


@pytest.fixture(scope="session")
def given(small):
    """``given(domain, pool, n, sources=None, **fields)``: a problem whose per-example gradients are given."""
    return small.given_gradients
