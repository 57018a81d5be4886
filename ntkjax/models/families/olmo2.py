"""OLMo 2: RMS norms after attention and MLP in the place of those before, and over all heads of queries and of keys."""

from __future__ import annotations

import functools

from ntkjax.models.families.base import Family, ModelShape, Reader, layer_of
from ntkjax.models.families.llama import TENSORS, decoder_fields, decoder_keys

OLMO_TENSORS = {name: tensor for name, tensor in TENSORS.items() if name not in ("layers/norm_1", "layers/norm_2")} | {
    "layers/post_norm_1": "model.layers.{}.post_attention_layernorm",
    "layers/post_norm_2": "model.layers.{}.post_feedforward_layernorm",
}
olmo_layer = functools.partial(layer_of, norms="after", qk_norm="full")


def _read(reader: Reader) -> ModelShape:
    bias, fields = reader.flag("attention_bias", False), decoder_fields(reader, eps=1e-5)
    return ModelShape(family="olmo2", qkv_bias=bias, o_bias=bias, qk_norm=True, **fields)


OLMO2 = Family(
    name="olmo2",
    architectures={"Olmo2ForCausalLM": "olmo2"},
    read=_read,
    write=decoder_keys,
    tensors=OLMO_TENSORS,
    layer=olmo_layer,
    fixed={"qk_norm": True},
)
