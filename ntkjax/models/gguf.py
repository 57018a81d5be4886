"""Models out of GGUF files, the format of llama.cpp, as directories in Hugging Face format.

Names, orders and shapes that all architectures share are here; what an architecture has of its own, its family declares
(`ntkjax.models.families.base.Gguf`).
"""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # makes "bfloat16" a dtype of NumPy
import numpy as np
from jaxtyping import Float

from ntkjax.errors import CheckpointError, ConfigError
from ntkjax.files import written_folder
from ntkjax.models.config import ModelConfig
from ntkjax.models.families import FAMILIES
from ntkjax.models.families.base import Family, Gguf, Reader, RopeConfig
from ntkjax.models.files import write_checkpoint, write_json
from ntkjax.models.functions import param_shapes
from ntkjax.models.gguf_file import GgufFile, read_gguf
from ntkjax.models.gguf_tokenizer import TokenizerFiles, tokenizer_files
from ntkjax.models.layers import ModelSpec
from ntkjax.models.lm import paths
from ntkjax.models.names import Source, sources
from ntkjax.models.rotary import rope_frequencies

DTYPES = ("float32", "bfloat16", "float16")

TENSORS = {
    "embed/weight": "token_embd",
    "wpe/weight": "position_embd",
    "norm": "output_norm",
    "head/kernel": "output",
    "layers/norm_1": "blk.{}.attn_norm",
    "layers/norm_2": "blk.{}.ffn_norm",
    "layers/attention/q": "blk.{}.attn_q",
    "layers/attention/k": "blk.{}.attn_k",
    "layers/attention/v": "blk.{}.attn_v",
    "layers/attention/o": "blk.{}.attn_output",
    "layers/attention/q_norm": "blk.{}.attn_q_norm",
    "layers/attention/k_norm": "blk.{}.attn_k_norm",
    "layers/mlp/gate": "blk.{}.ffn_gate",
    "layers/mlp/up": "blk.{}.ffn_up",
    "layers/mlp/down": "blk.{}.ffn_down",
}
"""Parameter, linear layer or norm -> its tensor without ".weight" or ".bias", "{}" for the layer's number."""

KEYS = {
    "block_count": "num_layers",
    "context_length": "max_positions",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_heads",
    "attention.head_count_kv": "num_kv_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_epsilon": "norm_eps",
    "attention.layer_norm_rms_epsilon": "norm_eps",
}
"""Key without the architecture's name -> the field of ModelShape that it is."""

_ROPE_FACTORS = "rope_freqs.weight"
# Keys that are read elsewhere in this file, or hold nothing that the tensors do not say.
_READ = ("attention.value_length", "rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.type",
         "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned",
         "attention.sliding_window", "attention.causal", "vocab_size")  # fmt: skip
_HF = "take the model in Hugging Face format"


@dataclasses.dataclass(frozen=True)
class Imported:
    """What an import wrote.

    Attributes:
      types: how many tensors of each type the file has ("Q4_K"). parameters: their values in all.
    """

    directory: Path
    config: ModelConfig
    types: dict[str, int]
    parameters: int


def import_gguf(
    file: str | Path, directory: str | Path, *, dtype: str = "float32", max_shard_size: int = 5_000_000_000
) -> Imported:
    """Write the model of a GGUF file as a directory in Hugging Face format, which `load_lm` and transformers read.

    Weights are dequantised, with rows and names as Hugging Face has them; the directory also gets config.json,
    tokenizer.json, tokenizer_config.json with the chat template, and generation_config.json with the tokens that end an
    answer. It appears whole or not at all. The host holds one shard at a time.

    Args:
      dtype: of the weights written. float32 keeps the dequantised values; bfloat16 and float16 round them, in half the
        space.
      max_shard_size: bytes of a file of weights.

    Raises:
      ConfigError: another dtype; ``directory`` is there already, with something in it.
      CheckpointError: naming the file and the key or tensor: not GGUF, cut off, an architecture, key, tensor type,
        tokenizer or pre-tokeniser that is not supported, a tensor that is missing, unknown, misshapen or not finite.
    """
    directory = Path(directory)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory}: is there already; give another directory, or remove this one")
    content = read_gguf(file)
    family, naming = _family(content)
    config = _config(content, family, naming)
    tokenizer = tokenizer_files(content, context=config.max_positions)
    config = _with_tokens(content, config, tokenizer)
    plan = _Plan.of(content, config, naming)
    sizes = {name: count * np.dtype(dtype).itemsize for name, count in plan.sizes().items()}
    with written_folder(directory, error=CheckpointError) as scratch:
        write_checkpoint(scratch, sizes, lambda name: _cast(content, name, plan.tensor(name), dtype), max_shard_size)
        write_json(scratch / "config.json", config.to_hf(dtype))
        write_json(scratch / "generation_config.json", _generation(tokenizer))
        write_json(scratch / "tokenizer.json", tokenizer.tokenizer)
        write_json(scratch / "tokenizer_config.json", tokenizer.settings)
    types = collections.Counter(tensor.type for tensor in content.tensors.values())
    return Imported(directory, config, dict(types.most_common()), sum(plan.sizes().values()))


def _family(file: GgufFile) -> tuple[Family, Gguf]:
    name = file.fields.get("general.architecture")
    known = {family.gguf.architecture: (family, family.gguf) for family in FAMILIES.values() if family.gguf is not None}
    if name not in known:
        raise file.fail(
            f"general.architecture = {name!r} is not supported; expected one of {', '.join(known)}: take another model"
        )
    return known[name]


def _config(file: GgufFile, family: Family, naming: Gguf) -> ModelConfig:
    """The shape that the keys and the tensors of the file describe."""
    prefix, reader = naming.architecture, Reader(_uniform(file), str(file.path))
    for key, value in reader.config.items():
        inner = key.removeprefix(f"{prefix}.")
        if inner == key or value in (0, False, "", []):
            continue
        if inner not in KEYS and inner not in _READ and inner not in naming.keys:
            raise reader.fail(f"key {key!r} = {value!r} is not known, and may change what the model computes; {_HF}")
        if isinstance(value, list):
            raise reader.fail(f"{key} = {value!r}, another for each layer, is not supported; {_HF}")
    is_there = lambda key: f"{prefix}.{key}" in reader.config
    number = lambda key: reader.number(f"{prefix}.{key}", kind=float if KEYS[key] == "norm_eps" else int)
    needed = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count")
    said: dict[str, Any] = {KEYS[key]: number(key) for key in KEYS if key in needed or is_there(key)}
    said.setdefault("num_kv_heads", said["num_heads"])
    said.setdefault("head_dim", said["hidden_size"] // said["num_heads"])
    embedding = file.tensors.get(f"{TENSORS['embed/weight']}.weight")
    if embedding is None:
        raise file.fail(f"tensor '{TENSORS['embed/weight']}.weight' is missing; convert the model again")
    names = TENSORS | dict(naming.tensors)
    has_bias = lambda linear: f"{names[linear].format(0)}.bias" in file.tensors
    said |= {
        "vocab_size": embedding.shape[0],
        "tied": f"{names['head/kernel']}.weight" not in file.tensors,
        "qkv_bias": has_bias("layers/attention/q"),
        "o_bias": has_bias("layers/attention/o"),
        "mlp_bias": has_bias("layers/mlp/up"),
        **family.fixed,
        **naming.fields,
    }
    if not family.learned_positions:
        said["rope"] = _rope(file, reader, prefix, said["head_dim"])
    if naming.more is not None:
        said |= naming.more(reader, said)
    _refuse(reader, prefix, said)
    try:
        config = ModelConfig(family=family.name, **said)
        again = ModelConfig.from_hf(config.to_hf(), "config.json")
    except (CheckpointError, TypeError) as error:
        raise file.fail(f"its keys describe no model of architecture {prefix!r}: {error}") from error
    if again != config:
        lost = [f.name for f in dataclasses.fields(config) if getattr(again, f.name) != getattr(config, f.name)]
        raise file.fail(f"{', '.join(lost)}: a config.json of {config.architecture} cannot say this; {_HF}")
    return config


def _uniform(file: GgufFile) -> dict[str, Any]:
    """The keys, with one number where a list has it for every layer."""
    same = lambda value: isinstance(value, list) and len(value) > 0 and all(item == value[0] for item in value)
    special = ("tokenizer.", "general.")
    return {
        key: value[0] if same(value) and not key.startswith(special) else value for key, value in file.fields.items()
    }


def _refuse(reader: Reader, prefix: str, said: dict[str, Any]) -> None:
    """An error for keys with a value that would change the mathematics."""
    value_length = reader.number(f"{prefix}.attention.value_length", said["head_dim"])
    if value_length != said["head_dim"]:
        raise reader.fail(f"{prefix}.attention.value_length = {value_length}: expected {said['head_dim']} as of keys")
    reader.refuse_flag(f"{prefix}.attention.causal", True)
    window = f"{prefix}.attention.sliding_window"
    if "window" not in said and reader.config.get(window) and reader.number(window) < said["max_positions"]:
        raise reader.fail(f"{window} = {reader.config[window]} is not supported with {prefix!r}; {_HF}")


def _rope(file: GgufFile, reader: Reader, prefix: str, head_dim: int) -> RopeConfig:
    """Rotary positions: base, share of a head, scaling, and Llama 3.1's, which lies in a tensor of factors."""
    theta = reader.number(f"{prefix}.rope.freq_base", 10_000.0, float)
    dims = reader.number(f"{prefix}.rope.dimension_count", head_dim)
    plain = RopeConfig(theta=theta, partial=1.0 if dims == head_dim else dims / head_dim)
    kind = reader.config.get(f"{prefix}.rope.scaling.type") or "none"
    factor = reader.number(f"{prefix}.rope.scale_linear", 1.0, float)
    factor = reader.number(f"{prefix}.rope.scaling.factor", factor, float)
    if kind not in ("none", "linear"):
        raise reader.fail(f"{prefix}.rope.scaling.type = {kind!r} is not supported; supported: none, linear; {_HF}")
    if _ROPE_FACTORS not in file.tensors:
        return plain if factor == 1 else dataclasses.replace(plain, kind="linear", factor=factor)
    stored = file.tensors[_ROPE_FACTORS].read().reshape(-1)
    # llama.cpp divides the frequencies by these numbers, and keeps nothing else of the rule that they come from.
    rope = dataclasses.replace(
        plain,
        kind="llama3",
        factor=float(stored.max()),
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_positions=reader.number(f"{prefix}.rope.scaling.original_context_length", 8192),
    )
    expected = rope_frequencies(plain, head_dim) / rope_frequencies(rope, head_dim)
    if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-4) or factor != 1:
        raise reader.fail(
            f"tensor {_ROPE_FACTORS!r} is not Llama 3.1's scaling of rotary positions (factors 1 and 4, context "
            f"{rope.original_max_positions}), the only one that is known; {_HF}"
        )
    return rope


def _with_tokens(file: GgufFile, config: ModelConfig, tokenizer: TokenizerFiles) -> ModelConfig:
    count = len(file.fields["tokenizer.ggml.tokens"])
    if count > config.vocab_size:
        raise file.fail(
            f"tensor '{TENSORS['embed/weight']}.weight' has {config.vocab_size} rows for {count} tokens; convert the "
            "model again"
        )
    return dataclasses.replace(
        config, bos_token_id=tokenizer.bos, eos_token_ids=tokenizer.ends[:1], pad_token_id=tokenizer.pad
    )


def _generation(tokenizer: TokenizerFiles) -> dict[str, Any]:
    ends = list(tokenizer.ends)
    settings = {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": ends[0] if len(ends) == 1 else ends,
        "pad_token_id": tokenizer.pad,
    }
    return {key: value for key, value in settings.items() if value not in (None, [])}


@dataclasses.dataclass(frozen=True)
class _Piece:
    """One parameter (of one layer) of a tensor of the checkpoint: ``width`` rows from ``start`` on of the file's tensor
    ``name``; ``heads``: their rows are paired in that many heads (0: they are not); ``offset``: the file holds offset +
    weight (norms that multiply by that, as llama.cpp's converter adds it up)."""

    source: Source
    name: str
    start: int
    width: int
    inputs: tuple[int, ...]
    heads: int = 0
    offset: float = 0.0


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Each tensor of the checkpoint, and the pieces of the file's tensors that it is made of."""

    file: GgufFile
    pieces: dict[str, list[_Piece]]

    @classmethod
    def of(cls, file: GgufFile, config: ModelConfig, naming: Gguf) -> _Plan:
        """Raises CheckpointError where a tensor is missing, misshapen, or left over."""
        spec = ModelSpec(config, None)
        shapes, table, names = paths(param_shapes(spec)), sources(spec), TENSORS | dict(naming.tensors)
        heads = {"layers/attention/q": config.num_heads, "layers/attention/k": config.num_kv_heads}
        pieces: dict[str, list[_Piece]] = collections.defaultdict(list)
        needed: dict[str, tuple[int, ...]] = {}
        order = {f"layers/{name}": i for i, name in enumerate(spec.linears())}
        for path, source in sorted(table.items(), key=lambda entry: order.get(entry[0].rsplit("/", 1)[0], -1)):
            stem, leaf = path.rsplit("/", 1)
            known = names.get(path) or names.get(stem)
            if known is None:
                raise file.fail(f"where {path} lies in such a file is not known; {_HF}")
            name = f"{known}.{'bias' if leaf == 'bias' else 'weight'}"
            stacked = path.startswith("layers/")
            shape = shapes[path].shape[1:] if stacked else shapes[path].shape
            shape = shape[::-1] if stacked and leaf == "kernel" else shape
            # Fused tensors hold several of our layers one under another, in the order of `linears`: each begins where
            # the rows so far end.
            start = needed[name.format(0)][0] if name.format(0) in needed else 0
            piece = _Piece(
                source,
                name,
                start,
                shape[0],
                tuple(shape[1:]),
                heads.get(stem, 0) if naming.paired_rows else 0,
                config.block.norm_offset if leaf == "scale" else 0.0,
            )
            for layer in range(config.num_layers) if stacked else (0,):
                needed[name.format(layer)] = (start + shape[0], *shape[1:])
                pieces[source.name.format(layer)].append(dataclasses.replace(piece, name=name.format(layer)))
        _check(file, needed)
        return cls(file, dict(pieces))

    def sizes(self) -> dict[str, int]:
        """How many values each tensor of the checkpoint has."""
        return {
            name: sum(int(np.prod((piece.width, *piece.inputs))) for piece in parts)
            for name, parts in self.pieces.items()
        }

    def tensor(self, name: str) -> Float[np.ndarray, "..."]:
        """A tensor of the checkpoint in float32."""
        parts = self.pieces[name]
        values = [self._rows(piece) for piece in parts]
        whole, source = values[0], parts[0].source
        if source.share is not None:
            whole = np.empty((source.share.total, *whole.shape[1:]), np.float32)
            for piece, value in zip(parts, values):
                assert piece.source.share is not None
                whole[piece.source.share.columns()] = value
        linear = parts[0].name.startswith("blk.") and whole.ndim == 2
        return whole.T if linear and not source.transpose else whole

    def _rows(self, piece: _Piece) -> Float[np.ndarray, "..."]:
        value = self.file.tensors[piece.name].read()[piece.start : piece.start + piece.width]
        if piece.heads:
            value = value.reshape(piece.heads, -1, 2, *piece.inputs).swapaxes(1, 2).reshape(value.shape)
        return value - np.float32(piece.offset) if piece.offset else value


def _check(file: GgufFile, needed: dict[str, tuple[int, ...]]) -> None:
    """Every tensor is there in its shape, and none is left over."""
    if missing := sorted(needed.keys() - file.tensors.keys()):
        raise file.fail(f"{_listed(missing)} missing; convert the model again")
    if unknown := sorted(file.tensors.keys() - needed.keys() - {_ROPE_FACTORS}):
        raise file.fail(f"{_listed(unknown)} not known, and the model would compute something else without; {_HF}")
    for name, shape in needed.items():
        if (stored := file.tensors[name].shape) != shape:
            raise file.fail(f"tensor {name!r} has shape {list(stored)}: its keys ask for {list(shape)}")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 4} more are" if len(names) > 4 else " is" if len(names) == 1 else " are"
    return f"tensor{'s' if len(names) > 1 else ''} {', '.join(map(repr, names[:4]))}{more}"


def _cast(file: GgufFile, name: str, value: Float[np.ndarray, "..."], dtype: str) -> np.ndarray:
    """``value`` in ``dtype``; CheckpointError where a number is not finite, or too large for the dtype."""
    if not np.isfinite(value).all():
        raise file.fail(f"{name}: its tensor has values that are not finite; download or convert it again")
    with np.errstate(over="ignore"):
        out = value.astype(dtype, copy=False)
    if not np.isfinite(out).all():
        raise file.fail(f"{name}: a value of size {np.abs(value).max():.3g} is too large for {dtype}; use float32")
    return out
