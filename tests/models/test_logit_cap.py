"""A soft cap on the logits: outputs c tanh(W h / c) are not linear in the head, and nothing may take them to be."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkjax.commands.stability.outputs import ChoiceOutputs, ChoiceRows
from ntkjax.errors import ConfigError
from ntkjax.evaluation.choices import token_log_probs
from ntkjax.models import LoraConfig, ModelConfig, functions, generate, init_lm
from ntkjax.ntk import KernelFunctions, build
from ntkjax.ntk.cross_terms import cross_output_cosines
from ntkjax.ntk.kernels import KERNELS
from ntkjax.types import Batch

CAP = 0.5
MODEL = init_lm(
    ModelConfig(
        family="gemma2", vocab_size=19, hidden_size=16, intermediate_size=12, num_layers=2, num_heads=4, num_kv_heads=2,
        head_dim=4, initializer_range=0.5, logit_cap=CAP, tied=True,
    ),
    seed=0,
    lora=LoraConfig(rank=1),
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 19, (2, 7)).astype(np.int32)
PLACE = np.arange(7)[None]
BATCH = Batch(TOKENS, (PLACE >= 3) & (PLACE < [[7], [6]]), np.asarray([7, 6], np.int32), np.arange(2, dtype=np.int32))
COUNT = functions.position_mask(BATCH, "response")


def capped_logits() -> np.ndarray:
    """By the formula, from hidden states and the head: [B, T, V]."""
    states = np.asarray(MODEL.states_fn({}, BATCH), np.float64)
    plain = states @ np.asarray(MODEL.head_fn({}), np.float64).T
    capped = CAP * np.tanh(plain / CAP)
    assert np.abs(plain - capped).max() > 1
    return capped


def pooled(values: np.ndarray) -> np.ndarray:
    mask = np.asarray(COUNT).reshape(2, 7, *(1,) * (values.ndim - 2))
    return (values * mask).sum(1) / mask.sum(1)


def test_every_output_of_the_model_is_that_of_the_formula(monkeypatch) -> None:
    logits = capped_logits()
    np.testing.assert_allclose(MODEL.logits(TOKENS), logits, atol=1e-5)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    targets = np.pad(TOKENS[:, 1:], ((0, 0), (0, 1)))
    chosen = np.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
    entropy = -(np.exp(log_probs) * log_probs).sum(-1)
    for limit in (functions.MAX_LOGITS, 40):  # at once, and a slice of T after the other
        monkeypatch.setattr(functions, "MAX_LOGITS", limit)
        for kind, expected in {
            "apply": pooled(logits),
            "nll": -pooled(chosen),
            "entropy": pooled(entropy),
            "sum_logits": pooled(logits.sum(-1)),
        }.items():
            np.testing.assert_allclose(MODEL.output(kind)({}, BATCH), expected, atol=1e-5, err_msg=kind)
    predictor = np.asarray([[2, 3], [4, 0]], np.int32)
    target = np.asarray([[5, 18], [1, 0]], np.int32)
    rows = np.arange(2)[:, None]
    got = token_log_probs(MODEL.states_fn, MODEL.head_fn, {}, BATCH, predictor, target)
    np.testing.assert_allclose(got, log_probs[rows, predictor, target], atol=1e-5)
    choices = ChoiceRows(BATCH, predictor, target, np.zeros((2, 2), np.int32), np.ones((2, 1), bool))
    scores = ChoiceOutputs(MODEL.states_fn, MODEL.head_fn, "logit").token_scores({}, choices)
    np.testing.assert_allclose(scores, logits[rows, predictor, target], atol=1e-5)


def test_sampling_draws_from_the_capped_logits() -> None:
    """At a cap of 0.5 every token is probable: without it the largest logits alone would be drawn."""
    draw = lambda model: {
        tokens[0]
        for tokens in generate(model, {}, [[3]] * 64, max_new_tokens=1, temperature=1.0, key=jax.random.key(0))
    }
    uncapped = dataclasses.replace(MODEL, spec=dataclasses.replace(
        MODEL.spec, config=dataclasses.replace(MODEL.config, logit_cap=None)
    ))  # fmt: skip
    assert len(draw(MODEL)) > 12 > len(draw(uncapped))


@pytest.mark.parametrize("name", [name for name, kind in KERNELS.items() if kind.linear])
def test_kernels_that_fold_the_head_are_refused(name: str) -> None:
    functions_of = KernelFunctions(MODEL.hidden_fn, MODEL.head_fn({}), MODEL.nll_fn, MODEL.sum_logits_fn)
    text = f"{name}:2" if KERNELS[name].sized else name
    with pytest.raises(ConfigError, match=f"kernel '{text}'.*not linear|kernel '{text}'.*final_logit_softcapping"):
        build(text, functions_of, MODEL.lora, seed=0)
    with pytest.raises(ConfigError, match="cross terms"):
        cross_output_cosines(functions_of, MODEL.lora, [BATCH])


def test_sum_logits_and_loss_are_those_of_the_formula() -> None:
    functions_of = KernelFunctions(MODEL.hidden_fn, MODEL.head_fn({}), MODEL.nll_fn, MODEL.sum_logits_fn)
    kernel = build("sum_logits", functions_of, MODEL.lora, seed=0)
    np.testing.assert_allclose(kernel.output_fn(MODEL.lora, BATCH), pooled(capped_logits()).sum(-1), atol=1e-5)
    assert build("loss", functions_of, MODEL.lora, seed=0).name == "loss"
    plain = init_lm(dataclasses.replace(MODEL.config, logit_cap=None), seed=0)
    assert plain.sum_logits_fn is None
    folded = jnp.sum(plain.apply_fn({}, BATCH), axis=1)
    np.testing.assert_allclose(plain.output("sum_logits")({}, BATCH), folded, atol=1e-4)
