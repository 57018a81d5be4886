"""Llama and what has its shape (Mistral with its window, SmolLM2): RMS norms, rotary positions, grouped-query
attention, a gated MLP.

A Llama has no window: like transformers, ``sliding_window`` is not read. Refused: rope scalings other than ROPE_TYPES,
partial rotary factors, layer types in a Mistral.
"""

from __future__ import annotations

from typing import Any

from ntkjax.models.families.base import LOCAL, Family, Gguf, ModelShape, Reader, RopeConfig, rope_keys

MISTRAL = "MistralForCausalLM"

TENSORS = {
    "embed/weight": "model.embed_tokens",
    "norm": "model.norm",
    "head/kernel": "lm_head",
    "layers/norm_1": "model.layers.{}.input_layernorm",
    "layers/norm_2": "model.layers.{}.post_attention_layernorm",
    "layers/attention/q": "model.layers.{}.self_attn.q_proj",
    "layers/attention/k": "model.layers.{}.self_attn.k_proj",
    "layers/attention/v": "model.layers.{}.self_attn.v_proj",
    "layers/attention/o": "model.layers.{}.self_attn.o_proj",
    "layers/attention/q_norm": "model.layers.{}.self_attn.q_norm",
    "layers/attention/k_norm": "model.layers.{}.self_attn.k_norm",
    "layers/mlp/gate": "model.layers.{}.mlp.gate_proj",
    "layers/mlp/up": "model.layers.{}.mlp.up_proj",
    "layers/mlp/down": "model.layers.{}.mlp.down_proj",
}


def decoder_fields(
    reader: Reader,
    *,
    head_dim: int | None = None,
    tied: bool = False,
    eps: float = 1e-6,
    positions: int = 2048,
    rope: RopeConfig | None = None,
) -> dict[str, Any]:
    """Fields of ModelShape that Llama and the families of its shape read alike.

    ``tied``, ``eps``, ``positions`` and ``head_dim`` are transformers' defaults where the key is absent; a ``head_dim``
    of None means hidden_size / num_attention_heads. ``rope``: what the family read, None for one kind in all layers.
    """
    heads, hidden = reader.number("num_attention_heads"), reader.number("hidden_size")
    if reader.config.get("head_dim") is None and head_dim is None and hidden % heads:
        raise reader.fail(f"hidden_size = {hidden} is not a multiple of num_attention_heads = {heads}; no head_dim")
    return reader.common() | {
        "hidden_size": hidden,
        "intermediate_size": reader.number("intermediate_size"),
        "num_layers": reader.layers(),
        "num_heads": heads,
        "num_kv_heads": reader.number("num_key_value_heads", heads),
        "head_dim": reader.number("head_dim", head_dim or hidden // heads),
        "max_positions": reader.number("max_position_embeddings", positions),
        "norm_eps": reader.number("rms_norm_eps", eps, float),
        "activation": reader.activation("hidden_act", "silu"),
        "rope": rope or reader.rope(),
        "tied": reader.flag("tie_word_embeddings", tied),
    }


def decoder_keys(shape: ModelShape) -> dict[str, Any]:
    """The keys of config.json that ``decoder_fields`` and its callers read."""
    return {
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": shape.norm_eps,
        "hidden_act": shape.activation,
        "attention_bias": shape.o_bias,
        "mlp_bias": shape.mlp_bias,
        "sliding_window": shape.window,
        "use_sliding_window": shape.window is not None,
    } | rope_keys(shape.rope)


def kind_keys(shape: ModelShape) -> dict[str, Any]:
    """``layer_types`` where a layer has a window; else nothing."""
    same = ("full_attention" if shape.window is None else LOCAL,) * shape.num_layers
    return {} if shape.window is None else {"layer_types": list(shape.layer_types or same)}


def _read(reader: Reader) -> ModelShape:
    mistral = reader.architecture == MISTRAL  # its config class has neither bias
    kinds = reader.layer_types(lambda i: mistral and reader.config.get("sliding_window", 4096) is not None)
    if mistral and len(set(kinds)) > 1:
        raise reader.fail(
            "layer_types of a Mistral: transformers gives every layer the window; remove the entry, or name the "
            "architecture whose layers differ"
        )
    attention, mlp = reader.flag("attention_bias", False), reader.flag("mlp_bias", False)
    return ModelShape(
        family="llama",
        qkv_bias=attention and not mistral,
        o_bias=attention and not mistral,
        mlp_bias=mlp and not mistral,
        **reader.windows(kinds if mistral else (), 4096),
        **decoder_fields(reader),
    )


LLAMA = Family(
    name="llama",
    architectures={"LlamaForCausalLM": "llama", MISTRAL: "mistral"},
    read=_read,
    write=decoder_keys,
    tensors=TENSORS,
    gguf=Gguf("llama", paired_rows=True),
)
