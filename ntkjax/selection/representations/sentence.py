"""Embeddings of a sentence encoder (the extra ``sentence``: the package sentence-transformers)."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int

from ntkjax.errors import ConfigError
from ntkjax.selection.base import SelectionProblem
from ntkjax.selection.options import Options
from ntkjax.selection.parts import Part, Representation, texts_of
from ntkjax.selection.shared import open_shared

BATCH = 64
"""Texts that are encoded at a time."""
MISSING = (
    "--representation sentence needs the package sentence-transformers, which is not installed; pip install "
    '"ntkjax[sentence]", or choose --representation embeddings or ngrams'
)


@dataclasses.dataclass(frozen=True)
class SentenceOptions(Options):
    """Options of representation=sentence."""

    sentence_model: str = "sentence-transformers/all-MiniLM-L6-v2"
    """The encoder: a directory or a hub id of sentence-transformers."""


@dataclasses.dataclass(frozen=True)
class Sentence(SentenceOptions, Representation):
    """phi(x) = the encoder's embedding of the text of x (prompt, newline, response). The encoder sees only so many
    tokens of a text (the default 256); the report says how many and of how many texts it cut the end off.

    Source: arXiv 2602.14696 (EMBED). The encoder runs in the package sentence-transformers (and torch), which is
    imported only here and only when it is asked for. What is encoded is kept like other embeddings.

    Raises:
      ConfigError: the package is not installed; an encoder that it cannot load; a problem without texts.
    """

    uses_model: ClassVar[bool] = False

    def check_installed(self) -> None:
        """Raise ConfigError where the package is not installed."""
        if importlib.util.find_spec("sentence_transformers") is None:
            raise ConfigError(MISSING)

    @property
    def embeds_pool(self) -> bool:
        """Always, in the encoder's own width."""
        return False

    def parts(self, problem: SelectionProblem, rows: Int[np.ndarray, " C"]) -> tuple[Part, ...]:
        """One part; what is encoded of the pool is kept."""
        domain, pool = texts_of(problem, "a sentence encoder reads text")
        encoder = load_encoder(self.sentence_model)
        vectors, count = encode(encoder, domain), len(pool)
        report = {
            "encoder_tokens": encoder.max_seq_length,
            "encoder_cut_domain": cut(encoder, domain),
            "encoder_cut_pool": cut(encoder, pool),
        }
        depends = {"encoder": self.sentence_model, "data": problem.pool.fingerprint}
        store = open_shared(problem, "sentence-embeddings", depends, rows=count, width=vectors.shape[1])
        if store is None:
            kept = encode(encoder, pool)
            return (Part(vectors, lambda index: kept[index], report=report),)
        mine = store.mine()
        missing = np.flatnonzero(~store.done() & (True if mine is None else mine))
        for start in range(0, len(missing), BATCH):
            index = missing[start : start + BATCH]
            store.write(index, encode(encoder, [pool[int(row)] for row in index]))
        store.gather()
        return (Part(vectors, store.read, report=report),)


def load_encoder(name: str) -> Any:
    """The sentence-transformers model ``name``. ConfigError where the package or the model cannot be had."""
    try:
        from sentence_transformers import SentenceTransformer  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(f"{MISSING} ({error})") from error
    try:
        return SentenceTransformer(name)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"sentence_model: {name} cannot be loaded: {error}; expected a directory or a hub id of "
            "sentence-transformers"
        ) from error


def cut(encoder: Any, texts: Sequence[str]) -> int:
    """How many of the texts have more tokens than the encoder takes."""
    if encoder.max_seq_length is None:
        return 0
    count = 0
    for start in range(0, len(texts), BATCH):
        batch = [texts[row] for row in range(start, min(start + BATCH, len(texts)))]
        tokens = encoder.tokenizer(batch, truncation=False, verbose=False)["input_ids"]
        count += sum(len(each) > encoder.max_seq_length for each in tokens)
    return count


def encode(encoder: Any, texts: Sequence[str]) -> np.ndarray:
    """Embeddings [n, D], float32."""
    vectors = encoder.encode(list(texts), batch_size=BATCH, convert_to_numpy=True, show_progress_bar=False)
    return np.asarray(vectors, np.float32)
