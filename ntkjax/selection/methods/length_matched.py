"""A control for length: random pool examples whose responses are as long as those that ``ntk`` chooses."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from ntkjax.errors import ConfigError
from ntkjax.rng import numpy_rng
from ntkjax.selection.base import Selection, SelectionProblem, select_top
from ntkjax.selection.methods.ntk import NtkSelector


@dataclasses.dataclass(frozen=True)
class LengthMatchedSelector(NtkSelector):
    """For the n rows of ``ntk`` with the same options, as many other rows of the whole pool with the same response
    lengths |S(x_j)|, drawn uniformly; score_j ~ U(0, 1) for the drawn rows, none for the others.

    Where the pool has too few of a length, those nearest to it are taken; ``length_gap`` reports the largest difference
    of the two sorted lists of lengths, in tokens.

    Source: none, a control of ours. Scores of the tangent kernel are correlated with length, and a step's loss is a
    mean over tokens, so that short auxiliary examples leave more of it to the domain: what ``ntk`` gains over this
    control is not that.

    Cost: that of ``ntk``.

    Raises:
      ConfigError: the pool holds fewer than 2 n rows; and what ``ntk`` raises.
    """

    @property
    def no_parts(self) -> str | None:
        """Its scores are drawn."""
        return "its scores are random numbers"

    def __call__(self, problem: SelectionProblem) -> Selection:
        rows, lengths = len(problem.pool), np.asarray(problem.pool.response_lengths, np.int64)
        if 2 * problem.n > rows:
            raise ConfigError(
                f"length-matched takes n = {problem.n} rows beside those of ntk, and the pool holds {rows}; expected "
                f"at least {2 * problem.n}; ask for fewer or add pool files"
            )
        taken = super().__call__(problem).selected
        numbers = numpy_rng(problem.seed, "selection", "length matched").random(rows)
        drawn = match_lengths(lengths, taken, numbers)
        scores = np.full(rows, np.nan)
        scores[drawn] = numbers[drawn]
        gap = int(np.max(np.abs(np.sort(lengths[drawn]) - np.sort(lengths[taken]))))
        chosen = select_top("length-matched", scores, problem.n)
        return dataclasses.replace(chosen, diagnostics={"length_gap": gap})


def match_lengths(
    lengths: Int[np.ndarray, " N"], taken: Int[np.ndarray, " n"], numbers: Float[np.ndarray, " N"]
) -> Int[np.ndarray, " n"]:
    """n rows outside ``taken``, one for each of them with its length or the nearest that is left; of equally near ones
    those with the lowest of ``numbers``. Lengths of which there are enough come first, so that they keep their own."""
    free = np.ones(len(lengths), bool)
    free[taken] = False
    wanted, counts = np.unique(lengths[taken], return_counts=True)
    short = np.asarray([np.sum(free & (lengths == length)) for length in wanted]) < counts
    drawn = []
    for k in np.argsort(short, kind="stable"):
        rows = np.flatnonzero(free)
        near = rows[np.lexsort((numbers[rows], np.abs(lengths[rows] - wanted[k])))[: counts[k]]]
        free[near] = False
        drawn.append(near)
    return np.concatenate(drawn)
