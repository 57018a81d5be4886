"""Qwen3: Llama with RMS norms on the queries and keys of each head; windows as in Qwen2."""

from __future__ import annotations

from ntkjax.models.families.base import Family, Gguf, ModelShape, Reader
from ntkjax.models.families.llama import TENSORS, decoder_fields
from ntkjax.models.families.qwen2 import qwen_keys, qwen_windows


def _read(reader: Reader) -> ModelShape:
    bias = reader.flag("attention_bias", False)
    fields = qwen_windows(reader) | decoder_fields(reader, head_dim=128)
    return ModelShape(family="qwen3", qkv_bias=bias, o_bias=bias, qk_norm=True, **fields)


QWEN3 = Family(
    name="qwen3",
    architectures={"Qwen3ForCausalLM": "qwen3"},
    read=_read,
    write=qwen_keys,
    tensors=TENSORS,
    fixed={"qk_norm": True},
    gguf=Gguf("qwen3"),
)
