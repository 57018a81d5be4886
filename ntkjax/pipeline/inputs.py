"""Digests of the inputs of a run (data, weights, tokenizer, adapter), compared before results are read back.

A command reads its data and its model, takes the digests of both (`inputs_of`), and gives them to ``RunDir``, which
keeps them in inputs.json from before the first result. Equal inputs: what is finished is read back, what is not goes
on. Other inputs: the directory is refused, and what differs is named. A study is the exception, as its directory may
hold many runs: each has a folder named from the same digests (`ntkjax.pipeline.study.grid`), and other inputs are
computed beside them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from ntkjax.data import Records
from ntkjax.data.encode import tokenizer_digest
from ntkjax.errors import ConfigError
from ntkjax.fingerprint import digest, weights_fingerprint
from ntkjax.models import LanguageModel
from ntkjax.models.lm import paths
from ntkjax.pipeline.load import Loaded
from ntkjax.pipeline.options import ModelOptions
from ntkjax.pipeline.versions import package_version
from ntkjax.types import Params

Inputs = Mapping[str, Mapping[str, str | None]]
"""What results come from: input, as its flag is called -> part of it -> digest (of ``ntkjax``: its version)."""
INPUTS = "inputs.json"
"""The file of a run directory that holds them."""


def inputs_of(model: LanguageModel, options: ModelOptions, **data: Loaded | Records | None) -> Inputs:
    """The content of inputs.json: the version of the package, digests of the model, of the adapter where one was given,
    and of every file of every data set, as it was read.

    Args:
      model: as loaded; LoRA factors count where they come from ``options.adapter``: fresh ones follow from the options.
      data: data sets by the name of their flag, before duplicates are removed; None: not given.
    """
    inputs: dict[str, Mapping[str, str | None]] = {"ntkjax": {"version": package_version()}}
    inputs["model"] = {f"{part} of {options.model}": value for part, value in model_digests(model).items()}
    if options.adapter is not None:
        adapter = adapter_digests(model, model.lora)
        inputs["adapter"] = {f"{part} of {options.adapter}": value for part, value in adapter.items()}
    for name, loaded in data.items():
        if loaded is not None:
            inputs[name] = file_digests(loaded.records if isinstance(loaded, Loaded) else loaded)
    return inputs


def model_digests(model: LanguageModel) -> dict[str, str]:
    """Digests of the frozen weights, of the configuration (shape, rotary positions, end tokens) and of the tokenizer
    with its chat template."""
    adapter = paths(model.lora)
    frozen = {path: leaf for path, leaf in paths(model.params).items() if path not in adapter}
    return {
        "weights": weights_fingerprint(frozen),
        "configuration": digest(model.config.settings())[:16],
        "tokenizer": tokenizer_digest(model.tokenizer)[:16],
    }


def adapter_digests(model: LanguageModel, lora: Params) -> dict[str, str]:
    """Digests of LoRA factors and of their configuration (rank, alpha, layers); {} for a model without LoRA."""
    if model.lora_config is None:
        return {}
    config = dataclasses.asdict(model.lora_config)
    return {"weights": weights_fingerprint(lora), "configuration": digest(config)[:16]}


def file_digests(records: Records) -> dict[str, str]:
    """16 hex digits for each file that records were read from: of their content and order in it, whatever the bytes of
    the file are. A file without a usable record has those of nothing."""
    digest_of: dict[str, str] = {}
    content_of: dict[int, Any] = {}  # a file may lie in several tables, one behind another
    for part, table in enumerate(records.tables):
        rows = records.row[records.part == part]
        digests = table.numbers("digest")[rows].astype("<u8")
        files = table.numbers("file")[rows] + records.file_offsets[part]
        for number in np.unique(files).tolist():
            content = content_of.setdefault(number, blake2b(digest_size=8))
            content.update(digests[files == number].tobytes())
            digest_of[str(records.report["files"][number])] = content.hexdigest()
    nothing = blake2b(digest_size=8).hexdigest()
    return {str(name): digest_of.get(str(name), nothing) for name in records.report["files"]}


def check_inputs(path: Path, inputs: Inputs) -> None:
    """Raise ConfigError where the directory holds results of other inputs, or it cannot be known of which."""
    anew = f"Use a new --out directory, or remove {path} to compute everything anew."
    file = path / INPUTS
    if not file.exists():
        if (path / "config.yaml").exists():
            raise ConfigError(f"{path}: holds a run without {INPUTS}, so it is unknown of what data and weights it is "
                              f"(an earlier version wrote none). {anew}")  # fmt: skip
        return
    try:
        old = {name: dict(parts) for name, parts in json.loads(file.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{file}: not the inputs of a run ({error}), so it is unknown of what the results are. {anew}"
        ) from None
    changed = input_changes(old, inputs)
    if changed:
        raise ConfigError(
            f"{path}: holds results of other inputs (digests of their content):\n  "
            + "\n  ".join(changed)
            + f"\nIts results are left as they are. {anew} With its inputs put back this run goes on."
        )


def input_changes(old: Inputs, new: Inputs) -> list[str]:
    """One line ``INPUT: PART was OLD, is now NEW`` for every digest that differs, in 8 digits each (versions whole)."""
    pairs = lambda inputs: {(name, part): value for name, parts in inputs.items() for part, value in parts.items()}
    before, now = pairs(old), pairs(new)

    def shown(inputs: dict, key: tuple[str, str]) -> str:
        return "absent" if key not in inputs else str(inputs[key])[: None if key[0] == "ntkjax" else 8]

    return [
        f"{key[0]}: {key[1]} was {shown(before, key)}, is now {shown(now, key)}"
        for key in dict.fromkeys([*now, *before])
        if key not in before or key not in now or before[key] != now[key]
    ]
