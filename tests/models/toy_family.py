"""A family as a file of its own: Llama with other tensor names, 1 + w norms, and q, k, v and gate, up fused."""

from __future__ import annotations

import functools

from ntkjax.models.families.base import Family, ModelShape, Reader, layer_of
from ntkjax.models.families.llama import decoder_fields, decoder_keys


def _read(reader: Reader) -> ModelShape:
    reader.refuse_flag("toy_dropout", False)
    return ModelShape(family="toy", **decoder_fields(reader))


TOY = Family(
    name="toy",
    architectures={"ToyForCausalLM": "toy"},
    read=_read,
    write=decoder_keys,
    tensors={
        "embed/weight": "body.words",
        "norm": "body.last_norm",
        "head/kernel": "words_out",
        "layers/norm_1": "body.block.{}.norm_a",
        "layers/norm_2": "body.block.{}.norm_b",
        "layers/attention/q": "body.block.{}.mixer.qkv",
        "layers/attention/k": "body.block.{}.mixer.qkv",
        "layers/attention/v": "body.block.{}.mixer.qkv",
        "layers/attention/o": "body.block.{}.mixer.out",
        "layers/mlp/gate": "body.block.{}.ff.gate_up",
        "layers/mlp/up": "body.block.{}.ff.gate_up",
        "layers/mlp/down": "body.block.{}.ff.back",
    },
    layer=functools.partial(layer_of, norm_offset=1.0),
)
