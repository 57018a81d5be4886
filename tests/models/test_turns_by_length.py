"""Rotary frequencies that depend on how long a sequence is: by the example's own length, wherever it stands.

What is right comes from models without that dependence, of the same weights: for longrope one whose short factors are
the long ones, for dynamic one whose base is the formula's.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkjax.data import TokenisedDataset
from ntkjax.evaluation.choices import score_packed
from ntkjax.evaluation.packing import pack
from ntkjax.models import LanguageModel, LoraConfig, ModelConfig, RopeConfig, init_lm
from ntkjax.models.functions import forward
from ntkjax.models.generate import generate
from ntkjax.types import Batch

SWITCH = 9
LONGROPE = RopeConfig(
    kind="longrope", original_max_positions=SWITCH, attention_factor=1.2, short_factors=(1.0, 1.3),
    long_factors=(2.0, 7.0),
)  # fmt: skip
ROPES = {"longrope": LONGROPE, "dynamic": RopeConfig(kind="dynamic", factor=3.0)}
PLAIN = ModelConfig(
    family="llama", vocab_size=31, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=4, initializer_range=0.5, max_positions=SWITCH,
)  # fmt: skip


def right_rope(kind: str, length: int) -> RopeConfig:
    """Frequencies of no length at all, for a sequence of ``length`` tokens."""
    if kind == "dynamic":
        stretch = 3.0 * max(length, SWITCH) / SWITCH - 2.0
        return RopeConfig(theta=1e4 * stretch ** (4 / 2))
    if length <= SWITCH:
        return dataclasses.replace(LONGROPE, original_max_positions=1000)
    return dataclasses.replace(LONGROPE, original_max_positions=1000, short_factors=LONGROPE.long_factors)


@functools.cache
def model_of(rope: RopeConfig) -> LanguageModel:
    """Always the same weights; an adapter that turns queries too."""
    model = init_lm(dataclasses.replace(PLAIN, rope=rope), seed=0, lora=LoraConfig(rank=2, targets=("q", "down")))
    rng = np.random.default_rng(5)
    return model.with_params(jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), model.lora))


def sequence(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed + length).integers(1, 31, length).tolist()


def alone(tokens: list[int]) -> Batch:
    mask = np.arange(len(tokens)) >= 2
    return Batch(np.asarray([tokens], np.int32), mask[None], np.asarray([len(tokens)], np.int32), np.zeros(1, np.int32))


def values(model: LanguageModel, batch: Batch) -> dict[str, np.ndarray]:
    """Two outputs and their derivatives along the adapter itself."""
    found = {}
    for name, fn in (("nll", model.nll_fn), ("embed", model.embed_fn)):
        value, slope = jax.jvp(lambda p, fn=fn: fn(p, batch), (model.lora,), (model.lora,))
        found |= {name: np.asarray(value), f"{name} slope": np.asarray(slope)}
    return found


LENGTHS = (5, SWITCH, SWITCH + 1, 15)


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_an_example_turns_by_its_own_length_whatever_stands_beside_it(kind: str, packing: bool) -> None:
    """Padded to one length on the right, and several in a row."""
    model, texts = model_of(ROPES[kind]), [sequence(n) for n in LENGTHS]
    data = TokenisedDataset.from_sequences(texts, [2] * len(texts)).packed(packing)
    expected = [values(model_of(right_rope(kind, len(text))), alone(text)) for text in texts]
    met = 0
    for batch in data.batches(token_budget=64, max_buckets=1):
        assert (batch.examples is not None) == packing
        got = values(model, batch)
        for slot, row in enumerate(np.asarray(batch.index).tolist()):
            if row < 0:
                continue
            met += 1
            for name, value in got.items():
                right = expected[row][name][0]  # a slope sums many terms: its error grows with its size
                np.testing.assert_allclose(value[slot], right, rtol=2e-5, atol=2e-5, err_msg=f"{row} {name}")
    assert met == len(texts)
    others = values(model_of(right_rope(kind, 5)), alone(texts[-1]))
    assert np.abs(others["nll"] - expected[-1]["nll"]).max() > 2e-3  # the length makes a difference


@pytest.mark.parametrize("kind", ["longrope", pytest.param("dynamic", marks=pytest.mark.slow)])
def test_each_new_token_follows_from_the_sequence_before_it_turned_by_its_length(kind: str) -> None:
    """Prompts on both sides of the switch and at it, in one batch with a cache, and sampled ones drawn as alone."""
    model, prompts = model_of(ROPES[kind]), [sequence(n) for n in (3, SWITCH - 1, SWITCH, SWITCH + 1, 12)]
    expected = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(8):
            logits = model_of(right_rope(kind, len(tokens))).logits([tokens])
            tokens.append(int(np.argmax(logits[0, -1])))
        expected.append(tokens[len(prompt) :])
    assert generate(model, {}, prompts, max_new_tokens=8, stop_tokens=()) == expected
    assert len({token for row in expected for token in row}) > 5
    key = jax.random.key(3)
    sample = functools.partial(generate, model, {}, prompts, max_new_tokens=8, temperature=1.0, key=key, stop_tokens=())
    sampled = sample()
    assert [len(row) for row in sampled] == [8] * len(prompts)
    assert sampled == generate(
        model, {}, prompts, max_new_tokens=8, temperature=1.0, key=key, stop_tokens=(), batch_size=2
    )
    assert len({tuple(row[:4]) for row in sampled}) > 1
    stop = expected[0][-2]
    until = [row[: row.index(stop) + 1] if stop in row else row for row in expected]
    assert generate(model, {}, prompts, max_new_tokens=8, stop_tokens=(stop,)) == until


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("packing", [False, True], ids=["one a row", "several a row"])
def test_choices_on_both_sides_of_the_switch_are_scored_as_alone(kind: str, packing: bool) -> None:
    """Three prompts: all choices short, short and long ones, all long."""
    model, expected, packed = model_of(ROPES[kind]), [], []
    for size in (4, SWITCH - 2, SWITCH + 2):
        prompt = sequence(size, seed=7)
        texts = [prompt + choice for choice in ([3, 4], [5], [6, 7, 8, 9])]
        packed.append(pack(texts, [size] * 3, max_length=64))
        own = []
        for text in texts:
            logits = model_of(right_rope(kind, len(text))).logits([text])[0]
            of = jax.nn.log_softmax(logits)[np.arange(size - 1, len(text) - 1), np.asarray(text[size:])]
            own.append(float(of.sum()))
        expected.append(own)
    scored = score_packed(model, {}, packed, token_budget=64, packing=packing)
    got = dict(pair for batch in scored for pair in batch)
    assert sorted(got) == [0, 1, 2]
    for i, own in enumerate(expected):
        np.testing.assert_allclose(got[i], own, atol=5e-5)


def test_one_choice_alone_is_its_own_sequence() -> None:
    texts = [[1, 2, 3, 4, 5], [1, 2, 3, 6], [1, 2, 3, 4, 7, 8]]
    packed = pack(texts, [2, 2, 2], max_length=64)
    assert packed.lengths().tolist() == [5, 4, 6]
    for choice, text in enumerate(texts):
        one = packed.alone(choice)
        assert one.tokens.tolist() == text and one.positions.tolist() == list(range(len(text)))
        assert [text[p + 1] for p in one.predictor] == one.target.tolist() == text[2:]
        assert one.counts().tolist() == [packed.counts()[choice]]


def test_rows_of_unknown_lengths_are_refused() -> None:
    model = model_of(LONGROPE)
    tokens, positions = jnp.ones((1, 4), jnp.int32), jnp.asarray([[0, 1, 0, 1]], jnp.int32)
    with pytest.raises(ValueError, match="need extents"):
        forward(model.spec, model.params, tokens, positions)
