"""Granite: Llama with multipliers of the embedding, the attention scores, the residual branches and the logits."""

from __future__ import annotations

from typing import Any

from ntkjax.models.families.base import Family, ModelShape, Reader
from ntkjax.models.families.llama import TENSORS, decoder_fields, decoder_keys


def _read(reader: Reader) -> ModelShape:
    bias = reader.flag("attention_bias", False)
    return ModelShape(
        family="granite",
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=reader.flag("mlp_bias", False),
        embed_factor=reader.number("embedding_multiplier", 1.0, float),
        query_scale=reader.number("attention_multiplier", 1.0, float),
        residual_scale=reader.number("residual_multiplier", 1.0, float),
        state_divisor=reader.number("logits_scaling", 1.0, float),
        **decoder_fields(reader),
    )


def _write(shape: ModelShape) -> dict[str, Any]:
    return decoder_keys(shape) | {
        "embedding_multiplier": shape.embed_factor,
        "attention_multiplier": shape.head_dim**-0.5 if shape.query_scale is None else shape.query_scale,
        "residual_multiplier": shape.residual_scale,
        "logits_scaling": shape.state_divisor,
    }


GRANITE = Family(
    name="granite",
    architectures={"GraniteForCausalLM": "granite"},
    read=_read,
    write=_write,
    tensors=TENSORS,
    embed_scale=lambda shape: shape.embed_factor,
)
