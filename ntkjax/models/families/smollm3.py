"""SmolLM3: Llama whose every fourth layer, or those that config.json names, has no rotary positions; windows where they
are asked for.
"""

from __future__ import annotations

from typing import Any

from ntkjax.models.families.base import LOCAL, Family, ModelShape, Reader
from ntkjax.models.families.llama import TENSORS, decoder_fields, decoder_keys, kind_keys


def _unrotated(reader: Reader) -> tuple[int, ...]:
    """The layers whose entry of no_rope_layers is 0; where there is none, every no_rope_layer_interval-th."""
    layers, given = reader.layers(), reader.config.get("no_rope_layers")
    if given is None:
        every = reader.number("no_rope_layer_interval", 4)
        given = [int((i + 1) % every != 0) for i in range(layers)]
    if not isinstance(given, list) or len(given) < layers or any(flag not in (0, 1) for flag in given):
        raise reader.fail(f"no_rope_layers = {given!r}: expected {layers} numbers, 1 for a layer with rotary positions")
    return tuple(i for i in range(layers) if not given[i])


def _read(reader: Reader) -> ModelShape:
    attention, still = reader.flag("attention_bias", False), _unrotated(reader)
    used = reader.flag("use_sliding_window", False)
    window = used and reader.config.get("sliding_window") is not None
    kinds = reader.layer_types(lambda i: window and i in still)
    if LOCAL in kinds and not used:
        raise reader.fail(
            f"layer_types names {LOCAL!r} and use_sliding_window is false: set it to true, or name others"
        )
    return ModelShape(
        family="smollm3",
        qkv_bias=attention,
        o_bias=attention,
        mlp_bias=reader.flag("mlp_bias", False),
        unrotated=still,
        **reader.windows(kinds),
        **decoder_fields(reader, tied=True, positions=32768, rope=reader.rope(theta=2e6)),
    )


def _write(shape: ModelShape) -> dict[str, Any]:
    rotated = [int(i not in shape.unrotated) for i in range(shape.num_layers)]
    return decoder_keys(shape) | kind_keys(shape) | {"no_rope_layers": rotated}


SMOLLM3 = Family(
    name="smollm3",
    architectures={"SmolLM3ForCausalLM": "smollm3"},
    read=_read,
    write=_write,
    tensors=TENSORS,
)
