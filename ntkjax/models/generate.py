"""Greedy and sampled continuation with a key/value cache, compiled once per length bucket."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from ntkjax.errors import ConfigError, UserError
from ntkjax.models.config import ModelConfig
from ntkjax.models.functions import forward, overlay, project
from ntkjax.models.layers import KVCache, ModelSpec
from ntkjax.models.lm import LanguageModel
from ntkjax.parallel import to_host
from ntkjax.types import Params, at_least_float32

SHORTEST_BUCKET = 16
"""Prompts are padded to this length or to the next power of two above theirs."""


def generate(
    model: LanguageModel,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    key: Array | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop_tokens: Sequence[int] | None = None,
    batch_size: int = 32,
) -> list[list[int]]:
    """Continue each prompt by up to ``max_new_tokens`` tokens; the new tokens alone, in the order of the prompts.

    A continuation ends with the first stop token, which is kept: one without it was cut at
    ``max_new_tokens``. Each token follows from the whole sequence before it: where rotary frequencies depend on a
    sequence's length, the cache is made anew when they change (longrope once, dynamic ones for every token beyond
    max_positions). A prompt's continuation does not depend on the others': padding is never attended to,
    and its random stream is ``key`` folded with its place in ``prompts``. On a mesh every device takes all rows: only
    the weights are spread.

    Args:
      params: any subset of the model's tree, laid over its weights. prompts: token ids, each of length >= 1.
        temperature: 0 takes the largest logit; otherwise samples softmax(logits / temperature), and needs
        ``key``. top_p: sample only from the fewest most probable tokens whose probabilities reach ``top_p``.
        stop_tokens: None means the model's, see `LanguageModel.stop_tokens`. batch_size: prompts
        that run together; memory grows with it, compiled shapes are powers of two up to it.

    Raises UserError naming the prompt that is empty, has a token outside the vocabulary or is too long for
    the model's positions; ConfigError for an option out of range.
    """
    _check_options(max_new_tokens, key, temperature, top_p, batch_size)
    prompts = [[int(token) for token in prompt] for prompt in prompts]
    limit = model.config.position_limit
    for i, prompt in enumerate(prompts):
        _check_prompt(i, prompt, model.config, max_new_tokens)
    weights, stop = overlay(model.params, params), jnp.asarray(_stop_tokens(model, stop_tokens), jnp.int32)
    key = _typed(key)
    results: list[list[int]] = [[] for _ in prompts]
    settings, ends = jnp.asarray([temperature, top_p], jnp.float32), set(np.asarray(stop).tolist())
    pending = list(range(len(prompts)))
    while pending:
        # Once for nearly every model. Where rotary frequencies depend on the length, a round ends where they change,
        # and the next begins with a cache made anew from all that was generated.
        texts = [prompts[i] + results[i] for i in pending]
        for bucket, members in _buckets([len(text) for text in texts], limit).items():
            size = bucket + max_new_tokens
            size = size if limit is None else min(size, limit)
            for start in range(0, len(members), batch_size):
                some = members[start : start + batch_size]
                chosen = [pending[i] for i in some]
                tokens, lengths, index = _pad([texts[i] for i in some], chosen, bucket, batch_size)
                began = np.zeros_like(lengths)
                began[: len(some)] = [len(results[i]) for i in chosen]
                room = np.asarray([_room(model.config, n, max_new_tokens) for n in lengths.tolist()], np.int32)
                steps = np.stack([began, np.minimum(max_new_tokens, began + room)])
                out = _continue(
                    model.spec,
                    size,
                    max_new_tokens,
                    temperature > 0,
                    weights,
                    tokens,
                    lengths,
                    index,
                    stop,
                    key,
                    settings,
                    steps,
                )
                for i, row in zip(chosen, to_host(out).tolist()):
                    results[i] += row[: row.index(-1)] if -1 in row else row
        pending = [i for i in pending if results[i][-1] not in ends and len(results[i]) < max_new_tokens]
    return results


def _room(config: ModelConfig, length: int, most: int) -> int:
    """How many tokens, at most ``most``, follow from sequences that turn as one of ``length`` tokens does."""
    end = config.same_turns_until(length)
    return most if end is None else min(most, end - length + 1)


def _check_options(max_new_tokens: int, key: Array | None, temperature: float, top_p: float, batch_size: int) -> None:
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens = {max_new_tokens}: expected at least 1")
    if batch_size < 1:
        raise ConfigError(f"batch_size = {batch_size}: expected at least 1")
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature = {temperature}: expected 0 (greedy) or a positive number")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p = {top_p}: expected a share above 0 and at most 1")
    if temperature > 0 and key is None:
        raise ConfigError(f"temperature = {temperature} samples: give key=jax.random.key(seed), or temperature=0")


def _typed(key: Array | None) -> Array:
    """A typed key; greedy generation never uses it."""
    if key is None:
        return jax.random.key(0)
    return key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)


def _check_prompt(i: int, prompt: list[int], config: ModelConfig, new: int) -> None:
    vocab_size, limit = config.vocab_size, config.position_limit
    if not prompt:
        raise UserError(f"prompt {i} is empty: expected at least one token to continue from")
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        wrong = next(token for token in prompt if not 0 <= token < vocab_size)
        raise UserError(f"prompt {i}: token id {wrong} is outside the vocabulary (0 to {vocab_size - 1})")
    if limit is not None and len(prompt) + new > limit:
        raise UserError(
            f"prompt {i}: {len(prompt)} tokens and max_new_tokens = {new} do not fit the model's {limit} "
            "learned positions: shorten the prompt or ask for fewer tokens"
        )


def _stop_tokens(model: LanguageModel, given: Sequence[int] | None) -> list[int]:
    """The stop tokens, filled up with -1 to a multiple of 8 so that their number compiles nothing anew."""
    tokens = model.stop_tokens if given is None else set(given)
    return sorted(tokens) + [-1] * (-len(tokens) % 8 or 8 * (not tokens))


def _buckets(lengths: list[int], limit: int | None) -> dict[int, list[int]]:
    """Padded length -> the prompts padded to it, in order."""
    buckets: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        bucket = max(SHORTEST_BUCKET, 1 << (length - 1).bit_length())
        buckets.setdefault(bucket if limit is None else min(bucket, limit), []).append(i)
    return buckets


def _pad(
    prompts: list[list[int]], members: list[int], bucket: int, batch_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens [B, T], lengths [B] and places [B] with B the next power of two; filler rows have place -1."""
    # Powers of two: a batch of any size is one of a few programs.
    rows = min(batch_size, 1 << (len(prompts) - 1).bit_length())
    tokens, lengths = np.zeros((rows, bucket), np.int32), np.ones(rows, np.int32)
    index = np.full(rows, -1, np.int32)
    index[: len(members)] = members
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)], lengths[row] = prompt, len(prompt)
    return tokens, lengths, index


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _continue(
    spec: ModelSpec,
    cache_size: int,
    new: int,
    sampled: bool,
    weights: dict,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    index: Int[Array, " B"],
    stop: Int[Array, " E"],
    key: Array,
    settings: Float[Array, "2"],
    steps: Int[Array, "2 B"],
) -> Int[Array, "B N"]:
    """New tokens [B, new], -1 after a row's stop token and in filler rows. ``settings``: temperature and top_p.
    ``steps``: of each row the number of its first new token and the number at which it ends, at most ``new`` apart.
    """
    rows, (began, ended) = tokens.shape[0], steps
    # Streams by place and step, not by batch: what is sampled does not depend on which prompts run together.
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.maximum(index, 0))

    def choose(hidden: Array, step: Array) -> Array:
        logits = at_least_float32(project(spec, weights, hidden))
        if not sampled:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return _sample(logits, jax.vmap(jax.random.fold_in)(keys, began + step), settings)

    def stops(token: Array) -> Bool[Array, " B"]:
        return jnp.any(token[:, None] == stop[None, :], axis=-1)

    def body(state):
        step, token, done, cache, out = state
        hidden, cache = forward(spec, weights, token[:, None], cache=cache, extents=extents[:, :1])
        token = choose(hidden[:, 0], step)
        out = jax.lax.dynamic_update_slice(out, jnp.where(done, -1, token)[:, None], (jnp.int32(0), step))
        return step + 1, token, done | stops(token) | (began + step + 1 >= ended), cache, out

    # The prompt's keys and values in one pass; its padding is overwritten by the tokens that follow.
    extents = jnp.broadcast_to(lengths[:, None], tokens.shape)
    hidden, cache = forward(spec, weights, tokens, cache=KVCache.zeros(spec, rows, cache_size), extents=extents)
    assert cache is not None
    # `forward` has counted the padding: the next token is written over its first slot.
    cache = KVCache(cache.keys, cache.values, lengths)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    first, filler = choose(last, jnp.int32(0)), index < 0
    out = jnp.full((rows, new), -1, jnp.int32).at[:, 0].set(jnp.where(filler, -1, first))
    state = (jnp.int32(1), first, filler | stops(first) | (began + 1 >= ended), cache, out)
    return jax.lax.while_loop(lambda s: (s[0] < new) & ~jnp.all(s[2]), body, state)[4]


def _sample(logits: Float[Array, "B V"], keys: Key[Array, " B"], settings: Float[Array, "2"]) -> Int[Array, " B"]:
    """One token per row from softmax(logits / temperature), cut to its nucleus of mass top_p (arXiv 1904.09751)."""
    temperature, top_p = settings.astype(logits.dtype)
    logits = logits / temperature
    ordered = -jnp.sort(-logits, axis=-1)
    # The mass in front of each token, sorted: a token is kept where that has not reached top_p yet, so that the nucleus
    # includes the token that crosses it. It is cut by the smallest logit kept, in the order of the vocabulary.
    before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(ordered, axis=-1)
    # The most probable token is always kept: nothing comes before it.
    kept = jnp.where((before < top_p).at[:, 0].set(True), ordered, jnp.inf)
    least = jnp.min(kept, axis=-1, keepdims=True)
    logits = jnp.where(logits >= least, logits, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
