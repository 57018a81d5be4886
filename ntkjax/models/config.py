"""The shape of a decoder, read from a Hugging Face ``config.json`` (transformers v4 or v5 style) or written
by hand. What differs from one family to the next stands in `ntkjax.models.families`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from ntkjax.errors import CheckpointError
from ntkjax.models.families import FAMILIES, family_of
from ntkjax.models.families.base import (
    ACTIVATIONS,
    LOCAL,
    MAX_LAYERS,
    LayerSpec,
    ModelShape,
    Reader,
    RopeConfig,
    common_keys,
)
from ntkjax.parallel import Split

__all__ = ["DTYPES", "LayerSpec", "ModelConfig", "RopeConfig"]

DTYPES = ("float32", "bfloat16", "float16", "float64")

# What may differ between the layers of one model.
_BY_LAYER = ("rope", "window")


@dataclasses.dataclass(frozen=True)
class ModelConfig(ModelShape):
    """Shape of a causal decoder, checked; hashable, so it is part of a compiled function's identity.

    The fields are those of `ntkjax.models.families.base.ModelShape`. Raises CheckpointError for a shape that no
    checkpoint of its family could hold, or that is not implemented.
    """

    def __post_init__(self) -> None:
        family = family_of(self.family)
        if not 0 < self.num_layers <= MAX_LAYERS:
            raise CheckpointError(f"{self.num_layers} layers: expected 1 to {MAX_LAYERS}; mend the number of layers")
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"num_attention_heads = {self.num_heads} is not a multiple of num_key_value_heads = "
                f"{self.num_kv_heads}: query heads share key/value heads in equal groups"
            )
        if self.activation not in ACTIVATIONS:
            raise CheckpointError(
                f"activation {self.activation!r} is not supported; supported: {', '.join(ACTIVATIONS)}"
            )
        for name, value in family.fixed.items():
            if getattr(self, name) != value:
                raise CheckpointError(
                    f"{name} = {getattr(self, name)} with family {self.family!r}: every model of this family has "
                    f"{name} = {value}, so no checkpoint could hold this one; set it accordingly"
                )
        if not self.architecture:
            object.__setattr__(self, "architecture", next(iter(family.architectures)))
        self._check_layers()
        self._check_experts()

    def _check_experts(self) -> None:
        routed = self.block.mlp == "experts"
        if not routed and self.num_experts:
            raise CheckpointError(
                f"num_experts = {self.num_experts} with family {self.family!r}, which has no experts: leave it out"
            )
        if routed and not 1 <= self.experts_per_token <= self.num_experts:
            raise CheckpointError(
                f"experts_per_token = {self.experts_per_token} with num_experts = {self.num_experts}: a token goes to "
                "one expert at least, and to no more than there are"
            )

    def _check_layers(self) -> None:
        if self.layer_types and len(self.layer_types) != self.num_layers:
            raise CheckpointError(
                f"layer_types has {len(self.layer_types)} entries for {self.num_layers} layers: expected one for each"
            )
        if unknown := set(self.layer_types) - {"full_attention", LOCAL}:
            raise CheckpointError(f"layer_types {sorted(unknown)}: expected 'full_attention' or {LOCAL!r}")
        if self.window is not None and self.window < 1:
            raise CheckpointError(f"window = {self.window}: expected a positive number of tokens, or none")
        layers = self.layers
        for layer in layers:
            if dataclasses.replace(layer, **{name: getattr(layers[0], name) for name in _BY_LAYER}) != layers[0]:
                raise CheckpointError(f"layers differ in more than {' and '.join(_BY_LAYER)}: {layer} and {layers[0]}")
        for dims in self.rotary_dims:
            if dims % 2:
                head = "head_dim" if dims == self.head_dim else "the rotated part of head_dim"
                raise CheckpointError(f"{head} = {dims} is odd: rotary positions rotate pairs")
        if any(not 0 <= index < self.num_layers for index in self.unrotated):
            raise CheckpointError(
                f"unrotated = {self.unrotated}: expected numbers of layers, 0 to {self.num_layers - 1}"
            )
        for rope in (layer.rope for layer in layers if layer.rope is not None and layer.rope.kind == "longrope"):
            count = rope.dims(self.head_dim) // 2
            for name, factors in (("short_factor", rope.short_factors), ("long_factor", rope.long_factors)):
                if len(factors) != count:
                    raise CheckpointError(
                        f"{name} has {len(factors)} numbers: expected {count}, one for each frequency"
                    )
        if len(self.rotary_dims) > 1:
            raise CheckpointError(f"layers rotate {self.rotary_dims} dimensions of a head: expected one number for all")

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """Every layer of the decoder, from the first."""
        return _layers(self)

    @property
    def block(self) -> LayerSpec:
        """What all layers have in common (``rope`` and ``window`` are the first layer's)."""
        return self.layers[0]

    @property
    def linears(self) -> dict[str, tuple[int, int, bool]]:
        """The linear layers of a block, "attention/q", ..., "mlp/down": inputs, outputs, whether it has a bias.

        With routed experts those of the MLP but the router are stacked: there is one of each for every expert.
        """
        query, kv, width, inner = self.num_heads, self.num_kv_heads, self.hidden_size, self.intermediate_size
        block = self.block
        shapes = {
            "attention/q": (width, query * self.head_dim, block.qkv_bias),
            "attention/k": (width, kv * self.head_dim, block.qkv_bias),
            "attention/v": (width, kv * self.head_dim, block.qkv_bias),
            "attention/o": (query * self.head_dim, width, block.o_bias),
        }
        if block.mlp == "experts":
            shapes["mlp/router"] = (width, self.num_experts, False)
        if block.mlp != "plain":
            shapes["mlp/gate"] = (width, inner, block.mlp_bias)
        return shapes | {"mlp/up": (width, inner, block.mlp_bias), "mlp/down": (inner, width, block.mlp_bias)}

    @property
    def rotary_dims(self) -> tuple[int, ...]:
        """The numbers of dimensions of a head that layers with rotary positions rotate, each once: one or none."""
        ropes = [layer.rope for layer in self.layers if layer.rope is not None]
        return tuple(dict.fromkeys(rope.dims(self.head_dim) for rope in ropes))

    @property
    def learned_positions(self) -> bool:
        """Whether positions are a learned table of ``max_positions`` rows."""
        return family_of(self.family).learned_positions

    @property
    def position_limit(self) -> int | None:
        """The longest sequence that the model can take: ``max_positions`` where positions are learned, else None."""
        return self.max_positions if self.learned_positions else None

    @property
    def turns_by_length(self) -> bool:
        """Whether rotary frequencies depend on how many tokens a sequence has (RopeConfig: longrope, dynamic)."""
        return any(rope.kind in ("longrope", "dynamic") for rope in _ropes(self))

    def same_turns_until(self, length: int) -> int | None:
        """The longest sequence whose rotary frequencies are those of one of ``length`` tokens; None for any longer one.

        Up to original_max_positions longrope has one set of frequencies, beyond it another. Dynamic ones are the same
        up to max_positions, and differ for every length beyond.
        """
        ends = []
        for rope in _ropes(self):
            if rope.kind == "longrope" and length <= rope.original_max_positions:
                ends.append(rope.original_max_positions)
            if rope.kind == "dynamic":
                ends.append(max(length, self.max_positions))
        return min(ends, default=None)

    @property
    def embed_scale(self) -> float | None:
        """What embeddings are multiplied by; None for nothing."""
        scale = family_of(self.family).embed_scale
        return None if scale is None else scale(self)

    def split(self, path: str) -> Split:
        """How the parameter at ``path`` ("layers/attention/q/kernel") is split over a device mesh."""
        return family_of(self.family).split(path)

    def settings(self) -> dict[str, Any]:
        """The fields as a dictionary, to take a digest of: those added after the first release only where they are
        set, so that the digests of older runs hold."""
        return _settings(self)

    @classmethod
    def from_hf(cls, config: dict[str, Any], where: str = "config.json") -> ModelConfig:
        """Read a Hugging Face configuration. ``where`` names the file in errors.

        Raises CheckpointError naming the key for an unknown architecture, rope type or activation, and for
        any option that would change the mathematics and is not implemented.
        """
        if not isinstance(config, dict):
            raise CheckpointError(f"{where}: expected a JSON object, found {type(config).__name__}")
        by_name = {name: family for family in FAMILIES.values() for name in family.architectures}
        by_type = {kind: name for family in FAMILIES.values() for name, kind in family.architectures.items()}
        names = config.get("architectures") or [by_type.get(kind := str(config.get("model_type")), kind)]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise CheckpointError(f"{where}: architectures = {names!r}: expected a list of class names")
        reader = Reader(config, where, names[0])
        for family in FAMILIES.values():
            if names[0] in family.refused:
                raise reader.fail(f"architecture {names[0]!r} is not supported: {family.refused[names[0]]}")
        if names[0] not in by_name:
            raise reader.fail(f"architecture {names[0]!r} is not supported; supported: {', '.join(by_name)}")
        if config.get("quantization_config"):
            raise reader.fail("quantization_config is set: quantised weights are not supported; use the original")
        shape = vars(by_name[names[0]].read(reader))
        try:
            return cls(**shape)
        except CheckpointError as error:
            raise reader.fail(str(error)) from None

    def to_hf(self, dtype: str = "float32") -> dict[str, Any]:
        """A ``config.json`` that transformers v4 and v5 both read, and that ``from_hf`` reads back to this
        object.
        """
        family = family_of(self.family)
        return common_keys(self, family, dtype) | family.write(self)


@functools.lru_cache(maxsize=256)
def _layers(config: ModelConfig) -> tuple[LayerSpec, ...]:
    family = family_of(config.family)
    return tuple(family.layer(config, i) for i in range(config.num_layers))


def _ropes(config: ModelConfig) -> tuple[RopeConfig, ...]:
    return tuple(dict.fromkeys(layer.rope for layer in config.layers if layer.rope is not None))


def _settings(value: Any) -> dict[str, Any]:
    settings = {}
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if not field.metadata.get("later") or item != field.default:
            settings[field.name] = _settings(item) if dataclasses.is_dataclass(item) else item
    return settings
