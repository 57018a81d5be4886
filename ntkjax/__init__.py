"""Tangent-kernel data selection for fine-tuning language models, and exact kernels to check the selection against.

Everything public is here. The commands are functions: ``ntkjax.select``, ``finetune``, ``evaluate``, ``adapt``,
``study``, ``verify``, ``stability``, ``show``, ``import_gguf``, ``replay`` and ``demo``, each with its config class
(``SelectConfig``, ...); they come from the table ``ntkjax.commands.COMMANDS``. ``load_lm`` gives a model whose
functions feed ``ntkjax.ntk`` and ``ntkjax.selection``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ntkjax.commands import COMMANDS, load_command

if TYPE_CHECKING:
    from ntkjax.data import read_records, tokenise
    from ntkjax.errors import CheckpointError, ConfigError, DataError, UserError
    from ntkjax.models import LanguageModel, LoraConfig, init_lm, load_lm
    from ntkjax.training import TrainConfig, fit

__version__ = "0.1.0"

_PUBLIC = {
    "ntkjax.data": ("read_records", "tokenise"),
    "ntkjax.errors": ("CheckpointError", "ConfigError", "DataError", "UserError"),
    "ntkjax.models": ("LanguageModel", "LoraConfig", "init_lm", "load_lm"),
    "ntkjax.training": ("TrainConfig", "fit"),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}
_function = lambda command: command.replace("-", "_")
_config = lambda command: f"{command.title().replace('-', '')}Config"

__all__ = sorted([*_HOME, *map(_function, COMMANDS), *map(_config, COMMANDS)])


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that `import ntkjax` does not start JAX and the command line answers --help at once.
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    for command in COMMANDS:
        if name == _function(command):
            return load_command(command).function
        if name == _config(command):
            return load_command(command).config
    raise AttributeError(f"module 'ntkjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
