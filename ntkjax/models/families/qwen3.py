"""Qwen3: Llama with RMS norms on the queries and keys of each head. Refused: sliding windows that a layer uses."""

from __future__ import annotations

from ntkjax.models.families.base import Family, Gguf, ModelShape, Reader
from ntkjax.models.families.llama import TENSORS, decoder_fields, decoder_keys
from ntkjax.models.families.qwen2 import slides


def _read(reader: Reader) -> ModelShape:
    reader.refuse_windows(lambda: slides(reader))
    bias = reader.flag("attention_bias", False)
    return ModelShape(family="qwen3", qkv_bias=bias, o_bias=bias, qk_norm=True, **decoder_fields(reader, head_dim=128))


QWEN3 = Family(
    name="qwen3",
    architectures={"Qwen3ForCausalLM": "qwen3"},
    read=_read,
    write=decoder_keys,
    tensors=TENSORS,
    fixed={"qk_norm": True},
    gguf=Gguf("qwen3"),
)
