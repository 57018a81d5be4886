"""Many continuations of one prompt in one sequence, so that the prompt is computed once; several such in a row.

``[shared | rest of choice 1 | rest of choice 2 | ...]``: segment 0 is the longest common token prefix of all
choices (the prompt and whatever of the response they share, such as "So the answer is"); segment c >= 1 holds
the rest of choice c. A token attends to segment 0 and to its own segment, and every segment c restarts its
positions where segment 0 ends, so each choice sees exactly what it would see alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from ntkjax.data.rows import FilledBatch
from ntkjax.errors import UserError
from ntkjax.types import Batch


@dataclasses.dataclass(frozen=True)
class Packed:
    """One packed example.

    Attributes:
      tokens, segments, positions: int32 [T].
      predictor: int32 [M], the place in the packed sequence whose hidden state predicts the m-th scored
        token.
      target: int32 [M], that token.
      branch: int32 [M], 0 where the token is shared by all choices, c >= 1 where it belongs to choice c.
      choices: number of choices C.
      dropped: prompt tokens cut from the left to fit ``max_length``.
    """

    tokens: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    predictor: np.ndarray
    target: np.ndarray
    branch: np.ndarray
    choices: int
    dropped: int

    def lengths(self) -> np.ndarray:
        """int64 [C]: tokens of the prompt with each choice, as it is alone."""
        return (self.segments == 0).sum() + np.bincount(self.segments, minlength=self.choices + 1)[1:]

    def alone(self, choice: int) -> Packed:
        """The sequence with one of its choices, numbered from 0."""
        kept, scored = np.isin(self.segments, (0, choice + 1)), np.isin(self.branch, (0, choice + 1))
        new_position = np.cumsum(kept, dtype=np.int32) - 1
        one = lambda x: np.minimum(x, 1).astype(np.int32)
        return dataclasses.replace(
            self,
            tokens=self.tokens[kept],
            segments=one(self.segments[kept]),
            positions=self.positions[kept],
            predictor=new_position[self.predictor[scored]],
            target=self.target[scored],
            branch=one(self.branch[scored]),
            choices=1,
        )

    def counts(self) -> np.ndarray:
        """int64 [C]: scored tokens of each choice, the shared ones included."""
        return self._per_choice(np.ones(self.branch.size)).astype(np.int64)

    def sums(self, log_probs: np.ndarray) -> np.ndarray:
        """float64 [C]: the log-probability of each choice from those of its tokens, [M]."""
        return self._per_choice(np.asarray(log_probs, dtype=np.float64))

    def _per_choice(self, values: np.ndarray) -> np.ndarray:
        # Branch 0 is what all choices share: its log-probabilities are those of each.
        totals = np.bincount(self.branch, weights=values, minlength=self.choices + 1)
        return totals[0] + totals[1:]


def common_prefix_length(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest prefix that all sequences share."""
    shortest = min(len(s) for s in sequences)
    for i in range(shortest):
        token = sequences[0][i]
        if any(s[i] != token for s in sequences):
            return i
    return shortest


def cut_prompt(prompt: Sequence[int], room: int, bos: int | None = None) -> list[int]:
    """The last ``room >= 1`` tokens of a prompt; a leading bos stays in front where there is room for two."""
    if len(prompt) <= room:
        return list(prompt)
    if room >= 2 and prompt[0] == bos:
        return [prompt[0], *prompt[len(prompt) - room + 1 :]]
    return list(prompt[len(prompt) - room :])


def pack(
    sequences: Sequence[Sequence[int]],
    starts: Sequence[int],
    *,
    max_length: int,
    score_shared: bool = True,
    bos: int | None = None,
    name: str = "example",
) -> Packed:
    """Pack C token sequences that begin alike.

    Args:
      sequences: C sequences, prompt and response.
      starts: [C] where each response starts; only response tokens are scored.
      max_length: the longest sequence alone; a longer one loses prompt tokens on the left, the same for all
        choices.
      score_shared: False leaves the shared response tokens out of the score: they add the same number to
        every choice.
      bos: a token that stays in front of a prompt that is cut.
      name: for the error message.

    Raises:
      UserError: a response that leaves no room for a single prompt token within ``max_length``.
    """
    dropped = max(0, max(len(s) for s in sequences) - max_length)
    if dropped >= min(starts):
        longest = max(len(s) - start for s, start in zip(sequences, starts))
        raise UserError(
            f"{name}: the longest response has {longest} tokens and max_length is {max_length}, which "
            "leaves no room for the prompt; raise max_length"
        )
    sequences = [cut_prompt(s[:start], start - dropped, bos) + list(s[start:]) for s, start in zip(sequences, starts)]
    starts = [start - dropped for start in starts]
    # The prefix stops before the last token of the shortest choice, so that every choice owns at least one,
    # and, where responses start at different places, before the first, so that shared ones are scored alike.
    shared = min(common_prefix_length(sequences), min(len(s) for s in sequences) - 1)
    if len(set(starts)) > 1:
        shared = min(shared, min(starts))
    if shared < 1:
        raise UserError(f"{name}: the choices share no prompt token after tokenisation")
    return _lay_out(sequences, starts, shared, score_shared, dropped)


def _lay_out(sequences: list[list[int]], starts: list[int], shared: int, score_shared: bool, dropped: int) -> Packed:
    tokens, segments, positions = list(sequences[0][:shared]), [0] * shared, list(range(shared))
    scored: list[tuple[int, int, int]] = []  # predictor, target, branch
    if score_shared:
        scored += [(t - 1, tokens[t], 0) for t in range(starts[0], shared)]
    for c, (sequence, start) in enumerate(zip(sequences, starts), 1):
        for t in range(shared, len(sequence)):
            # The first token of every choice is predicted by the last token of the prefix, whatever lies between them
            # in the row; the others by the token before.
            predictor = shared - 1 if t == shared else len(tokens) - 1
            if t >= start:
                scored.append((predictor, sequence[t], c))
            tokens.append(sequence[t])
            segments.append(c)
            positions.append(t)
    table = np.asarray(scored, dtype=np.int32).reshape(-1, 3).T
    as_int = lambda x: np.asarray(x, dtype=np.int32)
    predictor, target, branch = table
    ids, segment, position = as_int(tokens), as_int(segments), as_int(positions)
    return Packed(ids, segment, position, predictor, target, branch, len(sequences), dropped)


@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """Packed examples at one fixed shape.

    Attributes:
      batch: ``Batch`` with segments and positions, [B, T]; its response mask is empty (what is scored is
        given here).
      predictor, target: int32 [B, M]; padded with zeros.
      rows: which examples they are, int64 [number of examples].
      places: int64, the row of the batch that each lies in; starts: int64, where in [M] its predictions begin.
    """

    batch: Batch
    predictor: np.ndarray
    target: np.ndarray
    rows: np.ndarray
    places: np.ndarray
    starts: np.ndarray


def collate(packed: Sequence[Packed], rows: np.ndarray, n_rows: int, length: int, scored: int) -> PackedBatch:
    """Right-pad ``packed[rows]`` to ``n_rows`` x ``length`` with ``scored`` predictions a row, one example a row."""
    members = np.asarray(rows, dtype=np.int64)
    collated = collate_rows(packed, FilledBatch(length, n_rows, 1, members, np.arange(len(members))), scored)
    batch = dataclasses.replace(collated.batch, examples=None, lengths=np.maximum(collated.batch.lengths, 1))
    return dataclasses.replace(collated, batch=batch)


def collate_rows(packed: Sequence[Packed], filled: FilledBatch, scored: int) -> PackedBatch:
    """Several of ``packed`` in each row, as ``filled`` has them, kept apart by ``Batch.examples``."""
    shape, slots = (filled.rows, filled.length), filled.slots
    tokens, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
    examples = np.full(shape, -1, np.int32)
    predictor, target = (np.zeros((filled.rows, scored), np.int32) for _ in range(2))
    lengths, index = np.zeros(filled.rows * slots, np.int32), np.full(filled.rows * slots, -1, np.int32)
    used, said, held = (np.zeros(filled.rows, np.int64) for _ in range(3))
    starts = np.zeros(len(filled.members), np.int64)
    for k, (i, row) in enumerate(zip(filled.members, filled.places)):
        p, at, first, slot = packed[i], used[row], said[row], held[row]
        here, there = slice(at, at + p.tokens.size), slice(first, first + p.target.size)
        tokens[row, here], segments[row, here], positions[row, here] = p.tokens, p.segments, p.positions
        examples[row, here] = slot
        predictor[row, there], target[row, there] = p.predictor + at, p.target
        lengths[row * slots + slot], index[row * slots + slot], starts[k] = p.tokens.size, i, first
        used[row], said[row], held[row] = at + p.tokens.size, first + p.target.size, slot + 1
    batch = Batch(tokens, np.zeros(shape, bool), lengths, index, segments, positions, examples)
    return PackedBatch(batch, predictor, target, np.asarray(filled.members, np.int64), filled.places, starts)
