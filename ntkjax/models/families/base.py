"""What a model family declares, and what the families' files share: shapes, layers, reading config.json.

A file of this folder describes a family in plain data and small functions of a shape: it imports no model code. The
decoder (`ntkjax.models.decoder`), the loader, the exporter, PEFT's format and the device mesh read the description.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from ntkjax.errors import CheckpointError
from ntkjax.parallel import Split

RopeType = Literal["default", "linear", "llama3"]
ROPE_TYPES = ("default", "linear", "llama3")
ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
LOCAL = "sliding_attention"
"""The layer type (config.json: ``layer_types``) that a window and ``local_rope`` belong to."""

# Fields that came after the first release: left out of a config's digest at their default, so that stored runs keep
# their names.
_LATER = {"later": True}


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: inverse frequencies theta^(-2i/d), i < d/2, divided or bent for longer contexts.

    ``linear`` divides every frequency by ``factor``. ``llama3`` divides those of wavelength above
    original_max_positions / low_freq_factor, keeps those below original_max_positions / high_freq_factor and
    interpolates between (transformers, modeling_rope_utils). ``partial`` is the share of a head that is rotated:
    d = partial * head_dim, and the head's other dimensions stay as they are.
    """

    theta: float = 10_000.0
    kind: RopeType = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    partial: float = dataclasses.field(default=1.0, metadata=_LATER)

    def dims(self, head_dim: int) -> int:
        """d, the dimensions of a head that are rotated."""
        return int(head_dim * self.partial)


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """One layer of a decoder: everything about a block but its sizes.

    ``rope`` and ``window`` may differ between the layers of a model. All else must be equal in all of them: they run
    as one compiled body over stacked parameters (`ntkjax.models.layers.scan_layers`).

    Not here yet, and refused by the families whose config.json asks for it: routed experts (a third ``mlp``), and a
    soft cap on the model's logits (outputs would no longer be linear in the head, which every kernel relies on).

    Attributes:
      norm: "rms", or "layer" with mean and bias. norm_offset: a norm multiplies by norm_offset + weight (Gemma: 1).
      norms: a norm stands "before" attention and MLP, "after" them (on what is added to the residual), or "both".
      qk_norm: RMS norm on queries and keys of each "head", or over the "full" width of all heads; None for none.
      mlp: "gated", down(act(gate(x)) * up(x)), or "plain", down(act(up(x))).
      qkv_bias, o_bias, mlp_bias: which linear layers have a bias.
      parallel: x + attention(norm_1(x)) + mlp(norm_2(x)) instead of one after the other.
      rope: rotary positions; None for none. window: a query sees this many tokens, itself included; None for all.
      soft_cap: attention scores s become cap * tanh(s / cap). query_scale: they are query_scale * q k^T; None means
        1 / sqrt(head_dim).
    """

    norm: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0
    norms: Literal["before", "after", "both"] = "before"
    qk_norm: Literal["head", "full"] | None = None
    mlp: Literal["gated", "plain"] = "gated"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    parallel: bool = False
    rope: RopeConfig | None = RopeConfig()
    window: int | None = None
    soft_cap: float | None = None
    query_scale: float | None = None


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """Sizes and settings of a causal decoder, as its config.json gives them.

    Attributes:
      family: a name of FAMILIES.
      architecture: the class name in ``config.json``, e.g. "MistralForCausalLM" (family "llama").
      vocab_size, hidden_size, intermediate_size: V, D and the width of the MLP.
      num_layers, num_heads, num_kv_heads, head_dim: num_heads is a multiple of num_kv_heads; head_dim need
        not be hidden_size / num_heads.
      max_positions: the context it was trained for; a hard limit only where positions are learned.
      norm_eps, activation, rope: as in transformers; rope is ignored where positions are learned.
      tied: the head is the embedding. qkv_bias, o_bias, mlp_bias: which linear layers have a bias.
      qk_norm: norms on queries and keys (Qwen3).
      initializer_range: standard deviation of random weights.
      layer_types: "full_attention" or "sliding_attention" for each layer; () means one type for all.
      window: tokens that a query sees in sliding layers, or in all layers where layer_types is (). local_rope: rotary
        positions of sliding layers where they have their own. soft_cap, query_scale: see LayerSpec.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int = 2048
    norm_eps: float = 1e-6
    activation: str = "silu"
    rope: RopeConfig = RopeConfig()
    tied: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    initializer_range: float = 0.02
    architecture: str = ""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    layer_types: tuple[str, ...] = dataclasses.field(default=(), metadata=_LATER)
    window: int | None = dataclasses.field(default=None, metadata=_LATER)
    local_rope: RopeConfig | None = dataclasses.field(default=None, metadata=_LATER)
    soft_cap: float | None = dataclasses.field(default=None, metadata=_LATER)
    query_scale: float | None = dataclasses.field(default=None, metadata=_LATER)


def layer_of(shape: ModelShape, index: int, **changes: Any) -> LayerSpec:
    """Layer ``index`` as the shape says, with ``changes`` for what the family has of its own."""
    local = shape.layer_types[index] == LOCAL if shape.layer_types else shape.window is not None
    said: dict[str, Any] = {
        "qk_norm": "head" if shape.qk_norm else None,
        "qkv_bias": shape.qkv_bias,
        "o_bias": shape.o_bias,
        "mlp_bias": shape.mlp_bias,
        "rope": shape.local_rope if local and shape.local_rope is not None else shape.rope,
        "window": shape.window if local else None,
        "soft_cap": shape.soft_cap,
        "query_scale": shape.query_scale,
    }
    return LayerSpec(**said | changes)


# How weights are split over a mesh (Megatron-LM, 1909.08053). Column-parallel layers split their outputs, row-parallel
# ones their inputs, so that one all-reduce per attention and per MLP suffices.
_COLUMN, _ROW, _VOCABULARY = Split(-1, -2), Split(-2, -1), Split(-2, -1)
SPLITS: Mapping[str, Split] = {
    "embed/weight": _VOCABULARY,
    "head/kernel": _VOCABULARY,
    **{f"layers/{name}/kernel": _COLUMN for name in ("attention/q", "attention/k", "attention/v")},
    **{f"layers/{name}/bias": Split(-1) for name in ("attention/q", "attention/k", "attention/v")},
    **{f"layers/{name}/kernel": _COLUMN for name in ("mlp/gate", "mlp/up")},
    **{f"layers/{name}/bias": Split(-1) for name in ("mlp/gate", "mlp/up")},
    **{f"layers/{name}/kernel": _ROW for name in ("attention/o", "mlp/down")},
}


@dataclasses.dataclass(frozen=True)
class Gguf:
    """How GGUF files hold a family, as far as `ntkjax.models.gguf` does not say it for all of them.

    Attributes:
      architecture: what the file's ``general.architecture`` says.
      tensors: as ``Family.tensors``, with the file's names, where they are not the common ones (`gguf.TENSORS`). Linear
        layers that share a tensor lie in it one after the other, in the order of the block.
      paired_rows: the rows of a head's queries and keys are in the order in which rotary positions turn neighbours,
        rows 2i and 2i + 1, and not rows i and i + head_dim / 2 as in a checkpoint (llama.cpp: ``permute``).
      keys: keys beyond the common ones (`gguf.KEYS`), without the architecture's name -> a field of ModelShape.
      fields: fields of ModelShape that no key says.
    """

    architecture: str
    tensors: Mapping[str, str] = dataclasses.field(default_factory=dict)
    paired_rows: bool = False
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Family:
    """All that a model family is.

    Attributes:
      name: what ``ModelConfig.family`` says.
      architectures: class name in config.json -> its model_type; the first is the one of a model made here.
      read: the shape that a config.json describes; raises CheckpointError, through the reader, for what would change
        the mathematics and is not implemented. Its ``architecture`` is one of ``architectures``.
      write: the keys of config.json beyond the common ones (`common_keys`).
      tensors: parameter, or linear layer or norm ("layers/attention/q"), -> its tensor in the checkpoint without
        ".weight" or ".bias", "{}" for the layer's number. Linear layers that share a tensor lie side by side in it, in
        the order of the block. PEFT's module names, and the names that LoRA targets may have, follow from these.
      layer: the LayerSpec of layer i of a shape.
      conv1d: the checkpoint holds linear weights as [in, out] (transformers' Conv1D), not as [out, in].
      fused_by_head: what shares a tensor alternates in it head by head (GPT-NeoX), instead of one after the other.
      learned_positions: a table of ``max_positions`` rows ("wpe/weight") is added to the embedding; the context cannot
        be longer.
      embed_scale: the embedding is multiplied by this number of a shape, rounded to the model's dtype (Gemma).
      fixed: fields that have one value in every model of the family.
      optional_prefix: beginning of every name that some checkpoints leave out.
      buffers: regular expressions for tensors that are saved beside the weights and hold nothing that is learned.
      splits: how parameters are split over a device mesh; those not named are on every device.
      gguf: how GGUF files hold it; None: they are not imported.
    """

    name: str
    architectures: Mapping[str, str]
    read: Callable[[Reader], ModelShape]
    write: Callable[[ModelShape], dict[str, Any]]
    tensors: Mapping[str, str]
    layer: Callable[[ModelShape, int], LayerSpec] = layer_of
    conv1d: bool = False
    fused_by_head: bool = False
    learned_positions: bool = False
    embed_scale: Callable[[ModelShape], float] | None = None
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"qk_norm": False})
    optional_prefix: str = ""
    buffers: tuple[str, ...] = (r"(^|\.)rotary_emb\.inv_freq$",)
    splits: Mapping[str, Split] = dataclasses.field(default_factory=lambda: SPLITS)
    gguf: Gguf | None = None

    def split(self, path: str) -> Split:
        """How the parameter at ``path`` ("layers/attention/q/kernel") is split over a mesh."""
        return self.splits.get(path, Split())


LARGEST = 2**31 - 1
"""No size, frequency or other number of a config.json is larger."""


def is_finite(value: Any) -> bool:
    """Whether a decoded JSON value is a number other than NaN and infinity."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def read_token_ids(config: dict[str, Any], key: str, where: str, several: bool = True) -> tuple[int, ...]:
    """The token ids that ``key`` of a configuration names: none, one, or with ``several`` a list of them.

    Raises CheckpointError, beginning with ``where``, for anything that is no id. Negative ids stand for none.
    """
    value = config.get(key)
    ids = value if several and isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i < 2**31 for i in ids):
        raise CheckpointError(
            f"{where}: {key} is {value!r}; expected a token id{' or a list of them' if several else ''}; mend or "
            "remove the entry"
        )
    return tuple(i for i in ids if i >= 0)


class Reader:
    """Typed access to the keys of one config.json; every error starts with the file's name.

    Attributes:
      config: the content. where: the file's name. architecture: the class name that it is read as.
    """

    def __init__(self, config: dict[str, Any], where: str, architecture: str = ""):
        self.config, self.where, self.architecture = config, where, architecture

    def fail(self, message: str) -> CheckpointError:
        """An error to raise, with the file's name in front."""
        return CheckpointError(f"{self.where}: {message}")

    def number(self, key: str, default: int | float | None = None, kind: type = int) -> Any:
        """A positive number; ``default`` where the key is absent or null, an error where that is None."""
        value = self.config.get(key)
        if value is None:
            if default is None:
                raise self.fail(f"key {key!r} is missing: expected a number")
            return kind(default)
        if not is_finite(value) or (kind is int and value != int(value)):
            raise self.fail(f"{key} = {value!r}: expected {'an integer' if kind is int else 'a number'}")
        if not 0 < value <= LARGEST:
            raise self.fail(f"{key} = {value!r}: expected a positive number, at most {LARGEST}")
        return kind(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false; ``default`` where the key is absent or null."""
        value = self.config.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(f"{key} = {value!r}: expected true or false")
        return value

    def refuse_flag(self, key: str, neutral: bool) -> None:
        """An error unless the flag is, or defaults to, ``neutral``."""
        if self.flag(key, neutral) is not neutral:
            raise self.fail(f"{key} = {not neutral} is not supported (only {neutral})")

    def activation(self, key: str, default: str) -> str:
        """The name of a pointwise function, one of ACTIVATIONS."""
        value = self.config.get(key) or default
        if value not in ACTIVATIONS:
            raise self.fail(f"{key} = {value!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
        return value

    def common(self) -> dict[str, Any]:
        """Fields of ModelShape whose keys are the same in every family."""
        ends, given = read_token_ids(self.config, "eos_token_id", self.where), ("bos_token_id", "pad_token_id")
        found = {key: read_token_ids(self.config, key, self.where, several=False) for key in given}
        return {
            "architecture": self.architecture,
            "vocab_size": self.number("vocab_size"),
            "initializer_range": self.number("initializer_range", 0.02, float),
            "eos_token_ids": ends,
            **{key: ids[0] if ids else None for key, ids in found.items()},
        }

    def layer_types(self) -> set[str]:
        """The kinds of layers that are named; full attention where none are."""
        kinds = self.config.get("layer_types") or ["full_attention"]
        if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
            raise self.fail(f"layer_types = {kinds!r}: expected a list of names, one for each layer")
        return set(kinds)

    def refuse_windows(self, uses: Callable[[], bool]) -> None:
        """An error where ``sliding_window`` is shorter than the context and ``uses()`` says that some layer has it."""
        limit = self.config.get("max_position_embeddings")
        limit = 0 if limit is None else self.number("max_position_embeddings")
        kinds = self.layer_types()
        window = None if self.config.get("sliding_window") is None else self.number("sliding_window")
        if window is not None and window < limit and uses():
            raise self.fail(
                f"sliding_window = {window} is shorter than max_position_embeddings = {limit}: "
                "sliding-window attention is not supported (a checkpoint with sliding_window = null is)"
            )
        others = kinds - {"full_attention", LOCAL}
        if others or (kinds != {"full_attention"} and window is None):
            raise self.fail(f"layer_types {sorted(kinds)}: only 'full_attention' is supported")

    def rope(self) -> RopeConfig:
        """v5: everything in rope_parameters. v4: rope_theta beside rope_scaling {type or rope_type, ...}."""
        key = "rope_parameters" if self.config.get("rope_parameters") is not None else "rope_scaling"
        scaling = self.config.get(key) or {}
        if not isinstance(scaling, dict) or any(isinstance(v, dict) for v in scaling.values()):
            raise self.fail(f"{key} = {scaling!r}: expected one flat object for all layers")
        kind = scaling.get("rope_type", scaling.get("type")) or "default"
        if kind not in ROPE_TYPES:
            raise self.fail(f"{key}.rope_type = {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
        for source in (self.config, scaling):
            if source.get("partial_rotary_factor") not in (None, 1, 1.0):
                raise self.fail(f"partial_rotary_factor = {source['partial_rotary_factor']}: only 1.0 is supported")
        inner = Reader(scaling, f"{self.where}: {key}")
        theta = self.number("rope_theta", 10_000.0, float)
        theta = inner.number("rope_theta", theta, float)
        if kind == "default":
            return RopeConfig(theta=theta)
        if kind == "linear":
            return RopeConfig(theta=theta, kind="linear", factor=inner.number("factor", kind=float))
        return RopeConfig(
            theta=theta,
            kind="llama3",
            factor=inner.number("factor", kind=float),
            low_freq_factor=inner.number("low_freq_factor", kind=float),
            high_freq_factor=inner.number("high_freq_factor", kind=float),
            original_max_positions=inner.number("original_max_position_embeddings"),
        )


def common_keys(shape: ModelShape, family: Family, dtype: str) -> dict[str, Any]:
    """The keys of config.json that every family has, for transformers v4 and v5."""
    eos = list(shape.eos_token_ids)
    return {
        "architectures": [shape.architecture],
        "model_type": family.architectures[shape.architecture],
        "vocab_size": shape.vocab_size,
        "tie_word_embeddings": shape.tied,
        "initializer_range": shape.initializer_range,
        "bos_token_id": shape.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": shape.pad_token_id,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def rope_keys(rope: RopeConfig) -> dict[str, Any]:
    """The keys of config.json about rotary positions, v4's and v5's."""
    scaling: dict[str, Any] = {"rope_type": rope.kind}
    if rope.kind != "default":
        scaling["factor"] = rope.factor
    if rope.kind == "llama3":
        scaling["low_freq_factor"] = rope.low_freq_factor
        scaling["high_freq_factor"] = rope.high_freq_factor
        scaling["original_max_position_embeddings"] = rope.original_max_positions
    return {
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.kind == "default" else scaling,
        "rope_parameters": scaling | {"rope_theta": rope.theta},
    }
