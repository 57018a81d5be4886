"""The answer choices of a question as outputs f(x) [C] of the model: what kernel regression predicts.

- ``likelihood``: log p of each choice's own tokens (those the choices do not share), as accuracy over choices has it.
- ``logits``: the logit of each choice's first own token, all read off one position: the label words of Malladi et al.
  2023 (arXiv 2210.05643). Choices that begin with the same token cannot be told apart so.

Both are centred over the choices: what they share changes no answer. For choices of one token the two are equal, the
normaliser being shared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ntkjax.data.buckets import round_up
from ntkjax.errors import ConfigError, UserError
from ntkjax.evaluation.choices import gold_choice, pack_choices, token_log_probs
from ntkjax.evaluation.packing import Packed, collate
from ntkjax.models import LanguageModel
from ntkjax.types import Batch, Params, at_least_float32, capped, logit_cap

KINDS = ("likelihood", "logits")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChoiceRows:
    """Packed questions at one shape; every leaf has a leading axis of questions.

    Attributes:
      batch: tokens with segments and positions.
      predictor, target: int32 [B, M], places and tokens that are scored.
      branch: int32 [B, M], the choice a scored token belongs to, from 0; -1 for padding.
      valid: bool [B, C], the choices that exist.
    """

    # Any: inside JAX's transformations the leaves are also tracers of other shapes.
    batch: Batch
    predictor: Any
    target: Any
    branch: Any
    valid: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChoiceOutputs:
    """f(params, rows) [B, C], at least float32, centred over the valid choices and 0 at the others."""

    states_fn: Any
    head_fn: Any
    kind: str = dataclasses.field(default="likelihood", metadata={"static": True})

    def __call__(self, params: Params, rows: ChoiceRows) -> Float[Array, "B C"]:
        scores = self.token_scores(params, rows)
        choices = jnp.arange(rows.valid.shape[1], dtype=jnp.int32)
        belongs = jnp.asarray(rows.branch)[:, :, None] == choices[None, None, :]
        zero = jnp.zeros((), scores.dtype)
        sums = jnp.sum(jnp.where(belongs, scores[:, :, None], zero), axis=1)
        valid = jnp.asarray(rows.valid)
        mean = jnp.sum(jnp.where(valid, sums, zero), axis=1) / jnp.sum(valid, axis=1).astype(sums.dtype)
        return jnp.where(valid, sums - mean[:, None], zero)

    def token_scores(self, params: Params, rows: ChoiceRows) -> Float[Array, "B M"]:
        """log p(target), or its logit, at each scored place."""
        if self.kind == "likelihood":
            return token_log_probs(self.states_fn, self.head_fn, params, rows.batch, rows.predictor, rows.target)
        states = at_least_float32(self.states_fn(params, rows.batch))
        hidden = jnp.take_along_axis(states, jnp.asarray(rows.predictor)[:, :, None], axis=1)
        words = at_least_float32(self.head_fn(params))[jnp.asarray(rows.target)]
        return capped(jnp.sum(hidden.astype(words.dtype) * words, axis=2), logit_cap(self.head_fn))


@dataclasses.dataclass(frozen=True)
class Questions:
    """Questions with choices, ready for `ChoiceOutputs`.

    Attributes:
      rows: NumPy leaves [n, ...].
      gold: int64 [n], index of the right choice.
      kept: int64 [n], their rows in the records; the others have no choices or no answer.
      cut: questions whose prompt lost tokens on the left.
    """

    rows: ChoiceRows
    gold: Int[np.ndarray, " n"]
    kept: Int[np.ndarray, " n"]
    cut: int

    def __len__(self) -> int:
        return len(self.gold)

    @property
    def valid(self) -> Bool[np.ndarray, "n C"]:
        """The choices that exist."""
        return np.asarray(self.rows.valid)

    def padded(self, choices: int) -> Questions:
        """The same questions with room for ``choices`` choices."""
        more = ((0, 0), (0, choices - self.valid.shape[1]))
        return dataclasses.replace(self, rows=dataclasses.replace(self.rows, valid=np.pad(self.valid, more)))


def questions(
    model: LanguageModel, records: Any, *, kind: str, max_length: int, answer_template: str
) -> Questions | None:
    """The records with choices and an answer as `Questions`; None where there is none.

    Raises:
      ConfigError: an unknown kind. UserError: for ``logits``, choices that begin with the same token (named).
    """
    if kind not in KINDS:
        raise ConfigError(f"outputs {kind!r}: expected one of {', '.join(KINDS)}")
    pairs = [(row, gold_choice(records[row])) for row in range(len(records))]
    kept, gold = [row for row, choice in pairs if choice is not None], [c for _, c in pairs if c is not None]
    if not kept:
        return None
    examples = [records[row] for row in kept]
    texts = [[answer_template.format(choice) for choice in example.choices] for example in examples]
    packed = pack_choices(model.tokenizer, examples, texts, max_length=max_length, score_shared=False)
    if kind == "logits":
        packed = [_first_tokens(p, example) for p, example in zip(packed, examples)]
    return Questions(_rows(packed), np.asarray(gold), np.asarray(kept), sum(p.dropped > 0 for p in packed))


def _first_tokens(packed: Packed, example: Any) -> Packed:
    """Only the first scored token of every choice."""
    places = np.array([np.flatnonzero(packed.branch == c + 1)[0] for c in range(packed.choices)])
    if len({int(t) for t in packed.target[places]}) < packed.choices:
        raise UserError(
            f"example {example.id!r}: two of its choices {list(example.choices)} begin with the same token, so one "
            "logit cannot tell them apart; use --outputs likelihood"
        )
    cut = lambda values: values[places]
    return dataclasses.replace(
        packed, predictor=cut(packed.predictor), target=cut(packed.target), branch=cut(packed.branch)
    )


def _rows(packed: Sequence[Packed]) -> ChoiceRows:
    length = round_up(max(p.tokens.size for p in packed), 8)
    scored, choices = max(p.target.size for p in packed), max(p.choices for p in packed)
    made = collate(packed, np.arange(len(packed)), len(packed), length, scored)
    branch = np.full((len(packed), scored), -1, np.int32)
    for row, p in enumerate(packed):
        branch[row, : p.branch.size] = p.branch - 1
    valid = np.arange(choices)[None] < np.array([p.choices for p in packed])[:, None]
    return ChoiceRows(made.batch, made.predictor, made.target, branch, valid)


@jax.jit
def _outputs(output_fn: Any, params: Params, rows: ChoiceRows) -> Array:
    return output_fn(params, rows)


def choice_outputs(output_fn: Any, params: Params, rows: ChoiceRows, *, token_budget: int) -> np.ndarray:
    """f [n, C] float64 of all questions, at most ``token_budget`` tokens at a time; ``output_fn``: `ChoiceOutputs` or a
    linearisation of it."""
    count, length = np.shape(rows.batch.tokens)
    size = min(count, max(1, token_budget // length))
    parts = []
    for start in range(0, count, size):
        picked = np.minimum(np.arange(start, start + size), count - 1)
        part = jax.tree.map(lambda leaf, p=picked: leaf[p], rows)
        parts.append(np.asarray(_outputs(output_fn, params, part), np.float64)[: count - start])
    return np.concatenate(parts)
