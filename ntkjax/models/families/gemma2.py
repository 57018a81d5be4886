"""Gemma 2: norms that multiply by 1 + w before and after attention and MLP, a scaled embedding, a window in every other
layer, soft caps on attention scores and on the logits.

Refused: attention in both directions.
"""

from __future__ import annotations

import functools
from typing import Any

from ntkjax.models.families.base import Family, ModelShape, Reader, layer_of
from ntkjax.models.families.llama import TENSORS, decoder_fields, decoder_keys, kind_keys

GEMMA_TENSORS = TENSORS | {
    "layers/post_norm_1": "model.layers.{}.post_attention_layernorm",
    "layers/norm_2": "model.layers.{}.pre_feedforward_layernorm",
    "layers/post_norm_2": "model.layers.{}.post_feedforward_layernorm",
}
gemma_layer = functools.partial(layer_of, norm_offset=1.0, norms="both")


def gemma_scale(shape: ModelShape) -> float:
    """What a Gemma's embedding is multiplied by: sqrt(hidden_size)."""
    return shape.hidden_size**0.5


def gemma_fields(reader: Reader, *, positions: int, attention_cap: float | None, logit_cap: float | None, **more: Any):
    """Fields of ModelShape that Gemma 2 and 3 read alike, with transformers' defaults; ``more``: see decoder_fields."""
    reader.refuse_flag("use_bidirectional_attention", False)
    bias, scalar = reader.flag("attention_bias", False), reader.number("query_pre_attn_scalar", 256)
    fields = decoder_fields(reader, head_dim=256, tied=True, positions=positions, **more)
    return fields | {
        "qkv_bias": bias,
        "o_bias": bias,
        "num_kv_heads": reader.number("num_key_value_heads", 4),
        "activation": reader.activation("hidden_activation", "gelu_pytorch_tanh"),
        "query_scale": None if scalar == fields["head_dim"] else scalar**-0.5,
        "soft_cap": reader.optional("attn_logit_softcapping", attention_cap),
        "logit_cap": reader.optional("final_logit_softcapping", logit_cap),
    }


def gemma_keys(shape: ModelShape) -> dict[str, Any]:
    """The keys of config.json that ``gemma_fields`` reads, and the layers' kinds."""
    kinds = kind_keys(shape) or {"layer_types": ["full_attention"] * shape.num_layers}
    return decoder_keys(shape) | kinds | {
        "hidden_activation": shape.activation,
        "query_pre_attn_scalar": shape.head_dim if shape.query_scale is None else round(shape.query_scale**-2),
        "attn_logit_softcapping": shape.soft_cap,
        "final_logit_softcapping": shape.logit_cap,
    }  # fmt: skip


def _read(reader: Reader) -> ModelShape:
    windows = reader.windows(reader.layer_types(lambda i: i % 2 == 0), 4096)
    fields = gemma_fields(reader, positions=8192, attention_cap=50.0, logit_cap=30.0)
    return ModelShape(family="gemma2", **windows, **fields)


GEMMA2 = Family(
    name="gemma2",
    architectures={"Gemma2ForCausalLM": "gemma2"},
    read=_read,
    write=gemma_keys,
    tensors=GEMMA_TENSORS,
    layer=gemma_layer,
    embed_scale=gemma_scale,
)
