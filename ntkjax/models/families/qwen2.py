"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values. Refused: sliding windows that a layer uses."""

from __future__ import annotations

from ntkjax.models.families.base import Family, Gguf, ModelShape, Reader, is_finite
from ntkjax.models.families.llama import TENSORS, decoder_fields, decoder_keys


def slides(reader: Reader) -> bool:
    """Whether any layer has the window of a Qwen model's config.json."""
    kinds = reader.config.get("layer_types")
    # Without layer_types, the layers from max_window_layers on slide.
    if kinds is None:
        sliding = reader.config.get("max_window_layers", 28)
        if not is_finite(sliding):
            raise reader.fail(f"max_window_layers = {sliding!r}: expected an integer")
        some = sliding < reader.number("num_hidden_layers")
    else:
        some = reader.layer_types() != {"full_attention"}
    return some and reader.flag("use_sliding_window", False)


def _read(reader: Reader) -> ModelShape:
    reader.refuse_windows(lambda: slides(reader))
    return ModelShape(family="qwen2", qkv_bias=True, **decoder_fields(reader))


QWEN2 = Family(
    name="qwen2",
    architectures={"Qwen2ForCausalLM": "qwen2"},
    read=_read,
    write=decoder_keys,
    tensors=TENSORS,
    gguf=Gguf("qwen2"),
)
