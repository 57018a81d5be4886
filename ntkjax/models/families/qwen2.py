"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values, and windows where config.json asks for them."""

from __future__ import annotations

from typing import Any

from ntkjax.models.families.base import LOCAL, Family, Gguf, ModelShape, Reader, is_finite
from ntkjax.models.families.llama import TENSORS, decoder_fields, decoder_keys, kind_keys


def qwen_windows(reader: Reader) -> dict[str, Any]:
    """The windows of a Qwen model: none without ``use_sliding_window``; else of the layers that ``layer_types`` names,
    or of those from ``max_window_layers`` on.
    """
    first = reader.config.get("max_window_layers", 28)
    if not is_finite(first):
        raise reader.fail(f"max_window_layers = {first!r}: expected an integer")
    used = reader.flag("use_sliding_window", False)
    kinds = reader.layer_types(lambda i: used and reader.config.get("sliding_window", 4096) is not None and i >= first)
    if LOCAL in kinds and not used:
        raise reader.fail(
            f"layer_types names {LOCAL!r} and use_sliding_window is false: set it to true, or name others"
        )
    return reader.windows(kinds, 4096)


def qwen_keys(shape: ModelShape) -> dict[str, Any]:
    """The keys of config.json of a Qwen model."""
    return decoder_keys(shape) | kind_keys(shape)


def _read(reader: Reader) -> ModelShape:
    return ModelShape(family="qwen2", qkv_bias=True, **qwen_windows(reader), **decoder_fields(reader))


QWEN2 = Family(
    name="qwen2",
    architectures={"Qwen2ForCausalLM": "qwen2"},
    read=_read,
    write=qwen_keys,
    tensors=TENSORS,
    gguf=Gguf("qwen2"),
)
