"""Sampled continuations: text of the right number, the same for the same call, close to what the model predicts."""

from __future__ import annotations

from collections import Counter

import jax
import numpy as np
import pytest

from ntkjax.models import LoraConfig, load_lm
from ntkjax.pipeline.load import load_data
from ntkjax.pipeline.options import DataOptions
from ntkjax.pipeline.sample import Sampler


@pytest.fixture(scope="module")
def sampler(files):
    model = load_lm(files.model, lora=LoraConfig(rank=2))
    return Sampler(model, model.lora, load_data(files.domain, model, DataOptions()).tokens)


def test_as_many_texts_as_asked_for_and_the_same_again(sampler):
    ask = lambda rows, **more: sampler(np.array(rows), **({"samples": 3, "max_new_tokens": 5, "seed": 0} | more))
    texts = ask([1, 4])
    assert [len(row) for row in texts] == [3, 3] and all(isinstance(t, str) for row in texts for t in row)
    assert ask([1, 4]) == texts != ask([1, 4], seed=1)
    assert ask([2, 4]) != texts


def test_samples_come_from_the_model(sampler):
    """First tokens of 600 continuations of one prompt against softmax(logits): no bin further off than 4 sigma."""
    tokens, start = sampler.data.tokens(0)
    logits = np.asarray(sampler.model.logits(tokens[None, :start]), np.float64)[0, -1]
    p = np.exp(logits - logits.max())
    p /= p.sum()
    drawn = 600
    texts = sampler(np.array([0]), samples=drawn, max_new_tokens=1, seed=0)[0]
    decoded = sampler.model.tokenizer.batch_decode([[v] for v in range(len(p))], skip_special_tokens=True)
    counts, by_text = Counter(texts), Counter()
    for text, share in zip(decoded, p):
        by_text[text] += share
    for text, share in by_text.items():
        assert abs(counts[text] - drawn * share) < 4 * np.sqrt(drawn * share * (1 - share)) + 1


def test_parameters_are_those_given(sampler):
    changed = jax.tree.map(lambda leaf: leaf + 1.0, sampler.params)
    other = Sampler(sampler.model, changed, sampler.data)
    call = lambda one: one(np.arange(6), samples=2, max_new_tokens=8, seed=0)
    assert call(other) != call(sampler)
