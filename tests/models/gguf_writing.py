"""GGUF files as llama.cpp's converter writes them, from checkpoints in Hugging Face format: written here from its own
rules (names, row order, keys), not from the tables that are tested."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType
from safetensors.numpy import load_file

Edit = Callable[[dict[str, Any], dict[str, np.ndarray]], None]

LLAMA_LIKE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA3 = LLAMA_LIKE | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
GPT2 = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
TOKENS = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["<|end|>", "a", "b", "ab"],
    "tokenizer.ggml.token_type": [3, 1, 1, 1],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 0,
}
"""The smallest tokenizer there is."""


def paired(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head in llama.cpp's order: i and i + H/2 become neighbours."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def content(folder: Path, architecture: str | None = None) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(keys, tensors) of the GGUF file of a checkpoint, in float32."""
    config = json.loads((folder / "config.json").read_text())
    kind = architecture or {"mistral": "llama", "gemma3_text": "gemma3"}.get(config["model_type"], config["model_type"])
    source = load_file(folder / "model.safetensors")
    return (*_content(config, kind, source),)


def _content(config: dict, kind: str, source: dict) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    gpt2 = kind == "gpt2"
    get = lambda *names: next(config[name] for name in names if config.get(name) is not None)
    heads = get("n_head", "num_attention_heads") if gpt2 else get("num_attention_heads")
    kv = heads if gpt2 else config.get("num_key_value_heads") or heads
    hidden = get("n_embd", "hidden_size") if gpt2 else get("hidden_size")
    keys: dict[str, Any] = {
        "block_count": get("n_layer") if gpt2 else get("num_hidden_layers"),
        "context_length": get("n_positions") if gpt2 else get("max_position_embeddings"),
        "embedding_length": hidden,
        "feed_forward_length": (config.get("n_inner") or 4 * hidden) if gpt2 else get("intermediate_size"),
        "attention.head_count": heads,
        "attention.head_count_kv": kv,
    }
    if gpt2:
        keys["attention.layer_norm_epsilon"] = float(get("layer_norm_epsilon"))
    else:
        rope = config.get("rope_parameters") or config
        rope = rope.get("full_attention") or rope
        keys["attention.layer_norm_rms_epsilon"] = float(get("rms_norm_eps"))
        keys["rope.freq_base"] = float(rope["rope_theta"])
        if config.get("head_dim"):
            keys |= {"attention.key_length": config["head_dim"], "attention.value_length": config["head_dim"]}
        keys["rope.dimension_count"] = config.get("head_dim") or hidden // heads
        if kind == "gemma3":
            keys["attention.sliding_window"] = config["sliding_window"]
        if rope.get("rope_type") == "linear":
            keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    tensors = {}
    for name, value in source.items():
        if "inv_freq" in name:
            continue
        *stem, leaf = name.split(".")
        path, layer = ".".join(stem), ""
        if (place := ".h." if gpt2 else ".layers.") in path:
            number, _, path = path.partition(place)[2].partition(".")
            layer = f"blk.{number}."
        new = {"gpt2": GPT2, "gemma3": GEMMA3}.get(kind, LLAMA_LIKE)[path]
        value = value.astype(np.float32)
        if kind == "gemma3" and value.ndim == 1:
            value = value + np.float32(1)  # the converter adds Gemma's 1 up
        if gpt2 and layer and value.ndim == 2:
            value = value.T
        if kind == "llama" and new in ("attn_q", "attn_k"):
            value = paired(value, heads if new == "attn_q" else kv)
        tensors[f"{layer}{new}.{leaf}"] = np.ascontiguousarray(value)
    return {"general.architecture": kind, **{f"{kind}.{key}": value for key, value in keys.items()}, **TOKENS}, tensors


def write(
    path: Path,
    keys: dict[str, Any],
    tensors: dict[str, np.ndarray],
    kind: str | Callable[[str], str] = "F32",
    raw: Callable[[str, np.ndarray, str], np.ndarray] | None = None,
) -> Path:
    """Write the file. ``kind``: type of the matrices, or of each by name; vectors are F32, as llama.cpp has them.

    ``raw``: bytes for types that the package cannot quantise.
    """
    writer = gguf.GGUFWriter(path, keys["general.architecture"])
    for key, value in keys.items():
        add(writer, key, value)
    for name, value in tensors.items():
        wanted = "F32" if value.ndim == 1 else kind if isinstance(kind, str) else kind(name)
        number = GGMLQuantizationType[wanted]
        if wanted == "F32":
            writer.add_tensor(name, value)
        elif raw is not None:
            writer.add_tensor(name, raw(name, value, wanted), raw_dtype=number)
        else:
            writer.add_tensor(name, gguf.quants.quantize(value, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """One key, in the type that the converter gives such a value."""
    if key == "general.architecture":  # the writer has it already
        return
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
