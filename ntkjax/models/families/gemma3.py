"""Gemma 3, text alone: Gemma 2 with RMS norms on the queries and keys of each head, a window in five of six layers with
rotary positions of their own, and no soft caps unless they are asked for.

Refused: attention in both directions, and checkpoints with a vision tower.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ntkjax.models.families.base import LOCAL, Family, Gguf, ModelShape, Reader, RopeConfig, kinds_of_rope_keys
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


def _from_gguf(reader: Reader, said: Mapping[str, Any]) -> dict[str, Any]:
    """What llama.cpp knows of Gemma 3 (src/models/gemma3.cpp, llama-model.cpp) and old files do not say: five of six
    layers slide, with rotary positions of base 1e4; queries of the 27B model, the one of 62 layers, are scaled by the
    width of a head that hidden_size would give it."""
    key = "gemma3.{}".format
    every = reader.number(key("attention.sliding_window_pattern"), 6)
    local = RopeConfig(theta=reader.number(key("rope.freq_base_swa"), 1e4, float))
    kinds = [LOCAL if (i + 1) % every else "full_attention" for i in range(said["num_layers"])]
    config = {"num_hidden_layers": len(kinds), "layer_types": kinds}
    if (window := reader.config.get(key("attention.sliding_window"))) is not None:
        config["sliding_window"] = window
    inner = Reader(config, reader.where)
    windows = inner.windows(inner.layer_types(), 4096, keep=True)
    return windows | {
        "local_rope": local if windows and local != said["rope"] else None,
        "query_scale": (said["hidden_size"] / said["num_heads"]) ** -0.5 if len(kinds) == 62 else None,
        "logit_cap": reader.optional(key("final_logit_softcapping"), None),
    }


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
    gguf=Gguf(
        "gemma3",
        tensors={
            "layers/post_norm_1": "blk.{}.post_attention_norm",
            "layers/post_norm_2": "blk.{}.post_ffw_norm",
        },
        fields={"activation": "gelu_pytorch_tanh"},
        more=_from_gguf,
        keys=("attention.sliding_window_pattern", "rope.freq_base_swa", "final_logit_softcapping"),
    ),
)
