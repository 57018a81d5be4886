"""GPT-NeoX and Pythia: LayerNorm with bias, attention and MLP from the same input, rotary positions of part of a head,
q, k and v of a head side by side in one tensor, an untied head.
"""

from __future__ import annotations

import functools
from typing import Any

from ntkjax.models.families.base import Family, ModelShape, Reader, layer_of, rope_keys

_LAYER = "gpt_neox.layers.{}."
NEOX_TENSORS = {
    "embed/weight": "gpt_neox.embed_in",
    "norm": "gpt_neox.final_layer_norm",
    "head/kernel": "embed_out",
    "layers/norm_1": _LAYER + "input_layernorm",
    "layers/norm_2": _LAYER + "post_attention_layernorm",
    **{f"layers/attention/{name}": _LAYER + "attention.query_key_value" for name in "qkv"},
    "layers/attention/o": _LAYER + "attention.dense",
    "layers/mlp/up": _LAYER + "mlp.dense_h_to_4h",
    "layers/mlp/down": _LAYER + "mlp.dense_4h_to_h",
}


def _read(reader: Reader) -> ModelShape:
    hidden, heads = reader.number("hidden_size"), reader.number("num_attention_heads")
    if hidden % heads:
        raise reader.fail(f"hidden_size = {hidden} is not a multiple of num_attention_heads = {heads}")
    bias = reader.flag("attention_bias", True)
    theta, partial = reader.number("rotary_emb_base", 10_000.0, float), reader.number("rotary_pct", 0.25, float)
    return ModelShape(
        family="gpt_neox",
        hidden_size=hidden,
        intermediate_size=reader.number("intermediate_size", 24576),
        num_layers=reader.layers(),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_positions=reader.number("max_position_embeddings", 2048),
        norm_eps=reader.number("layer_norm_eps", 1e-5, float),
        activation=reader.activation("hidden_act", "gelu"),
        rope=reader.rope(theta=theta, partial=partial),
        tied=reader.flag("tie_word_embeddings", False),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=True,
        parallel=reader.flag("use_parallel_residual", True),
        **reader.common(),
    )


def _write(shape: ModelShape) -> dict[str, Any]:
    return {
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "max_position_embeddings": shape.max_positions,
        "layer_norm_eps": shape.norm_eps,
        "hidden_act": shape.activation,
        "attention_bias": shape.o_bias,
        "use_parallel_residual": shape.parallel,
        "rotary_pct": shape.rope.partial,
        "rotary_emb_base": shape.rope.theta,
    } | rope_keys(shape.rope)


GPT_NEOX = Family(
    name="gpt_neox",
    architectures={"GPTNeoXForCausalLM": "gpt_neox"},
    read=_read,
    write=_write,
    tensors=NEOX_TENSORS,
    layer=functools.partial(layer_of, norm="layer", mlp="plain"),
    fused_by_head=True,
    other_names={"embed_out": "lm_head"},  # transformers 5
    buffers=(r"(^|\.)attention\.(bias|masked_bias|rotary_emb\.inv_freq)$",),
)
