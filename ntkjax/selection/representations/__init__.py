"""Representations of examples, one file each. The table is at the end.

A new representation is one file in this folder and one line in the table.
"""

from __future__ import annotations

from typing import Any

from ntkjax.selection.tables import load_table

TABLE = {
    "gradients": "gradients.Gradients",
    "embeddings": "embeddings.Embeddings",
    "weighted-embeddings": "weighted_embeddings.WeightedEmbeddings",
    "ngrams": "ngrams.Ngrams",
    "sentence": "sentence.Sentence",
}
"""Name of the representation, as ``--representation`` takes it: module in this folder and class."""


REPRESENTATIONS: dict[str, type[Any]] = load_table(__name__, TABLE)
"""Name of the representation: its class, a frozen dataclass of options (`ntkjax.selection.parts.Representation`)."""
