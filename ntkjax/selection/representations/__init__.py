"""Representations of examples, one file each. The table is at the end.

A new representation is one file in this folder and one line in the table.
"""

from __future__ import annotations

import importlib
from typing import Any

TABLE = {
    "gradients": "gradients.Gradients",
    "embeddings": "embeddings.Embeddings",
    "weighted-embeddings": "weighted_embeddings.WeightedEmbeddings",
    "ngrams": "ngrams.Ngrams",
    "sentence": "sentence.Sentence",
}
"""Name of the representation, as ``--representation`` takes it: module in this folder and class."""


def _load(where: str) -> type[Any]:
    module, _, name = where.partition(".")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


REPRESENTATIONS: dict[str, type[Any]] = {name: _load(where) for name, where in TABLE.items()}
"""Name of the representation: its class, a frozen dataclass of options (`ntkjax.selection.parts.Representation`)."""
