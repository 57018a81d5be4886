"""Gemma 3, text alone: Gemma 2 with RMS norms on the queries and keys of each head, a window in five of six layers with
rotary positions of their own, and no soft caps unless they are asked for.

Refused: attention in both directions, and checkpoints with a vision tower.
"""

from __future__ import annotations

from typing import Any

from ntkjax.models.families.base import Family, ModelShape, Reader, kinds_of_rope_keys
from ntkjax.models.families.gemma2 import GEMMA_TENSORS, gemma_fields, gemma_keys, gemma_layer, gemma_scale


def _read(reader: Reader) -> ModelShape:
    every = reader.number("sliding_window_pattern", 6)
    rope, local = reader.ropes(theta=1e6, local_theta=reader.number("rope_local_base_freq", 1e4, float))
    windows = reader.windows(reader.layer_types(lambda i: (i + 1) % every != 0), 4096, keep=True)
    fields = gemma_fields(reader, positions=131_072, attention_cap=None, logit_cap=None, rope=rope)
    return ModelShape(
        family="gemma3",
        qk_norm=True,
        local_rope=local if windows and local != rope else None,
        **windows,
        **fields,
    )


def _write(shape: ModelShape) -> dict[str, Any]:
    local = shape.local_rope or shape.rope
    return gemma_keys(shape) | kinds_of_rope_keys(shape) | {"rope_local_base_freq": local.theta}


GEMMA3 = Family(
    name="gemma3",
    architectures={"Gemma3ForCausalLM": "gemma3_text"},
    read=_read,
    write=_write,
    tensors=GEMMA_TENSORS,
    layer=gemma_layer,
    embed_scale=gemma_scale,
    fixed={"qk_norm": True},
    refused={
        "Gemma3ForConditionalGeneration": "it holds a vision tower beside the text model; use a checkpoint of text "
        "alone (Gemma3ForCausalLM, such as gemma-3-270m and gemma-3-1b)"
    },
)
