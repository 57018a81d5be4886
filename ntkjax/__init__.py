"""ntkjax: tangent-kernel data selection for language models, with the exact kernel to judge it by.

Everything public is here: ``ntkjax.select``, ``finetune``, ``evaluate``, ``adapt``, ``study``, ``verify``,
``stability``, ``show``, ``replay`` and ``demo`` are the commands as functions; ``load_lm`` gives a model whose
functions feed ``ntkjax.ntk`` and ``ntkjax.selection``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ntkjax.data import read_records, tokenise
    from ntkjax.errors import CheckpointError, ConfigError, DataError, UserError
    from ntkjax.models import LanguageModel, LoraConfig, init_lm, load_lm
    from ntkjax.stages import (
        AdaptConfig,
        DemoConfig,
        EvaluateConfig,
        FinetuneConfig,
        ReplayConfig,
        SelectConfig,
        ShowConfig,
        StabilityConfig,
        StudyConfig,
        VerifyConfig,
        adapt,
        demo,
        evaluate,
        finetune,
        replay,
        select,
        show,
        stability,
        study,
        verify,
    )
    from ntkjax.training import TrainConfig, fit

__version__ = "0.1.0"

_PUBLIC = {
    "ntkjax.data": ("read_records", "tokenise"),
    "ntkjax.errors": ("CheckpointError", "ConfigError", "DataError", "UserError"),
    "ntkjax.models": ("LanguageModel", "LoraConfig", "init_lm", "load_lm"),
    "ntkjax.training": ("TrainConfig", "fit"),
    "ntkjax.stages": (
        *("AdaptConfig", "DemoConfig", "EvaluateConfig", "FinetuneConfig", "ReplayConfig", "SelectConfig"),
        *("ShowConfig", "StabilityConfig", "StudyConfig", "VerifyConfig"),
        *("adapt", "demo", "evaluate", "finetune", "replay", "select", "show", "stability", "study", "verify"),
    ),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that `import ntkjax` does not start JAX and the command line answers --help at once.
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'ntkjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
