"""What a model family declares, and what the families' files share: shapes, layers, reading config.json.

A file of this folder describes a family in plain data and small functions of a shape: it imports no model code. The
decoder (`ntkjax.models.decoder`), the loader, the exporter, PEFT's format and the device mesh read the description.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from ntkjax.errors import CheckpointError
from ntkjax.parallel import Split

RopeType = Literal["default", "linear", "llama3", "dynamic", "yarn", "longrope"]
ROPE_TYPES = ("default", "linear", "llama3", "dynamic", "yarn", "longrope")
_OLD_ROPE_TYPES = {"su": "longrope"}
ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu")
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

    ``yarn`` (arXiv 2309.00071) divides the frequencies that turn less than beta_slow times in original_max_positions by
    ``factor``, keeps those that turn more than beta_fast times, goes linearly from one to the other between (whole
    dimensions with ``truncate``), and multiplies cos and sin by ``attention_factor``.

    ``longrope`` (arXiv 2402.13753) divides frequency i by short_factors[i], and in a sequence of more than
    original_max_positions tokens by long_factors[i], and multiplies cos and sin by ``attention_factor``. ``dynamic``
    changes nothing in a sequence of at most the model's max_positions tokens; in one of n it puts theta (factor n /
    max_positions - (factor - 1))^(d / (d - 2)) in the place of theta. n counts the tokens of the example that a token
    belongs to, padding and the rest of the batch left out (transformers takes the longest row of the batch, padded).
    """

    theta: float = 10_000.0
    kind: RopeType = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    partial: float = dataclasses.field(default=1.0, metadata=_LATER)
    attention_factor: float = dataclasses.field(default=1.0, metadata=_LATER)
    beta_fast: float = dataclasses.field(default=32.0, metadata=_LATER)
    beta_slow: float = dataclasses.field(default=1.0, metadata=_LATER)
    truncate: bool = dataclasses.field(default=True, metadata=_LATER)
    short_factors: tuple[float, ...] = dataclasses.field(default=(), metadata=_LATER)
    long_factors: tuple[float, ...] = dataclasses.field(default=(), metadata=_LATER)

    def dims(self, head_dim: int) -> int:
        """d, the dimensions of a head that are rotated."""
        return int(head_dim * self.partial)


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """One layer of a decoder: everything about a block but its sizes.

    ``rope`` and ``window`` may differ between the layers of a model. All else must be equal in all of them: they run
    as one compiled body over stacked parameters (`ntkjax.models.layers.scan_layers`).

    Attributes:
      norm: "rms", or "layer" with mean and bias. norm_offset: a norm multiplies by norm_offset + weight (Gemma: 1).
      norms: a norm stands "before" attention and MLP, "after" them (on what is added to the residual), or "both".
      qk_norm: RMS norm on queries and keys of each "head", or over the "full" width of all heads; None for none.
      mlp: "gated", down(act(gate(x)) * up(x)), "plain", down(act(up(x))), or "experts", gated ones of which a router
        chooses some for each token.
      qkv_bias, o_bias, mlp_bias: which linear layers have a bias.
      parallel: x + attention(norm_1(x)) + mlp(norm_2(x)) instead of one after the other.
      rope: rotary positions; None for none. window: a query sees this many tokens, itself included; None for all.
      soft_cap: attention scores s become cap * tanh(s / cap). query_scale: they are query_scale * q k^T; None means
        1 / sqrt(head_dim).
      residual_scale: what attention and MLP add to the residual stream is multiplied by it (Granite).
    """

    norm: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0
    norms: Literal["before", "after", "both"] = "before"
    qk_norm: Literal["head", "full"] | None = None
    mlp: Literal["gated", "plain", "experts"] = "gated"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    parallel: bool = False
    rope: RopeConfig | None = RopeConfig()
    window: int | None = None
    soft_cap: float | None = None
    query_scale: float | None = None
    residual_scale: float = 1.0


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
        positions of sliding layers where they have their own. soft_cap, query_scale, parallel, residual_scale: see
        LayerSpec. unrotated: numbers of the layers without rotary positions.
      logit_cap: logits z become cap * tanh(z / cap): they are then not linear in the head.
      embed_factor: the embedding is multiplied by it (``Family.embed_scale`` says so). state_divisor: hidden states are
        divided by it after the last norm, and with them the logits.
      num_experts, experts_per_token: routed experts of a layer, each of width intermediate_size, and how many a token
        gets. norm_topk: their weights, the largest of a softmax over all experts, are divided by their sum.
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
    parallel: bool = dataclasses.field(default=False, metadata=_LATER)
    unrotated: tuple[int, ...] = dataclasses.field(default=(), metadata=_LATER)
    logit_cap: float | None = dataclasses.field(default=None, metadata=_LATER)
    embed_factor: float = dataclasses.field(default=1.0, metadata=_LATER)
    residual_scale: float = dataclasses.field(default=1.0, metadata=_LATER)
    state_divisor: float = dataclasses.field(default=1.0, metadata=_LATER)
    num_experts: int = dataclasses.field(default=0, metadata=_LATER)
    experts_per_token: int = dataclasses.field(default=0, metadata=_LATER)
    norm_topk: bool = dataclasses.field(default=False, metadata=_LATER)


def layer_of(shape: ModelShape, index: int, **changes: Any) -> LayerSpec:
    """Layer ``index`` as the shape says, with ``changes`` for what the family has of its own."""
    local = shape.layer_types[index] == LOCAL if shape.layer_types else shape.window is not None
    said: dict[str, Any] = {
        "qk_norm": "head" if shape.qk_norm else None,
        "qkv_bias": shape.qkv_bias,
        "o_bias": shape.o_bias,
        "mlp_bias": shape.mlp_bias,
        "parallel": shape.parallel,
        "rope": None if index in shape.unrotated else (local and shape.local_rope) or shape.rope,
        "window": shape.window if local else None,
        "soft_cap": shape.soft_cap,
        "query_scale": shape.query_scale,
        "residual_scale": shape.residual_scale,
    }
    return LayerSpec(**said | changes)


# How weights are split over a mesh (Megatron-LM, 1909.08053). Column-parallel layers split their outputs, row-parallel
# ones their inputs, so that one all-reduce per attention and per MLP suffices. Axes count from the last, so each routed
# expert [..., in, out] is split as an MLP is, the axis of experts is whole on every device, and so is the router.
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
      fields: fields of ModelShape that no key says.
      more: further fields of ModelShape, from the file's keys (each with "ARCHITECTURE." in front of it) and the fields
        that are known already, rotary positions among them. keys: those that it reads besides the common ones, without
        the architecture's name.
    """

    architecture: str
    tensors: Mapping[str, str] = dataclasses.field(default_factory=dict)
    paired_rows: bool = False
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    more: Callable[[Reader, Mapping[str, Any]], Mapping[str, Any]] | None = None
    keys: tuple[str, ...] = ()


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
        ".weight" or ".bias", "{}" for the layer's number, and another for the expert's. Linear layers that share a
        tensor lie side by side in it, in the order of the block. PEFT's module names, and the names that LoRA targets
        may have, follow from these.
      layer: the LayerSpec of layer i of a shape.
      conv1d: the checkpoint holds linear weights as [in, out] (transformers' Conv1D), not as [out, in].
      fused_by_head: what shares a tensor alternates in it head by head (GPT-NeoX), instead of one after the other.
      learned_positions: a table of ``max_positions`` rows ("wpe/weight") is added to the embedding; the context cannot
        be longer.
      embed_scale: the embedding is multiplied by this number of a shape, rounded to the model's dtype (Gemma).
      fixed: fields that have one value in every model of the family.
      optional_prefix: beginning of every name that some checkpoints leave out.
      other_names: a tensor of ``tensors`` -> what other checkpoints call it.
      refused: class names in config.json that belong to the family and are not read -> why, and what to use.
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
    other_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    buffers: tuple[str, ...] = (r"(^|\.)rotary_emb\.inv_freq$",)
    splits: Mapping[str, Split] = dataclasses.field(default_factory=lambda: SPLITS)
    gguf: Gguf | None = None

    def split(self, path: str) -> Split:
        """How the parameter at ``path`` ("layers/attention/q/kernel") is split over a mesh."""
        return self.splits.get(path, Split())


LARGEST = 2**31 - 1
"""No size, frequency or other number of a config.json is larger."""
MAX_LAYERS = 4096
"""More layers than any decoder has: a larger number is a mistake, and is refused before any layer is described."""


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

    def optional(self, key: str, default: float | None) -> float | None:
        """A positive number or None, which null means; ``default`` where the key is absent."""
        return None if self.config.get(key, default) is None else self.number(key, default, float)

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
        ids_of = {key: read_token_ids(self.config, key, self.where, several=False) for key in given}
        return {
            "architecture": self.architecture,
            "vocab_size": self.number("vocab_size"),
            "initializer_range": self.number("initializer_range", 0.02, float),
            "eos_token_ids": ends,
            **{key: ids[0] if ids else None for key, ids in ids_of.items()},
        }

    def layers(self, key: str = "num_hidden_layers") -> int:
        """The number of layers, at most MAX_LAYERS."""
        count = self.number(key)
        if count > MAX_LAYERS:
            raise self.fail(f"{key} = {count}: expected 1 to {MAX_LAYERS}; mend the number of layers")
        return count

    def layer_types(self, default: Callable[[int], bool] | None = None) -> tuple[str, ...]:
        """The kind of every layer, "full_attention" or "sliding_attention".

        Where ``layer_types`` is absent, ``default`` says whether layer i slides (None: no layer does).
        """
        layers, kinds = self.layers(), self.config.get("layer_types")
        if not kinds:
            slides = default or (lambda i: False)
            return tuple(LOCAL if slides(i) else "full_attention" for i in range(layers))
        if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
            raise self.fail(f"layer_types = {kinds!r}: expected a list of names, one for each layer")
        if others := sorted(set(kinds) - {"full_attention", LOCAL}):
            raise self.fail(f"layer_types {others}: only 'full_attention' and {LOCAL!r} are supported")
        if len(kinds) != layers:
            raise self.fail(f"layer_types has {len(kinds)} entries for num_hidden_layers = {layers}: expected one each")
        return tuple(kinds)

    def switched_layer_types(self, default: Callable[[int], bool]) -> tuple[str, ...]:
        """``layer_types`` of a family in which no layer slides unless ``use_sliding_window`` says so."""
        used = self.flag("use_sliding_window", False)
        kinds = self.layer_types(lambda i: used and default(i))
        if LOCAL in kinds and not used:
            raise self.fail(
                f"layer_types names {LOCAL!r} and use_sliding_window is false: set it to true, or name others"
            )
        return kinds

    def windows(self, kinds: tuple[str, ...], default: int | None = None, *, keep: bool = False) -> dict[str, Any]:
        """The fields ``window`` and ``layer_types`` of ModelShape for layers of these kinds, the window as
        ``sliding_window`` says, or ``default`` where that key is absent.

        A window as long as the context (``max_position_embeddings``) hides nothing in it and is left out, unless told
        to ``keep`` it: where sliding layers differ in more than the window.
        """
        if LOCAL not in kinds:
            return {}
        if self.config.get("sliding_window", default) is None:
            raise self.fail(f"layer_types names {LOCAL!r} and there is no sliding_window: set it, or name other layers")
        window = self.number("sliding_window", default)
        if not keep and window >= self.number("max_position_embeddings", LARGEST):
            return {}
        return {"window": window} | ({} if set(kinds) == {LOCAL} else {"layer_types": kinds})

    def rope(self, *, theta: float = 10_000.0, partial: float | None = None) -> RopeConfig:
        """v5: everything in rope_parameters. v4: rope_theta beside rope_scaling {type or rope_type, ...}.

        ``theta``: transformers' default. ``partial``: the share of a head that is rotated where the key is absent; with
        None the family rotates whole heads.
        """
        key = "rope_parameters" if self.config.get("rope_parameters") is not None else "rope_scaling"
        scaling = self.config.get(key) or {}
        if not isinstance(scaling, dict) or any(isinstance(v, dict) for v in scaling.values()):
            raise self.fail(f"{key} = {scaling!r}: expected one flat object for all layers")
        return self.rope_of(scaling, key, theta=self.number("rope_theta", theta, float), partial=partial)

    def ropes(self, *, theta: float, local_theta: float) -> tuple[RopeConfig, RopeConfig]:
        """Rotary positions of full and of sliding layers. v5: rope_parameters has an object for each kind of layer. v4:
        rope_theta and rope_scaling are those of full layers; sliding layers have ``local_theta`` and no scaling.
        """
        kinds = self.config.get("rope_parameters")
        if kinds is None:
            scaling = self.config.get("rope_scaling") or {}
            if not isinstance(scaling, dict):
                raise self.fail(f"rope_scaling = {scaling!r}: expected an object")
            return (
                self.rope_of(scaling, "rope_scaling", theta=self.number("rope_theta", theta, float)),
                RopeConfig(theta=local_theta),
            )
        wanted = "expected an object for each of 'full_attention' and 'sliding_attention'"
        if not isinstance(kinds, dict) or set(kinds) - {"full_attention", LOCAL}:
            raise self.fail(f"rope_parameters = {kinds!r}: {wanted}")
        ropes = []
        for kind, default in (("full_attention", theta), (LOCAL, local_theta)):
            inner = kinds.get(kind) or {}
            if not isinstance(inner, dict):
                raise self.fail(f"rope_parameters.{kind} = {inner!r}: {wanted}")
            ropes.append(self.rope_of(inner, f"rope_parameters.{kind}", theta=default))
        return ropes[0], ropes[1]

    def rope_of(self, scaling: dict[str, Any], key: str, *, theta: float, partial: float | None = None) -> RopeConfig:
        """The rotary positions that the object ``scaling``, found at ``key``, describes."""
        kind = scaling.get("rope_type", scaling.get("type")) or "default"
        kind = _OLD_ROPE_TYPES.get(kind, kind) if isinstance(kind, str) else kind
        if kind not in ROPE_TYPES:
            raise self.fail(f"{key}.rope_type = {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
        inner = Reader(scaling, f"{self.where}: {key}")
        share = inner.number(
            "partial_rotary_factor", self.number("partial_rotary_factor", partial or 1.0, float), float
        )
        if (share != 1 and partial is None) or share > 1:
            raise self.fail(
                f"partial_rotary_factor = {share}: only {'1.0 is' if partial is None else 'up to 1.0'} supported"
            )
        plain = RopeConfig(theta=inner.number("rope_theta", theta, float), partial=share)
        if kind == "default":
            return plain
        read = {"linear": _linear, "dynamic": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}[kind]
        return dataclasses.replace(plain, kind=kind, **read(self, inner))

    def original_positions(self, inner: Reader) -> int:
        """The context before it was made longer: beside the scaling, in it, or ``max_position_embeddings``."""
        key = "original_max_position_embeddings"
        within = inner.config.get(key)
        return (
            self.number(key)
            if self.config.get(key) is not None
            else inner.number(key, None if within is not None else self.number("max_position_embeddings", 2048))
        )


def _linear(reader: Reader, inner: Reader) -> dict[str, Any]:
    return {"factor": inner.number("factor", kind=float)}


def _llama3(reader: Reader, inner: Reader) -> dict[str, Any]:
    return {
        "factor": inner.number("factor", kind=float),
        "low_freq_factor": inner.number("low_freq_factor", kind=float),
        "high_freq_factor": inner.number("high_freq_factor", kind=float),
        "original_max_positions": inner.number("original_max_position_embeddings"),
    }


def _stretch(reader: Reader, inner: Reader, original: int) -> float:
    """How much longer the context became: ``factor``, or the ratio of the two contexts."""
    return inner.number("factor", reader.number("max_position_embeddings", original) / original, float)


def _yarn(reader: Reader, inner: Reader) -> dict[str, Any]:
    original = reader.original_positions(inner)
    factor = _stretch(reader, inner, original)
    m, over_all = (inner.config.get(key) and inner.number(key, kind=float) for key in ("mscale", "mscale_all_dim"))
    size = lambda m: 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0
    return {
        "factor": factor,
        "original_max_positions": original,
        "attention_factor": inner.number(
            "attention_factor", size(m) / size(over_all) if m and over_all else size(1), float
        ),
        "beta_fast": inner.number("beta_fast", 32, float),
        "beta_slow": inner.number("beta_slow", 1, float),
        "truncate": inner.flag("truncate", True),
    }


def _longrope(reader: Reader, inner: Reader) -> dict[str, Any]:
    original = reader.original_positions(inner)
    factor = _stretch(reader, inner, original)
    size = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    factors = {}
    for key in ("short_factor", "long_factor"):
        value = inner.config.get(key)
        if not isinstance(value, list) or not all(is_finite(x) and 0 < x <= LARGEST for x in value):
            raise inner.fail(f"{key} = {value!r}: expected a list of positive numbers")
        factors[f"{key}s"] = tuple(float(x) for x in value)
    return factors | {
        "factor": factor,
        "original_max_positions": original,
        "attention_factor": inner.number("attention_factor", size, float),
    }


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
    scaling = _scaling(rope)
    return {
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.kind == "default" else scaling,
        "rope_parameters": scaling | {"rope_theta": rope.theta},
    } | ({} if rope.partial == 1 else {"partial_rotary_factor": rope.partial})


def kinds_of_rope_keys(shape: ModelShape) -> dict[str, Any]:
    """As ``rope_keys``, for families whose sliding layers have rotary positions of their own."""
    local = shape.local_rope or shape.rope
    by_kind = {
        kind: _scaling(rope) | {"rope_theta": rope.theta}
        for kind, rope in (("full_attention", shape.rope), (LOCAL, local))
    }
    return rope_keys(shape.rope) | {"rope_parameters": by_kind}


def _scaling(rope: RopeConfig) -> dict[str, Any]:
    settings: dict[str, Any] = {"rope_type": rope.kind}
    if rope.partial != 1:
        settings["partial_rotary_factor"] = rope.partial
    if rope.kind == "default":
        return settings
    settings["factor"] = rope.factor
    if rope.kind in ("llama3", "yarn", "longrope"):
        settings["original_max_position_embeddings"] = rope.original_max_positions
    if rope.kind == "llama3":
        settings |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind in ("yarn", "longrope"):
        settings["attention_factor"] = rope.attention_factor
    if rope.kind == "yarn":
        settings |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
    if rope.kind == "longrope":
        settings |= {"short_factor": list(rope.short_factors), "long_factor": list(rope.long_factors)}
    return settings
