"""Language models from Hugging Face directories: config.json, safetensors (one file or shards), tokenizer files."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from ntkjax.errors import CheckpointError, UserError
from ntkjax.job import everyone, process
from ntkjax.models.attention import resolve
from ntkjax.models.config import ModelConfig
from ntkjax.models.families import family_of
from ntkjax.models.families.base import read_token_ids
from ntkjax.models.functions import param_shapes
from ntkjax.models.layers import ModelSpec
from ntkjax.models.lm import LanguageModel, LoadReport, check_dtype, init_leaf, paths, unflatten
from ntkjax.models.lora import LoraConfig
from ntkjax.models.names import Source, is_buffer, sources
from ntkjax.models.quantised import is_scale, quantised, scale_path
from ntkjax.models.real import DIRECTORIES, real_directory
from ntkjax.models.safetensors_file import TensorInfo, read_header
from ntkjax.parallel import put, spans_processes, weight_sharding, weights_over_rows

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
_SETTINGS = "tokenizer_config.json"
_NEEDED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
_FILE_DTYPES = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def load_lm(
    path: str | Path,
    *,
    lora: LoraConfig | None = LoraConfig(),
    dtype: str = "float32",
    mesh: Mesh | None = None,
    remat: bool = False,
    seed: int = 0,
    attention: str = "auto",
    weights: str = "tensor",
) -> LanguageModel:
    """Load a causal language model from a directory in Hugging Face format, from the hub by id, or the one named
    ``real`` (`ntkjax.models.real`).

    Each tensor is read, sent to its device (spread by ``parallel.weight_sharding`` where there is a mesh) and
    cast to ``dtype`` there before the next is read: the host never holds more than one. Of a tensor that is spread only
    the parts of this process's devices are read (``report.bytes_read``). ``lora`` adds a fresh
    adapter (B = 0, so the function is unchanged) drawn from ``seed``; None adds none.

    Args:
      dtype: "float32", "bfloat16", "float16", "float64" (with x64 on), or "auto": the one config.json names,
        else the file's most common. Norm scales and adapters are kept in float32 or better. "int8" or "nf4": the
        kernels of the blocks are held in 8 or 4 bits (`ntkjax.models.quantised`), all else in bfloat16.
      attention: one of `ntkjax.models.attention.IMPLEMENTATIONS`.
      weights: "tensor" or "fully-sharded", how they are spread over ``mesh``: see ``parallel.weight_sharding``.

    Raises CheckpointError naming the file, key or tensor that is missing, unused, misshapen or unsupported,
    UserError where a hub id cannot be fetched, ConfigError for an unknown dtype or LoRA target.
    """
    directory = find_directory(path)
    _refuse_adapter(directory)
    hf_config = read_json(directory / "config.json", "every model directory in Hugging Face format has one")
    config = read_config(directory, hf_config)
    tensors = find_tensors(directory)
    if config.num_layers * max(1, config.num_experts) > len(tensors):  # before anything is made for each of them
        experts = f" of {config.num_experts} experts" if config.num_experts else ""
        raise CheckpointError(
            f"{directory}: config.json asks for {config.num_layers} layers{experts}: there are only {len(tensors)} "
            "tensors"
        )
    floating, held = _resolve_dtype(dtype, hf_config, tensors)
    spec = ModelSpec(
        config,
        lora,
        floating,
        remat,
        resolve(attention, mesh),
        quantised=held,
        gathered_on=weights_over_rows(mesh, weights),
    )
    if lora is not None:
        lora.matches(spec.linears())
    params, report = _load_params(spec, Reading(tensors, mesh, weights), str(directory), seed)
    tokenizer = load_tokenizer(directory, config)
    here = Path(path).expanduser().is_dir() or str(path) in DIRECTORIES
    report = dataclasses.replace(report, name=str(directory.resolve()) if here else str(path))
    return LanguageModel(spec, params, tokenizer, mesh, hf_config, report)


def read_config(directory: Path, hf_config: dict[str, Any] | None = None) -> ModelConfig:
    """The configuration of a model directory: config.json (``hf_config``, where it is read already), and as its end
    tokens also those of generation_config.json, where there is one.

    Raises CheckpointError naming the file and the key.
    """
    file, generation = directory / "config.json", directory / "generation_config.json"
    if hf_config is None:
        hf_config = read_json(file, "every model directory in Hugging Face format has one")
    config = ModelConfig.from_hf(hf_config, str(file))
    ends = read_token_ids(read_json(generation, ""), "eos_token_id", str(generation)) if generation.is_file() else ()
    return dataclasses.replace(config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *ends))))


def find_directory(path: str | Path) -> Path:
    """The local directory of a model: ``path`` itself, that of a model that has a name (`ntkjax.models.real`), or
    where it is a hub id the one that it is downloaded to."""
    local, text = Path(path).expanduser(), str(path)
    if not text:  # else the current directory
        raise CheckpointError(
            "the path of the model is empty; expected a directory or hub id; check where it comes from"
        )
    try:
        if local.is_dir():
            return local
    except OSError as error:  # a name that is too long, a link to itself
        raise CheckpointError(f"{path}: not a usable path ({error.strerror}); expected a model directory") from error
    if text in DIRECTORIES and not local.exists():
        return real_directory(text)
    if local.exists() or text.startswith((".", "/", "~")) or text.count("/") > 1:
        what = "is a file" if local.exists() else "does not exist"
        raise CheckpointError(f"{path}: {what}; expected a model directory with config.json and model.safetensors")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, allow_patterns=_NEEDED))
    except Exception as error:  # the hub client raises its own, urllib's and its HTTP library's errors
        raise UserError(
            f"{text!r} is not a directory here and could not be fetched from the hub "
            f"({type(error).__name__}): check the name, connect (unset HF_HUB_OFFLINE), or download it "
            "elsewhere and give the directory's path"
        ) from error


def _refuse_adapter(directory: Path) -> None:
    """CheckpointError where a directory holds an adapter and no model."""
    file = directory / "adapter_config.json"
    weights = ("config.json", "model.safetensors"), ("config.json", "model.safetensors.index.json")
    if not file.is_file() or any(all((directory / name).is_file() for name in names) for names in weights):
        return
    base = read_json(file, "").get("base_model_name_or_path")
    named = f"the model that it was trained on ({base!r}, says {file.name})" if base else "the model it was trained on"
    raise CheckpointError(
        f"{directory}: holds a PEFT adapter ({file.name}) and no model; expected a directory with config.json and "
        f"model.safetensors: give {named} as --model and this directory as --adapter"
    )


def read_json(path: Path, hint: str) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError where it is missing or malformed."""
    if not path.is_file():
        raise CheckpointError(f"{path}: missing ({hint})")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def find_tensors(directory: Path) -> dict[str, TensorInfo]:
    """Every tensor of a checkpoint by name: from model.safetensors, or from the shards its index names."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return read_header(single)
    if not index.is_file():
        pickles = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        if pickles:
            raise CheckpointError(
                f"{directory}: only pickled weights ({', '.join(pickles)}): pickles can run code and are "
                "not read. Convert once where torch is installed: AutoModelForCausalLM.from_pretrained(DIR)"
                ".save_pretrained(NEW_DIR, safe_serialization=True)"
            )
        raise CheckpointError(f"{directory}: no model.safetensors and no model.safetensors.index.json")
    names = read_json(index, "").get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(shard, str) for shard in names.values()):
        raise CheckpointError(f"{index}: key 'weight_map' is missing or empty: expected tensor names and their files")
    headers: dict[str, dict[str, TensorInfo]] = {}
    for shard in sorted(set(names.values())):
        if not (directory / shard).is_file():
            raise CheckpointError(f"{directory / shard}: shard is missing, although {index.name} names it")
        headers[shard] = read_header(directory / shard)
    for name, shard in names.items():
        if name not in headers[shard]:
            raise CheckpointError(
                f"{directory / shard}: tensor {name!r} is missing, although {index.name} places it here"
            )
    return {name: info for header in headers.values() for name, info in header.items()}


def _resolve_dtype(dtype: str, hf_config: dict[str, Any], tensors: dict[str, TensorInfo]) -> tuple[str, str | None]:
    """As ``check_dtype``, of "auto" too."""
    if dtype != "auto":
        return check_dtype(dtype)
    named = hf_config.get("dtype") or hf_config.get("torch_dtype")
    if isinstance(named, str) and named.removeprefix("torch.") in ("float32", "bfloat16", "float16"):
        return named.removeprefix("torch."), None
    counts = collections.Counter(info.dtype for info in tensors.values() if info.is_float)
    return (_FILE_DTYPES[counts.most_common(1)[0][0]] if counts else "float32"), None


@dataclasses.dataclass
class Reading:
    """One checkpoint being read.

    Attributes:
      tensors: what it holds. mesh, rule: where parameters go, see ``parallel.weight_sharding``.
      bytes_read: so far, by this process.
    """

    tensors: dict[str, TensorInfo]
    mesh: Mesh | None
    rule: str
    bytes_read: int = 0

    def sharding(self, spec: ModelSpec, path: str, shape: tuple[int, ...]) -> NamedSharding | None:
        """Where the parameter at ``path`` goes; None without a mesh."""
        return (
            None if self.mesh is None else weight_sharding(path, shape, self.mesh, spec.config.split(path), self.rule)
        )

    def tensor(self, name: str, source: Source, sharding: NamedSharding | None) -> Array:
        """The tensor ``name``, or of a shared one the part of ``source``, as it lies in the file, on its devices. Read
        are the bytes that the devices of this process hold."""
        info = self.tensors[name]
        if not info.is_float:
            raise CheckpointError(
                f"{info.file}: tensor {info.name!r} has dtype {info.dtype}: expected F32, BF16, F16 or F64 "
                "(quantised weights are not supported)"
            )
        # Rows and columns by number: of a fused tensor (q, k and v in one) only those of this layer are read.
        places = [np.arange(size) for size in info.shape]
        if source.share is not None:
            places[0 if source.transpose else -1] = source.share.columns()
        shape = tuple(map(len, places))
        if sharding is None:
            return jax.device_put(self._read(info, places, (slice(None),) * len(shape)))
        parts: dict[tuple, np.ndarray] = {}  # devices that hold the same part share what was read

        def part(index: Any) -> np.ndarray:
            key = tuple(axis.indices(size) for axis, size in zip(index, shape))
            if key not in parts:
                parts[key] = self._read(info, places, index)
            return parts[key]

        return jax.make_array_from_callback(shape, sharding, part)

    def same(self, first: TensorInfo, second: TensorInfo) -> bool:
        """Whether two tensors are equal; on a mesh over several processes each compares its share of their rows."""
        if first.shape != second.shape:
            return False
        together = spans_processes(self.mesh)
        index, count = process() if together else (0, 1)
        rows, *others = (np.arange(size) for size in first.shape)
        a, b = (info.read([rows[index::count], *others]) for info in (first, second))
        self.bytes_read += a.nbytes + b.nbytes
        equal = np.array_equal(a, b)
        return all(everyone(equal)) if together else equal

    def _read(self, info: TensorInfo, places: list[np.ndarray], index: tuple[slice, ...]) -> np.ndarray:
        values = info.read([axis[chosen] for axis, chosen in zip(places, index)])
        self.bytes_read += values.nbytes
        return values.astype(jax.dtypes.canonicalize_dtype(values.dtype), copy=False)


def _load_params(spec: ModelSpec, reading: Reading, where: str, seed: int) -> tuple[dict, LoadReport]:
    flat, table, tensors = paths(param_shapes(spec)), sources(spec), reading.tensors
    table = _as_named_there(spec, table, tensors)
    _check_names(spec, table, reading, where)
    _check_shapes(flat, table, tensors)
    leaves = {}
    for path, shape in flat.items():
        if scale_path(path) in flat:
            stored = path, shape, flat[scale_path(path)], table[path]
            leaves[path], leaves[scale_path(path)] = _load_quantised(spec, *stored, reading)
        elif path in table:
            leaves[path] = _load_leaf(spec, path, shape, table[path], reading)
        elif not is_scale(path):
            fresh, split = init_leaf(spec, path, shape, seed), spec.config.split(path)
            leaves[path] = put(fresh, path, reading.mesh, split, reading.rule)
    weights = [info for info in tensors.values() if not is_buffer(spec, info.name)]
    counts, size = collections.Counter(info.dtype for info in weights), sum(i.stop - i.start for i in weights)
    parameters = sum(int(np.prod(flat[path].shape)) for path in table)
    report = LoadReport(where, "", counts.total(), parameters, size, reading.bytes_read, dict(counts))
    return unflatten(leaves), report


def _as_named_there(spec: ModelSpec, table: dict[str, Source], tensors: dict[str, TensorInfo]) -> dict[str, Source]:
    """Some checkpoints were saved without the family's prefix in front of every name, or with other names."""
    family = family_of(spec.config.family)
    for name, other in family.other_names.items():
        if f"{name}.weight" not in tensors and f"{other}.weight" in tensors:
            rename = lambda source, name=name, other=other: (
                dataclasses.replace(source, name=f"{other}.weight") if source.name == f"{name}.weight" else source
            )
            table = {path: rename(source) for path, source in table.items()}
    prefix = family.optional_prefix
    if not prefix or table["embed/weight"].name.removeprefix(prefix) not in tensors:
        return table
    bare = lambda source: dataclasses.replace(source, name=source.name.removeprefix(prefix))
    return {path: bare(source) for path, source in table.items()}


def _check_names(spec: ModelSpec, table: dict[str, Source], reading: Reading, where: str) -> None:
    """No tensor may be missing, and none may be left over."""
    tensors = reading.tensors
    needed = {name for source in table.values() for name in source.names().values()}
    missing = sorted(needed - tensors.keys())
    head = family_of(spec.config.family).tensors["head/kernel"] + ".weight"
    if missing:
        hint = ""
        if missing == [head]:
            hint = " (a model whose head is its embedding says tie_word_embeddings: true in config.json)"
        elif fused := _fused_experts(table, tensors.keys() - needed):
            hint = (
                f" ({fused!r} seems to hold a layer's experts together; to save them apart with transformers: old = "
                "AutoModelForCausalLM.from_pretrained(DIR); new = AutoModelForCausalLM.from_config(old.config); "
                "new.load_state_dict(old.state_dict()); new.save_pretrained(NEW_DIR))"
            )
        raise CheckpointError(f"{where}: {_listed('tensor', missing)} missing{hint}")
    unused = sorted(name for name in tensors.keys() - needed if not is_buffer(spec, name))
    if unused == [head] and spec.config.tied:
        embedding = tensors[table["embed/weight"].name]
        if not reading.same(tensors[head], embedding):
            raise CheckpointError(
                f"{where}: tensor {head!r} differs from {embedding.name!r}, although config.json "
                "ties them (tie_word_embeddings): set it to false to use both"
            )
        return
    if unused:
        raise CheckpointError(
            f"{where}: {_listed('tensor', unused)} not used by {spec.config.architecture} with this config.json"
        )


def _fused_experts(table: dict[str, Source], unused: set[str]) -> str | None:
    """A tensor that lies under the name of experts ("experts.gate_up_proj") without the number of one, if any does."""
    stacked = (source.name for source in table.values() if len(source.stack) == 2)
    groups = {name.rsplit(".{}.", 1)[0].rsplit(".", 1)[-1] for name in stacked}
    fused = (name for name in unused for group in groups if re.search(rf"\.{re.escape(group)}\.\D", name))
    return min(fused, default=None)


def _listed(noun: str, names: list[str]) -> str:
    more = f" and {len(names) - 4} more are" if len(names) > 4 else " is" if len(names) == 1 else " are"
    return f"{noun}{'s' if len(names) > 1 else ''} {', '.join(map(repr, names[:4]))}{more}"


def _load_leaf(
    spec: ModelSpec,
    path: str,
    shape: jax.ShapeDtypeStruct,
    source: Source,
    reading: Reading,
) -> Array:
    """One parameter, its layers (and experts) written one by one into a stack that already lies on the device."""
    sharding = reading.sharding(spec, path, shape.shape)
    rest = _slice_sharding(sharding, source, len(shape.shape))
    if not source.stack:
        array = reading.tensor(source.name, source, rest)
        return _as_leaf(array, source.transpose, str(shape.dtype), sharding)
    stack = _zeros(shape.shape, str(shape.dtype), sharding)
    for index, name in source.names().items():
        tensor = reading.tensor(name, source, rest)
        stack = _write_at(stack, np.asarray(index, np.int32), tensor, source.transpose, sharding)
    return stack


def _load_quantised(
    spec: ModelSpec,
    path: str,
    shape: jax.ShapeDtypeStruct,
    scale_shape: jax.ShapeDtypeStruct,
    source: Source,
    reading: Reading,
) -> tuple[Array, Array]:
    """A kernel and its scales, quantised layer by layer: the device holds one layer's in floating point. The scales lie
    whole on every device of a mesh.
    """
    sharding = reading.sharding(spec, path, shape.shape)
    whole = None if reading.mesh is None else NamedSharding(reading.mesh, PartitionSpec())
    integers = _zeros(shape.shape, str(shape.dtype), sharding)
    scales = _zeros(scale_shape.shape, str(scale_shape.dtype), whole)
    rest = _slice_sharding(sharding, source, len(shape.shape))
    for index, name in source.names().items():
        tensor = reading.tensor(name, source, rest)
        kernel = _as_leaf(tensor, source.transpose, str(scale_shape.dtype), None)
        held, scale = quantised(kernel, spec.quantised)
        where = np.asarray(index, np.int32)
        integers = _write_at(integers, where, held, False, sharding)
        scales = _write_at(scales, where, scale, False, whole)
    return integers, scales


def _check_shapes(flat: dict, table: dict[str, Source], tensors: dict[str, TensorInfo]) -> None:
    """Every tensor has the shape that config.json asks for: checked before anything of these sizes is made."""
    for path, source in table.items():
        shape = flat[path].shape[len(source.stack) :]
        outputs = shape[-1:] if source.share is None else (source.share.total,)
        expected = (*shape[:-1], *outputs)
        expected = expected[::-1] if source.transpose else expected
        for info in (tensors[name] for name in source.names().values()):
            if info.shape != expected:
                raise CheckpointError(
                    f"{info.file}: tensor {info.name!r} has shape {list(info.shape)}: config.json asks for "
                    f"{list(expected)}"
                )


def _slice_sharding(sharding: NamedSharding | None, source: Source, rank: int) -> NamedSharding | None:
    """The sharding of one layer's (and expert's) tensor as it lies in the file."""
    if sharding is None:
        return None
    # A spec may leave out trailing axes that are not split; filled up it can be cut and reversed.
    axes = (tuple(sharding.spec) + (None,) * rank)[len(source.stack) : rank]
    axes = axes[::-1] if source.transpose else axes
    return NamedSharding(sharding.mesh, PartitionSpec(*axes) if any(axes) else PartitionSpec())


def _zeros(shape: tuple[int, ...], dtype: str, sharding: NamedSharding | None) -> Array:
    return jnp.zeros(shape, dtype) if sharding is None else jnp.zeros(shape, dtype, device=sharding)


@functools.partial(jax.jit, static_argnums=(1, 2, 3), donate_argnums=0)
def _as_leaf(array: Array, transpose: bool, dtype: str, sharding: NamedSharding | None) -> Array:
    out = (array.T if transpose else array).astype(dtype)
    return out if sharding is None else jax.lax.with_sharding_constraint(out, sharding)


@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=0)
def _write_at(stack: Array, index: Any, tensor: Array, transpose: bool, sharding: NamedSharding | None) -> Array:
    tensor = (tensor.T if transpose else tensor).astype(stack.dtype)
    # The index is data, so that all layers are written by one program; the stack is donated and written in place.
    starts = [*index, *[np.int32(0)] * tensor.ndim]
    out = jax.lax.dynamic_update_slice(stack, tensor[(None,) * len(index)], starts)
    return out if sharding is None else jax.lax.with_sharding_constraint(out, sharding)


def load_tokenizer(directory: Path, config: ModelConfig) -> Any:
    """The transformers tokenizer of a model directory, or None where it has no tokenizer files."""
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    where = directory
    if {name for name in _TOKENIZER_FILES if (directory / name).is_file()} <= {"tokenizer.model", _SETTINGS}:
        where = (
            directory / "tokenizer.model"
        )  # transformers reads it by means of sentencepiece, where that is installed
    remedy = (
        ": a SentencePiece model without tokenizer.json. Convert it once where transformers and sentencepiece are "
        "installed: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory))
        if where != directory and not getattr(tokenizer, "is_fast", False):
            raise CheckpointError("no fast tokenizer can be made of it here")
    except Exception as error:  # transformers and tokenizers raise many kinds for a bad file
        hint = "" if where == directory else remedy
        raise CheckpointError(f"{where}: the tokenizer files cannot be read{hint} ({_one_line(error)})") from error
    templates = getattr(tokenizer, "chat_template", None)
    if isinstance(templates, dict) and "default" not in templates:
        raise CheckpointError(
            f"{directory / _SETTINGS}: chat_template holds the templates {', '.join(sorted(templates))} and none named "
            "'default'; expected one of that name; rename the one that is meant to 'default'"
        )
    _check_special(tokenizer, config.vocab_size, directory)
    return tokenizer


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]}..."


def _check_special(tokenizer: Any, rows: int, directory: Path) -> None:
    """CheckpointError where a token that every text may get (end, beginning, padding, the template's) has no row."""
    beyond = ids_beyond(tokenizer, rows)
    template = str(getattr(tokenizer, "chat_template", None) or "")
    for role in ("pad", "eos", "bos"):
        if (token := getattr(tokenizer, f"{role}_token_id")) in beyond:
            remedy = f"name a token that the model has as {role}_token in {_SETTINGS}, or "
            raise CheckpointError(_no_row(f"{directory / _SETTINGS}: the {role} token", beyond, token, rows, remedy))
    for token in sorted(beyond):
        if beyond[token] in template:
            where = f"{directory / 'tokenizer.json'}: the chat template's token"
            raise CheckpointError(_no_row(where, beyond, token, rows, ""))


def ids_beyond(tokenizer: Any, rows: int) -> dict[int, str]:
    """Tokens that the tokenizer can give and an embedding of ``rows`` rows has none for, by id."""
    known = {token: str(text) for text, token in tokenizer.get_vocab().items()}
    known |= {token: str(added) for token, added in getattr(tokenizer, "added_tokens_decoder", {}).items()}
    return {token: text for token, text in known.items() if token >= rows}


def check_ids(max_id: int, rows: int, tokenizer: Any, where: str = "") -> None:
    """CheckpointError naming the token where the id ``max_id`` of tokenised text has no row in the embedding.

    Args:
      where: the record that it is in, as FILE:LINE.
    """
    if max_id >= rows:
        subject = f"{where}: its text holds a token without a row:" if where else "token"
        raise CheckpointError(_no_row(subject, ids_beyond(tokenizer, rows), max_id, rows, ""))


def _no_row(what: str, texts: dict[int, str], token: int, rows: int, remedy: str) -> str:
    return (
        f"{what} {texts.get(token, '?')!r} has id {token} and the embedding only {rows} rows (vocab_size of "
        f"config.json); {remedy}give the embedding a row for it (transformers: "
        "model.resize_token_embeddings(len(tokenizer)), save_pretrained, train), or take the token out of "
        "tokenizer.json and of the template"
    )
