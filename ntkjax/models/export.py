"""Models in Hugging Face format, adapters merged: config.json, safetensors, tokenizer and generation settings."""

from __future__ import annotations

import collections
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from ntkjax.errors import CheckpointError, ConfigError
from ntkjax.files import written_folder
from ntkjax.job import is_primary
from ntkjax.models.files import write_checkpoint, write_json
from ntkjax.models.lm import LanguageModel, paths
from ntkjax.models.names import Source, sources
from ntkjax.models.quantised import restored, scale_path
from ntkjax.parallel import spans_processes, to_host
from ntkjax.types import Params

_STALE = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")


def save_merged(
    directory: str | Path, model: LanguageModel, params: Params, *, max_shard_size: int = 5_000_000_000
) -> None:
    """Write ``model`` with ``params`` (any subset of its tree) as a directory that torch and ``load_lm`` read.

    Adapters are added to their kernels, W + scale A B, in float32 or better, and every tensor is cast to the
    model's dtype (kernels held in 8 or 4 bits: to that of the rest). Weights go to model.safetensors, or to
    shards of at most ``max_shard_size`` bytes and an index. config.json keeps what the model was loaded from
    and is read by transformers v4 and v5. Tokenizer files, and generation_config.json where the source
    directory has one, are written too. The host holds one shard at a time. On a mesh over several processes
    all of them call it, and the first writes.

    Raises CheckpointError naming the file that cannot be written; nothing half-written is left then.
    """
    if max_shard_size < 1:
        raise ConfigError(f"max_shard_size = {max_shard_size}: expected a number of bytes")
    leaves, pieces = paths(model.with_params(params).params), _pieces(model)
    sizes = {name: _size(model, leaves, parts) for name, parts in pieces.items()}
    tensor = lambda name: _tensor(model, leaves, name, pieces[name])
    if spans_processes(model.mesh) and not is_primary():
        for name in sizes:  # the first process gathers them in this order, with the help of all
            tensor(name)
        return
    with written_folder(directory, keep=True, stale=_STALE, error=CheckpointError) as scratch:
        write_checkpoint(scratch, sizes, tensor, max_shard_size)
        write_json(scratch / "config.json", _config(model))
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(str(scratch))
        generation = Path(model.report.source) / "generation_config.json"
        if model.report.source and generation.is_file():
            shutil.copyfile(generation, scratch / generation.name)


Piece = tuple[str, Source, tuple[int, ...]]
"""A parameter's path, where it lies in the checkpoint, and its place in the stack of layers and experts."""


def _pieces(model: LanguageModel) -> dict[str, list[Piece]]:
    """Tensor name -> the parameters that it is made of (more than one where layers are fused)."""
    pieces: dict[str, list[Piece]] = collections.defaultdict(list)
    for path, source in sources(model.spec).items():
        for index, name in source.names().items():
            pieces[name].append((path, source, index))
    return dict(pieces)


def _size(model: LanguageModel, leaves: dict[str, Any], parts: list[Piece]) -> int:
    """Bytes of one tensor in the file."""
    counts = (leaves[path].size // math.prod(source.stack) for path, source, _ in parts)
    return sum(counts) * np.dtype(_dtype(model)).itemsize


def _dtype(model: LanguageModel) -> Any:
    return model.params["embed"]["weight"].dtype


def _tensor(model: LanguageModel, leaves: dict[str, Any], name: str, parts: list[Piece]) -> np.ndarray:
    """One tensor of the checkpoint, on the host, in the model's dtype."""
    values = [_merged(model, leaves, path, index).astype(_dtype(model)) for path, _, index in parts]
    whole, transpose = values[0], parts[0][1].transpose
    if (share := parts[0][1].share) is not None:
        whole = np.zeros((*whole.shape[:-1], share.total), whole.dtype)
        for (_, source, _), value in zip(parts, values):
            assert source.share is not None
            whole[..., source.share.columns()] = value
    return whole.T if transpose else whole


def _merged(model: LanguageModel, leaves: dict[str, Any], path: str, index: tuple[int, ...]) -> np.ndarray:
    """A parameter (at one place of its stack), its adapter added in float32 or better.

    On the host: accelerators may take float32 products at less than float32 precision.
    """
    take = lambda path: to_host(leaves[path][index])
    branch = path.rsplit("/", 1)[0]
    if scale_path(path) in leaves:
        assert model.spec.quantised is not None
        value = to_host(restored(leaves[path][index], leaves[scale_path(path)][index], model.spec.quantised))
    else:
        value = take(path)
    if not path.endswith("/kernel") or f"{branch}/lora_a" not in leaves or model.lora_config is None:
        return value
    wide = np.promote_types(leaves[f"{branch}/lora_a"].dtype, np.float32)
    a, b = take(f"{branch}/lora_a").astype(wide), take(f"{branch}/lora_b").astype(wide)
    return value.astype(wide) + wide.type(model.lora_config.scale) * (a @ b)


def _config(model: LanguageModel) -> dict[str, Any]:
    """The source's config.json, completed so that transformers v4 and v5 both read it, with the dtype written."""
    dtype = str(_dtype(model))
    own = {key: value for key, value in (model.hf_config or {}).items() if value is not None}
    return model.config.to_hf(dtype) | own | {"dtype": dtype, "torch_dtype": dtype}
