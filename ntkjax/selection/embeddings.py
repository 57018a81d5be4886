"""Embeddings of domain and pool, computed once, and the vote of stage 1 (arXiv 2511.07380) over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float

from ntkjax.ahead import Program
from ntkjax.fingerprint import tree_digest
from ntkjax.ntk.rows import Pass
from ntkjax.selection.base import SelectionProblem, Selector
from ntkjax.selection.cost import Sizes
from ntkjax.selection.shared import open_shared
from ntkjax.selection.vote import Votes, embed, embed_program, vote
from ntkjax.store import RowStore


class EmbeddingMethod(Selector):
    """A method that embeds domain and pool, and by default asks no more of the model."""

    def forward_tokens(self, sizes: Sizes) -> float:
        """Domain and pool embedded once."""
        return sizes.embeddings

    @property
    def embeds_pool(self) -> bool:
        """Always."""
        return True

    def programs(self, problem: SelectionProblem) -> Iterator[Program]:
        """The embedding."""
        yield from embedding_programs(problem)


def embedding_programs(problem: SelectionProblem) -> Iterator[Program]:
    """Those of the embeddings of stage 1."""
    for data in (problem.domain, problem.pool):
        yield embed_program(problem.embed_fn, problem.params, data.batches(token_budget=problem.token_budget))


def stage1_votes(problem: SelectionProblem, k: int) -> Votes:
    """Embed domain and pool, and let every domain point vote for its ``k`` nearest pool rows."""
    domain, read_pool = embed_both(problem, problem.embed_fn, "embeddings")
    return vote(domain, read_pool, rows=len(problem.pool), k=k)


def embed_both(
    problem: SelectionProblem, embed_fn: Callable, name: str
) -> tuple[Float[np.ndarray, "M D"], Callable[[np.ndarray], Float[np.ndarray, "b D"]]]:
    """``embed_fn`` of every domain example, and a function from pool rows [b] to theirs; the pool's lie in
    ``work_dir``/``name``, or under ``shared_dir`` (see `open_shared`), so that equal embeddings are computed once."""
    batches = lambda data: data.batches(token_budget=problem.token_budget)
    run = lambda data, store, what: embed(
        embed_fn, problem.params, batches(data), rows=Pass(len(data), store, progress=problem.bar(what))
    )
    domain = run(problem.domain, None, "embed domain")(np.arange(len(problem.domain)))
    store, width, dtype = None, domain.shape[1], domain.dtype
    if problem.shared_dir is not None:
        depends = {"data": problem.pool.fingerprint, "theta": tree_digest(problem.params)}
        store = open_shared(problem, name, depends, rows=len(problem.pool), width=width, dtype=dtype)
    elif problem.work_dir is not None:
        store = RowStore.open(
            problem.work_dir / name,
            rows=len(problem.pool),
            width=width,
            dtype=dtype,
            manifest={**problem.manifest, "rows": name},
            together=problem.together,
        )
    return domain, run(problem.pool, store, "embed pool")
