"""Differences of two texts that share most of their words: another wording of the same content, or other content.

Words are compared, not typography: case, width, white space, quotes, brackets, dashes and full stops are left out,
signs of arithmetic stay where they stand beside a number or a single letter. What both texts say is taken away first
(runs of ``size`` words that occur equally often in both), the rest is aligned; what then has no partner is changed.

Two texts differ in their numbers where both have changed numbers, ordinals, single letters or signs of arithmetic, and
not the same ones. They differ in their words where a negation is changed, where both have changed words that turn a
sense (more and less, true and false), or where the changed words are more than a synonym's share of the passages that
they stand in: above `SHARE` of the content words of those passages, or above `CLUSTER_SHARE` of a run of at least
`CLUSTER` changed ones. A passage reaches `WINDOW` content words around a changed word and no further than its sentence,
so the rule does not depend on how long the text is. Words that are only added (an instruction, say) are a difference
from `ADDED` content words in a sentence on. Function words of English count at the end of a sentence only.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, UInt64

SHARE, WINDOW = 1 / 4, 6
CLUSTER, CLUSTER_SHARE = 4, 0.6
ADDED = 5
ALIGNED = 250_000  # products of lengths up to which words are aligned; above, they are counted

IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_LETTER = r"[^\W\d_]"
_WORDS = "|".join([
    r"\d+(?:\.\d+)+(?!\w)",  # a decimal number
    rf"[{IDEOGRAPHS}]",
    rf"[^\W{IDEOGRAPHS}]+",
    r"!=",
    r"(?<!\w)-(?=\d)",  # the sign of a number
    rf"(?:(?<=[\d)])|(?<=[\d)] )|(?<=\b{_LETTER})|(?<=\b{_LETTER} ))[-*\u2013](?=\s?(?:[\d(]|{_LETTER}\b))",
    r"[^\w\s.,;:!?'\"\u2018\u2019\u201c\u201d\u00ab\u00bb`()\u2026\u2013\u2014*#\u2022\u3001\u3002-]",
])  # fmt: skip
_WORD = re.compile(_WORDS)
_PIECE = re.compile(rf"(?P<word>{_WORDS})|(?P<end>\n|[.?!;:](?=\s|$)|[\u3002\uff1f\uff01\uff1a\uff1b])")
_APOSTROPHE = re.compile(r"(?<=\w)['\u2019](?=\w)")
_IS = re.compile(r"\b(what|who|where|when|how|it|that|there)['\u2019]s\b")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def _listed(words: str) -> frozenset[str]:
    return frozenset(words.split())


_FUNCTION_WORDS = _listed("""
    a an the this that these those of to in on at by for from with as into about and or but so if then than is are
    was were be been being am do does did done has have had having will would shall should can could may might must
    it its he him his she her they them their we us our you your i me my there here also just very some any each
    such
""")
_NEGATIONS = _listed("""
    not no never none nothing nobody neither nor without cannot nicht kein keine nie pas jamais nunca non mai dont
    doesnt didnt isnt arent wasnt werent wont wouldnt cant couldnt shouldnt hasnt havent hadnt mustnt
""")
_TURNING = _listed("""
    more less most least fewer before after above below increase decrease increases decreases increased decreased
    rise fall rises falls higher lower highest lowest maximum minimum largest smallest first last true false yes
    correct incorrect always only all except same different both either
""")
_NUMERALS = _listed("""
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million billion half
    third quarter double twice second fourth fifth sixth seventh eighth ninth tenth
""")
_ARITHMETIC = frozenset("+-*\u2013\u2212\u00d7\u00f7=<>\u2264\u2265^") | {"!="}


def _plain(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).casefold()
    if "'" in text or "\u2019" in text:
        text = _APOSTROPHE.sub("", _IS.sub(r"\1 is", text))
    return _THOUSANDS.sub("", text) if "," in text else text


def words_of(text: str) -> list[str]:
    """The words of ``text`` in order, as they are compared: see the module. Signs alone are split at white space."""
    plain = _plain(text)
    return _WORD.findall(plain) or plain.split()


@dataclasses.dataclass(frozen=True)
class Words:
    """A text as words.

    Attributes:
      words: as ``words_of`` gives them. sentences: the number of the sentence or line that each stands in.
    """

    words: Sequence[str]
    sentences: Sequence[int]

    @classmethod
    def of(cls, text: str) -> Words:
        """The words of ``text`` and their sentences."""
        words, sentences, sentence, plain = [], [], 0, _plain(text)
        for piece in _PIECE.finditer(plain):
            if piece.lastgroup == "end":
                sentence += 1
            else:
                words.append(sys.intern(piece[0]))  # words repeat: a text in memory is a list of references
                sentences.append(sentence)
        return cls(words, sentences) if words else cls(plain.split(), [0] * len(plain.split()))


# -- what both say --


def combine(columns: Sequence[UInt64[np.ndarray, " n"]]) -> UInt64[np.ndarray, " n"]:
    """One 64-bit number for each ordered row: a polynomial, then the finaliser of splitmix64, a bijection whose every
    output bit depends on every input bit."""
    x = np.zeros(len(columns[0]), np.uint64)
    for column in columns:
        x = x * np.uint64(0x9E3779B97F4A7C15) + column
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def runs(words: UInt64[np.ndarray, " w"], size: int) -> UInt64[np.ndarray, " s"]:
    """A number for every ``size``-gram of a sequence of word hashes, in order; the whole where it is shorter."""
    if len(words) == 0:
        return words
    size = min(size, len(words))
    count = len(words) - size + 1
    return combine([words[k : k + count] for k in range(size)])


def uncovered(
    a: UInt64[np.ndarray, " a"], b: UInt64[np.ndarray, " b"], size: int
) -> tuple[Bool[np.ndarray, " a"], Bool[np.ndarray, " b"]]:
    """Words of either sequence of hashes that both neither begin nor end with, and that stand in no run of ``size``
    words that both have equally often between those.

    Equally often: a question that quotes its document has a run twice, which one on the same document has once.
    """
    least = min(len(a), len(b))
    # The common end is looked for behind the common start: in a text that repeats itself they would overlap.
    start = _equal(a[:least], b[:least])
    end = _equal(a[start:][::-1][: least - start], b[start:][::-1][: least - start])
    inner = a[start : len(a) - end], b[start : len(b) - end]
    alone = _outside_runs(*inner, size)
    masks = np.zeros(len(a), bool), np.zeros(len(b), bool)
    for mask, part in zip(masks, alone):
        mask[start : start + len(part)] = part
    return masks


def _equal(a: UInt64[np.ndarray, " n"], b: UInt64[np.ndarray, " n"]) -> int:
    """How many numbers two sequences begin with in common."""
    other = np.flatnonzero(a != b)
    return int(other[0]) if len(other) else len(a)


def _outside_runs(
    a: UInt64[np.ndarray, " a"], b: UInt64[np.ndarray, " b"], size: int
) -> tuple[Bool[np.ndarray, " a"], Bool[np.ndarray, " b"]]:
    if min(len(a), len(b)) < size:
        return np.ones(len(a), bool), np.ones(len(b), bool)
    grams = [runs(x, size) for x in (a, b)]
    values, inverse = np.unique(np.concatenate(grams), return_inverse=True)
    places = np.split(inverse, [len(grams[0])])
    counts = [np.bincount(of_runs, minlength=len(values)) for of_runs in places]
    common = counts[0] == counts[1]
    alone = []
    for words, of_runs in zip((a, b), places):
        starts = np.zeros(len(words) + 1, np.int64)
        hits = np.flatnonzero(common[of_runs])
        starts[hits] += 1
        np.subtract.at(starts, hits + size, 1)
        alone.append(np.cumsum(starts)[:-1] == 0)
    return alone[0], alone[1]


def changed_words(
    a: Words, b: Words, hashes: tuple[UInt64[np.ndarray, " a"], UInt64[np.ndarray, " b"]], size: int
) -> tuple[list[int], list[int]]:
    """Positions in ``a`` and in ``b`` of the words that have no partner in the other text."""
    left, right = (np.flatnonzero(mask).tolist() for mask in uncovered(*hashes, size))
    said = [a.words[i] for i in left], [b.words[i] for i in right]
    if len(left) * len(right) > ALIGNED:
        spare = Counter(said[0]) - Counter(said[1]), Counter(said[1]) - Counter(said[0])
        return [i for i in left if a.words[i] in spare[0]], [i for i in right if b.words[i] in spare[1]]
    blocks = difflib.SequenceMatcher(None, *said, autojunk=False).get_matching_blocks()
    same = [{block[side] + k for block in blocks for k in range(block.size)} for side in (0, 1)]
    return [i for k, i in enumerate(left) if k not in same[0]], [i for k, i in enumerate(right) if k not in same[1]]


# -- whether it matters --


def difference(a: Words, b: Words, changed: tuple[list[int], list[int]]) -> str | None:
    """None where the changed words leave the sense alone; else ``numbers`` or ``words``, what the texts differ in."""
    said = [a.words[i] for i in changed[0]], [b.words[i] for i in changed[1]]
    pick = lambda kind: tuple(Counter(word for word in side if kind(word)) for side in said)
    numbers, signs, turning = pick(_is_number), pick(_ARITHMETIC.__contains__), pick(_TURNING.__contains__)
    if signs[0] != signs[1] or (all(numbers) and numbers[0] != numbers[1]):
        return "numbers"
    negations = pick(_NEGATIONS.__contains__)
    if negations[0].total() != negations[1].total() or (all(turning) and turning[0] != turning[1]):
        return "words"
    passages = [_passages(text, positions) for text, positions in zip((a, b), changed)]
    counts = [sum(p.changed for p in side) for side in passages]
    if not all(counts):
        return "words" if any(p.changed >= ADDED for side in passages for p in side) else None
    every = [p for side in passages for p in side]
    if sum(counts) > SHARE * sum(p.content for p in every) or any(p.rewritten for p in every):
        return "words"
    return None


def _is_number(word: str) -> bool:
    return word[0].isdigit() or word in _NUMERALS or (len(word) == 1 and word.isascii() and word not in "ai")


def _is_content(text: Words, i: int) -> bool:
    """A function word at the end of its sentence ("The answer is in.") counts like any other."""
    ends = i + 1 == len(text.words) or text.sentences[i + 1] != text.sentences[i]
    return ends or text.words[i] not in _FUNCTION_WORDS


@dataclasses.dataclass(frozen=True)
class _Passage:
    """Around the changed words of one sentence: content words, those of them that are changed, and whether the changed
    ones have a dense run."""

    content: int
    changed: int
    rewritten: bool


def _passages(text: Words, changed: list[int]) -> list[_Passage]:
    """The sentences with changed content words, each as far as `WINDOW` content words from one."""
    by_sentence: dict[int, list[int]] = {}
    for i in changed:
        if _is_content(text, i):
            by_sentence.setdefault(text.sentences[i], []).append(i)
    return [_passage(text, positions) for positions in by_sentence.values()]


def _passage(text: Words, changed: list[int]) -> _Passage:
    sentence = text.sentences[changed[0]]
    first, last = changed[0], changed[-1]
    while first > 0 and text.sentences[first - 1] == sentence:
        first -= 1
    while last + 1 < len(text.words) and text.sentences[last + 1] == sentence:
        last += 1
    order = {i: k for k, i in enumerate(i for i in range(first, last + 1) if _is_content(text, i))}
    places = [order[i] for i in changed]
    near: set[int] = set()
    for position in places:
        near.update(range(max(0, position - WINDOW), min(len(order), position + WINDOW + 1)))
    return _Passage(len(near), len(places), _dense(places))


def _dense(places: list[int]) -> bool:
    """Whether `CLUSTER` changed words or more stand so close that they are `CLUSTER_SHARE` of the run they make."""
    ends = range(CLUSTER - 1, len(places))
    return any(CLUSTER_SHARE * (places[k] - places[k - CLUSTER + 1] + 1) <= CLUSTER for k in ends)
