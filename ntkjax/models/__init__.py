"""Causal language models in JAX: Llama, Qwen2, Qwen3 (and all of their shape) and GPT-2, with LoRA."""

from ntkjax.models.config import ModelConfig, RopeConfig
from ntkjax.models.export import save_merged
from ntkjax.models.functions import ModelFn, overlay
from ntkjax.models.generate import generate
from ntkjax.models.layers import KVCache, ModelSpec
from ntkjax.models.lm import LanguageModel, LoadReport, init_lm
from ntkjax.models.load import load_lm
from ntkjax.models.lora import LoraConfig, merge_lora
from ntkjax.models.peft import adapter_lora_config, load_adapter, save_adapter

__all__ = [
    "KVCache",
    "LanguageModel",
    "LoadReport",
    "LoraConfig",
    "ModelConfig",
    "ModelFn",
    "ModelSpec",
    "RopeConfig",
    "adapter_lora_config",
    "generate",
    "init_lm",
    "load_adapter",
    "load_lm",
    "merge_lora",
    "overlay",
    "save_adapter",
    "save_merged",
]
