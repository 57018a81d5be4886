"""Causal language models in JAX: Llama, Qwen2, Qwen3 (and all of their shape) and GPT-2, with LoRA."""

from ntkjax.models.config import ModelConfig, RopeConfig
from ntkjax.models.functions import ModelFn, overlay
from ntkjax.models.layers import KVCache, ModelSpec
from ntkjax.models.lm import LanguageModel, LoadReport, init_lm
from ntkjax.models.load import load_lm
from ntkjax.models.lora import LoraConfig, merge_lora

__all__ = [
    "KVCache",
    "LanguageModel",
    "LoadReport",
    "LoraConfig",
    "ModelConfig",
    "ModelFn",
    "ModelSpec",
    "RopeConfig",
    "init_lm",
    "load_lm",
    "merge_lora",
    "overlay",
]
