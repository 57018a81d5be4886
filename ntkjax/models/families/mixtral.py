"""Mixtral: Mistral whose MLP is one of several experts, the two or so that a router chooses for each token.

The adapter's default targets ("all-linear") are those of PEFT: attention, the router and every expert. Not read: what
transformers uses in training alone (``router_aux_loss_coef``, ``router_jitter_noise``); no such loss is added here.
Refused: layer types that differ.
"""

from __future__ import annotations

import functools
from typing import Any

from ntkjax.models.families.base import Family, ModelShape, Reader, layer_of
from ntkjax.models.families.llama import TENSORS, decoder_fields, decoder_keys

EXPERT_KEYS = ("num_experts", "num_local_experts")
"""The number of experts of a layer: transformers 4 says the first in a Qwen3-MoE, 5 the second in every family."""

MIXTRAL_TENSORS = TENSORS | {
    "layers/mlp/router": "model.layers.{}.block_sparse_moe.gate",
    "layers/mlp/gate": "model.layers.{}.block_sparse_moe.experts.{}.w1",
    "layers/mlp/up": "model.layers.{}.block_sparse_moe.experts.{}.w3",
    "layers/mlp/down": "model.layers.{}.block_sparse_moe.experts.{}.w2",
}
expert_layer = functools.partial(layer_of, mlp="experts")


def expert_fields(reader: Reader) -> dict[str, Any]:
    """Fields of ModelShape about routed experts."""
    counts = {key: reader.number(key) for key in EXPERT_KEYS if reader.config.get(key) is not None}
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{key} = {value}" for key, value in counts.items())
        raise reader.fail(f"{said}: two names of one number; remove one, or make them equal")
    if not counts:
        raise reader.fail(f"keys {' and '.join(map(repr, EXPERT_KEYS))} are missing: expected one, a number")
    experts, per_token = next(iter(counts.values())), reader.number("num_experts_per_tok")
    if per_token > experts:
        raise reader.fail(
            f"num_experts_per_tok = {per_token} with {next(iter(counts))} = {experts}: a token cannot go to more "
            "experts than there are"
        )
    return {"num_experts": experts, "experts_per_token": per_token}


def expert_keys(shape: ModelShape) -> dict[str, Any]:
    """The keys of config.json that ``expert_fields`` reads."""
    return dict.fromkeys(EXPERT_KEYS, shape.num_experts) | {"num_experts_per_tok": shape.experts_per_token}


def windows_of_all(reader: Reader, kinds: tuple[str, ...], default: int | None = None) -> dict[str, Any]:
    """The window of every layer, of a family in which all have the same one or none."""
    if len(set(kinds)) > 1:
        raise reader.fail(
            f"layer_types of a {reader.architecture}: transformers gives every layer the window; remove the entry, or "
            "name the architecture whose layers differ"
        )
    return reader.windows(kinds, default)


def _read(reader: Reader) -> ModelShape:
    rope = reader.rope(theta=1e6)
    kinds = reader.layer_types(lambda i: reader.config.get("sliding_window") is not None)
    fields = decoder_fields(reader, eps=1e-5, positions=131_072, rope=rope)
    return ModelShape(
        family="mixtral", norm_topk=True, **windows_of_all(reader, kinds), **fields, **expert_fields(reader)
    )


def _write(shape: ModelShape) -> dict[str, Any]:
    return decoder_keys(shape) | expert_keys(shape)


MIXTRAL = Family(
    name="mixtral",
    architectures={"MixtralForCausalLM": "mixtral"},
    read=_read,
    write=_write,
    tensors=MIXTRAL_TENSORS,
    layer=expert_layer,
    fixed={"qk_norm": False, "mlp_bias": False, "norm_topk": True},
)
