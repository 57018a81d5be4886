"""GPT-2: learned positions, LayerNorm with bias, a two-layer MLP, fused q, k and v, a tied head.

Refused: attention scaled by the layer's number or not at all, and cross-attention.
"""

from __future__ import annotations

import functools
from typing import Any

from ntkjax.models.families.base import Family, Gguf, ModelShape, Reader, layer_of

TENSORS = {
    "embed/weight": "transformer.wte",
    "wpe/weight": "transformer.wpe",
    "norm": "transformer.ln_f",
    "head/kernel": "lm_head",
    "layers/norm_1": "transformer.h.{}.ln_1",
    "layers/norm_2": "transformer.h.{}.ln_2",
    "layers/attention/q": "transformer.h.{}.attn.c_attn",
    "layers/attention/k": "transformer.h.{}.attn.c_attn",
    "layers/attention/v": "transformer.h.{}.attn.c_attn",
    "layers/attention/o": "transformer.h.{}.attn.c_proj",
    "layers/mlp/up": "transformer.h.{}.mlp.c_fc",
    "layers/mlp/down": "transformer.h.{}.mlp.c_proj",
}


def _read(reader: Reader) -> ModelShape:
    reader.refuse_flag("scale_attn_by_inverse_layer_idx", False)
    reader.refuse_flag("add_cross_attention", False)
    reader.refuse_flag("scale_attn_weights", True)
    hidden, heads = reader.number("n_embd"), reader.number("n_head")
    if hidden % heads:
        raise reader.fail(f"n_embd = {hidden} is not a multiple of n_head = {heads}")
    return ModelShape(
        family="gpt2",
        hidden_size=hidden,
        intermediate_size=reader.number("n_inner", 4 * hidden),
        num_layers=reader.layers("n_layer"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_positions=reader.number("n_positions", 1024),
        norm_eps=reader.number("layer_norm_epsilon", 1e-5, float),
        activation=reader.activation("activation_function", "gelu_new"),
        tied=reader.flag("tie_word_embeddings", True),
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        **reader.common(),
    )


def _write(shape: ModelShape) -> dict[str, Any]:
    return {
        "n_embd": shape.hidden_size,
        "n_inner": shape.intermediate_size,
        "n_layer": shape.num_layers,
        "n_head": shape.num_heads,
        "n_positions": shape.max_positions,
        "layer_norm_epsilon": shape.norm_eps,
        "activation_function": shape.activation,
    }


GPT2 = Family(
    name="gpt2",
    architectures={"GPT2LMHeadModel": "gpt2"},
    read=_read,
    write=_write,
    tensors=TENSORS,
    layer=functools.partial(layer_of, norm="layer", mlp="plain", rope=None),
    conv1d=True,
    learned_positions=True,
    optional_prefix="transformer.",
    buffers=(r"(^|\.)attn\.(bias|masked_bias)$",),
    gguf=Gguf(
        "gpt2",
        tensors={f"layers/attention/{name}": "blk.{}.attn_qkv" for name in "qkv"},
        fields={"activation": "gelu_new"},
    ),
)
