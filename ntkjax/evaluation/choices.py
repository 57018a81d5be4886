"""Accuracy over fixed choices by likelihood.

For an example x with choices c the response is ``answer_template.format(c)``, rendered as training renders it
(chat template or plain). log p(response_c | x) is the sum over *all* response tokens: the words of the
template, which the choices share, the choice itself and what the renderer puts after it (full stop,
end-of-turn token).

- ``raw``: the sum, in nats.
- ``norm``: the sum divided by the number of those tokens, so long choices are not punished for their length.

All choices of an example are packed into one sequence (see `packing`), so the prompt is computed once; logits
are formed only at the places that predict a scored token. This is exact: no approximation against one
sequence per choice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ntkjax.data.batches import most_buckets, plan_batches
from ntkjax.data.buckets import round_up
from ntkjax.data.prompts import encode, render_text
from ntkjax.data.rows import lay_out
from ntkjax.errors import ConfigError, DataError, UserError
from ntkjax.evaluation.answers import find_choices
from ntkjax.evaluation.options import DEFAULT_TEMPLATE, Batching
from ntkjax.evaluation.packing import Packed, PackedBatch, collate, collate_rows, pack
from ntkjax.parallel import data_parallel, shard_batch, to_host
from ntkjax.types import ArrayLike, Batch, Params, as_pytree_fn, at_least_float32, capped, logit_cap

LOGIT_ELEMENTS = 1 << 24
"""Logits held at once while scoring: 64 MiB in float32, whatever the vocabulary."""
ROW_LENGTH = 512
"""Tokens of a row that holds several examples: attention here makes a number for every pair of them."""
RENDER_BLOCK = 256
"""Examples rendered and tokenised at once."""
TIE_TOLERANCE = 1e-5
"""Nats: two choices closer than this are a tie, decided for the one listed first."""


@dataclasses.dataclass(frozen=True)
class ChoiceScores:
    """Likelihoods of the choices of one example.

    Attributes:
      row: row of the example in the records (or in the list) given.
      raw: float64 [C], log p(response_c | prompt) in nats.
      tokens: int64 [C], response tokens in each sum.
      dropped: prompt tokens cut from the left.
    """

    row: int
    raw: np.ndarray
    tokens: np.ndarray
    dropped: int

    @property
    def norm(self) -> np.ndarray:
        """float64 [C]: raw / tokens, nats per token."""
        return self.raw / self.tokens


def pick(scores: np.ndarray) -> tuple[int, bool]:
    """Index of the best score and whether it was a tie (within `TIE_TOLERANCE`; the first listed wins)."""
    best = np.flatnonzero(scores >= scores.max() - TIE_TOLERANCE)
    return int(best[0]), bool(best.size > 1)


@jax.jit
def token_log_probs(
    states_fn: Callable,
    head_fn: Callable,
    params: Params,
    batch: Batch,
    predictor: Int[ArrayLike, "B M"],
    target: Int[ArrayLike, "B M"],
) -> Float[Array, "B M"]:
    """log p(target) at the predictor positions: log_softmax(W h)[target], nats, float32 or better.

    The hidden states are gathered before the head is applied, and the head runs over blocks of positions, so
    [B, T, V] is never formed. Model functions and weights are arguments: one compilation for each batch
    shape. Logits are capped where ``head_fn`` has a ``logit_cap`` (`ntkjax.types.logit_cap`).
    """
    return token_scores(states_fn, head_fn, params, batch, predictor, target)[0]


@jax.jit
def token_scores(
    states_fn: Callable,
    head_fn: Callable,
    params: Params,
    batch: Batch,
    predictor: Int[ArrayLike, "B M"],
    target: Int[ArrayLike, "B M"],
) -> tuple[Float[Array, "B M"], Bool[Array, "B M"]]:
    """`token_log_probs`, and whether no token is likelier than the target there, [B, M] each."""
    predictor, target = jnp.asarray(predictor), jnp.asarray(target)
    states, head = states_fn(params, batch), at_least_float32(head_fn(params))
    hidden = at_least_float32(jnp.take_along_axis(states, predictor[:, :, None], axis=1))
    dtype = jnp.promote_types(hidden.dtype, head.dtype)
    hidden, head = hidden.astype(dtype), head.astype(dtype)

    # Position by position instead of [B, M, V] at once; `block` of them, so that their logits stay within bounds.
    def one(pair: tuple[Array, Array]) -> tuple[Array, Array]:
        logits = capped(jnp.matmul(head, pair[0], precision=jax.lax.Precision.HIGHEST), logit_cap(head_fn))
        best = jnp.argmax(logits).astype(pair[1].dtype) == pair[1]
        return logits[pair[1]] - jax.nn.logsumexp(logits), best

    flat = (hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1))
    block = max(1, min(flat[1].size, LOGIT_ELEMENTS // head.shape[0]))
    log_probs, best = jax.lax.map(one, flat, batch_size=block)
    return log_probs.reshape(target.shape), best.reshape(target.shape)


def score_packed(
    model: Any,
    params: Params,
    packed: Sequence[Packed],
    *,
    token_budget: int,
    max_buckets: int | None = None,
    packing: bool = False,
) -> Iterator[list[tuple[int, np.ndarray]]]:
    """Score packed examples, one list for each batch: ``(place in packed, log-probabilities float64 [C])``.

    Batches are grouped by packed length, longest first; each length has one number of rows and of scored
    tokens, so the scorer compiles once for each. With ``packing`` a row of `ROW_LENGTH` tokens (more where an example
    needs it) holds several examples. The rows of a batch are spread over the model's ``mesh``, where it has one, and
    the budget is that of each part of them. Where the model's rotary frequencies depend on a sequence's length, choices
    of one example that would turn differently are scored in sequences of their own.

    Args:
      model: anything with the callable pytrees ``states_fn(params, batch) -> [B, T, D]`` and
        ``head_fn(params) -> [V, D]``.
    """
    states_fn, head_fn = as_pytree_fn(model.states_fn), as_pytree_fn(model.head_fn)
    _check_positions(model, packed)
    together = [_turn_alike(model, p.lengths()) for p in packed]
    if not all(together):
        apart = [i for i, alike in enumerate(together) for _ in range(1 if alike else packed[i].choices)]
        parts = [p for i, p in enumerate(packed) for p in ([p] if together[i] else map(p.alone, range(p.choices)))]
        options = {"token_budget": token_budget, "max_buckets": max_buckets, "packing": packing}
        yield from _joined(score_packed(model, params, parts, **options), apart)
        return
    lengths = np.asarray([p.tokens.size for p in packed], dtype=np.int32)
    buckets = most_buckets(6) if max_buckets is None else max_buckets
    mesh = getattr(model, "mesh", None)  # a stub may have none
    parts = data_parallel(mesh)
    plan = (lengths, token_budget * parts, parts)
    for b in _laid_out(packed, *plan) if packing else _padded(packed, *plan, buckets):
        batch, predictor, target = (shard_batch(x, mesh) for x in (b.batch, b.predictor, b.target))
        log_probs = to_host(token_log_probs(states_fn, head_fn, params, batch, predictor, target))
        yield [
            (int(i), packed[i].sums(log_probs[row, start : start + packed[i].target.size]))
            for i, row, start in zip(b.rows, b.places, b.starts)
        ]


def _turn_alike(model: Any, lengths: np.ndarray) -> bool:
    """Whether sequences of these lengths have the same rotary frequencies."""
    config = getattr(model, "config", None)  # a stub may have none
    if config is None or not config.turns_by_length:
        return True
    end = config.same_turns_until(int(lengths.min()))
    return end is None or int(lengths.max()) <= end


def _joined(
    scored: Iterator[list[tuple[int, np.ndarray]]], owners: Sequence[int]
) -> Iterator[list[tuple[int, np.ndarray]]]:
    """What ``scored`` gives of parts, by the ``owners`` of the parts: an owner comes as soon as all its parts did."""
    waiting = {owner: list[int]() for owner in owners}
    for part, owner in enumerate(owners):
        waiting[owner].append(part)
    values: dict[int, np.ndarray] = {}
    for batch in scored:
        values |= dict(batch)
        done = {owners[part]: waiting[owners[part]] for part, _ in batch}
        whole = {owner: parts for owner, parts in done.items() if all(part in values for part in parts)}
        yield [(owner, np.concatenate([values.pop(part) for part in parts])) for owner, parts in whole.items()]


def _padded(
    packed: Sequence[Packed], lengths: np.ndarray, token_budget: int, parts: int, max_buckets: int
) -> Iterator[PackedBatch]:
    plan = plan_batches(lengths, np.arange(len(packed)), token_budget, max_buckets, parts) if packed else []
    scored: dict[int, int] = {}
    for planned in plan:
        most = max(packed[i].target.size for i in planned.indices)
        # One number of scored tokens for each length, the most of its batches: it is a shape of the program.
        scored[planned.length] = max(scored.get(planned.length, 0), round_up(most, 8))
    for planned in plan:
        yield collate(packed, planned.indices, planned.rows, planned.length, scored[planned.length])


def _laid_out(packed: Sequence[Packed], lengths: np.ndarray, token_budget: int, parts: int) -> Iterator[PackedBatch]:
    filled = lay_out(lengths, token_budget, row_multiple=parts, row_length=ROW_LENGTH)[1]
    targets = np.asarray([p.target.size for p in packed])
    scored: dict[int, int] = {}
    for batch in filled:
        most = int(np.bincount(batch.places, weights=targets[batch.members]).max())
        scored[batch.length] = max(scored.get(batch.length, 0), round_up(most, 64))
    for batch in filled:
        yield collate_rows(packed, batch, scored[batch.length])


def _check_positions(model: Any, packed: Sequence[Packed]) -> None:
    config = getattr(model, "config", None)  # a stub may have none
    limit = getattr(config, "position_limit", None)
    longest = max((int(p.positions.max()) + 1 for p in packed), default=0)
    if limit is not None and longest > limit:
        raise UserError(
            f"an example of {longest} tokens does not fit the model's {limit} learned positions; "
            f"set max_length to {limit} or less"
        )


def check_template(answer_template: str) -> None:
    """Refuse a template without exactly one ``{}``.

    Raises:
      ConfigError: with the template and what was expected.
    """
    try:
        good = answer_template.format("\x00").count("\x00") == 1
    except (IndexError, KeyError, ValueError):
        good = False
    if not good:
        raise ConfigError(
            f"answer_template: expected text with one {{}} for the choice, such as {DEFAULT_TEMPLATE!r}, "
            f"got {answer_template!r}"
        )


def pack_choices(
    tokenizer: Any,
    examples: Sequence[Any],
    responses: Sequence[Sequence[str]],
    *,
    max_length: int,
    score_shared: bool = True,
) -> list[Packed]:
    """Render each example with each of its responses and pack the renderings.

    Raises:
      UserError: a response that does not fit into ``max_length``, naming the example.
    """
    packed = []
    for start in range(0, len(examples), RENDER_BLOCK):
        part = list(zip(examples[start : start + RENDER_BLOCK], responses[start : start + RENDER_BLOCK]))
        rendered = iter(encode(tokenizer, [render_text(tokenizer, e, r) for e, texts in part for r in texts]))
        for example, texts in part:
            own = list(islice(rendered, len(texts)))
            packed.append(
                pack(
                    [r.tokens for r in own],
                    [r.response_start for r in own],
                    max_length=max_length,
                    score_shared=score_shared,
                    bos=tokenizer.bos_token_id,
                    name=f"example {example.id!r}",
                )
            )
    return packed


def gold_choice(example: Any) -> int | None:
    """Index of the example's answer among its choices; None without choices or answer.

    Compared as written first, then ever less strictly, as long as one choice alone is meant (`find_choices`).

    Raises:
      DataError: an answer that is not among the choices or could be several of them, or fewer than two choices.
    """
    if not example.choices or example.answer is None or not example.answer.strip():
        return None
    choices = list(example.choices)
    if len(choices) < 2:
        raise DataError(
            f"example {example.id!r}: found the choices {choices}; expected at least two; add the others, or remove "
            "the field 'choices'"
        )
    matches = find_choices(example.answer, choices)
    if len(matches) == 1:
        return matches[0]
    meant = f"could be any of {[choices[c] for c in matches]}," if matches else "is not"
    raise DataError(
        f"example {example.id!r}: the answer {example.answer!r} {meant} among the choices {choices}; expected one of "
        "them as it is written there; mend the record"
    )


def score_choices(
    model: Any,
    params: Params,
    records: Any,
    *,
    batching: Batching,
    answer_template: str = DEFAULT_TEMPLATE,
    rows: Sequence[int] | None = None,
    max_buckets: int | None = None,
) -> Iterator[list[ChoiceScores]]:
    """Likelihoods of the choices of every example that has choices and an answer, one list for each batch.

    Args:
      model: a `LanguageModel`, or anything with ``tokenizer``, ``states_fn`` and ``head_fn``.
      params: the trained parameters, any subset of the model's tree.
      batching: how they are put into batches; an example longer than its token budget forms a batch alone.
      rows: which rows of the records; None for all.
      max_buckets: padded lengths; None: 6 on a CPU, fewer where compilation takes long.

    Raises:
      UserError: no example has choices and an answer, or one does not fit into ``batching.max_length``.
    """
    check_template(answer_template)
    rows = range(len(records)) if rows is None else rows
    chosen = [
        (row, example) for row, example in ((row, records[row]) for row in rows) if gold_choice(example) is not None
    ]
    if not chosen:
        raise UserError(
            f"none of the {len(rows)} examples has choices and an answer, so there is no accuracy over choices; "
            "expected records with the fields 'choices' and 'answer'; add them to the records"
        )
    kept, examples = zip(*chosen)
    responses = [[answer_template.format(choice) for choice in example.choices] for example in examples]
    packed = pack_choices(model.tokenizer, examples, responses, max_length=batching.max_length)
    options = {"token_budget": batching.token_budget, "max_buckets": max_buckets, "packing": batching.packing}
    for done in score_packed(model, params, packed, **options):
        yield [ChoiceScores(kept[i], sums, packed[i].counts(), packed[i].dropped) for i, sums in done]
