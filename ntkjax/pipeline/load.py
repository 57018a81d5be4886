"""A model and tokenised data from options: the first step of every command."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ntkjax.data import Records, TokenisedDataset, read_records, tokenise
from ntkjax.data.cache import Shared
from ntkjax.data.rows import packs
from ntkjax.errors import ConfigError
from ntkjax.job import everyone, is_primary, process
from ntkjax.models import LanguageModel, LoraConfig, adapter_lora_config, load_adapter, load_lm
from ntkjax.models.load import check_ids, ids_beyond
from ntkjax.parallel import mesh_of
from ntkjax.pipeline.options import DataOptions, ModelOptions
from ntkjax.types import Params


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A data set as text and as tokens; row i of one is row i of the other."""

    records: Records
    tokens: TokenisedDataset

    def __len__(self) -> int:
        return len(self.records)

    def subset(self, rows: np.ndarray) -> Loaded:
        """The given rows, in that order."""
        tokens = self.tokens.subset(rows)
        assert self.tokens.records is self.records and tokens.records is not None
        return Loaded(tokens.records, tokens)  # one index of the rows for both

    def report(self) -> dict:
        """Counts of what was read, skipped and truncated."""
        return {"records": self.records.report, "tokens": self.tokens.report}


def load_model(options: ModelOptions, *, seed: int) -> LanguageModel:
    """The model of ``options``, with fresh LoRA factors drawn from ``seed`` or those of ``options.adapter``.

    Raises:
      CheckpointError: the directory or a tensor in it cannot be used. ConfigError: options that exclude each other.
    """
    if options.parameters == "all" and options.adapter is not None:
        raise ConfigError(
            "--adapter holds LoRA factors but --parameters is all; merge the adapter first or drop one of them"
        )
    lora = None
    if options.adapter is not None:
        lora = adapter_lora_config(options.adapter)
    elif options.parameters == "lora":
        lora = LoraConfig(rank=options.lora_rank, alpha=options.lora_alpha, targets=options.lora_targets)
    model = load_lm(
        options.model,
        lora=lora,
        dtype=options.dtype,
        mesh=mesh_of(options.mesh),
        weights=options.weights,
        remat=options.remat,
        seed=seed,
    )
    index, count = process()
    if count > 1:
        told = f"read {model.report.bytes_read:,} of {model.report.weight_bytes:,} bytes of weights"
        print(f"process {index} of {count}: {told}", file=sys.stderr)
    if model.tokenizer is None:
        raise ConfigError(
            f"{options.model}: no tokenizer files (tokenizer.json) beside the weights; add them to the directory"
        )
    beyond = ids_beyond(model.tokenizer, model.config.vocab_size)
    if beyond and is_primary():
        shown = ", ".join(f"{text!r} ({token})" for token, text in sorted(beyond.items())[:3])
        print(
            f"warning: {options.model}: {len(beyond)} of the tokenizer's tokens have no row in the embedding of "
            f"{model.config.vocab_size} rows: {shown}{', ...' if len(beyond) > 3 else ''}; text with one is refused",
            file=sys.stderr,
        )
    if options.adapter is not None:
        model = model.with_params(load_adapter(options.adapter, model))
    return model


def weights_read(model: LanguageModel) -> dict[str, Any]:
    """In a job of several processes {"weights": bytes of the checkpoint, and those that each process read of it}, in a
    single one {}. All processes ask for it."""
    if process()[1] == 1:
        return {}
    return {"weights": {"bytes": model.report.weight_bytes, "read_by_process": everyone(model.report.bytes_read)}}


def trained_parameters(model: LanguageModel, options: ModelOptions) -> Params:
    """theta: the subset of the model's tree that is differentiated and trained."""
    return model.select_params(options.parameters)


def fresh_parameters(model: LanguageModel, options: ModelOptions, seed: int) -> Params:
    """theta at the start of a run with ``seed``: fresh LoRA factors; the loaded ones where an adapter was given or all
    parameters are trained."""
    if options.parameters == "all" or options.adapter is not None:
        return trained_parameters(model, options)
    return model.fresh_lora(seed)


def load_data(
    paths: str | Sequence[str],
    model: LanguageModel,
    options: DataOptions,
    *,
    limit: int | None = None,
    shared: Shared | None = None,
) -> Loaded:
    """Read, validate and tokenise; sequences are at most ``options.max_length`` and what the model can hold.

    Args:
      shared: where the processes of a job divide the work (`shared_cache`); None: each does all of it, in its own
        cache.

    Raises:
      DataError: ``FILE:LINE: what is wrong``.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    records = read_records(paths, on_bad_record=options.on_bad_record, limit=limit, cache_dir=shared)
    tokens = tokenise(
        records,
        model.tokenizer,
        max_length=longest(model, options),
        loss_turns=options.loss_turns,
        on_bad_record=options.on_bad_record,
        cache_dir=shared,
    )
    assert tokens.records is not None
    check_tokens(tokens, model)
    packing = packs(options.packing) and within_positions(tokens.lengths, model)
    return Loaded(tokens.records, tokens.on(model.mesh).packed(packing))  # without the records that were skipped


def shared_cache(out: str | Path) -> Shared | None:
    """OUT/cache, where the processes of a job prepare a pool together; None for a process that stands alone, unless it
    goes on with the run of a job, whose pool is there."""
    folder = Path(out) / "cache"
    return Shared(folder) if process()[1] > 1 or folder.is_dir() else None


def within_positions(lengths: np.ndarray, model: LanguageModel) -> bool:
    """Whether every example is within the model's positions: of packed rows, which may be longer, the model cannot say,
    and one example a row that is too long is refused by it."""
    limit = model.config.position_limit
    return limit is None or int(np.max(lengths, initial=0)) <= limit


def check_tokens(tokens: TokenisedDataset, model: LanguageModel) -> None:
    """Raise CheckpointError, with FILE:LINE of the first record, where a token has no row in the embedding.

    Only read through where the tokenizer has such tokens at all.
    """
    rows = model.config.vocab_size
    if not ids_beyond(model.tokenizer, rows):
        return
    for row in range(len(tokens)):
        largest = int(tokens.tokens(row)[0].max(initial=0))
        if largest >= rows:
            where = "" if tokens.records is None else tokens.records.location(row)
            check_ids(largest, rows, model.tokenizer, where)


def longest(model: LanguageModel, options: DataOptions) -> int:
    """Tokens of the longest sequence: the option, or the context that the model was trained for. Dynamic rotary
    positions are made for sequences beyond it."""
    config = model.config
    dynamic = any(layer.rope is not None and layer.rope.kind == "dynamic" for layer in config.layers)
    return options.max_length if dynamic else min(options.max_length, config.max_positions)
