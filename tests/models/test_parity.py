"""Logits and greedy tokens against the golden files that torch transformers made (see make_golden.py there)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("family_checks", Path(__file__).with_name("family_checks.py"))
assert _spec is not None and _spec.loader is not None
checks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(checks)

CASES = checks.CASES
TOLERANCE = 1e-5
# Decoding adds a cache and per-row positions; these differ in what meets them. The rest are slow.
DECODED = (
    "llama31",
    "smollm2",
    "llama-head-dim",
    "llama-lora",
    "qwen2",
    "qwen3",
    "gpt2-lora",
    "mixtral-window",
    "qwen3-moe",
)


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_torch(name: str) -> None:
    difference, largest = checks.logit_difference(name)
    print(f"{name}: largest difference {difference:.2g}, largest logit {largest:.2f}")
    assert difference < TOLERANCE
    assert largest > 1  # else the tolerance would mean little


def marked(name: str):
    return pytest.param(name, marks=() if name in DECODED else pytest.mark.slow)


@pytest.mark.parametrize("name", [marked(name) for name in CASES])
def test_greedy_tokens_equal_torch(name: str) -> None:
    """Both prompts, of different lengths, in one batch."""
    ours, theirs = checks.greedy_tokens(name)
    assert ours == theirs
    assert min(p["margin"] for p in CASES[name]["prompts"]) > 1e-3  # no rounding can decide
