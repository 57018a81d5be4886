"""The shape of a decoder, read from a Hugging Face ``config.json`` (transformers v4 or v5 style) or written by hand."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from ntkjax.errors import CheckpointError

Family = Literal["llama", "qwen2", "qwen3", "gpt2"]
RopeType = Literal["default", "linear", "llama3"]

ARCHITECTURES: dict[str, Family] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "GPT2LMHeadModel": "gpt2",
}
ROPE_TYPES = ("default", "linear", "llama3")
ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
LARGEST = 2**31 - 1
"""No size, frequency or other number of a config.json is larger."""
DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: inverse frequencies theta^(-2i/d), i < d/2, divided or bent for longer contexts.

    ``linear`` divides every frequency by ``factor``. ``llama3`` divides those of wavelength above
    original_max_positions / low_freq_factor, keeps those below original_max_positions / high_freq_factor and
    interpolates between (transformers, modeling_rope_utils).
    """

    theta: float = 10_000.0
    kind: RopeType = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a causal decoder; hashable, so it is part of a compiled function's identity.

    Attributes:
      family: which of the four decoders.
      architecture: the class name in ``config.json``, e.g. "MistralForCausalLM" (family "llama").
      vocab_size, hidden_size, intermediate_size: V, D and the width of the MLP.
      num_layers, num_heads, num_kv_heads, head_dim: num_heads is a multiple of num_kv_heads; head_dim need
        not be hidden_size / num_heads.
      max_positions: the context it was trained for; only GPT-2's learned positions make it a hard limit.
      norm_eps, activation, rope: as in transformers; rope is ignored by GPT-2.
      tied: the head is the embedding. qkv_bias, o_bias, mlp_bias: which linear layers have a bias.
      qk_norm: RMSNorm over head_dim on queries and keys (Qwen3).
      initializer_range: standard deviation of random weights.
    """

    family: Family
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

    def __post_init__(self) -> None:
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"num_attention_heads = {self.num_heads} is not a multiple of num_key_value_heads = "
                f"{self.num_kv_heads}: query heads share key/value heads in equal groups"
            )
        if self.family != "gpt2" and self.head_dim % 2:
            raise CheckpointError(f"head_dim = {self.head_dim} is odd: rotary positions rotate pairs")
        if self.activation not in ACTIVATIONS:
            raise CheckpointError(
                f"activation {self.activation!r} is not supported; supported: {', '.join(ACTIVATIONS)}"
            )
        if self.qk_norm != (self.family == "qwen3"):
            raise CheckpointError(
                f"qk_norm = {self.qk_norm} with family {self.family!r}: Qwen3 has norms on queries and keys and no "
                "other family does, so no checkpoint could hold this model; set qk_norm accordingly"
            )
        if not self.architecture:
            names = {family: name for name, family in reversed(ARCHITECTURES.items())}
            object.__setattr__(self, "architecture", names[self.family])

    @classmethod
    def from_hf(cls, config: dict[str, Any], where: str = "config.json") -> ModelConfig:
        """Read a Hugging Face configuration. ``where`` names the file in errors.

        Raises CheckpointError naming the key for an unknown architecture, rope type or activation, and for
        any option that would change the mathematics and is not implemented.
        """
        return _Reader(config, where).read()

    def to_hf(self, dtype: str = "float32") -> dict[str, Any]:
        """A ``config.json`` that transformers v4 and v5 both read, and that ``from_hf`` reads back to this object."""
        return _gpt2_to_hf(self, dtype) if self.family == "gpt2" else _decoder_to_hf(self, dtype)


def _is_finite(value: Any) -> bool:
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


class _Reader:
    """Typed access to the keys of one config.json; every error starts with the file's name."""

    def __init__(self, config: dict[str, Any], where: str):
        if not isinstance(config, dict):
            raise CheckpointError(f"{where}: expected a JSON object, found {type(config).__name__}")
        self.config, self.where = config, where

    def fail(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {message}")

    def number(self, key: str, default: int | float | None = None, kind: type = int) -> Any:
        value = self.config.get(key)
        if value is None:
            if default is None:
                raise self.fail(f"key {key!r} is missing: expected a number")
            return kind(default)
        if not _is_finite(value) or (kind is int and value != int(value)):
            raise self.fail(f"{key} = {value!r}: expected {'an integer' if kind is int else 'a number'}")
        if not 0 < value <= LARGEST:
            raise self.fail(f"{key} = {value!r}: expected a positive number, at most {LARGEST}")
        return kind(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.config.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(f"{key} = {value!r}: expected true or false")
        return value

    def architecture(self) -> str:
        names = self.config.get("architectures") or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise self.fail(f"architectures = {names!r}: expected a list of class names")
        if not names:
            by_type = {
                "llama": "LlamaForCausalLM",
                "mistral": "MistralForCausalLM",
                "gpt2": "GPT2LMHeadModel",
            }
            by_type |= {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
            names = [by_type.get(str(self.config.get("model_type")), str(self.config.get("model_type")))]
        if names[0] not in ARCHITECTURES:
            supported = ", ".join(ARCHITECTURES)
            raise self.fail(f"architecture {names[0]!r} is not supported; supported: {supported}")
        return names[0]

    def read(self) -> ModelConfig:
        name = self.architecture()
        family = ARCHITECTURES[name]
        if self.config.get("quantization_config"):
            raise self.fail("quantization_config is set: quantised weights are not supported; use the original")
        return self.gpt2(name) if family == "gpt2" else self.decoder(name, family)

    def activation(self, key: str, default: str) -> str:
        value = self.config.get(key) or default
        if value not in ACTIVATIONS:
            raise self.fail(f"{key} = {value!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
        return value

    def token_ids(self) -> dict[str, Any]:
        ends, given = read_token_ids(self.config, "eos_token_id", self.where), {"bos_token_id", "pad_token_id"}
        found = {key: read_token_ids(self.config, key, self.where, several=False) for key in given}
        return {"eos_token_ids": ends, **{key: ids[0] if ids else None for key, ids in found.items()}}

    def decoder(self, name: str, family: Family) -> ModelConfig:
        heads, hidden = self.number("num_attention_heads"), self.number("hidden_size")
        if self.config.get("head_dim") is None and family != "qwen3" and hidden % heads:
            raise self.fail(f"hidden_size = {hidden} is not a multiple of num_attention_heads = {heads}; no head_dim")
        self.refuse_windows(name)
        bias = self.flag("attention_bias", False) and name in ("LlamaForCausalLM", "Qwen3ForCausalLM")
        return ModelConfig(
            family=family,
            architecture=name,
            vocab_size=self.number("vocab_size"),
            hidden_size=hidden,
            intermediate_size=self.number("intermediate_size"),
            num_layers=self.number("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=self.number("num_key_value_heads", heads),
            # transformers' own default where the key is absent.
            head_dim=self.number("head_dim", 128 if family == "qwen3" else hidden // heads),
            max_positions=self.number("max_position_embeddings", 2048),
            norm_eps=self.number("rms_norm_eps", 1e-6, float),
            activation=self.activation("hidden_act", "silu"),
            rope=self.rope(),
            tied=self.flag("tie_word_embeddings", False),
            qkv_bias=bias or family == "qwen2",
            o_bias=bias,
            mlp_bias=self.flag("mlp_bias", False) and name == "LlamaForCausalLM",
            qk_norm=family == "qwen3",
            initializer_range=self.number("initializer_range", 0.02, float),
            **self.token_ids(),
        )

    def refuse_windows(self, name: str) -> None:
        window = self.config.get("sliding_window")
        limit = self.config.get("max_position_embeddings")
        limit = 0 if limit is None else self.number("max_position_embeddings")
        kinds = self.config.get("layer_types") or ["full_attention"]
        if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
            raise self.fail(f"layer_types = {kinds!r}: expected a list of names, one for each layer")
        kinds = set(kinds)
        window = None if window is None else self.number("sliding_window")
        used = window is not None and window < limit
        if name.startswith("Qwen"):
            # Without layer_types, the layers from max_window_layers on slide.
            sliding = self.config.get("max_window_layers", 28)
            if not _is_finite(sliding):
                raise self.fail(f"max_window_layers = {sliding!r}: expected an integer")
            some = sliding < self.number("num_hidden_layers")
            some = some if self.config.get("layer_types") is None else kinds != {"full_attention"}
            used = used and some and self.flag("use_sliding_window", False)
        elif not name.startswith("Mistral"):
            used = False
        if used:
            raise self.fail(
                f"sliding_window = {window} is shorter than max_position_embeddings = {limit}: "
                "sliding-window attention is not supported (a checkpoint with sliding_window = null is)"
            )
        others = kinds - {"full_attention", "sliding_attention"}
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
        inner = _Reader(scaling, f"{self.where}: {key}")
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

    def gpt2(self, name: str) -> ModelConfig:
        for key, neutral in (("scale_attn_by_inverse_layer_idx", False), ("add_cross_attention", False)):
            if self.flag(key, neutral) is not neutral:
                raise self.fail(f"{key} = {not neutral} is not supported (only {neutral})")
        if not self.flag("scale_attn_weights", True):
            raise self.fail("scale_attn_weights = False is not supported (only True)")
        hidden, heads = self.number("n_embd"), self.number("n_head")
        if hidden % heads:
            raise self.fail(f"n_embd = {hidden} is not a multiple of n_head = {heads}")
        return ModelConfig(
            family="gpt2",
            architecture=name,
            vocab_size=self.number("vocab_size"),
            hidden_size=hidden,
            intermediate_size=self.number("n_inner", 4 * hidden),
            num_layers=self.number("n_layer"),
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=hidden // heads,
            max_positions=self.number("n_positions", 1024),
            norm_eps=self.number("layer_norm_epsilon", 1e-5, float),
            activation=self.activation("activation_function", "gelu_new"),
            tied=self.flag("tie_word_embeddings", True),
            qkv_bias=True,
            o_bias=True,
            mlp_bias=True,
            initializer_range=self.number("initializer_range", 0.02, float),
            **self.token_ids(),
        )


def _common_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    eos = list(config.eos_token_ids)
    return {
        "architectures": [config.architecture],
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied,
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": config.pad_token_id,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def _gpt2_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    return _common_to_hf(config, dtype) | {
        "model_type": "gpt2",
        "n_embd": config.hidden_size,
        "n_inner": config.intermediate_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_positions": config.max_positions,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": config.activation,
    }


def _decoder_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    rope, types = config.rope, {"MistralForCausalLM": "mistral"}
    scaling: dict[str, Any] = {"rope_type": rope.kind}
    if rope.kind != "default":
        scaling["factor"] = rope.factor
    if rope.kind == "llama3":
        scaling["low_freq_factor"] = rope.low_freq_factor
        scaling["high_freq_factor"] = rope.high_freq_factor
        scaling["original_max_position_embeddings"] = rope.original_max_positions
    return _common_to_hf(config, dtype) | {
        "model_type": types.get(config.architecture, config.family),
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": config.activation,
        "attention_bias": config.o_bias,
        "mlp_bias": config.mlp_bias,
        "sliding_window": None,
        "use_sliding_window": False,
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.kind == "default" else scaling,
        "rope_parameters": scaling | {"rope_theta": rope.theta},
    }
