"""Where each parameter lies in a Hugging Face checkpoint: tensor names, transposition, fused tensors, PEFT modules.

All follow from what a family declares (`ntkjax.models.families.base.Family`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

from ntkjax.models.config import ModelConfig
from ntkjax.models.families import FAMILIES, family_of
from ntkjax.models.families.base import Family
from ntkjax.models.functions import param_shapes
from ntkjax.models.layers import ModelSpec
from ntkjax.models.quantised import is_scale


@dataclasses.dataclass(frozen=True)
class Share:
    """A parameter's part of a tensor's outputs.

    The outputs (the last axis, or the first where the checkpoint holds [out, in]) are ``groups`` runs of equal length;
    of each, the parameter has ``width`` from ``start`` on. ``total`` is their number in all.
    """

    start: int
    width: int
    total: int
    groups: int = 1

    def columns(self) -> Int[np.ndarray, " outputs"]:
        """Places of the parameter's outputs in the tensor, in order."""
        run = np.arange(self.start, self.start + self.width)
        return (np.arange(self.groups)[:, None] * (self.total // self.groups) + run[None]).reshape(-1)


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a parameter comes from.

    Attributes:
      name: tensor name, with "{}" for each axis that the parameter is stacked over: the layer, and the expert.
      transpose: the checkpoint holds [out, in] where the parameter is [in, out].
      share: its part of the tensor's outputs where several parameters share it (fused q, k, v); None: all of it.
      stack: the lengths of the axes that it is stacked over: (), (layers,) or (layers, experts).
    """

    name: str
    transpose: bool = False
    share: Share | None = None
    stack: tuple[int, ...] = ()

    def names(self) -> dict[tuple[int, ...], str]:
        """The tensor at each place of the stack: (3,) -> "model.layers.3.input_layernorm.weight"."""
        return {index: self.name.format(*index) for index in np.ndindex(*self.stack)}


def sources(spec: ModelSpec) -> dict[str, Source]:
    """For each parameter path but those of adapters and scales, where it lies in a checkpoint of this architecture."""
    family, flat = family_of(spec.config.family), {}
    shares = _shares(family, spec.config, spec.linears())
    for path, shape in _leaves(param_shapes(spec)).items():
        stem, leaf = path.rsplit("/", 1)
        if leaf in ("lora_a", "lora_b") or is_scale(path):
            continue
        linear = path.startswith("layers/") and leaf == "kernel"
        name = f"{family.tensors.get(path) or family.tensors[stem]}.{'bias' if leaf == 'bias' else 'weight'}"
        flat[path] = Source(name, linear and not family.conv1d, shares.get(stem), shape[: name.count("{}")])
    return flat


def _shares(family: Family, config: ModelConfig, linears: tuple[str, ...]) -> dict[str, Share]:
    """The part of each linear layer that shares its tensor with others."""
    shares: dict[str, Share] = {}
    for names in _by_module(family, linears).values():
        widths = [config.linears[name][1] for name in names]
        groups = config.num_kv_heads if family.fused_by_head else 1
        total, start = sum(widths), 0
        for name, width in zip(names, widths) if len(names) > 1 else ():
            shares[f"layers/{name}"] = Share(start, width // groups, total, groups)
            start += width // groups
    return shares


def _by_module(family: Family, linears: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """A block's tensors, "model.layers.{}.mlp.up_proj", and the linear layers in each, in the block's order."""
    names_of: dict[str, tuple[str, ...]] = {}
    for name in linears:
        tensor = family.tensors[f"layers/{name}"]
        names_of[tensor] = (*names_of.get(tensor, ()), name)
    return names_of


def modules(spec: ModelSpec) -> dict[str, tuple[str, ...]]:
    """PEFT's modules of a layer, "self_attn.q_proj" or with "{}" for the expert "mlp.experts.{}.up_proj", and the
    linear layers that each holds side by side.
    """
    by_tensor = _by_module(family_of(spec.config.family), spec.linears())
    return {_module(tensor): names for tensor, names in by_tensor.items()}


def every_module() -> Mapping[str, tuple[str, ...]]:
    """As ``modules``, of all families."""
    every: dict[str, tuple[str, ...]] = {}
    for family in FAMILIES.values():
        linears = tuple(
            path.removeprefix("layers/")
            for path in family.tensors
            if path.startswith(("layers/attention/", "layers/mlp/")) and not path.endswith("_norm")
        )
        every |= {_module(tensor): names for tensor, names in _by_module(family, linears).items()}
    return every


def module_columns(spec: ModelSpec, module: str) -> Int[np.ndarray, " outputs"]:
    """Places in a module's outputs of its linear layers' outputs, these one after the other."""
    shares = _shares(family_of(spec.config.family), spec.config, spec.linears())
    names = modules(spec)[module]
    if len(names) == 1:
        return np.arange(spec.config.linears[names[0]][1])
    return np.concatenate([shares[f"layers/{name}"].columns() for name in names])


def layer_prefix(spec: ModelSpec) -> str:
    """What stands before the number of a layer: "model.layers"."""
    return family_of(spec.config.family).tensors["layers/attention/o"].split(".{}.")[0]


def _module(tensor: str) -> str:
    return tensor.split(".{}.", 1)[1]


def is_buffer(spec: ModelSpec, name: str) -> bool:
    """True for tensors that are saved but not learned: inverse frequencies, causal masks."""
    return any(re.search(pattern, name) for pattern in family_of(spec.config.family).buffers)


def _leaves(tree: dict, where: str = "") -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, value in tree.items():
        shapes |= _leaves(value, f"{where}{name}/") if isinstance(value, dict) else {where + name: value.shape}
    return shapes
