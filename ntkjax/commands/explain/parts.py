"""Which examples are shown, and their scores taken apart: by token, by layer, by kind of module."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from ntkjax.errors import ConfigError
from ntkjax.files import write_npz
from ntkjax.fingerprint import digest, tree_digest
from ntkjax.models.lm import paths
from ntkjax.models.names import modules
from ntkjax.ntk.features import gradient_features
from ntkjax.ntk.rows import Pass
from ntkjax.ntk.scores import ProductsByLeaf, scores_by_position
from ntkjax.rng import numpy_rng
from ntkjax.selection import Selection, SelectionProblem
from ntkjax.selection.directional import Directional
from ntkjax.store import RowStore
from ntkjax.types import Params

GROUPS = ("chosen", "nearly", "rejected")
"""The n that were selected; those whose rank follows; the other rows with a score."""
BLOCK = 256
"""Examples whose parts are written to one file: what a kill can cost."""
TOLERANCE = 1e-3
TOLERANCE_16 = 5e-2
"""How far a score may be from the stored one, relative to the sum of the sizes of its parts: rounding differs from
batch to batch. Of weights of 16 bits the second."""


@dataclasses.dataclass(frozen=True)
class Shown:
    """The pool rows that are shown.

    Attributes:
      rows: int64 [S], of the pool: the groups one after another, each by rank. groups: int64 [S], places in `GROUPS`.
      offered: how many rows each group has in all.
    """

    rows: Int[np.ndarray, " S"]
    groups: Int[np.ndarray, " S"]
    offered: tuple[int, ...]

    def counts(self) -> dict[str, tuple[int, int]]:
        """Group -> (shown, of how many)."""
        shown = np.bincount(self.groups, minlength=len(GROUPS)).tolist()
        return {name: (shown[k], self.offered[k]) for k, name in enumerate(GROUPS)}


def choose_shown(selection: Selection, most: tuple[int, int, int], *, seed: int) -> Shown:
    """The rows of each group, and where there are more than ``most`` of it so many of them, drawn evenly from ``seed``.
    Of the nearly chosen the first: those that follow by rank, at most as many as were chosen and half of the rest."""
    ranked = np.argsort(np.where(selection.scored, selection.ranks, np.iinfo(np.int64).max), kind="stable")
    ranked = ranked[: int(selection.scored.sum())]
    rest = ranked[~np.isin(ranked, selection.selected)]
    nearly = min(most[1], len(selection.selected), -(-len(rest) // 2))  # where there are few, some are rejected
    members = (selection.selected, rest[:nearly], rest[nearly:])
    rng = numpy_rng(seed, "explain", "shown")
    picked = []
    for rows, limit in zip(members, most):
        drawn = np.sort(rng.choice(len(rows), limit, replace=False)) if len(rows) > limit else np.arange(len(rows))
        picked.append(rows[drawn])
    groups = np.repeat(np.arange(len(GROUPS)), [len(rows) for rows in picked])
    return Shown(np.concatenate(picked).astype(np.int64), groups, tuple(map(len, members)))


@dataclasses.dataclass(frozen=True)
class Parts:
    """Scores of the shown examples, taken apart.

    Attributes:
      tokens: for each a float64 [T], the part of every token: that of the position before it, which predicts it; it is
        0 for tokens that are not learned. They add up to the score.
      by_leaf: float64 [S, layers, modules]: likewise; what lies in no layer is in the last of ``layers``.
      layers, modules: their names.
      domain: int64 [S], which direction (group of the domain) the score is along. own: see `Directional`.
      worst: the largest difference of a score from the stored one, and of the sums over layers and modules from it,
        relative to the sum of the sizes of its parts.
    """

    tokens: list[np.ndarray]
    by_leaf: Float[np.ndarray, "S L G"]
    layers: list[str]
    modules: list[str]
    domain: Int[np.ndarray, " S"]
    own: tuple[float, ...] | None
    worst: tuple[float, float]

    def sums(self) -> Float[np.ndarray, " S"]:
        """The scores."""
        return np.array([values.sum() for values in self.tokens])


def take_apart(
    directional: Directional, problem: SelectionProblem, selection: Selection, rows: np.ndarray, spec: Any, folder: Path
) -> Parts:
    """The parts of the scores of ``rows``, kept in ``folder`` as they are found.

    Raises:
      ConfigError: scores that are not those of ``selection``.
    """
    manifest = {
        **problem.manifest,
        "kernel": directional.kernel.name,
        "directions": [tree_digest(direction) for direction in directional.directions],
    }
    folder = folder / f"parts-{digest(manifest)[:16]}"
    tokens, domain = [], []
    for values, along in _by_token(directional, problem, rows, folder):
        tokens.append(values)
        domain.append(along)
    which = np.asarray(domain, np.int64)
    sizes = np.array([np.abs(values).sum() for values in tokens])
    off = check_scores(np.array([values.sum() for values in tokens]), selection, rows, sizes, spec.dtype)
    by_leaf = _by_leaf(directional, problem, rows, which, folder / "leaves", manifest)
    table, layers, kinds = group_leaves(by_leaf, problem.params, spec)
    if directional.divisors is not None:
        table /= directional.divisors[rows][:, None, None]
    sums = table.sum(axis=(1, 2))
    second = float(np.max(np.abs(sums - [values.sum() for values in tokens]) / np.maximum(sizes, 1e-300), initial=0))
    return Parts(tokens, table, layers, kinds, which, directional.own, (off, second))


def check_scores(
    sums: Float[np.ndarray, " S"], selection: Selection, rows: np.ndarray, sizes: Float[np.ndarray, " S"], dtype: Any
) -> float:
    """The largest relative difference of ``sums`` from the scores of the selection.

    Raises:
      ConfigError: it is more than rounding explains.
    """
    stored = selection.scores[rows]
    off = np.abs(sums - stored) / np.maximum(np.maximum(sizes, np.abs(stored)), 1e-300)
    allowed = TOLERANCE if np.dtype(dtype).itemsize >= 4 else TOLERANCE_16
    if np.max(off, initial=0) > allowed:
        worst = int(np.argmax(off))
        raise ConfigError(
            f"the score of pool row {rows[worst]} is {sums[worst]:.6g} when it is computed again, and "
            f"{stored[worst]:.6g} in scores.parquet ({np.sum(off > allowed)} of {len(rows)} scores differ): the inputs "
            "of the run, its adapter or the program have changed since; run the selection again, into a new directory"
        )
    return float(np.max(off, initial=0))


def _by_token(
    directional: Directional, problem: SelectionProblem, rows: np.ndarray, folder: Path
) -> Iterator[tuple[np.ndarray, int]]:
    """(parts of every token, direction) for each of ``rows`` in turn; a block of rows is one file in ``folder``."""
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        file = folder / f"tokens-{digest(block.tolist())[:16]}.npz"
        if not file.exists():
            batches = problem.pool.batches(token_budget=problem.token_budget, indices=block)
            title = problem.progress and f"scores by token, {start} to {start + len(block)} of {len(rows)}"
            pieces = dict(
                scores_by_position(directional.kernel, problem.params, directional.directions, batches, progress=title)
            )
            lengths = [len(pieces[row]) for row in block.tolist()]
            write_npz(
                file, {"lengths": np.array(lengths), "parts": np.concatenate([pieces[r] for r in block.tolist()])}
            )
        with np.load(file) as kept:
            cuts = np.cumsum(kept["lengths"])[:-1]
            pieces = np.split(np.asarray(kept["parts"], np.float64), cuts)
        for row, values in zip(block, pieces):
            along = int(np.argmax(values.sum(axis=0)))
            chosen = values[:, along] if directional.divisors is None else values[:, along] / directional.divisors[row]
            # The position that predicts a token is the one before it.
            yield np.concatenate([np.zeros(1), chosen[:-1]]), along


def _by_leaf(
    directional: Directional,
    problem: SelectionProblem,
    rows: np.ndarray,
    which: np.ndarray,
    folder: Path,
    manifest: dict,
) -> Float[np.ndarray, "S K"]:
    """Products of gradient and direction by leaf, [S, K]."""
    stacked = tuple(path.startswith("layers/") for path in paths(problem.params))
    width = ProductsByLeaf(directional.directions[0], stacked).width(problem.params)
    total = len(problem.pool)
    options: dict[str, Any] = {"rows": total, "width": width, "dtype": np.float32, "manifest": manifest}
    with RowStore.open(folder, **options) as store:
        for number, direction in enumerate(directional.directions):
            mine = np.sort(rows[which == number])
            if len(mine) == 0 or store.done()[mine].all():
                continue
            products = ProductsByLeaf(direction, stacked)
            batches = problem.pool.batches(token_budget=problem.gradient_budget, indices=mine)
            run = Pass(total, store, progress=problem.progress and "scores by layer")
            gradient_features(directional.kernel, problem.params, batches, products, rows=run, read=False)
        return np.asarray(store.read(rows), np.float64)


def group_leaves(
    by_leaf: Float[np.ndarray, "S K"], params: Params, spec: Any
) -> tuple[Float[np.ndarray, "S L G"], list[str], list[str]]:
    """Columns of `ProductsByLeaf` as (table [S, layers, modules], names of layers, names of modules).

    A linear layer has the last word of its name in PEFT, ``q_proj``; of fused layers each part has its own.
    """
    named = {f"layers/{linear}": module for module, linears in modules(spec).items() for linear in linears}
    count, leaves = spec.config.num_layers, paths(params)

    def kind(path: str) -> str:
        stem = path.rsplit("/", 1)[0]
        module = named.get(stem)
        if module is None:
            return stem.removeprefix("layers/")
        fused = sum(other == module for other in named.values()) > 1
        return stem.rsplit("/", 1)[-1] if fused else module.rsplit(".", 1)[-1]

    order = {stem: number for number, stem in enumerate(named)}  # as the block applies them; no linear layer: last
    listed = sorted(leaves, key=lambda path: order.get(path.rsplit("/", 1)[0], len(order)))
    kinds = list(dict.fromkeys(kind(path) for path in listed))
    width = sum(count if path.startswith("layers/") else 1 for path in leaves)
    if by_leaf.shape[1] > width:  # a trained head's own term in closed form
        kinds = list(dict.fromkeys([*kinds, "head"]))
    table, column = np.zeros((len(by_leaf), count + 1, len(kinds))), 0
    for path in leaves:
        span = slice(0, count) if path.startswith("layers/") else slice(count, count + 1)
        size = span.stop - span.start
        table[:, span, kinds.index(kind(path))] += by_leaf[:, column : column + size]
        column += size
    if column < by_leaf.shape[1]:
        table[:, count, kinds.index("head")] += by_leaf[:, column]
    names = [str(layer) for layer in range(count)]
    if np.any(table[:, count]):
        return table, [*names, "outside"], kinds
    return table[:, :count], names, kinds
