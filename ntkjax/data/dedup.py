"""Duplicates and leakage: the same text, or nearly the same, in the pool, the domain and the held-out sets.

Two examples are ``exact`` duplicates where prompt and response are the same characters; ``re-spaced`` where their words
are the same (they differ in white space, case, width or punctuation); ``near`` duplicates where the Jaccard similarity
|A n B| / |A u B| of their sets of word ``shingle``-grams is at least ``threshold`` and neither the prompts nor the
responses differ in what they ask and say: `ntkjax.data.differences` has the words and the rule. Different questions on
one document, the same question with another answer, and what a template made of other numbers are therefore kept,
however long the text they share; how many rows were is counted (``apart``). Five words at 0.8: one word changed in the
middle of w leaves (w - 9) / (w + 1), below 0.8 up to 48 words; a text of fewer words than a shingle is one shingle. The
same is asked of the prompts alone against held-out sets (``prompt``: equal words, ``near-prompt``): a test question
with another's answer, or a longer one, is still a test question.

Candidates come from MinHash (datasketch) and locality-sensitive hashing: b bands of r of the ``permutations`` minima, r
the largest for which a pair at the threshold shares a band with probability 1 - (1 - threshold^r)^b >= `RECALL`. Their
true similarity is computed from the text, so nothing that is listed is a false alarm; what banding misses is measured
in the tests. Texts on one document fill a bucket, and comparing all with all would take quadratic time. The rows of
buckets of more than `CROWD` are joined into groups, and each gets keys of what sets it apart: bands of minima of its
words outside the runs that it shares with the group's first row. Where those keys crowd too, the words of the first of
the new group are taken away as well, up to `LEVELS` times. A row is compared with the first row of its groups and with
at most `CROWD` of each bucket; what fell out of a bucket of the last level is counted (``crowded``).

Keys of 8 (b + 1) bytes a row and level, twice that with held-out sets, lie in mapped files of the data cache while the
search lasts; memory holds what sorting one column of them takes, 4 bytes for each key that two rows share, and the text
of a few rows. (MinHashLSH of the same library would hold b Python objects a row instead.) In a job each process reads
its own part of the texts into keys, and the first compares, over all of them.

A pool row is a duplicate where it matches a row of another set, or an earlier pool row that is none: each group keeps
its first row. Other sets are searched (domain in test, say) but nothing is taken from them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt64
from tqdm import tqdm

from ntkjax.data.cache import CacheDir, build_once
from ntkjax.data.crew import Crew
from ntkjax.data.differences import Words, changed_words, combine, difference, runs, uncovered, words_of
from ntkjax.data.records import Records
from ntkjax.errors import ConfigError
from ntkjax.fingerprint import digest

RECALL = 0.99
CROWD = 8
LEVELS = 3
DETAIL_BANDS, DETAIL_ROWS = 12, 4
"""Bands and minima a band of what sets a row apart: 0.95 of pairs with 0.69 of those words in common meet, 0.998 with
0.8, 0.01 with 0.15."""
CACHED_WORDS, CACHED_TEXTS, CACHED_RESTS = 1 << 15, 1 << 10, 1 << 14
POOL = "pool"
VERSION = 2  # part of the cache key: raise it when the same records would give other pairs


@dataclasses.dataclass(frozen=True)
class DedupSettings:
    """How texts are compared.

    Attributes:
      threshold: Jaccard similarity from which two texts are near-duplicates, above 0 and at most 1.
      shingle: words of a shingle. permutations: MinHash minima of a text. seed: of the permutations.
    """

    threshold: float = 0.8
    shingle: int = 5
    permutations: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ConfigError(f"threshold must be above 0 and at most 1, got {self.threshold}")
        for name in ("shingle", "permutations"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def banding(self) -> tuple[int, int]:
        """(b bands, r rows a band)."""
        recall = lambda r: 1 - (1 - self.threshold**r) ** (self.permutations // r)
        rows = max((r for r in range(1, self.permutations + 1) if recall(r) >= RECALL), default=1)
        return self.permutations // rows, rows


@dataclasses.dataclass(frozen=True)
class Pair:
    """Row ``row`` of the set ``name`` repeats row ``of_row`` of the set ``of``.

    Attributes:
      kind: ``exact``, ``re-spaced``, ``near``, ``prompt`` or ``near-prompt``.
      similarity: Jaccard similarity of the texts (of the prompts for the two last kinds).
    """

    name: str
    row: int
    of: str
    of_row: int
    kind: str
    similarity: float


@dataclasses.dataclass(frozen=True)
class Duplicates:
    """What was found: for every row with a match its best one in each set (highest similarity, then lowest row).

    Attributes:
      sizes: rows of every set.
      pairs: pool rows last; in row order.
      apart: ``{"pool in pool": {"other question": 60, ...}, ...}``: rows whose most similar text reaches the threshold
        and is no duplicate, by what differs: ``other question``, ``other numbers`` (both in the prompts) or ``other
        response`` (the prompts say the same). Of the pairs that were compared.
      crowded: how often a row fell out of a bucket of the last level, to be compared through its others only.
    """

    sizes: dict[str, int]
    pairs: tuple[Pair, ...]
    apart: dict[str, dict[str, int]]
    crowded: int

    @property
    def kept(self) -> Int[np.ndarray, " K"]:
        """Pool rows that repeat nothing, ascending."""
        repeated = np.unique(np.asarray([p.row for p in self.pairs if p.name == POOL], np.int64))
        return np.delete(np.arange(self.sizes[POOL]), repeated)

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """``{"pool in test": {"exact": 3, ...}, ...}``: rows by where they were found again and how."""
        kinds_of: dict[str, Counter] = {}
        for p in self.pairs:
            kinds_of.setdefault(f"{p.name} in {p.of}", Counter())[p.kind] += 1
        return {where: dict(sorted(kinds.items())) for where, kinds in kinds_of.items()}


def find_duplicates(
    pool: Records,
    others: Mapping[str, Records],
    *,
    held_out: Collection[str] = (),
    settings: DedupSettings = DedupSettings(),
    cache_dir: CacheDir = None,
    progress: bool = False,
) -> Duplicates:
    """Search ``pool`` and ``others`` for repeated texts; see the module. Same records and settings, same result.

    The result is kept in the data cache, so that a second run does not search again.

    Args:
      others: sets by name, such as ``{"test": ..., "domain": ...}``; each is compared with itself, those before it and
        the pool.
      held_out: those of ``others`` whose prompts alone are leakage too.
      cache_dir: see `ntkjax.data.read_records`.

    Raises:
      ConfigError: a set is called ``pool``; a held-out name that is no set.
    """
    if POOL in others or not set(held_out) <= set(others):
        raise ConfigError(f"sets {', '.join(others)}, held out {', '.join(held_out)}: expected names other than "
                          f"{POOL!r}, and held-out ones among them")  # fmt: skip
    sets = {**others, POOL: pool}
    prints = [[name, len(records), records.fingerprint] for name, records in sets.items()]
    key = digest(VERSION, prints, sorted(held_out), dataclasses.astuple(settings))
    search = functools.partial(_search, sets, frozenset(held_out), settings, progress)
    made = build_once("duplicates", key, cache_dir, search, rows=sum(map(len, sets.values())))
    content = json.loads((made / "pairs.json").read_text(encoding="utf-8"))
    pairs = tuple(Pair(*values) for values in content["pairs"])
    sizes = {name: len(records) for name, records in sets.items()}
    return Duplicates(sizes, pairs, content["apart"], content["crowded"])


def _search(
    sets: Mapping[str, Records], held_out: Collection[str], settings: DedupSettings, progress: bool, crew: Crew
) -> None:
    text_keys, prompt_keys = _sketch(sets, settings, bool(held_out), progress, crew)
    crew.each("compare", lambda: _compare_all(sets, text_keys, prompt_keys, held_out, settings, progress, crew))
    _word_hash.cache_clear()


def _compare_all(
    sets: Mapping[str, Records],
    text_keys: UInt64[np.ndarray, "n k"],
    prompt_keys: UInt64[np.ndarray, "n k"] | None,
    held_out: Collection[str],
    settings: DedupSettings,
    progress: bool,
    crew: Crew,
) -> None:
    """Find the pairs and write them, on the first process."""
    if crew.index > 0:
        return
    folder = crew.folder
    texts = _Matcher(sets, text_keys, settings, folder, prompts=False)
    pairs = list(texts.within(progress))
    crowded = texts.crowded
    if prompt_keys is not None:
        prompts = _Matcher(sets, prompt_keys, settings, folder, prompts=True)
        known = {(p.name, p.row, p.of) for p in pairs}
        pairs += [p for p in prompts.against(held_out, progress) if (p.name, p.row, p.of) not in known]
        crowded += prompts.crowded
    order = {name: k for k, name in enumerate(sets)}
    pairs.sort(key=lambda p: (order[p.name], p.row, order[p.of]))
    apart = {where: dict(sorted(why.items())) for where, why in sorted(texts.apart.items())}
    content = {"pairs": [dataclasses.astuple(p) for p in pairs], "apart": apart, "crowded": crowded}
    (folder / "pairs.json").write_text(json.dumps(content), encoding="utf-8")


# -- a text as numbers --


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") or 1


# Words repeat; the bound keeps memory independent of the text, and what most texts say fits into it.
_word_hash = functools.lru_cache(maxsize=CACHED_WORDS)(_hash)


def word_hashes(words: Iterable[str]) -> UInt64[np.ndarray, " w"]:
    """64 bits for every word, in order."""
    return np.asarray([_word_hash(word) for word in words], np.uint64)


def shingles(words: UInt64[np.ndarray, " w"], size: int) -> UInt64[np.ndarray, " s"]:
    """The distinct ``size``-grams of a sequence of word hashes, ascending; the whole where it is shorter."""
    return np.unique(runs(words, size))


def jaccard(a: UInt64[np.ndarray, " a"], b: UInt64[np.ndarray, " b"]) -> float:
    """|A n B| / |A u B| of two ascending arrays of distinct numbers; 0 where both are empty."""
    # Both are distinct and ascending already, which saves intersect1d the two calls of unique.
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / max(len(a) + len(b) - both, 1)


def _mapped(file: Path, rows: int, width: int) -> UInt64[np.ndarray, "rows width"]:
    """An array in ``file``, which is unlinked at once, so that its space is freed with the array."""
    with file.open("w+b") as handle:
        handle.writelines(itertools.repeat(bytes(8 * width), rows))  # a full disk is an error here, not a dead process
        handle.flush()
        mapped = np.memmap(handle, np.uint64, "r+", shape=(rows, width)) if rows else np.zeros((0, width), np.uint64)
    file.unlink()
    return mapped.view(np.ndarray)


class _Minima:
    """MinHash of one set after another."""

    def __init__(self, permutations: int, seed: int):
        from datasketch import MinHash

        self._minima = MinHash(permutations, seed=seed, hashfunc=int)

    def bands(self, members: UInt64[np.ndarray, " s"], bands: int, width: int) -> UInt64[np.ndarray, " b"]:
        """A key for each of ``bands`` bands of ``width`` minima; none is 0."""
        self._minima.clear()
        # datasketch permutes hashes of 32 bits: the upper half of ours.
        self._minima.update_batch((members >> np.uint64(32)).tolist())
        minima = self._minima.hashvalues[: bands * width].astype(np.uint64).reshape(width, bands)
        # 0 stands for a key that was taken away (`_thin`).
        return np.maximum(combine(list(minima)), np.uint64(1))


def _sketch(
    sets: Mapping[str, Records], settings: DedupSettings, prompts: bool, progress: bool, crew: Crew
) -> tuple[UInt64[np.ndarray, "n k"], UInt64[np.ndarray, "n k"] | None]:
    """One pass over all texts: for every row the hash of its words and a key for each band [n, 1 + b]; the same of its
    prompt, or None. Both lie in files of the crew's folder. Each process makes its own part, and the first has all."""
    made: dict[str, np.ndarray] = {}
    crew.each("keys", lambda: made.update(_sketch_part(sets, settings, prompts, progress, crew)))
    if crew.count > 1:
        made = {name: _joined(name, keys, sets, crew) for name, keys in made.items()}
    return made["text-keys"], made.get("prompt-keys")


def _joined(name: str, own: np.ndarray, sets: Mapping[str, Records], crew: Crew) -> UInt64[np.ndarray, "n k"]:
    """The keys of all rows on the first process, from the files of all; on others those of their own rows."""
    if crew.index > 0:
        return own
    total = sum(len(records) for records in sets.values())
    whole = _mapped(crew.folder / name, total, own.shape[1])
    for index in range(crew.count):
        rows, file = crew.part(total, index), crew.folder / f"{name}-{index:05}"
        whole[rows.start : rows.stop] = np.fromfile(file, np.uint64).reshape(-1, own.shape[1])
        file.unlink()
    return whole


def _sketch_part(
    sets: Mapping[str, Records], settings: DedupSettings, prompts: bool, progress: bool, crew: Crew
) -> dict[str, np.ndarray]:
    """The keys of this process's rows; of several processes each writes them into files as well."""
    bands, width = settings.banding
    minima = _Minima(settings.permutations, settings.seed)
    rows = crew.part(sum(len(records) for records in sets.values()))
    names = ["text-keys", "prompt-keys"] if prompts else ["text-keys"]
    made = {name: _mapped(crew.folder / f"{name}.{crew.index}", len(rows), 1 + bands) for name in names}
    text_keys, prompt_keys = made["text-keys"], made.get("prompt-keys")

    def fill(keys: np.ndarray, text: str, words: np.ndarray) -> None:
        # The whole text as the first key: exact copies meet there even where all bands are crowded.
        keys[0] = _hash(text)
        keys[1:] = minima.bands(shingles(words, settings.shingle), bands, width)

    both = ((p, r) for records in _rows_of(sets.values(), rows) for p, r in zip(records.prompts, records.responses))
    shown = progress and crew.index == 0  # its own part, as long as the others'
    bar = tqdm(both, total=len(rows), desc="read for duplicates", disable=not shown, unit="example")
    for row, texts in enumerate(bar):
        prompt, response = (words_of(text) for text in texts)
        hashes = word_hashes(prompt)
        fill(text_keys[row], "\n".join([" ".join(prompt), " ".join(response)]),
             np.concatenate([hashes, word_hashes(response)]))  # fmt: skip
        if prompt_keys is not None:
            fill(prompt_keys[row], " ".join(prompt), hashes)
    if crew.count > 1:
        for name, keys in made.items():
            keys.tofile(crew.folder / f"{name}-{crew.index:05}")
    return made


def _rows_of(sets: Iterable[Records], rows: range) -> Iterator[Records]:
    """The records of ``rows``, where those of the sets are numbered one after another."""
    start = 0
    for records in sets:
        inside = range(max(rows.start - start, 0), min(rows.stop - start, len(records)))
        if len(inside) == len(records):
            yield records
        elif len(inside):
            yield records.subset(np.arange(inside.start, inside.stop))
        start += len(records)


# -- keys that few rows have --


def _groups(column: UInt64[np.ndarray, " n"]) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " g"]]:
    """(rows by key, ascending within one; where each key's rows start in it). Rows with key 0 have none."""
    order = np.argsort(column, kind="stable")
    order = order[np.searchsorted(column[order], 1) :]
    keys = column[order]
    first = np.ones(len(keys), bool)
    first[1:] = keys[1:] != keys[:-1]
    return order, np.flatnonzero(first)


def _crowds(keys: UInt64[np.ndarray, "n k"]) -> Int[np.ndarray, " n"]:
    """For every row the first row of the crowd it is in, -1 for none: rows that share a key with more than `CROWD`
    belong together, and so do those that share another such key with one of them (two rounds of passing on)."""
    first = np.full(len(keys), -1, np.int64)
    for _ in range(2):
        for column in keys.T:
            order, starts = _groups(column)
            sizes = np.diff(np.append(starts, len(order)))
            if not (sizes > CROWD).any():
                continue
            label = np.where(first[order] < 0, order, first[order])
            least = np.repeat(np.minimum.reduceat(label, starts), sizes)
            inside = np.repeat(sizes > CROWD, sizes)
            first[order[inside]] = least[inside]
    return first


def _thin(keys: UInt64[np.ndarray, "n k"], crowd: int | None) -> None:
    """Set keys to 0 that one row alone has, and those that more than ``crowd`` have."""
    for column in keys.T:
        order, starts = _groups(column)
        sizes = np.diff(np.append(starts, len(order)))
        useless = sizes == 1
        if crowd is not None:
            useless |= sizes > crowd
        column[order[np.repeat(useless, sizes)]] = 0


def _number(levels: Iterable[UInt64[np.ndarray, "n _"]]) -> Int[np.ndarray, " keys"]:
    """Put numbers from 1, each for one key of one column, in the place of keys; gives how many rows have each."""
    sizes, count = [np.zeros(0, np.int32)], 0
    for column in itertools.chain.from_iterable(level.T for level in levels):
        order, starts = _groups(column)
        sizes.append(np.diff(np.append(starts, len(order))).astype(np.int32))
        column[order] = np.repeat(np.arange(count + 1, count + 1 + len(starts), dtype=np.uint64), sizes[-1])
        count += len(starts)
    return np.concatenate(sizes)


# -- finding pairs --


@dataclasses.dataclass(frozen=True)
class _Text:
    """A row as it is compared: the hash of its characters, its sides (prompt, response) as words and as hashes, and
    the shingles of both together."""

    characters: int
    sides: tuple[Words, ...]
    hashes: tuple[np.ndarray, ...]
    shingles: np.ndarray


class _Buckets:
    """The last `CROWD` rows that were added with each key, keys being numbers from 1; 0 is none.

    Arrays, not Python objects: 4 bytes for a row and key, 5 for a key, 1 for a row.
    """

    def __init__(self, sizes: Int[np.ndarray, " keys"], rows: int):
        """``sizes``: rows that have each key at most. ``rows``: how many there are in all."""
        self._room = np.minimum(sizes, CROWD).astype(np.int8)
        self._start = np.cumsum(self._room, dtype=np.int64) - self._room
        self._held = np.zeros(len(sizes), np.int32)
        self._slots = np.zeros(int(self._room.sum(dtype=np.int64)), np.int32)
        self._added = np.zeros(rows, bool)
        self.crowded = 0

    def add(self, row: int, keys: Int[np.ndarray, " k"]) -> None:
        self._added[row] = True
        at = keys[keys > 0] - 1
        held, room = self._held[at], self._room[at]
        # A full bucket drops its oldest row, which is counted: pairs with it by this key are lost.
        self.crowded += int((held >= CROWD).sum())
        self._slots[self._start[at] + held % room] = row
        self._held[at] += 1

    def candidates(self, keys: Int[np.ndarray, " k"], firsts: list[int]) -> set[int]:
        at = keys[keys > 0] - 1
        count = np.minimum(self._held[at], self._room[at])
        within = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
        sharing = self._slots[np.repeat(self._start[at], count) + within].tolist()
        return {*sharing, *(row for row in firsts if self._added[row])}


class _Matcher:
    """Rows of all sets, numbered one after another, and their comparison."""

    def __init__(
        self, sets: Mapping[str, Records], keys: np.ndarray, settings: DedupSettings, folder: Path, *, prompts: bool
    ):
        self.names, self.records = list(sets), list(sets.values())
        self.starts = np.concatenate([[0], np.cumsum([len(r) for r in self.records])])
        self.settings, self.prompts, self.crowded = settings, prompts, 0
        self.apart: dict[str, Counter[str]] = {}
        self._text = functools.lru_cache(maxsize=CACHED_TEXTS)(self._read)
        self._rest = functools.lru_cache(maxsize=CACHED_RESTS)(self._make_rest)
        self._hashes = functools.lru_cache(maxsize=CACHED_TEXTS)(self._make_hashes)
        self.firsts: list[np.ndarray] = []
        self.keys = [keys]
        self._refine(folder)
        self._sizes = _number(self.keys)

    def _refine(self, folder: Path) -> None:
        """Take crowded keys away and give their rows keys of what sets them apart, level by level."""
        minima = _Minima(DETAIL_BANDS * DETAIL_ROWS, self.settings.seed)
        whole, bands = self.keys[0][:, :1], self.keys[0][:, 1:]
        _thin(whole, None)
        for level in range(LEVELS):
            first = _crowds(bands)
            _thin(bands, CROWD)
            # No key is crowded any more.
            if (first < 0).all():
                return
            self.firsts.append(first)
            bands = _mapped(folder / f"keys-{level}", len(first), DETAIL_BANDS)
            for row in np.flatnonzero(first >= 0).tolist():
                rest = self._rest(row, level)
                if len(rest):
                    bands[row] = minima.bands(rest, DETAIL_BANDS, DETAIL_ROWS)
            self.keys.append(bands)
        _thin(bands, None)

    def _make_rest(self, row: int, level: int) -> UInt64[np.ndarray, " s"]:
        """Hashes of the words that set ``row`` apart from the first rows of its crowds of levels up to ``level``."""
        first = int(self.firsts[level][row])
        if level > 0:
            before = self._rest(row, level - 1)
            return before if first < 0 else np.setdiff1d(before, self._rest(first, level - 1), assume_unique=True)
        if first < 0:
            return np.zeros(0, np.uint64)
        sides = zip(self._hashes(row), self._hashes(first))
        alone = [a[uncovered(a, b, self.settings.shingle)[0]] for a, b in sides]
        return np.unique(np.concatenate(alone))

    def _row(self, row: int) -> tuple[Int[np.ndarray, " k"], list[int]]:
        """(keys, first rows of its crowds)."""
        keys = np.concatenate([level[row] for level in self.keys]).astype(np.int64)
        return keys, [int(first[row]) for first in self.firsts if first[row] >= 0]

    def _linked(self) -> Bool[np.ndarray, " n"]:
        """Rows that have a key or a crowd in common with another."""
        linked = np.zeros(len(self.keys[0]), bool)
        for level in self.keys:
            for column in level.T:
                linked |= column != 0
        for first in self.firsts:
            linked |= first >= 0
        return linked

    def _buckets(self) -> _Buckets:
        return _Buckets(self._sizes, len(self.keys[0]))

    def within(self, progress: bool) -> Iterator[Pair]:
        """Pairs of all sets: a row of the pool is compared with pool rows that repeat nothing, others with all."""
        others, kept = self._buckets(), self._buckets()
        first = int(self.starts[-2])
        for row in self._bar(np.flatnonzero(self._linked()), progress):
            keys, firsts = self._row(row)
            pairs = self._best(row, others.candidates(keys, firsts) | kept.candidates(keys, firsts))
            yield from pairs
            if row < first:
                others.add(row, keys)
            # Only the first of several copies is met by later rows: k copies give k - 1 pairs, not k (k - 1) / 2.
            elif not pairs:
                kept.add(row, keys)
        self.crowded = others.crowded + kept.crowded

    def against(self, held_out: Collection[str], progress: bool) -> Iterator[Pair]:
        """Pairs of every row outside ``held_out`` with rows in it."""
        inside = np.zeros(len(self.keys[0]), bool)
        for name in held_out:
            number = self.names.index(name)
            inside[self.starts[number] : self.starts[number + 1]] = True
        buckets, linked = self._buckets(), self._linked()
        for row in np.flatnonzero(inside & linked).tolist():
            buckets.add(row, self._row(row)[0])
        for row in self._bar(np.flatnonzero(linked & ~inside), progress):
            yield from self._best(row, buckets.candidates(*self._row(row)))
        self.crowded = buckets.crowded

    def _best(self, row: int, candidates: set[int]) -> list[Pair]:
        """The best match of ``row`` in each set that has one; why there is none is counted for the others."""
        best: dict[int, tuple[tuple[int, float], int]] = {}
        apart: dict[int, tuple[float, str]] = {}
        for other in sorted(candidates):
            kind, similarity, why = self._compare(row, other)
            other_set = self._set_of(other)
            if similarity < self.settings.threshold:
                continue
            if why is not None:
                apart[other_set] = max(apart.get(other_set, (0.0, "")), (similarity, why))
            elif other_set not in best or (kind, similarity) > best[other_set][0]:
                best[other_set] = (kind, similarity), other
        for other_set in apart.keys() - best.keys():
            where = f"{self.names[self._set_of(row)]} in {self.names[other_set]}"
            self.apart.setdefault(where, Counter())[apart[other_set][1]] += 1
        return [self._pair(row, other, *match) for _, (match, other) in sorted(best.items())]

    def _set_of(self, row: int) -> int:
        """Which set a row lies in."""
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def _pair(self, row: int, other: int, kind: int, similarity: float) -> Pair:
        (mine, k), (theirs, j) = ((p := self._set_of(r), r - int(self.starts[p])) for r in (row, other))
        kinds = ("near-prompt", "prompt", "prompt") if self.prompts else ("near", "re-spaced", "exact")
        return Pair(self.names[mine], k, self.names[theirs], j, kinds[kind], similarity)

    def _compare(self, a: int, b: int) -> tuple[int, float, str | None]:
        """(2: equal characters, 1: equal words, 0: neither; Jaccard similarity; what differs, None for nothing)."""
        mine, theirs = self._text(a), self._text(b)
        if all(map(np.array_equal, mine.hashes, theirs.hashes)):
            return 1 + (mine.characters == theirs.characters), 1.0, None
        similarity = jaccard(mine.shingles, theirs.shingles)
        why = None
        if similarity >= self.settings.threshold:
            sides = zip(mine.sides, theirs.sides, zip(mine.hashes, theirs.hashes))
            differing = [difference(x, y, changed_words(x, y, h, self.settings.shingle)) for x, y, h in sides]
            named = {"words": "other question", "numbers": "other numbers"}
            why = named[differing[0]] if differing[0] else "other response" if any(differing) else None
        return 0, similarity, why

    def _sides(self, row: int) -> tuple[str, ...]:
        own_set = self._set_of(row)
        records, k = self.records[own_set], row - int(self.starts[own_set])
        return (records.prompts[k],) if self.prompts else (records.prompts[k], records.responses[k])

    def _make_hashes(self, row: int) -> tuple[UInt64[np.ndarray, " w"], ...]:
        return tuple(word_hashes(words_of(text)) for text in self._sides(row))

    def _read(self, row: int) -> _Text:
        texts = self._sides(row)
        sides = tuple(Words.of(text) for text in texts)
        hashes = tuple(word_hashes(side.words) for side in sides)
        return _Text(_hash("\0".join(texts)), sides, hashes, shingles(np.concatenate(hashes), self.settings.shingle))

    def _bar(self, rows: np.ndarray, progress: bool) -> Iterator[int]:
        what = "compare prompts" if self.prompts else "compare candidates"
        yield from tqdm(rows.tolist(), desc=what, disable=not progress, unit="example")


def report(duplicates: Duplicates, ids: Mapping[str, Any], settings: DedupSettings) -> dict[str, Any]:
    """Plain JSON values: settings, sizes, counts, and every pair with ids; ``ids``: of every set, by row."""
    bands, rows = settings.banding
    return {
        **dataclasses.asdict(settings),
        "bands": bands,
        "rows_per_band": rows,
        "chance_of_a_candidate_at_the_threshold": 1 - (1 - settings.threshold**rows) ** bands,
        "examples": duplicates.sizes,
        "repeated": duplicates.sizes[POOL] - len(duplicates.kept),
        "counts": duplicates.counts,
        "apart": duplicates.apart,
        "crowded": duplicates.crowded,
        "pairs": [
            {
                "set": p.name,
                "id": str(ids[p.name][p.row]),
                "kind": p.kind,
                "of": p.of,
                "of_id": str(ids[p.of][p.of_row]),
                "similarity": round(p.similarity, 4),
            }
            for p in duplicates.pairs
        ],
    }
