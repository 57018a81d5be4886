"""Logits and greedy tokens against the golden files that torch transformers made (see make_golden.py there)."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ntkjax.models import LanguageModel, load_lm
from ntkjax.models.generate import generate
from ntkjax.models.peft import adapter_lora_config, load_adapter

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CASES = json.loads((GOLDEN / "golden.json").read_text())
TOLERANCE = 1e-5
# Decoding adds a cache and per-row positions; these differ in what meets them. The rest are slow.
DECODED = ("llama31", "smollm2", "llama-head-dim", "llama-lora", "qwen2", "qwen3", "gpt2-lora")


@functools.cache
def load_case(name: str) -> LanguageModel:
    """The checkpoint in float32; with its PEFT adapter where it has one."""
    adapter = GOLDEN / name / "adapter"
    if not adapter.exists():
        return load_lm(GOLDEN / name, lora=None)
    model = load_lm(GOLDEN / name, lora=adapter_lora_config(adapter))
    return model.with_params(load_adapter(adapter, model))


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_torch(name: str) -> None:
    case = CASES[name]
    expected = load_file(GOLDEN / "logits.safetensors")[name]
    logits = np.asarray(load_case(name).logits(np.asarray(case["tokens"], np.int32)))
    assert logits.dtype == np.float32
    difference = np.abs(logits[:, case["positions"]] - expected).max()
    print(f"{name}: largest difference {difference:.2g}, largest logit {np.abs(expected).max():.2f}")
    assert difference < TOLERANCE
    assert np.abs(expected).max() > 1  # else the tolerance would mean little


def marked(name: str):
    return pytest.param(name, marks=() if name in DECODED else pytest.mark.slow)


@pytest.mark.parametrize("name", [marked(name) for name in CASES])
def test_greedy_tokens_equal_torch(name: str) -> None:
    """Both prompts, of different lengths, in one batch."""
    prompts = CASES[name]["prompts"]
    model = load_case(name)
    new_tokens = len(prompts[0]["continuation"])
    got = generate(model, {}, [p["prompt"] for p in prompts], max_new_tokens=new_tokens)
    assert got == [p["continuation"] for p in prompts]
    assert min(p["margin"] for p in prompts) > 1e-3  # no rounding can decide


def test_golden_files_cover_the_list() -> None:
    assert len(CASES) >= 14
    size = sum(file.stat().st_size for file in GOLDEN.rglob("*") if file.is_file())
    assert size < 4_000_000
    long = {name for name, case in CASES.items() if len(case["tokens"][0]) > 32}
    assert {"llama31", "llama32-tied", "llama31-v4"} <= long  # past original_max_position_embeddings = 32
