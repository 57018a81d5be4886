"""Where each parameter lies in a Hugging Face checkpoint: tensor names, transposition, fused tensors."""

from __future__ import annotations

import dataclasses
import re

from ntkjax.models.functions import param_shapes
from ntkjax.models.layers import ModelSpec

_DECODER = {
    "embed/weight": "model.embed_tokens.weight",
    "norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
    "layers/norm_1": "model.layers.{}.input_layernorm",
    "layers/norm_2": "model.layers.{}.post_attention_layernorm",
    "layers/attention/q_norm": "model.layers.{}.self_attn.q_norm",
    "layers/attention/k_norm": "model.layers.{}.self_attn.k_norm",
    **{f"layers/attention/{n}": f"model.layers.{{}}.self_attn.{n}_proj" for n in "qkvo"},
    **{f"layers/mlp/{n}": f"model.layers.{{}}.mlp.{n}_proj" for n in ("gate", "up", "down")},
}
_GPT2 = {
    "embed/weight": "transformer.wte.weight",
    "wpe/weight": "transformer.wpe.weight",
    "norm/scale": "transformer.ln_f.weight",
    "norm/bias": "transformer.ln_f.bias",
    "head/kernel": "lm_head.weight",
    "layers/norm_1": "transformer.h.{}.ln_1",
    "layers/norm_2": "transformer.h.{}.ln_2",
    **{f"layers/attention/{n}": "transformer.h.{}.attn.c_attn" for n in "qkv"},
    "layers/attention/o": "transformer.h.{}.attn.c_proj",
    "layers/mlp/up": "transformer.h.{}.mlp.c_fc",
    "layers/mlp/down": "transformer.h.{}.mlp.c_proj",
}

# Buffers that old versions of transformers saved beside the weights; they hold nothing that is learned.
_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)$")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a parameter comes from.

    Attributes:
      name: tensor name, with "{}" for the layer where the parameter is stacked.
      transpose: the checkpoint holds [out, in] where the parameter is [in, out].
      part, parts: the parameter is this one of ``parts`` equal slices of the tensor's last axis (fused q, k,
      v).
    """

    name: str
    transpose: bool = False
    part: int = 0
    parts: int = 1


def sources(spec: ModelSpec) -> dict[str, Source]:
    """For each parameter path but the adapter's, where it lies in a checkpoint of this architecture."""
    gpt2 = spec.config.family == "gpt2"
    table, flat = _GPT2 if gpt2 else _DECODER, {}
    for path in _leaf_paths(param_shapes(spec)):
        if path in table:
            flat[path] = Source(table[path])
            continue
        layer, leaf = path.rsplit("/", 1)
        if leaf in ("lora_a", "lora_b"):
            continue
        fused = layer.rsplit("/", 1)[-1] if gpt2 and layer.startswith("layers/attention/") else ""
        part, parts = ("qkv".index(fused), 3) if fused in ("q", "k", "v") else (0, 1)
        name = f"{table[layer]}.{'bias' if leaf == 'bias' else 'weight'}"
        flat[path] = Source(name, leaf == "kernel" and not gpt2, part, parts)
    return flat


def is_buffer(name: str) -> bool:
    """True for tensors that are saved but not learned: inverse frequencies, causal masks."""
    return _BUFFERS.search(name) is not None


def _leaf_paths(tree: dict, where: str = "") -> list[str]:
    found: list[str] = []
    for name, value in tree.items():
        found += _leaf_paths(value, f"{where}{name}/") if isinstance(value, dict) else [where + name]
    return found
