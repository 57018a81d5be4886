"""Tokens as pieces of their text."""

from __future__ import annotations

from typing import Any

import numpy as np

UNFINISHED = "\ufffd"
WINDOW = 8
"""Tokens before one that decide its text: a space that a tokenizer drops at the start, bytes of a character."""


def token_texts(tokenizer: Any, tokens: np.ndarray, known: dict[int, str]) -> list[str]:
    """The text of each token; joined they are the decoded text. Of a character that several tokens make, the last one
    has it and the others are empty.

    Args:
      known: texts of single tokens by id, filled as they are asked for.
    """
    ids = tokens.tolist()
    whole = _decode(tokenizer, ids)
    for token in set(ids) - known.keys():
        known[token] = _decode(tokenizer, [token])
    alone = [known[token] for token in ids]
    return alone if "".join(alone) == whole else _in_turn(tokenizer, ids, whole)


def _in_turn(tokenizer: Any, ids: list[int], whole: str) -> list[str]:
    """Token after token: what each adds to the text of the few before it."""
    texts, start, read = [], 0, 0
    for end in range(1, len(ids) + 1):
        before = _decode(tokenizer, ids[start:read])
        now = _decode(tokenizer, ids[start:end])
        if now.endswith(UNFINISHED) and end < len(ids):
            texts.append("")
            continue
        texts.append(now[len(before) :])
        start, read = max(start, end - WINDOW), end
    left = whole[len("".join(texts)) :]
    return [*texts[:-1], texts[-1] + left]


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
