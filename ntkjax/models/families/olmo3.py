"""OLMo 3: OLMo 2 with a window in three of four layers; those have plain rotary positions whatever the others have."""

from __future__ import annotations

from typing import Any

from ntkjax.models.families.base import Family, ModelShape, Reader, kinds_of_rope_keys
from ntkjax.models.families.llama import decoder_fields, decoder_keys, kind_keys
from ntkjax.models.families.olmo2 import OLMO_TENSORS, olmo_layer

THETA = 500_000.0


def _read(reader: Reader) -> ModelShape:
    bias, theta = reader.flag("attention_bias", False), reader.config.get("rope_theta")
    if reader.config.get("rope_parameters") is None and theta not in (None, THETA):
        raise reader.fail(
            f"rope_theta = {theta!r} without rope_parameters: transformers 4 gives it to sliding layers and 5 does "
            "not; say it for each kind of layer (rope_parameters: {full_attention: {...}, sliding_attention: {...}})"
        )
    rope, local = reader.ropes(theta=THETA, local_theta=THETA)
    windows = reader.windows(reader.layer_types(lambda i: (i + 1) % 4 != 0), 4096, keep=True)
    return ModelShape(
        family="olmo3",
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
        local_rope=local if windows and local != rope else None,
        **windows,
        **decoder_fields(reader, eps=1e-5, rope=rope),
    )


def _write(shape: ModelShape) -> dict[str, Any]:
    kinds = kind_keys(shape) or {"layer_types": ["full_attention"] * shape.num_layers}
    return decoder_keys(shape) | kinds | kinds_of_rope_keys(shape)


OLMO3 = Family(
    name="olmo3",
    architectures={"Olmo3ForCausalLM": "olmo3"},
    read=_read,
    write=_write,
    tensors=OLMO_TENSORS,
    layer=olmo_layer,
    fixed={"qk_norm": True},
)
