"""Duplicates and leakage: the same text, or nearly the same, in the pool, the domain and the held-out sets.

Two examples are ``exact`` duplicates where prompt and response are equal after Unicode NFKC, case folding and with
every run of white space made one space; ``near`` duplicates where the Jaccard similarity |A n B| / |A u B| of their
sets of word ``shingle``-grams is at least ``threshold``. A word is a run of letters and digits, one ideograph, or one
other sign, so that ``3 + 4`` and ``3 - 4`` differ. Five words at 0.8 keep what a template made of other numbers: one
word changed in the middle of a text of w words leaves (w - 9) / (w + 1), below 0.8 up to 48 words; a text of fewer
words than a shingle is one shingle. The same is asked of the prompts alone against held-out sets (``prompt``,
``near-prompt``): a test question with another's answer, or a longer one, is still a test question. Long boilerplate
shared by two prompts counts like any other text there.

Candidates come from MinHash (datasketch) and locality-sensitive hashing: b bands of r of the ``permutations`` minima, r
the largest for which a pair at the threshold shares a band with probability 1 - (1 - threshold^r)^b >= `RECALL`. Their
true similarity is computed from the text, so nothing that is listed is a false alarm; what banding misses is measured
in the tests. Keys of 8 (b + 1) bytes a row, twice that with held-out sets, lie in mapped files of the data cache while
the search lasts; memory holds what sorting one column of them takes, and no text. Time is linear: a row is compared
with the last `CROWD` rows of each bucket, and what fell out of a crowded one is counted. (MinHashLSH of the same
library would hold b Python objects a row instead.)

A pool row is a duplicate where it matches a row of another set, or an earlier pool row that is none: each group keeps
its first row. Other sets are searched (domain in test, say) but nothing is taken from them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
import unicodedata
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt64
from tqdm import tqdm

from ntkjax.data.cache import build_once, digest
from ntkjax.data.records import Records
from ntkjax.errors import ConfigError

IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
WORD = re.compile(rf"[{IDEOGRAPHS}]|[^\W{IDEOGRAPHS}]+|[^\w\s]")
"""One ideograph, kana or hangul syllable; a run of other letters, digits and underscores; one sign."""
RECALL = 0.99
CROWD = 64
CACHED_WORDS, CACHED_TEXTS = 1 << 15, 1 << 12
POOL = "pool"
VERSION = 1  # part of the cache key: raise it when the same records would give other pairs


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
      kind: ``exact``, ``near``, ``prompt`` or ``near-prompt``.
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
      crowded: how often a row fell out of a bucket of more than `CROWD`, to be compared through its others only.
    """

    sizes: dict[str, int]
    pairs: tuple[Pair, ...]
    crowded: int

    @property
    def kept(self) -> Int[np.ndarray, " K"]:
        """Pool rows that repeat nothing, ascending."""
        repeated = np.unique(np.asarray([p.row for p in self.pairs if p.name == POOL], np.int64))
        return np.delete(np.arange(self.sizes[POOL]), repeated)

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """``{"pool in test": {"exact": 3, ...}, ...}``: rows by where they were found again and how."""
        found: dict[str, Counter] = {}
        for p in self.pairs:
            found.setdefault(f"{p.name} in {p.of}", Counter())[p.kind] += 1
        return {where: dict(sorted(kinds.items())) for where, kinds in found.items()}


def find_duplicates(
    pool: Records,
    others: Mapping[str, Records],
    *,
    held_out: Collection[str] = (),
    settings: DedupSettings = DedupSettings(),
    cache_dir: str | Path | None = None,
    progress: bool = False,
) -> Duplicates:
    """Search ``pool`` and ``others`` for repeated texts; see the module. Same records and settings, same result.

    The result is kept in the data cache, so that a second run does not search again.

    Args:
      others: sets by name, such as ``{"test": ..., "domain": ...}``; each is compared with itself, those before it and
        the pool.
      held_out: those of ``others`` whose prompts alone are leakage too.

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
    content = json.loads((build_once("duplicates", key, cache_dir, search) / "pairs.json").read_text(encoding="utf-8"))
    pairs = tuple(Pair(*values) for values in content["pairs"])
    return Duplicates({name: len(records) for name, records in sets.items()}, pairs, content["crowded"])


def _search(
    sets: Mapping[str, Records], held_out: Collection[str], settings: DedupSettings, progress: bool, folder: Path
) -> None:
    text_keys, prompt_keys = _sketch(sets, settings, bool(held_out), progress, folder)
    texts = _Matcher(sets, text_keys, settings, prompts=False)
    pairs = list(texts.within(progress))
    crowded = texts.crowded
    if prompt_keys is not None:
        prompts = _Matcher(sets, prompt_keys, settings, prompts=True)
        known = {(p.name, p.row, p.of) for p in pairs}
        pairs += [p for p in prompts.against(held_out, progress) if (p.name, p.row, p.of) not in known]
        crowded += prompts.crowded
    place = {name: k for k, name in enumerate(sets)}
    pairs.sort(key=lambda p: (place[p.name], p.row, place[p.of]))
    content = {"pairs": [dataclasses.astuple(p) for p in pairs], "crowded": crowded}
    (folder / "pairs.json").write_text(json.dumps(content), encoding="utf-8")
    _word_hash.cache_clear()


# -- a text as numbers --


def normalise(text: str) -> str:
    """NFKC, case folded, one space for every run of white space, none at the ends."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


# Words repeat; the bound keeps memory independent of the text, and what most texts say fits into it.
_word_hash = functools.lru_cache(maxsize=CACHED_WORDS)(_hash)


def word_hashes(normalised: str) -> UInt64[np.ndarray, " w"]:
    """64 bits for every word of a normalised text, in order."""
    return np.asarray([_word_hash(word) for word in WORD.findall(normalised)], np.uint64)


def _combine(columns: Sequence[UInt64[np.ndarray, " n"]]) -> UInt64[np.ndarray, " n"]:
    """One 64-bit number for each ordered row: a polynomial, then the finaliser of splitmix64, a bijection whose every
    output bit depends on every input bit."""
    x = np.zeros(len(columns[0]), np.uint64)
    for column in columns:
        x = x * np.uint64(0x9E3779B97F4A7C15) + column
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shingles(words: UInt64[np.ndarray, " w"], size: int) -> UInt64[np.ndarray, " s"]:
    """The distinct ``size``-grams of a sequence of word hashes, ascending; the whole where it is shorter."""
    if len(words) == 0:
        return words
    size = min(size, len(words))
    count = len(words) - size + 1
    return np.unique(_combine([words[k : k + count] for k in range(size)]))


def jaccard(a: UInt64[np.ndarray, " a"], b: UInt64[np.ndarray, " b"]) -> float:
    """|A n B| / |A u B| of two ascending arrays of distinct numbers; 0 where both are empty."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / max(len(a) + len(b) - both, 1)


def _mapped(file: Path, rows: int, width: int) -> UInt64[np.ndarray, "rows width"]:
    """Room for numbers in ``file``, whose name is gone at once and whose space is when the array is."""
    with file.open("w+b") as handle:
        handle.writelines(itertools.repeat(bytes(8 * width), rows))  # a full disk is an error here, not a dead process
        handle.flush()
        mapped = np.memmap(handle, np.uint64, "r+", shape=(rows, width))
    file.unlink()
    return mapped.view(np.ndarray)


def _sketch(
    sets: Mapping[str, Records], settings: DedupSettings, prompts: bool, progress: bool, folder: Path
) -> tuple[UInt64[np.ndarray, "n k"], UInt64[np.ndarray, "n k"] | None]:
    """One pass over all texts: for every row the hash of its text and a key for each band [n, 1 + b]; the same of its
    prompt, or None. Both lie in files of ``folder``."""
    from datasketch import MinHash

    bands, width = settings.banding
    minima = MinHash(settings.permutations, seed=settings.seed, hashfunc=int)
    total = sum(len(records) for records in sets.values())
    text_keys = _mapped(folder / "text-keys", total, 1 + bands)
    prompt_keys = _mapped(folder / "prompt-keys", total, 1 + bands) if prompts else None

    def fill(keys: np.ndarray, normalised: str, words: np.ndarray) -> None:
        minima.clear()
        minima.update_batch((shingles(words, settings.shingle) >> np.uint64(32)).tolist())
        keys[0] = _hash(normalised)
        keys[1:] = _combine(list(minima.hashvalues[: bands * width].astype(np.uint64).reshape(width, bands)))

    both = ((p, r) for records in sets.values() for p, r in zip(records.prompts, records.responses))
    bar = tqdm(both, total=total, desc="read for duplicates", disable=not progress, unit="example")
    for row, (prompt, response) in enumerate(bar):
        prompt, response = normalise(prompt), normalise(response)
        words = word_hashes(prompt)
        fill(text_keys[row], f"{prompt} {response}", np.concatenate([words, word_hashes(response)]))
        if prompt_keys is not None:
            fill(prompt_keys[row], prompt, words)
    return text_keys, prompt_keys


# -- finding pairs --


class _Buckets:
    """Rows by key: the whole text's hash, then one table for each band."""

    def __init__(self, tables: int):
        self.tables: list[dict[int, deque[int]]] = [{} for _ in range(tables)]
        self.crowded = 0

    def add(self, row: int, keys: list[int]) -> None:
        for table, key in zip(self.tables, keys):
            bucket = table.setdefault(key, deque(maxlen=CROWD))
            self.crowded += len(bucket) == CROWD
            bucket.append(row)

    def candidates(self, keys: list[int]) -> set[int]:
        return {row for table, key in zip(self.tables, keys) for row in table.get(key, ())}


class _Matcher:
    """Rows of all sets, numbered one after another, and their comparison."""

    def __init__(self, sets: Mapping[str, Records], keys: np.ndarray, settings: DedupSettings, *, prompts: bool):
        self.names, self.records = list(sets), list(sets.values())
        self.starts = np.concatenate([[0], np.cumsum([len(r) for r in self.records])])
        self.settings, self.prompts, self.keys, self.crowded = settings, prompts, keys, 0
        self.kinds = ("prompt", "near-prompt") if prompts else ("exact", "near")
        self._words = functools.lru_cache(maxsize=CACHED_TEXTS)(self._read)

    def within(self, progress: bool) -> Iterator[Pair]:
        """Pairs of all sets: a row of the pool is compared with pool rows that repeat nothing, others with all."""
        others, kept = _Buckets(self.keys.shape[1]), _Buckets(self.keys.shape[1])
        first = int(self.starts[-2])
        for row in self._bar(np.flatnonzero(_shared(self.keys)), progress):
            keys = self.keys[row].tolist()
            found = self._best(row, others.candidates(keys) | kept.candidates(keys))
            yield from found
            if row < first:
                others.add(row, keys)
            elif not found:
                kept.add(row, keys)
        self.crowded = others.crowded + kept.crowded

    def against(self, held_out: Collection[str], progress: bool) -> Iterator[Pair]:
        """Pairs of every row outside ``held_out`` with rows in it."""
        inside = np.zeros(len(self.keys), bool)
        for name in held_out:
            place = self.names.index(name)
            inside[self.starts[place] : self.starts[place + 1]] = True
        buckets = _Buckets(self.keys.shape[1])
        for row in np.flatnonzero(inside).tolist():
            buckets.add(row, self.keys[row].tolist())
        hit = np.zeros(len(self.keys), bool)
        for column in self.keys.T:
            hit |= np.isin(column, column[inside])
        for row in self._bar(np.flatnonzero(hit & ~inside), progress):
            yield from self._best(row, buckets.candidates(self.keys[row].tolist()))
        self.crowded = buckets.crowded

    def _best(self, row: int, candidates: set[int]) -> list[Pair]:
        """The best match of ``row`` in each set that has one."""
        best: dict[int, tuple[tuple[bool, float], int]] = {}
        for other in sorted(candidates):
            found = self._compare(row, other)
            place = self._place(other)
            if (found[0] or found[1] >= self.settings.threshold) and (place not in best or found > best[place][0]):
                best[place] = (found, other)
        return [self._pair(row, other, *found) for _, (found, other) in sorted(best.items())]

    def _place(self, row: int) -> int:
        """Which set a row lies in."""
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def _pair(self, row: int, other: int, same: bool, similarity: float) -> Pair:
        (mine, k), (theirs, j) = ((p := self._place(r), r - int(self.starts[p])) for r in (row, other))
        return Pair(self.names[mine], k, self.names[theirs], j, self.kinds[0 if same else 1], similarity)

    def _compare(self, a: int, b: int) -> tuple[bool, float]:
        """(whether the normalised texts are equal, Jaccard similarity)."""
        (text_a, words_a), (text_b, words_b) = self._words(a), self._words(b)
        return (True, 1.0) if text_a == text_b else (False, jaccard(words_a, words_b))

    def _read(self, row: int) -> tuple[str, np.ndarray]:
        place = self._place(row)
        records, k = self.records[place], row - int(self.starts[place])
        text = normalise(records.prompts[k])
        if not self.prompts:
            text = f"{text} {normalise(records.responses[k])}"
        return text, shingles(word_hashes(text), self.settings.shingle)

    def _bar(self, rows: np.ndarray, progress: bool) -> Iterator[int]:
        what = "compare prompts" if self.prompts else "compare candidates"
        yield from tqdm(rows.tolist(), desc=what, disable=not progress, unit="example")


def _shared(keys: UInt64[np.ndarray, "n k"]) -> Bool[np.ndarray, " n"]:
    """Rows that have a key in common with another row, in some column."""
    shared = np.zeros(len(keys), bool)
    for column in keys.T:
        order = np.argsort(column, kind="stable")
        same = column[order][1:] == column[order][:-1]
        shared[order[1:][same]] = shared[order[:-1][same]] = True
    return shared


def report(found: Duplicates, ids: Mapping[str, Any], settings: DedupSettings) -> dict[str, Any]:
    """Plain JSON values: settings, sizes, counts, and every pair with ids; ``ids``: of every set, by row."""
    bands, rows = settings.banding
    return {
        **dataclasses.asdict(settings),
        "bands": bands,
        "rows_per_band": rows,
        "chance_of_a_candidate_at_the_threshold": 1 - (1 - settings.threshold**rows) ** bands,
        "examples": found.sizes,
        "repeated": found.sizes[POOL] - len(found.kept),
        "counts": found.counts,
        "crowded": found.crowded,
        "pairs": [
            {
                "set": p.name,
                "id": str(ids[p.name][p.row]),
                "kind": p.kind,
                "of": p.of,
                "of_id": str(ids[p.of][p.of_row]),
                "similarity": round(p.similarity, 4),
            }
            for p in found.pairs
        ],
    }
