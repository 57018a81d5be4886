"""LoRA adapters in the format of PEFT: adapter_config.json and adapter_model.safetensors.

PEFT stores lora_A [r, in] and lora_B [out, r] per layer, y = x W + scale (x A^T) B^T; we store lora_a [L, in,
r] and lora_b [L, r, out]. GPT-2 computes q, k and v with one linear layer c_attn, so PEFT has one A for the
three, while ours have one each. An adapter read from PEFT gives all three the same A and a third of B each:
exact. Writing is exact too: one A of rank r where the three coincide, otherwise the three A under one another
and a block-diagonal B, an adapter of rank 3 r for c_attn (rank_pattern, and alpha_pattern so that its scale
is unchanged), which is read back as it was.

Our layers all have one rank and one scale. What PEFT keeps apart (rank_pattern, alpha_pattern) is read without changing
the function: a module of smaller rank gets zero columns in A and zero rows in B, its scale goes into B, and a layer
that has none (layers_to_transform, layers_pattern, exclude_modules, target_modules that name some layers) gets zeros
in both. Where both are zero both gradients are, so what was absent stays absent in training and adds nothing to a
kernel. A scale in B is a change of parameters: gradients with respect to that module's B and A differ by that factor
from PEFT's.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntkjax.errors import CheckpointError
from ntkjax.files import written_folder
from ntkjax.job import is_primary
from ntkjax.models.families import family_of
from ntkjax.models.families.base import LARGEST
from ntkjax.models.files import write_json, write_tensors
from ntkjax.models.lm import LanguageModel
from ntkjax.models.load import read_json
from ntkjax.models.lora import LoraConfig
from ntkjax.models.names import every_module, layer_prefix, module_columns, modules
from ntkjax.models.safetensors_file import read_header
from ntkjax.parallel import spans_processes, spread, to_host
from ntkjax.types import Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_PREFIX = "base_model.model."
# Options that leave the mathematics of a stored adapter alone. Anything else that is set is refused.
_HARMLESS = (
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "use_rslora",
)
# Initialisations that do not move the base weights (pissa, olora, corda and loftq do).
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")

_REASONS = {
    "use_dora": "DoRA scales every column of W + A B by a vector of its own",
    "modules_to_save": "whole layers were trained beside the adapter",
    "trainable_token_indices": "rows of the embedding were trained beside the adapter",
    "target_parameters": "parameters of no linear layer are adapted, such as the fused experts of transformers 5, "
    "whose gate and up projections share one A",
    "lora_bias": "B has a bias",
    "layer_replication": "the model has other layers than its checkpoint",
}
_MERGE = (
    "merge it into its model where torch and peft are installed (AutoPeftModelForCausalLM.from_pretrained(DIR)"
    ".merge_and_unload().save_pretrained(NEW_DIR)) and give NEW_DIR as --model"
)

Factors = tuple[np.ndarray, np.ndarray]
"""A [L, in, r] and B [L, r, out] of one of our linear layers, or of one of PEFT's; [L, E, ...] of routed experts."""


def save_adapter(directory: str | Path, model: LanguageModel, params: Params) -> None:
    """Write the adapter in ``params`` (any subset of the tree; the rest of it is the model's) as a PEFT directory.

    ``lora_dropout`` is written as 0. The directory is replaced as a whole: nothing half-written stays. On a mesh over
    several processes all of them call it, and the first writes.

    Raises CheckpointError if the model has no adapter, if ``params`` changes a weight that an adapter cannot
    hold (use save_merged), or if a file cannot be written.
    """
    lora = _lora_of(model)
    _refuse_other_changes(model, params)
    ours = _factors(model.with_params(params).lora)
    if spans_processes(model.mesh) and not is_primary():
        return
    layers = layer_prefix(model.spec)
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    for module, names in modules(model.spec).items():
        if not any(name in ours for name in names):
            continue
        a, side_by_side = _fuse([ours.get(name) for name in names], _widths(model, names))
        b = np.empty_like(side_by_side)
        b[..., module_columns(model.spec, module)] = side_by_side
        ranks[module] = a.shape[-1]
        for layer, *expert in np.ndindex(a.shape[:-2]):
            key, index = f"{_PREFIX}{layers}.{layer}.{module.format(*expert)}", (layer, *expert)
            tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = a[index].T, b[index].T
    with written_folder(directory, keep=True, error=CheckpointError) as scratch:
        write_tensors(scratch / WEIGHTS, tensors)
        write_json(scratch / CONFIG, _peft_config(model, lora, ranks))


def load_adapter(directory: str | Path, model: LanguageModel) -> Params:
    """Read a PEFT directory as parameters of ``model``: every lora_a and lora_b of its tree, in its dtype.

    The model must have an adapter of at least its rank on the same layers (``adapter_lora_config`` reads it from
    the directory). Where alpha or the rank differs, the product stays the same: see the module.

    Raises CheckpointError naming the file, option or tensor: no adapter in the model, weights only in pickle
    form, another rank, a missing, unused or misshapen tensor, an option whose mathematics we do not have.
    """
    folder = Path(directory)
    lora, config = _lora_of(model), _read_config(folder)
    tensors = _read_tensors(folder)
    where, wanted = folder / WEIGHTS, _factors(model.lora)
    loaded: dict[str, Factors] = {}
    for module, names in modules(model.spec).items():
        targets = [name for name in names if name in wanted]
        if targets:
            a, b = _stack(tensors, model, module, config, lora, where)
            b = b[..., module_columns(model.spec, module)]
            parts = _split(a, b, names, targets, lora.rank, _widths(model, names), f"{where}: {module}")
            loaded.update(parts)
    if tensors:
        raise CheckpointError(
            f"{where}: tensor {min(tensors)!r} (and {len(tensors) - 1} more) has no place in the model's "
            f"adapter on {', '.join(wanted)}; load the model with lora=adapter_lora_config(directory)"
        )
    return _as_params(model.lora, loaded, where)


def adapter_lora_config(directory: str | Path) -> LoraConfig:
    """The LoraConfig to load a model with, so that ``load_adapter`` fits: rank, alpha and layers of a PEFT
    directory; the largest rank of its modules, and the alpha that gives it the scale of those no pattern names.

    Raises CheckpointError as ``load_adapter`` does for options and files that cannot be used.
    """
    folder = Path(directory)
    config = _read_config(folder)
    targets: set[str] = set()
    rank, known = 1, every_module()
    for key, tensor in (tensors := _read_tensors(folder)).items():
        match = re.fullmatch(r".*?\.\d+\.(\w+\.\w+(?:\.\d+\.\w+)?)\.lora_[AB]\.weight", key)
        names = known.get(re.sub(r"\.\d+\.", ".{}.", match[1])) if match else None
        if names is None:
            raise CheckpointError(
                f"{folder / WEIGHTS}: tensor {key!r} is of no linear layer that ntkjax adapts, so the adapter is not "
                f"supported; {_MERGE}"
            )
        targets.update(names)
        if key.endswith(".lora_B.weight") and tensor.ndim == 2:
            rank = max(rank, _rank_needed(tensor, len(names), config.rank))
    del tensors
    size = lambda r: math.sqrt(r) if config.rslora else r
    alpha = config.alpha if rank == config.rank else config.alpha * size(rank) / size(config.rank)
    return LoraConfig(rank, alpha, tuple(sorted(targets)), config.rslora)


def _rank_needed(b: np.ndarray, parts: int, rank: int) -> int:
    """The rank of each of ``parts`` layers that share B [out, r]: ``rank`` where B is block-diagonal (``_fuse``)."""
    if parts == 1 or b.shape[1] != parts * rank or b.shape[0] % parts:
        return b.shape[1]
    blocks = b.reshape(parts, b.shape[0] // parts, parts, rank)
    return b.shape[1] if any(blocks[i, :, j].any() for i in range(parts) for j in range(parts) if i != j) else rank


@dataclasses.dataclass(frozen=True)
class _PeftConfig:
    """What adapter_config.json says about scale and about which modules have an adapter; patterns are matched against a
    module's full name, as PEFT does.
    """

    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    layers: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    targets: str | tuple[str, ...]
    excluded: str | tuple[str, ...]

    def adapts(self, module: str) -> bool:
        """Whether the module of this full name, one of those that some layer adapts, has an adapter."""
        if self.excluded and _names(self.excluded, module):
            return False
        if self.targets and self.targets != "all-linear" and not _names(self.targets, module):
            return False
        if self.layers is None:
            return True
        match = next((m for pattern in self.layer_numbers() if (m := re.match(pattern, module))), None)
        return match is not None and int(match["layer"]) in self.layers

    def layer_numbers(self) -> list[str]:
        """Regular expressions whose group ``layer`` is the number of a module's layer."""
        # The first number of a name: a later one is that of an expert.
        return [rf".*?\.{name}\.(?P<layer>\d+)\." for name in self.layers_pattern or (r"[^.]*",)]

    def rank_of(self, module: str) -> int:
        return _by_pattern(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        rank = self.rank_of(module)
        return _by_pattern(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    return next((v for key, v in patterns.items() if re.match(_ends_in(key), module)), default)


def _ends_in(pattern: str) -> str:
    """The regular expression of PEFT for names that end in ``pattern``."""
    return rf"(.*\.)?({pattern})$"


def _names(modules: str | tuple[str, ...], module: str) -> bool:
    """Whether a regular expression or a list of (ends of) names holds the module."""
    if isinstance(modules, str):
        return re.fullmatch(modules, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in modules)


def _lora_of(model: LanguageModel) -> LoraConfig:
    if model.spec.lora is None:
        raise CheckpointError("the model was loaded without an adapter (lora=None): load it with a LoraConfig")
    return model.spec.lora


def _widths(model: LanguageModel, names: tuple[str, ...]) -> list[int]:
    """Output sizes of our linear layers ``names``."""
    return [model.config.linears[name][1] for name in names]


def _factors(lora: Params) -> dict[str, Factors]:
    """The adapter tree by layer name, on the host: {"attention/q": (A [L, in, r], B [L, r, out])}."""
    return {
        f"{group}/{name}": (to_host(node["lora_a"]), to_host(node["lora_b"]))
        for group, layers in lora["layers"].items()
        for name, node in layers.items()
    }


def _refuse_other_changes(model: LanguageModel, params: Params) -> None:
    whole = dict(jax.tree_util.tree_leaves_with_path(model.params))
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        if path[-1].key in ("lora_a", "lora_b") or value is whole.get(path):
            continue
        if path in whole and jnp.array_equal(value, whole[path]):
            continue
        name = "/".join(str(part.key) for part in path)
        raise CheckpointError(f"{name} was changed, and an adapter cannot hold it: write the model with save_merged")


def _fuse(parts: list[Factors | None], widths: list[int]) -> Factors:
    """One A and B for linear layers that share their input: outputs side by side."""
    if len(parts) == 1 and parts[0] is not None:
        return parts[0]
    present = [part for part in parts if part is not None]
    first = present[0][0]
    # Equal A, as PEFT itself trains fused layers: one A and the B side by side keep the rank.
    if len(present) == len(parts) and all(np.array_equal(a, first) for a, _ in present):
        return first, np.concatenate([b for _, b in present], axis=-1)
    # Different A: side by side too, each B in its own rows and columns, zeros elsewhere. The rank is their sum.
    a = np.concatenate([a for a, _ in present], axis=-1)
    b = np.zeros((a.shape[0], a.shape[-1], sum(widths)), present[0][1].dtype)
    row = column = 0
    for part, width in zip(parts, widths):
        if part is not None:
            rank = part[1].shape[1]
            b[:, row : row + rank, column : column + width] = part[1]
            row += rank
        column += width
    return a, b


def _split(
    a: np.ndarray,
    b: np.ndarray,
    names: tuple[str, ...],
    targets: list[str],
    rank: int,
    widths: list[int],
    where: str,
) -> dict[str, Factors]:
    """The inverse of ``_fuse``: one A and B for each of ``targets``; CheckpointError when the rank does not fit."""
    ends = np.cumsum(widths)
    columns = {name: slice(end - width, end) for name, end, width in zip(names, ends, widths)}
    for name in names:
        if name not in targets and b[..., columns[name]].any():
            raise CheckpointError(f"{where}: adapts {name}, where the model has no adapter: load it with that target")
    if a.shape[-1] <= rank:
        a, b = _padded(a, b, rank)
        return {name: (a, b[..., columns[name]]) for name in targets}
    rows = {name: slice(i * rank, (i + 1) * rank) for i, name in enumerate(targets)}
    blocks = {name: (a[..., rows[name]], b[..., rows[name], columns[name]]) for name in targets}
    # Only what was fused in blocks can be taken apart: B has no number outside them.
    in_blocks = sum(np.count_nonzero(block) for _, block in blocks.values()) == np.count_nonzero(b)
    if a.shape[-1] != rank * len(targets) or not in_blocks:
        raise CheckpointError(
            f"{where}: the adapter has rank {a.shape[-1]}, the model's has rank {rank}; load the model with "
            f"rank {a.shape[-1]} (--lora-rank {a.shape[-1]}), or give its directory as --adapter"
        )
    return blocks


def _padded(a: np.ndarray, b: np.ndarray, rank: int) -> Factors:
    """A [..., in, r] and B [..., r, out] with zeros up to ``rank``: the product is the same."""
    more = rank - a.shape[-1]
    front = [(0, 0)] * (a.ndim - 2)
    return np.pad(a, [*front, (0, 0), (0, more)]), np.pad(b, [*front, (0, more), (0, 0)])


def _stack(
    tensors: dict[str, np.ndarray],
    model: LanguageModel,
    module: str,
    config: _PeftConfig,
    lora: LoraConfig,
    where: Path,
) -> Factors:
    """Take one module's tensors of all layers (and experts) out of ``tensors``: A [L, in, r], B [L, r, out] at the
    model's scale, r the largest of its layers; zeros where the directory adapts other layers only.
    """
    names = modules(model.spec)[module]
    inputs, outputs = model.config.linears[names[0]][0], sum(_widths(model, names))
    stacked: list[Factors | None] = []
    stack = (model.config.num_layers, *[model.config.num_experts] * module.count("{}"))
    for layer, *expert in np.ndindex(*stack):
        full = f"{layer_prefix(model.spec)}.{layer}.{module.format(*expert)}"
        keys = [f"{_PREFIX}{full}.lora_{part}.weight" for part in "AB"]
        if not config.adapts(full) and not any(key in tensors for key in keys):
            stacked.append(None)
            continue
        rank = config.rank_of(full)
        a = _take(tensors, keys[0], (rank, inputs), where)
        b = _take(tensors, keys[1], (outputs, rank), where)
        # Modules may have scales of their own, our model has one: the quotient goes into B.
        factor = config.scale_of(full) / lora.scale
        stacked.append((a.T, b.T if factor == 1 else b.T * b.dtype.type(factor)))
    present = [part for part in stacked if part is not None]
    rank = max((a.shape[1] for a, _ in present), default=1)
    dtype = np.result_type(np.float32, *(x for part in present for x in part))
    none = np.zeros((inputs, rank), dtype), np.zeros((rank, outputs), dtype)
    whole = [none if part is None else _padded(*part, rank) for part in stacked]
    joined = lambda parts: np.stack(parts).reshape(*stack, *parts[0].shape)
    return joined([a for a, _ in whole]), joined([b for _, b in whole])


def _take(tensors: dict[str, np.ndarray], key: str, shape: tuple[int, int], where: Path) -> np.ndarray:
    if key not in tensors:
        raise CheckpointError(
            f"{where}: tensor {key!r} is missing, although the model has an adapter there and {CONFIG} names "
            "the layer: save the adapter again with PEFT, or load the model with lora=adapter_lora_config(directory), "
            "whose layers are the directory's"
        )
    if tensors[key].shape != shape:
        raise CheckpointError(f"{where}: tensor {key!r} has shape {tensors[key].shape}, expected {shape}")
    tensor = tensors.pop(key)
    return tensor.astype(np.promote_types(tensor.dtype, np.float32))


def _as_params(lora: Params, loaded: dict[str, Factors], where: Path) -> Params:
    """``loaded`` in the structure, dtype and placement of the model's adapter."""

    def leaf(path: tuple[Any, ...], old: Any) -> jax.Array:
        a, b = loaded["/".join(part.key for part in path[1:-1])]
        new = a if path[-1].key == "lora_a" else b
        if not np.isfinite(new).all():
            raise CheckpointError(f"{where}: the adapter of {path[1].key}/{path[2].key} has values that are not finite")
        new = new.astype(old.dtype)
        return spread(new, old.sharding) if isinstance(old, jax.Array) else jax.device_put(new)

    return jax.tree_util.tree_map_with_path(leaf, lora)


def _peft_config(model: LanguageModel, lora: LoraConfig, ranks: dict[str, int]) -> dict[str, Any]:
    ends = [module.split(".")[-1] for module in modules(model.spec)]
    unique = len(set(ends)) == len(ends)  # GPT-2 has two modules c_proj
    wider = {module: rank for module, rank in ranks.items() if rank != lora.rank}
    size = lambda rank: math.sqrt(rank) if lora.rslora else rank
    plain = lambda x: int(x) if x == int(x) else x
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.report.name or None,
        "r": lora.rank,
        "lora_alpha": plain(lora.alpha),
        "use_rslora": lora.rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": family_of(model.config.family).conv1d,
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": [module.split(".")[-1] if unique else module for module in ranks],
        "rank_pattern": wider,
        "alpha_pattern": {module: plain(lora.scale * size(rank)) for module, rank in wider.items()},
        "modules_to_save": None,
        "use_dora": False,
    }


def _read_config(folder: Path) -> _PeftConfig:
    file = folder / CONFIG
    model = (folder / "config.json").is_file() and not file.is_file()
    config = read_json(
        file, "a model is there: give it as --model" if model else "every PEFT adapter directory has one"
    )
    fail = lambda text: CheckpointError(f"{file}: {text}")
    if config.get("peft_type") != "LORA":
        raise fail(f"peft_type = {config.get('peft_type')!r} is not supported, only 'LORA'; {_MERGE}")
    if config.get("bias", "none") != "none":
        raise fail(f"bias = {config['bias']!r} is not supported, only 'none': biases were trained too; {_MERGE}")
    if config.get("init_lora_weights") not in _PLAIN_INITS:
        raise fail(
            f"init_lora_weights = {config['init_lora_weights']!r} is not supported, it moves the base weights: convert "
            "the adapter with PEFT first (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for key, value in config.items():
        if key not in _HARMLESS and value and key != "megatron_config":
            why = f" ({_REASONS[key]})" if key in _REASONS else ""
            raise fail(f"{key} = {value!r} is not supported{why}; {_MERGE}")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    wrong = fail(f"r = {rank!r}, lora_alpha = {alpha!r}: expected a positive integer and a number")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 0 < rank <= LARGEST:
        raise wrong
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not abs(alpha) <= LARGEST:
        raise wrong
    layers = config.get("layers_to_transform")

    def listed(key: str) -> str | tuple[str, ...]:
        value = config.get(key) or ()
        if isinstance(value, str):
            return value
        if not all(isinstance(name, str) for name in value):
            raise TypeError(f"{key} = {value!r}")
        return tuple(value)

    try:
        pattern = listed("layers_pattern")
        adapter = _PeftConfig(
            rank,
            float(alpha),
            bool(config.get("use_rslora")),
            {key: int(value) for key, value in (config.get("rank_pattern") or {}).items()},
            {key: float(value) for key, value in (config.get("alpha_pattern") or {}).items()},
            None
            if layers is None or layers == []
            else tuple(map(int, [layers] if isinstance(layers, int) else layers)),
            (pattern,) if isinstance(pattern, str) else pattern,
            listed("target_modules"),
            listed("exclude_modules"),
        )
        regular = [names for names in (adapter.targets, adapter.excluded) if isinstance(names, str)]
        for expression in (
            *regular,
            *adapter.layer_numbers(),
            *map(_ends_in, (*adapter.rank_pattern, *adapter.alpha_pattern)),
        ):
            re.compile(expression)
        if not all(abs(value) <= LARGEST for value in adapter.alpha_pattern.values()):
            raise ValueError(f"alpha_pattern = {config['alpha_pattern']!r}")
    except (AttributeError, OverflowError, RecursionError, TypeError, ValueError, re.error) as error:
        names = "rank_pattern, alpha_pattern, layers_to_transform, layers_pattern, target_modules and exclude_modules"
        raise fail(
            f"{names} cannot be read: {error}; expected what PEFT writes: save the adapter again with it"
        ) from None
    if (least := min([rank, *adapter.rank_pattern.values()])) < 1:
        raise fail(f"rank_pattern holds rank {least}: expected positive integers")
    return adapter


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    file = folder / WEIGHTS
    if file.exists():
        return {name: info.read() for name, info in read_header(file).items()}
    pickled = (folder / "adapter_model.bin").exists()
    hint = (
        " (adapter_model.bin is a pickle, which can run code and is not read: save it again with PEFT)"
        if pickled
        else ""
    )
    raise CheckpointError(f"{file}: missing{hint}")
