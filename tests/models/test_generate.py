"""Generation: the cache against full passes, batches against single prompts, sampling against its distribution."""

from __future__ import annotations

import dataclasses
import functools
import importlib

import jax
import numpy as np
import pytest

from ntkjax.errors import ConfigError, UserError
from ntkjax.models import LanguageModel, LoraConfig, ModelConfig, init_lm
from ntkjax.models.generate import generate

# The package gives the function the module's name.
generation = importlib.import_module("ntkjax.models.generate")

SHAPE = {
    "vocab_size": 30,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_layers": 2,
    "num_heads": 4,
    "head_dim": 2,
}
CONFIGS = {
    "qwen3": ModelConfig(family="qwen3", num_kv_heads=2, qk_norm=True, **SHAPE),
    "gpt2": ModelConfig(
        family="gpt2",
        num_kv_heads=4,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        tied=True,
        activation="gelu",
        max_positions=25,
        **SHAPE,
    ),
}
SHORT, LONG = [3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3]


@functools.cache
def make(name: str, **changes) -> LanguageModel:
    """Random weights large enough that continuations vary."""
    config = dataclasses.replace(CONFIGS[name], initializer_range=1.0, **changes)
    return init_lm(config, seed=1, lora=LoraConfig(2, 4.0, ("q",)))


def by_full_passes(model: LanguageModel, prompt: list[int], new: int) -> list[int]:
    """The definition: the largest logit after the whole sequence, again and again; padded to one shape."""
    tokens = list(prompt)
    for _ in range(new):
        padded = np.zeros((1, 25), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(np.argmax(model.logits(padded)[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_tokens_equal_full_passes(name: str) -> None:
    model = make(name)
    expected = [by_full_passes(model, prompt, 8) for prompt in (SHORT, LONG)]
    assert generate(model, {}, [SHORT, LONG], max_new_tokens=8) == expected
    assert len({*expected[0], *expected[1]}) > 3  # not the same token over and over


def test_batches_and_buckets_change_nothing() -> None:
    """Prompts of 5, 13 and 17 tokens: two buckets, filler rows, any order, any batch size."""
    model = make("qwen3")
    prompts = [SHORT, LONG, SHORT[::-1], LONG + LONG[:4], LONG[::-1]]
    together = generate(model, {}, prompts, max_new_tokens=8)
    assert together == generate(model, {}, prompts[::-1], max_new_tokens=8, batch_size=2)[::-1]
    assert together[:1] == generate(model, {}, prompts[:1], max_new_tokens=8)
    assert together[3] == by_full_passes(model, prompts[3], 8)
    assert generate(model, {}, [], max_new_tokens=8) == []


def test_params_are_laid_over_the_weights() -> None:
    model = make("qwen3")
    random = np.random.default_rng(0)
    lora = jax.tree.map(lambda x: random.normal(size=x.shape).astype(x.dtype), model.lora)
    expected = by_full_passes(model.with_params(lora), LONG, 8)
    assert generate(model, lora, [LONG], max_new_tokens=8) == [expected]
    assert expected != generate(model, {}, [LONG], max_new_tokens=8)[0]


class _Ending:
    """As much of a tokenizer as says where generation stops: no chat template, one end token."""

    eos_token, added_tokens_decoder, all_special_tokens = "<end>", {}, ()

    def __init__(self, eos_token_id: int):
        self.eos_token_id = eos_token_id

    def convert_tokens_to_ids(self, token: str) -> int:
        return {"<end>": self.eos_token_id}[token]


def test_stops_at_the_first_stop_token_and_keeps_it() -> None:
    model = make("qwen3")
    short, long = generate(model, {}, [SHORT, LONG], max_new_tokens=8)
    stop = long[2]
    cut = lambda tokens: tokens[: tokens.index(stop) + 1] if stop in tokens else tokens
    assert generate(model, {}, [SHORT, LONG], max_new_tokens=8, stop_tokens=[stop]) == [cut(short), cut(long)]
    assert len(cut(long)) <= 3
    own = dataclasses.replace(model, tokenizer=_Ending(stop))
    assert generate(own, {}, [SHORT, LONG], max_new_tokens=8) == [cut(short), cut(long)]
    assert generate(own, {}, [SHORT, LONG], max_new_tokens=8, stop_tokens=[]) == [short, long]
    configured = dataclasses.replace(make("qwen3", eos_token_ids=(7, 9)), tokenizer=own.tokenizer)
    assert set(generation._stop_tokens(configured, None)) == {7, 9, stop, -1}


def test_compiled_once_per_length_bucket(monkeypatch) -> None:
    traces = []

    def counted(*args, **kwargs):
        traces.append(args[2].shape)
        return forward(*args, **kwargs)

    forward = generation.forward
    monkeypatch.setattr(generation, "forward", counted)
    model = make("qwen3", norm_eps=1e-5)  # a structure no other test has compiled
    run = lambda prompts, **options: generate(model, {}, prompts, max_new_tokens=4, **options)
    run([SHORT, LONG])
    first = len(traces)
    assert first >= 2
    run([LONG[:9], SHORT[:1]])  # other lengths in the same bucket, other parameters
    generate(model, jax.tree.map(lambda x: x + 1, model.lora), [LONG, SHORT], max_new_tokens=4)
    assert len(traces) == first
    run([LONG + LONG, LONG + SHORT])
    assert len(traces) == 2 * first


def test_samples_do_not_depend_on_the_other_prompts() -> None:
    model, key = make("qwen3"), jax.random.key(3)
    options = {"max_new_tokens": 8, "temperature": 1.0, "top_p": 0.9}
    sample = lambda prompts, key=key: generate(model, {}, prompts, key=key, **options)
    together = sample([SHORT, LONG, SHORT])
    assert sample([SHORT, LONG]) == together[:2]
    assert sample([SHORT[::-1], LONG])[1] == together[1]
    assert together[0] != together[2]  # the same prompt at another place has a stream of its own
    assert sample([SHORT, LONG], jax.random.PRNGKey(3)) == together[:2]  # the older kind of key
    assert sample([SHORT, LONG], jax.random.key(4)) != together[:2]


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_samples_follow_the_softmax_cut_to_its_nucleus(top_p: float) -> None:
    """4,000 first tokens against softmax(logits / T), T = 0.8; each frequency within 5 standard errors."""
    model, n, temperature = make("qwen3"), 4000, 0.8
    logits = np.asarray(model.logits(np.asarray([SHORT], np.int32)))[0, -1].astype(np.float64) / temperature
    p = np.exp(logits - logits.max())
    p /= p.sum()
    order = np.argsort(-p)
    kept = order[: np.searchsorted(np.cumsum(p[order]), top_p) + 1] if top_p < 1 else order
    expected = np.zeros_like(p)
    expected[kept] = p[kept] / p[kept].sum()
    options = {"key": jax.random.key(0), "temperature": temperature, "top_p": top_p, "batch_size": 4096}
    drawn = np.asarray(generate(model, {}, [SHORT] * n, max_new_tokens=1, **options))[:, 0]
    observed = np.bincount(drawn, minlength=len(p)) / n
    assert np.all(np.abs(observed - expected) <= 5 * np.sqrt(expected * (1 - expected) / n) + 1e-12)
    assert top_p == 1 or len(kept) < np.count_nonzero(p > 1e-3)


def test_tiny_temperature_and_tiny_nucleus_are_greedy() -> None:
    model, key = make("qwen3"), jax.random.key(0)
    greedy = generate(model, {}, [SHORT, LONG], max_new_tokens=8)
    for options in ({"temperature": 1e-4}, {"temperature": 1.0, "top_p": 1e-6}):
        assert generate(model, {}, [SHORT, LONG], max_new_tokens=8, key=key, **options) == greedy


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"temperature": -1.0}, "temperature = -1"),
        ({"temperature": 1.0}, "give key="),
        ({"top_p": 0.0}, "top_p = 0"),
        ({"batch_size": 0}, "batch_size = 0"),
    ],
)
def test_options_out_of_range_are_named(options: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        generate(make("qwen3"), {}, [SHORT], **{"max_new_tokens": 2, **options})


def test_prompts_that_cannot_be_continued_are_named() -> None:
    with pytest.raises(UserError, match="prompt 1 is empty"):
        generate(make("qwen3"), {}, [SHORT, []], max_new_tokens=2)
    with pytest.raises(UserError, match="prompt 0: token id 30 is outside the vocabulary"):
        generate(make("qwen3"), {}, [[1, 30]], max_new_tokens=2)


def test_learned_positions_are_a_limit_and_can_be_filled() -> None:
    model = make("gpt2")
    prompt = (LONG + SHORT)[:17]
    assert generate(model, {}, [prompt], max_new_tokens=8) == [by_full_passes(model, prompt, 8)]
    with pytest.raises(UserError, match="prompt 0: 18 tokens and max_new_tokens = 8 do not fit the model's 25"):
        generate(model, {}, [[*prompt, 1]], max_new_tokens=8)
