"""Qwen3-MoE: Qwen3 whose MLP is several of many narrow experts, which a router chooses for each token.

The adapter's default targets ("all-linear") are those of PEFT: attention, the router and every expert. Not read: what
transformers uses in training alone (``router_aux_loss_coef``); no such loss is added here. Refused: layers without
experts among those with (``mlp_only_layers``, ``decoder_sparse_step``), layer types that differ.
"""

from __future__ import annotations

from typing import Any

from ntkjax.models.families.base import Family, ModelShape, Reader
from ntkjax.models.families.llama import TENSORS, decoder_fields, decoder_keys
from ntkjax.models.families.mixtral import expert_fields, expert_keys, expert_layer, windows_of_all

_EXPERT = "model.layers.{}.mlp.experts.{}"
_DENSE = "layers without experts beside layers with them are not supported: all layers run as one compiled body"


def _read(reader: Reader) -> ModelShape:
    if dense := reader.config.get("mlp_only_layers"):
        raise reader.fail(f"mlp_only_layers = {dense!r}: {_DENSE} (only [])")
    if (every := reader.number("decoder_sparse_step", 1)) != 1:
        raise reader.fail(f"decoder_sparse_step = {every}: {_DENSE} (only 1)")
    has_window = reader.config.get("sliding_window", 4096) is not None
    windows = windows_of_all(reader, reader.switched_layer_types(lambda i: has_window), 4096)
    bias, fields = reader.flag("attention_bias", False), decoder_fields(reader, positions=32_768)
    return ModelShape(
        family="qwen3_moe",
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
        norm_topk=reader.flag("norm_topk_prob", False),
        **windows,
        **fields | {"intermediate_size": reader.number("moe_intermediate_size")},  # no layer has the other one
        **expert_fields(reader),
    )


def _write(shape: ModelShape) -> dict[str, Any]:
    own = {"moe_intermediate_size": shape.intermediate_size, "norm_topk_prob": shape.norm_topk}
    return decoder_keys(shape) | expert_keys(shape) | own | {"mlp_only_layers": [], "decoder_sparse_step": 1}


QWEN3_MOE = Family(
    name="qwen3_moe",
    architectures={"Qwen3MoeForCausalLM": "qwen3_moe"},
    read=_read,
    write=_write,
    tensors=TENSORS
    | {
        "layers/mlp/router": "model.layers.{}.mlp.gate",
        **{f"layers/mlp/{name}": f"{_EXPERT}.{name}_proj" for name in ("gate", "up", "down")},
    },
    layer=expert_layer,
    fixed={"qk_norm": True, "mlp_bias": False},
)
