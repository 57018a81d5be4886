"""Records to tokens on disk: rendered, batch-encoded, cut to a maximal length with every cut counted."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ntkjax.data.batches import TokenisedDataset
from ntkjax.data.cache import build_once, digest
from ntkjax.data.prompts import Rendered, encode, end_token, pad_token, render_text, writes_the_date
from ntkjax.data.records import Records
from ntkjax.errors import ConfigError, DataError

VERSION = 1  # part of the cache key: raise it when the tokens of the same text change
BLOCK = 512


@dataclasses.dataclass(frozen=True)
class Cut:
    """An example after truncation, with the tokens it lost."""

    tokens: list[int]
    response_start: int
    prompt_lost: int
    response_lost: int


def truncate(rendered: Rendered, max_length: int, bos: int | None) -> Cut:
    """Cut to ``max_length`` tokens (at least 2): the prompt from the left, its bos kept where it has one.

    The response stays whole unless it alone exceeds ``max_length - 1``: then it is cut on the right and one
    prompt token remains, from which the first response token is predicted.
    """
    prompt, response = rendered.tokens[: rendered.response_start], rendered.tokens[rendered.response_start :]
    kept = response[: max_length - 1]
    room = max_length - len(kept)
    if len(prompt) <= room:
        return Cut(prompt + kept, len(prompt), 0, len(response) - len(kept))
    if room >= 2 and prompt[0] == bos:
        short = prompt[:1] + prompt[len(prompt) - room + 1 :]
    else:
        short = prompt[len(prompt) - room :]
    return Cut(short + kept, len(short), len(prompt) - len(short), len(response) - len(kept))


def tokenise(
    records: Records, tokenizer: Any, *, max_length: int = 2048, cache_dir: str | Path | None = None
) -> TokenisedDataset:
    """Tokenise ``records`` into memory-mapped storage, reused for the same content, tokenizer and length.

    ``.report`` counts examples, tokens, prompt_truncated, response_truncated, prompt_tokens_lost,
    response_tokens_lost, rendered_apart (the chat template does not render the prompt the same with a
    response behind it, see ``RenderedText``), empty_responses, dated_template (1 if it writes today's date),
    and end_token_inside (responses whose text holds the end token).

    Raises:
      ConfigError: ``max_length`` below 2, or a tokenizer without end token.
      DataError: no records, or a chat template that refuses one.
    """
    if max_length < 2:
        raise ConfigError(f"max_length is {max_length}; expected at least 2, a prompt token and a response token")
    if len(records) == 0:
        raise DataError("there are no records to tokenise; expected at least one")
    recipe = digest(VERSION, tokenizer_digest(tokenizer), max_length)
    key = digest(records.fingerprint, recipe)
    made = build_once("tokens", key, cache_dir, lambda folder: _write(records, tokenizer, max_length, folder))
    lengths = np.load(made / "lengths.npy")
    return TokenisedDataset(
        stores=(np.memmap(made / "tokens.bin", np.int32, "r"),),
        part=np.zeros(len(records), np.int16),
        start=np.cumsum(lengths, dtype=np.int64) - lengths,
        lengths=lengths,
        response_starts=np.load(made / "response_starts.npy"),
        pad_id=pad_token(tokenizer),
        report=json.loads((made / "report.json").read_text(encoding="utf-8")),
        records=records,
        recipe=recipe,
    )


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of what decides the tokens: vocabulary and rules, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return digest(type(tokenizer).__name__, rules, special, str(getattr(tokenizer, "chat_template", None)))


def _write(records: Records, tokenizer: Any, max_length: int, folder: Path) -> None:
    lengths, starts = np.zeros(len(records), np.int32), np.zeros(len(records), np.int32)
    end, counts, done = end_token(tokenizer), Counter(), 0
    counts["dated_template"] = int(writes_the_date(tokenizer))
    examples = iter(records)
    with (folder / "tokens.bin").open("wb") as file:
        while block := list(islice(examples, BLOCK)):
            texts = [render_text(tokenizer, example) for example in block]
            counts["rendered_apart"] += sum(text.apart for text in texts)
            counts["empty_responses"] += sum(not example.response for example in block)
            cuts = [truncate(item, max_length, tokenizer.bos_token_id) for item in encode(tokenizer, texts)]
            for row, cut in enumerate(cuts, done):
                lengths[row], starts[row] = len(cut.tokens), cut.response_start
                counts["prompt_truncated"] += cut.prompt_lost > 0
                counts["response_truncated"] += cut.response_lost > 0
                counts["prompt_tokens_lost"] += cut.prompt_lost
                counts["response_tokens_lost"] += cut.response_lost
                counts["end_token_inside"] += end in cut.tokens[cut.response_start : -1]
            np.asarray([token for cut in cuts for token in cut.tokens], np.int32).tofile(file)
            done += len(block)
    np.save(folder / "lengths.npy", lengths)
    np.save(folder / "response_starts.npy", starts)
    report = {"examples": len(records), "tokens": int(lengths.sum())} | dict(sorted(counts.items()))
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
