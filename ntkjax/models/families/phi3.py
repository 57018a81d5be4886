"""Phi-3, Phi-3.5 and Phi-4-mini: Llama with q, k, v in one tensor and gate, up in another, rotary positions of part of
a head, and longrope.
"""

from __future__ import annotations

import math
from typing import Any

from ntkjax.models.families.base import Family, ModelShape, Reader
from ntkjax.models.families.llama import TENSORS, decoder_fields, decoder_keys

PHI_TENSORS = TENSORS | {
    **{f"layers/attention/{name}": "model.layers.{}.self_attn.qkv_proj" for name in "qkv"},
    **{f"layers/mlp/{name}": "model.layers.{}.mlp.gate_up_proj" for name in ("gate", "up")},
}
ORIGINAL = "original_max_position_embeddings"


def _read(reader: Reader) -> ModelShape:
    reader = Reader({ORIGINAL: 4096} | reader.config, reader.where, reader.architecture)  # transformers' default
    rope = reader.rope(partial=1.0)
    if rope.kind == "yarn":
        raise reader.fail("rope_type 'yarn': transformers reads it as 'longrope' in a Phi-3; say 'longrope'")
    kinds = reader.layer_types(lambda i: reader.config.get("sliding_window") is not None)
    if len(set(kinds)) > 1:
        raise reader.fail("layer_types of a Phi-3: transformers gives every layer the window; remove the entry")
    fields = decoder_fields(reader, eps=1e-5, positions=4096, rope=rope)
    return ModelShape(family="phi3", **reader.windows(kinds), **fields)


def _write(shape: ModelShape) -> dict[str, Any]:
    keys, rope = decoder_keys(shape), shape.rope
    if rope.kind == "longrope":
        keys[ORIGINAL] = original = rope.original_max_positions
        stretch = shape.max_positions / original
        usual = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
        if (rope.factor, rope.attention_factor) == (stretch, usual):
            # transformers 4 takes no other key here, and computes the same.
            factors = {"short_factor": list(rope.short_factors), "long_factor": list(rope.long_factors)}
            keys["rope_scaling"] = {"type": "longrope"} | factors
    return keys


PHI3 = Family(
    name="phi3",
    architectures={"Phi3ForCausalLM": "phi3"},
    read=_read,
    write=_write,
    tensors=PHI_TENSORS,
)
