"""Float32 products of kernels and scores are in full precision, whatever the device's default: the lowered programs."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkjax.assets import tiny_lm_path
from ntkjax.models import LoraConfig, load_lm
from ntkjax.ntk import KernelFunctions, build
from ntkjax.ntk.gram import contract
from ntkjax.ntk.kernel import Kernel, gradients
from ntkjax.ntk.metrics import spearman
from ntkjax.ntk.scores import add_direction, mean_direction, score_batch, zero_direction
from ntkjax.training import TrainConfig
from ntkjax.training.optimiser import AdamW
from ntkjax.training.step import init_state, leaf_dtypes, train_step
from ntkjax.types import Batch, precision_of

PRODUCT = re.compile(r"stablehlo\.dot_general .*: \((tensor<\S+>), (tensor<\S+>)\)")


@pytest.fixture(scope="module")
def model():
    return load_lm(tiny_lm_path(), lora=LoraConfig(rank=4))


@pytest.fixture(scope="module")
def batch() -> Batch:
    tokens = np.arange(48, dtype=np.int32).reshape(3, 16) + 5
    lengths = np.asarray([16, 11, 9], np.int32)
    mask = (np.arange(16)[None] < lengths[:, None]) & (np.arange(16)[None] >= 4)
    return Batch(tokens, mask, lengths, np.arange(3, dtype=np.int32))


def kernel_of(model, name: str) -> Kernel:
    return build(name, KernelFunctions(model.hidden_fn, model.head_fn({}), model.nll_fn), model.lora, seed=0)


def products(text: str) -> list[tuple[str, bool]]:
    """(operands, whether full precision is asked for) of every float32 product in a StableHLO program."""
    lines = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    found = [(PRODUCT.search(line), line) for line in lines]
    assert all(match for match, _ in found), "a product that the pattern does not read"
    return [(f"{m[1]} {m[2]}", "precision = [HIGHEST, HIGHEST]" in line) for m, line in found if m is not None]


def check(text: str, least: int) -> None:
    """Every product of the program asks for full precision; there are at least so many."""
    found = products(text)
    assert len(found) >= least
    assert [operands for operands, full in found if not full] == []


# A layer (one body for all of them) has seven linear layers and two products of attention: 9 products without
# adapters, 16 and more with their gradient.


@pytest.mark.parametrize("name", ["sum_logits", "loss"])
def test_mean_gradients_ask_for_full_precision(model, batch, name):
    kernel = kernel_of(model, name)
    check(add_direction.lower(kernel, model.lora, batch, zero_direction(kernel, model.lora, batch)).as_text(), 16)


@pytest.mark.parametrize(("name", "directions"), [("sum_logits", 1), ("loss", 2)])
def test_scores_ask_for_full_precision(model, batch, name, directions):
    kernel = kernel_of(model, name)
    zero = zero_direction(kernel, model.lora, batch)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * directions), zero)
    check(score_batch.lower(kernel, model.lora, stacked, batch).as_text(), 16)


def test_kernel_matrices_ask_for_full_precision(model, batch):
    kernel, selector = kernel_of(model, "loss"), np.eye(1, dtype=np.float32)
    check(gradients.lower(kernel, model.lora, batch, selector).as_text(), 16)
    found = jax.eval_shape(gradients, kernel, model.lora, batch, selector)
    check(contract.lower(found, found).as_text(), len(jax.tree.leaves(model.lora)))


def test_logits_and_gradients_of_all_parameters_ask_for_full_precision(model, batch):
    check(jax.jit(lambda params, batch: model.apply_fn(params, batch)).lower(model.params, batch).as_text(), 10)
    fn = lambda params, batch: model.nll_fn(params, batch).sum()
    check(jax.jit(jax.grad(fn)).lower(model.params, batch).as_text(), 16)


def test_a_product_in_the_default_precision_is_found():
    x = jnp.ones((2, 3), jnp.float32)
    text = jax.jit(lambda x: x @ x.T).lower(x).as_text()
    assert [full for _, full in products(text)] == [False]
    with pytest.raises(AssertionError):
        check(text, 1)


@pytest.mark.parametrize("name", ["sum_logits", "loss"])
def test_linear_layers_of_a_model_in_sixteen_bits_have_products_of_sixteen_bits(batch, name):
    """In a score and in a mean gradient; what is left of a folded head is a product of float32 vectors."""
    model = load_lm(tiny_lm_path(), lora=LoraConfig(rank=4), dtype="bfloat16")
    kernel = kernel_of(model, name)
    zero = zero_direction(kernel, model.lora, batch)
    score = score_batch.lower(kernel, model.lora, jax.tree.map(lambda leaf: leaf[None], zero), batch).as_text()
    gradient = add_direction.lower(kernel, model.lora, batch, zero).as_text()
    rows, width = batch.tokens.shape[0], model.config.hidden_size
    folded = {f"tensor<{rows}x{width}xf32> tensor<{width}xf32>", f"tensor<{rows}xf32> tensor<{width}xf32>"}
    for program, least in ((score, 9), (gradient, 16)):
        wide = {operands for operands, _ in products(program) if "f32" in operands}
        assert len(products(program)) > least and (wide <= folded if name == "sum_logits" else not wide), wide


def test_products_with_the_vocabulary_of_a_model_in_sixteen_bits_are_of_sixteen_bits(batch):
    """Of the loss: its value, its derivative in forward mode, its gradient, and a step of training."""
    model = load_lm(tiny_lm_path(), lora=LoraConfig(rank=4), dtype="bfloat16")
    kernel, optimiser = kernel_of(model, "loss"), AdamW.of(TrainConfig())
    zero = zero_direction(kernel, model.lora, batch)
    options = {"optimiser": optimiser, "accumulation": 1, "dtypes": leaf_dtypes(model.lora)}
    programs = [
        jax.jit(lambda fn, batch: fn({}, batch)).lower(model.nll_fn, batch),
        score_batch.lower(kernel, model.lora, jax.tree.map(lambda leaf: leaf[None], zero), batch),
        add_direction.lower(kernel, model.lora, batch, zero),
        train_step.lower(model.nll_fn, init_state(model.lora, optimiser), batch, 1e-5, **options),
    ]
    vocabulary = re.compile(rf"[<x]{model.config.vocab_size}x")
    for program, count in zip(programs, (1, 2, 2, 2)):  # logits once, and once what their cotangents give
        found = [operands for operands, _ in products(program.as_text()) if vocabulary.search(operands)]
        assert len(found) == count and not [operands for operands in found if "f32" in operands], found


def test_scores_of_the_loss_in_sixteen_bits_keep_the_order_of_those_in_float32():
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 800, (40, 24)).astype(np.int32)
    mask = np.broadcast_to(np.arange(24) >= 8, tokens.shape)
    every = lambda rows: Batch(tokens[rows], mask[rows], np.full(len(rows), 24, np.int32), rows.astype(np.int32))
    scores = []
    for dtype in ("bfloat16", "float32"):
        model, random = load_lm(tiny_lm_path(), lora=LoraConfig(rank=4), dtype=dtype), np.random.default_rng(1)
        params = jax.tree.map(lambda x, r=random: x + 0.02 * r.standard_normal(x.shape, np.float32), model.lora)
        kernel = kernel_of(model, "loss")
        direction = mean_direction(kernel, params, [every(np.arange(8))])
        stacked = jax.tree.map(lambda leaf: leaf[None], direction)
        scores.append(np.asarray(score_batch(kernel, params, stacked, every(np.arange(8, 40)))[:, 0]))
    assert spearman(*scores) > 0.99


def test_sixteen_bits_ask_for_nothing():
    assert precision_of(jnp.bfloat16) is None and precision_of("float16") is None
    assert precision_of("float32") == precision_of(np.float64) == jax.lax.Precision.HIGHEST
