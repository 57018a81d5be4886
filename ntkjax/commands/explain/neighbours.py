"""Which pool examples a domain example is near to, and the other way round, over features that a run has kept.

Similarity is the cosine of two features: of the sketched gradients phi (`ntkjax.selection.gradients`), so that it is
the kernel's value divided by both gradients' lengths, off by about 1 / sqrt(K); or of the embeddings of stage 1.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from ntkjax.errors import ConfigError
from ntkjax.fingerprint import tree_digest
from ntkjax.ntk.kernels import KERNELS
from ntkjax.selection import SelectionProblem
from ntkjax.selection.gradients import domain_features, gradient_features
from ntkjax.selection.methods.parts import PartsSelector
from ntkjax.selection.vote import embed, nearest
from ntkjax.store import RowStore

FEATURES = (
    "select ... --method gradient-cosine, or --method ntk --scores sketch --aggregation max, keeps gradients; "
    "--stage1 on keeps embeddings"
)
"""Which selections keep features, as a remedy."""
Encode = Callable[[SelectionProblem], Float[np.ndarray, "M K"]]


@dataclasses.dataclass(frozen=True)
class Index:
    """Features of pool rows.

    Attributes:
      name: what they are, for people.
      rows: int64 [C], the pool rows that have one.
      read: places in ``rows`` [b] -> features [b, K].
      encode: a problem -> the features of the examples of its domain [M, K].
      whole: whether these are all rows that the selection looked at; else those that are shown.
    """

    name: str
    rows: Int[np.ndarray, " C"]
    read: Callable[[np.ndarray], Float[np.ndarray, "b K"]]
    encode: Encode
    whole: bool = True


@dataclasses.dataclass(frozen=True)
class Links:
    """The k nearest of each example on either side; similarity is NaN and the row -1 where there are fewer than k.

    Attributes:
      pulled: [M, k] pool rows nearest to each domain example, nearest first. pulled_cosine: [M, k].
      near: [S, k] domain rows nearest to each shown pool row. near_cosine: [S, k].
      name, whole: of the `Index`; among: how many pool rows were compared.
    """

    pulled: Int[np.ndarray, "M k"]
    pulled_cosine: Float[np.ndarray, "M k"]
    near: Int[np.ndarray, "S k2"]
    near_cosine: Float[np.ndarray, "S k2"]
    name: str
    whole: bool
    among: int


def kept_index(
    rows: Path,
    problem: SelectionProblem,
    *,
    shared: Path | None = None,
    kernel: str | None = None,
    pool: str | None = None,
) -> Index | None:
    """The features that a run has kept under the parameters and the seed of ``problem``: gradients, those of ``kernel``
    before others, else embeddings.

    Gradients under the parameters of an epoch of the warm-up, Adam's steps, and gradients of what is no kernel by name
    are not compared with a question's gradient, and are left out.

    Args:
      rows: the run's own folder. shared: where it shares rows with others; only rows of its pool count there.
      pool: fingerprint of that pool; None: that of ``problem``.
    """
    theta, pool = tree_digest(problem.params), problem.pool.fingerprint if pool is None else pool
    ours = lambda made: made.get("theta") == theta and made.get("data") == pool
    usable_stores = []
    for folder in [*sorted(rows.glob("gradients-*")), *_below(shared, "gradients-*")]:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        made = manifest["manifest"]
        usable = "adam" not in made and made.get("seed") == problem.seed and made["kernel"].split(":")[0] in KERNELS
        if usable and made.get("theta") == theta and (folder.parent != shared or ours(made)):
            usable_stores.append((made["kernel"] != kernel, folder, manifest))
    if usable_stores:
        _, folder, manifest = min(usable_stores, key=lambda item: item[0])  # the first of the right kernel
        made, store = manifest["manifest"], _open(folder, manifest)
        options = {"kernel": made["kernel"], "sketch": made["sketch"], "size": made["size"]}
        name = f"gradients of the kernel {made['kernel']}, sketched to {made['size']}"
        return _index(name, store, lambda of: domain_features(of, **options))
    for folder in (rows / "embeddings", *_below(shared, "embeddings-*")):
        if (folder / "manifest.json").exists():
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            if folder.parent != shared or ours(manifest["manifest"]):
                return _index("embeddings (mean final hidden states)", _open(folder, manifest), _embedded)
    return None


def _below(folder: Path | None, pattern: str) -> list[Path]:
    return [] if folder is None else sorted(folder.glob(pattern))


def similarity_index(selector: PartsSelector, problem: SelectionProblem) -> Index:
    """What a selection from parts compared, its vectors read back or made again: the cosine of an `Index` is then s_ij
    (of a product: the cosine of the same vectors)."""
    representation = selector.made_representation()
    candidates = representation.candidates(problem).rows
    similarities = representation.similarities(problem, candidates, cosine=selector.similarity == "cosine")
    return Index(
        f"{selector.representation}, as the selection compared them", candidates, similarities.pool_vectors,
        lambda _: similarities.domain_vectors(),
    )  # fmt: skip


def need_index(rows: Path, problem: SelectionProblem, **where: Any) -> Index:
    """`kept_index`; ConfigError with a remedy where there is none."""
    index = kept_index(rows, problem, **where)
    if index is None or len(index.rows) == 0:
        raise ConfigError(
            f"{rows}: holds no features of the pool that a question could be compared with (its scores come of a "
            f"pass that keeps none). Make a run that keeps them: {FEATURES}"
        )
    return index


def computed_index(problem: SelectionProblem, rows: np.ndarray, kernel: str, sketch: str, size: int) -> Index:
    """Gradient features of ``rows`` alone, computed (and kept under the problem's ``work_dir``)."""
    options = {"kernel": kernel, "sketch": sketch, "size": size}
    ordered = np.sort(rows)
    _, read = gradient_features(problem, ordered, **options)
    name = f"gradients of the kernel {kernel}, sketched to {size}"
    return Index(name, ordered, lambda at: read(ordered[at]), lambda of: domain_features(of, **options), whole=False)


def link(index: Index, questions: Float[np.ndarray, "M K"], shown: Int[np.ndarray, " S"], k: int) -> Links:
    """The k nearest pool rows of ``index`` for every domain example, whose features are ``questions``, and for the rows
    ``shown`` the k nearest domain examples. A domain feature of zero has no direction, and is near to nothing; a pool
    feature of zero has cosine 0 with everything."""
    pulled, pulled_cosine = top(questions, index.read, len(index.rows), k)
    pulled = np.where(pulled >= 0, index.rows[pulled], -1)
    alive = np.flatnonzero(questions.any(axis=1))
    near = np.full((len(shown), min(k, len(alive))), -1)
    near_cosine = np.full(near.shape, np.nan, np.float32)
    order = np.searchsorted(index.rows, shown)
    there = (order < len(index.rows)) & (index.rows[np.minimum(order, len(index.rows) - 1)] == shown)
    if there.any() and len(alive):
        places, near_cosine[there] = top(index.read(order[there]), lambda at: questions[alive[at]], len(alive), k)
        near[there] = np.where(places >= 0, alive[places], -1)
    return Links(pulled, pulled_cosine, near, near_cosine, index.name, index.whole, len(index.rows))


def top(
    questions: Float[np.ndarray, "M K"], read: Callable[[np.ndarray], np.ndarray], rows: int, k: int
) -> tuple[Int[np.ndarray, "M k"], Float[np.ndarray, "M k"]]:
    """(places, cosines) of the k nearest of ``rows`` features for each question, streamed; -1 and NaN for a question
    whose feature is zero."""
    alive = np.flatnonzero(questions.any(axis=1))
    nearest_rows = np.full((len(questions), min(k, rows)), -1, np.int64)
    cosine = np.full(nearest_rows.shape, np.nan, np.float32)
    if len(alive):
        neighbours = nearest(questions[alive], read, rows=rows, k=k)
        nearest_rows[alive], cosine[alive] = neighbours.rows, neighbours.similarity
    return nearest_rows, cosine


def _embedded(problem: SelectionProblem) -> np.ndarray:
    batches = problem.domain.batches(token_budget=problem.token_budget)
    count = len(problem.domain)
    return embed(problem.embed_fn, problem.params, batches, rows=count)(np.arange(count))


def _open(folder: Path, manifest: dict) -> RowStore:
    shape = manifest["shape"]
    return RowStore.open(folder, **shape, manifest=manifest["manifest"])


def _index(name: str, store: RowStore, encode: Encode) -> Index:
    rows = np.flatnonzero(store.done())
    return Index(name, rows, lambda at: store.read(rows[at]), encode)
