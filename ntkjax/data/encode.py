"""Records to tokens on disk: rendered, batch-encoded, cut to a maximal length with every cut counted."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ntkjax.data.batches import TokenisedDataset
from ntkjax.data.cache import CacheDir, build_once
from ntkjax.data.crew import Crew
from ntkjax.data.prompts import (
    LossTurns,
    Rendered,
    RenderedText,
    encode,
    end_token,
    pad_token,
    render_text,
    template_reads,
    writes_the_date,
)
from ntkjax.data.records import Example, Records
from ntkjax.errors import ConfigError, DataError
from ntkjax.fingerprint import digest

VERSION = 5  # part of the cache key: raise it when the tokens of the same text change
LAYOUT = 1  # part of the cache key, and of nothing else: raise it when the files of an entry change
BLOCK = 512
LISTED_SKIPS = 10_000


@dataclasses.dataclass(frozen=True)
class Cut:
    """An example after truncation, with what it lost: tokens of the prompt, of the last response, whole turns."""

    tokens: list[int]
    response_start: int
    trained: list[tuple[int, int]]
    prompt_lost: int
    response_lost: int
    turns_lost: int


def truncate(rendered: Rendered, max_length: int, bos: int | None) -> Cut:
    """Cut to ``max_length`` tokens (at least 2): whole turns from the front, then the prompt from the left.

    As few turns go as make the rest fit; where the last one alone is too long, its prompt loses tokens on the left. A
    leading bos stays. The last response stays whole unless it alone exceeds ``max_length - 1``: then it is cut on the
    right and one prompt token remains, from which the first response token is predicted.
    """
    tokens, start = rendered.tokens, rendered.response_start
    bos_size = int(tokens[0] == bos)
    for gone in [0, *rendered.turn_ends]:
        kept_bos = bos_size if gone else 0
        if len(tokens) - gone + kept_bos <= max_length:
            return _without(rendered, gone, kept_bos, 0)
    response_lost = max(0, len(tokens) - start - (max_length - 1))
    room = max_length - (len(tokens) - start - response_lost)
    if bos_size and room >= 2:
        return _without(rendered, start - room + 1, 1, response_lost)
    return _without(rendered, start - room, 0, response_lost)


def _without(rendered: Rendered, gone: int, bos: int, response_lost: int) -> Cut:
    """Without the first ``gone`` tokens (but for the ``bos`` first of them) and the last ``response_lost``."""
    end, shift = len(rendered.tokens) - response_lost, bos - gone
    whole = [(a + shift, min(b, end) + shift) for a, b in rendered.trained if a >= gone]
    # A turn that begins before the cut is not trained: its words would stand without what they answer.
    return Cut(
        tokens=rendered.tokens[:bos] + rendered.tokens[gone:end],
        response_start=rendered.response_start + shift,
        trained=whole,
        prompt_lost=-shift,
        response_lost=response_lost,
        turns_lost=sum(position <= gone for position in rendered.turn_ends) if gone else 0,
    )


def tokenise(
    records: Records,
    tokenizer: Any,
    *,
    max_length: int = 2048,
    loss_turns: LossTurns = "all",
    on_bad_record: Literal["raise", "skip"] = "raise",
    cache_dir: CacheDir = None,
) -> TokenisedDataset:
    """Tokenise ``records`` into memory-mapped storage, reused for the same content, tokenizer and options.

    Args:
      cache_dir: see `ntkjax.data.read_records`.
      loss_turns: ``all``: S(x) is every assistant turn of a conversation; ``last``: the last alone.
      on_bad_record: ``skip`` leaves out records that the chat template refuses or in which no token is to be learned;
        the ``records`` of the result are without them, and ``.report`` counts them.

    ``.report`` counts examples, tokens, skipped and skipped_lines (``FILE:LINE: why``), cut (examples), of them
    prompt_truncated and response_truncated, prompt_tokens_lost, response_tokens_lost, turns_truncated (assistant turns
    cut off whole), rendered_apart, turns_lost, messages_lost and calls_lost (see ``RenderedText``),
    tokens_across_borders (half prompt, half response), empty_responses, dated_template (1 if it writes today's date),
    end_token_inside (responses whose text holds the end token), and template_fields (fields of messages that the
    template reads: count).

    Raises:
      ConfigError: ``max_length`` below 2, or a tokenizer without end token.
      DataError: no records, or, unless they are skipped, one that the chat template refuses, by FILE:LINE.
    """
    if max_length < 2:
        raise ConfigError(f"max_length is {max_length}; expected at least 2, a prompt token and a response token")
    if len(records) == 0:
        raise DataError("there are no records to tokenise; expected at least one")
    options = _Options(max_length, loss_turns, on_bad_record == "skip")
    recipe = digest(VERSION, tokenizer_digest(tokenizer), *dataclasses.astuple(options))
    key = digest(LAYOUT, records.fingerprint, recipe)
    write = functools.partial(_write, records, tokenizer, options)
    made = build_once("tokens", key, cache_dir, write, rows=len(records))
    parts = sorted(made.glob("part-*"))
    columns = [[np.load(part / f"{name}.npy") for name in _COLUMNS] for part in parts]
    kept, lengths, response_starts, response_lengths = map(np.concatenate, zip(*columns))
    sizes = [len(column[0]) for column in columns]
    return TokenisedDataset(
        stores=tuple(_mapped(part / "tokens.bin", np.int32) for part in parts),
        masks=tuple(_mapped(part / "trained.bin", np.bool_) for part in parts),
        part=np.repeat(np.arange(len(parts), dtype=np.int16), sizes),
        start=np.concatenate([np.cumsum(column[1], dtype=np.int64) - column[1] for column in columns]),
        lengths=lengths,
        response_starts=response_starts,
        response_lengths=response_lengths,
        pad_id=pad_token(tokenizer),
        report=json.loads((made / "report.json").read_text(encoding="utf-8")),
        records=records if len(kept) == len(records) else records.subset(kept),
        recipe=recipe,
    )


@dataclasses.dataclass(frozen=True)
class _Options:
    max_length: int
    loss_turns: LossTurns
    skip_bad: bool


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of what decides the tokens: vocabulary and rules, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return digest(type(tokenizer).__name__, rules, special, str(getattr(tokenizer, "chat_template", None)))


_COLUMNS = ("kept", "lengths", "response_starts", "response_lengths")
"""Of every example: its row in the records, tokens, first token of the response, tokens that are trained."""


def _mapped(file: Path, dtype: Any) -> np.ndarray:
    return np.memmap(file, dtype, "r") if file.stat().st_size else np.zeros(0, dtype)  # none can be mapped


def _write(records: Records, tokenizer: Any, options: _Options, crew: Crew) -> None:
    """The tokens in folders ``part-K``, one by each process of the crew, and report.json of all of them."""
    parts = crew.each("tokens", lambda: _write_part(records, tokenizer, options, crew))
    done, skipped = sum(part["examples"] for part in parts), [line for part in parts for line in part["skipped_lines"]]
    if done == 0:
        raise DataError(f"no record is left to tokenise; the first of {len(skipped)} that were skipped: {skipped[0]}")
    if crew.index > 0:
        return
    counts, fields = Counter({"dated_template": int(writes_the_date(tokenizer))}), Counter()
    for part in parts:
        counts.update(part["counts"])
        fields.update(part["template_fields"])
    total = lambda name: sum(part[name] for part in parts)
    report = {"examples": done, "tokens": total("tokens")} | dict(sorted(counts.items()))
    report |= {"skipped": total("skipped"), "skipped_lines": skipped[:LISTED_SKIPS], "template_fields": dict(fields)}
    (crew.folder / "report.json").write_text(json.dumps(report, ensure_ascii=False), encoding="utf-8")


def _write_part(records: Records, tokenizer: Any, options: _Options, crew: Crew) -> dict[str, Any]:
    """Tokenise this process's part of the records; gives its part of the report."""
    rows, folder = crew.part(len(records)), crew.folder / f"part-{crew.index:05}"
    folder.mkdir()
    end, counts, read = end_token(tokenizer), Counter(), rows.start
    # Columns of ``_COLUMNS``. Arrays, so that millions cost little. Lengths are known when all is written; the table
    # has room for every record, and is cut to those that were kept.
    table, done, skipped = np.zeros((len(rows), 4), np.int32), 0, []
    fields: Counter[str] = Counter()

    def skip(row: int, error: DataError) -> None:
        located = f"{records.location(row)}: {error}"
        if not options.skip_bad:
            raise DataError(located) from error
        skipped.append(located)

    with (folder / "tokens.bin").open("wb") as tokens_file, (folder / "trained.bin").open("wb") as mask_file:
        examples = iter(records.subset(np.arange(rows.start, rows.stop)))
        while block := list(islice(examples, BLOCK)):
            texts: list[tuple[int, RenderedText]] = []
            for row, example in enumerate(block, read):
                try:
                    texts.append((row, render_text(tokenizer, example, loss_turns=options.loss_turns)))
                except DataError as error:
                    skip(row, error)
            for (row, _), rendered in zip(texts, encode(tokenizer, [text for _, text in texts]) if texts else []):
                example, cut = block[row - read], truncate(rendered, options.max_length, tokenizer.bos_token_id)
                mask = np.zeros(len(cut.tokens), bool)
                for a, b in cut.trained:
                    mask[a:b] = True
                if not mask.any():
                    skip(row, _nothing_to_learn(example))
                    continue
                table[done] = row, len(cut.tokens), cut.response_start, mask.sum()
                done += 1
                _count(counts, fields, tokenizer, example, rendered, cut, end)
                # Not `tofile`, which takes an error in flushing, or Ctrl-C there, for an argument that is no file.
                tokens_file.write(np.asarray(cut.tokens, np.int32).tobytes())
                mask_file.write(mask.tobytes())
            read += len(block)
    for name, column in zip(_COLUMNS, table[:done].T):
        np.save(folder / f"{name}.npy", np.ascontiguousarray(column))
    tokens = int(table[:done, 1].sum(dtype=np.int64))
    return {"examples": done, "tokens": tokens, "counts": counts, "template_fields": fields,
            "skipped": len(skipped), "skipped_lines": skipped[:LISTED_SKIPS]}  # fmt: skip


def _nothing_to_learn(example: Example) -> DataError:
    return DataError(
        f"record {example.id!r}: no assistant turn is to be learned (weight 0, train false, or no mark of the chat "
        "template's generation); expected at least one; change the weights or remove the record"
    )


def _count(
    counts: Counter[str],
    fields: Counter[str],
    tokenizer: Any,
    example: Example,
    rendered: Rendered,
    cut: Cut,
    end: int,
) -> None:
    counts["rendered_apart"] += rendered.apart
    counts["turns_lost"] += rendered.turns_lost
    counts["messages_lost"] += rendered.messages_lost
    counts["calls_lost"] += rendered.calls_lost
    counts["turns_truncated"] += cut.turns_lost
    counts["tokens_across_borders"] += rendered.crossing
    counts["empty_responses"] += not example.response
    counts["cut"] += cut.prompt_lost > 0 or cut.response_lost > 0
    counts["prompt_truncated"] += cut.prompt_lost > 0
    counts["response_truncated"] += cut.response_lost > 0
    counts["prompt_tokens_lost"] += cut.prompt_lost
    counts["response_tokens_lost"] += cut.response_lost
    counts["end_token_inside"] += end in cut.tokens[cut.response_start : -1]
    if example.messages is not None or example.response_fields is not None:
        names = {name for message in example.conversation() for name in message} - {"role", "content"}
        fields.update(name for name in names if name in ("weight", "train") or template_reads(tokenizer, name))
    if example.tools is not None and template_reads(tokenizer, "tools"):
        fields["tools"] += 1
