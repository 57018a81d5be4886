"""Duplicates: every pair that brute force finds, none that it does not, and the right row of each group kept."""

from __future__ import annotations

import functools
import json
import re

import numpy as np
import pytest

import ntkjax.data.dedup as dedup
from ntkjax.data import read_records
from ntkjax.data.dedup import DedupSettings, find_duplicates, jaccard, report, shingles, word_hashes
from ntkjax.data.differences import words_of
from ntkjax.errors import ConfigError

WORDS = [f"word{i}" for i in range(4000)]


@pytest.fixture
def records(tmp_path):
    """``records(name, [(prompt, response), ...])``, read from a file."""

    def make(name, pairs):
        rows = [{"id": f"{name}-{i}", "prompt": p, "response": r} for i, (p, r) in enumerate(pairs)]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read_records(path, allow_missing_response=True)

    return make


@functools.cache
def sets_of(text, size=5):
    """Shingles as sets of tuples of words: no hash."""
    words = re.findall(r"\w+|[^\w\s]", text.casefold())
    return {tuple(words[i : i + size]) for i in range(max(1, len(words) - size + 1))}


def similarity(a, b):
    a, b = sets_of(a), sets_of(b)
    return len(a & b) / len(a | b)


def sentence(rng, count=60):
    return [str(w) for w in rng.choice(WORDS, count)]


def changed(rng, words, count):
    """The words with ``count`` of them replaced, neighbours of one another."""
    start = int(rng.integers(0, len(words) - count + 1))
    return words[:start] + sentence(rng, count) + words[start + count :]


def words_as_sets(text):
    return shingles(word_hashes(words_of(text)), 5)


def test_jaccard_is_that_of_sets_of_tuples():
    rng = np.random.default_rng(0)
    for count in (0, 1, 3, 10, 55):
        a = sentence(rng)
        b = " ".join(changed(rng, a, count))
        assert jaccard(words_as_sets(" ".join(a)), words_as_sets(b)) == similarity(" ".join(a), b)
    one = words_as_sets
    assert jaccard(one("two words"), one("Two  WORDS")) == 1 and jaccard(one("two words"), one("two other")) == 0
    assert jaccard(one(""), one("")) == 0


@pytest.mark.parametrize("words", [20, 48, 49, 100])
def test_one_word_changed_in_the_middle(words):
    rng = np.random.default_rng(1)
    a = [f"w{i}" for i in range(words)]
    b = a[: words // 2] + sentence(rng, 1) + a[words // 2 + 1 :]
    found = jaccard(*[words_as_sets(" ".join(text)) for text in (a, b)])
    assert found == pytest.approx((words - 9) / (words + 1), abs=1e-12)
    assert (found >= 0.8) == (words >= 49)


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.95])
def test_banding_reaches_the_recall_with_the_longest_bands(threshold):
    bands, rows = DedupSettings(threshold).banding
    assert bands * rows <= 128
    assert 1 - (1 - threshold**rows) ** bands >= 0.99
    longer = 128 // (rows + 1)
    assert 1 - (1 - threshold ** (rows + 1)) ** longer < 0.99


def test_all_pairs_that_brute_force_finds_and_no_others(records):
    """160 texts of 60 words in 40 families, the members further and further from the first."""
    rng = np.random.default_rng(2)
    texts = []
    for _ in range(40):
        first = sentence(rng)
        texts += [first] + [changed(rng, first, count) for count in (1, 2, 8)]
    texts = [texts[i] for i in rng.permutation(len(texts))]
    pool = records("pool", [(" ".join(t[:30]), " ".join(t[30:])) for t in texts])
    found = find_duplicates(pool, {})
    texts = [" ".join(t) for t in texts]
    kept, expected = [], {}
    for j, text in enumerate(texts):  # greedy in row order, every kept row compared
        best = max(((similarity(text, texts[i]), -i) for i in kept), default=(0.0, 0))
        if best[0] >= 0.8:
            expected[j] = best[0]
        else:
            kept.append(j)
    missed = set(expected) - {p.row for p in found.pairs}
    assert len(expected) > 40
    # 1 - (1 - J^6)^21: 0.998 at 0.8 and above; the texts are few enough for one to be missed by chance at the most.
    assert len(missed) <= 1
    assert {p.row for p in found.pairs} - set(expected) == set()
    assert all(p.similarity == expected[p.row] and p.kind == "near" for p in found.pairs)
    assert found.kept.tolist() == sorted(set(range(len(texts))) - {p.row for p in found.pairs})


def test_recall_at_the_threshold_is_what_the_banding_promises():
    """Signatures of 2,000 pairs with similarity 0.8: the share that meets in a band, against 1 - (1 - s^r)^b."""
    from datasketch import MinHash

    rng, settings, met = np.random.default_rng(3), DedupSettings(), 0
    bands, rows = settings.banding
    for _ in range(2000):
        tokens = rng.integers(0, 2**32, 90, dtype=np.uint64)
        pair = []
        for own in (tokens[:80], tokens[10:]):  # 70 in common of 90: J = 0.777...
            minima = MinHash(128, seed=settings.seed, hashfunc=int)
            minima.update_batch(own.tolist())
            pair.append(minima.hashvalues[: bands * rows].reshape(rows, bands))
        met += bool((pair[0] == pair[1]).all(axis=0).any())
    promised = 1 - (1 - (70 / 90) ** rows) ** bands
    assert promised > 0.99
    assert met / 2000 == pytest.approx(promised, abs=4 * np.sqrt(promised * (1 - promised) / 2000))


def test_exact_and_re_spaced(records):
    """The same characters; the same words in other case, width, white space and punctuation. A sign is a word."""
    said = ("What  is 3 + 4, he asked?", "Seven.")
    pool = records(
        "pool", [said, ("what is ３ + 4 he asked", " SEVEN\n"), ("What is 3 - 4, he asked?", "Seven."), said]
    )
    found = find_duplicates(pool, {})
    listed = [(p.row, p.of_row, p.kind, p.similarity) for p in found.pairs]
    assert listed == [(1, 0, "re-spaced", 1.0), (3, 0, "exact", 1.0)]
    assert found.kept.tolist() == [0, 2]


def test_each_set_is_searched_and_only_the_pool_is_cut(records):
    rng = np.random.default_rng(4)
    texts = [sentence(rng) for _ in range(12)]
    say = lambda words: (" ".join(words[:20]), " ".join(words[20:]))
    test = records("test", [say(texts[0]), say(texts[1])])
    domain = records("domain", [say(texts[2]), say(texts[1]), say(texts[3]), say(texts[3])])
    question = " ".join(texts[0][:20])
    pool = records(
        "pool",
        [
            say(texts[4]),
            say(changed(rng, texts[0], 1)),  # near a test example
            say(texts[2]),  # in the domain
            say(changed(rng, texts[4], 1)),  # near the first
            (question, " ".join(texts[5])),  # the test's question, answered otherwise
            (" ".join(texts[2][:20]), " ".join(texts[6])),  # the domain's question, answered otherwise: no leak
            say(texts[1]),  # in both
            say(texts[7]),
            say(texts[7]),
            say(texts[7]),
        ],
    )
    found = find_duplicates(pool, {"test": test, "domain": domain}, held_out=["test"])
    listed = [(p.name, p.row, p.of, p.of_row, p.kind) for p in found.pairs]
    assert listed == [
        ("domain", 1, "test", 1, "exact"),
        ("domain", 3, "domain", 2, "exact"),
        ("pool", 1, "test", 0, "near"),
        ("pool", 2, "domain", 0, "exact"),
        ("pool", 3, "pool", 0, "near"),
        ("pool", 4, "test", 0, "prompt"),
        ("pool", 6, "test", 1, "exact"),
        ("pool", 6, "domain", 1, "exact"),
        ("pool", 8, "pool", 7, "exact"),
        ("pool", 9, "pool", 7, "exact"),
    ]
    assert found.kept.tolist() == [0, 5, 7]
    assert found.counts["pool in test"] == {"exact": 1, "near": 1, "prompt": 1}
    told = report(found, {"test": test.ids, "domain": domain.ids, "pool": pool.ids}, DedupSettings())
    assert told["repeated"] == 7 and told["examples"] == {"test": 2, "domain": 4, "pool": 10}
    assert told["pairs"][2] == {
        "set": "pool", "id": "pool-1", "kind": "near", "of": "test", "of_id": "test-0",
        "similarity": round(found.pairs[2].similarity, 4),
    }  # fmt: skip
    without = find_duplicates(pool, {"test": test, "domain": domain})
    assert 4 in without.kept


def test_a_near_prompt_of_a_held_out_set_without_responses(records):
    rng = np.random.default_rng(5)
    question = sentence(rng)
    test = records("test", [(" ".join(question), "")])
    pool = records("pool", [(" ".join(changed(rng, question, 1)), " ".join(sentence(rng, 90))), ("Why?", "Because.")])
    found = find_duplicates(pool, {"test": test}, held_out=["test"])
    assert [(p.row, p.kind) for p in found.pairs] == [(0, "near-prompt")]
    assert 0.8 <= found.pairs[0].similarity < 1


def test_a_kept_row_is_the_first_and_similarity_is_not_passed_on(records):
    """b repeats a and c repeats b, but c does not repeat a: c stays, since b, which it repeats, is gone."""
    a = [f"w{i}" for i in range(60)]
    b = ["x"] * 2 + a[2:]
    c = ["x"] * 2 + a[2:40] + ["y"] + a[41:]
    say = lambda words: (" ".join(words[:30]), " ".join(words[30:]))
    found = find_duplicates(records("pool", [say(a), say(b), say(c)]), {}, settings=DedupSettings(0.8))
    text = lambda words: " ".join(words)
    assert similarity(text(a), text(b)) >= 0.8 and similarity(text(b), text(c)) >= 0.8 > similarity(text(a), text(c))
    assert found.kept.tolist() == [0, 2]


def typed(rng):
    """A word of letters."""
    return "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), 7))


def prose(rng, count, vocabulary):
    """Sentences of 12 to 20 words."""
    words = [str(w) for w in rng.choice(vocabulary, count)]
    at = 0
    while (at := at + int(rng.integers(12, 21))) < count:
        words[at] += "."
    return words


COPIES = {
    "re-spaced": lambda rng, document, question: (document.replace(" ", "  "), f"{question} "),
    "case": lambda rng, document, question: (document.upper(), question),
    "punctuation": lambda rng, document, question: (document.replace(".", ","), question.replace("?", "...")),
    "reworded": lambda rng, document, question: (" ".join(replaced(rng, document.split(), 4)), question),
}


def replaced(rng, words, count):
    """``count`` words at random places replaced, others than the last of a sentence."""
    places = [i for i, word in enumerate(words) if not word.endswith(".")]
    chosen = set(rng.choice(places, count, replace=False).tolist())
    return [typed(rng) if i in chosen else word for i, word in enumerate(words)]


@pytest.mark.parametrize(("words", "border"), [(40, "\nQuestion: "), (300, "\nQuestion: "), (300, " "), (1200, "\n")])
def test_questions_on_one_document_are_kept_and_their_copies_found(records, words, border):
    """6 documents of any length, 12 questions on each, three answers among all; a copy of every second example."""
    rng = np.random.default_rng(7)
    vocabulary = [typed(rng) for _ in range(800)]
    own, copies, kinds = [], [], []
    for _ in range(6):
        document = " ".join(prose(rng, words, vocabulary))
        for k in range(12):
            question, answer = (
                " ".join(prose(rng, int(rng.integers(6, 11)), vocabulary)),
                ("yes", "no", "unclear")[k % 3],
            )
            own.append((f"{document}{border}{question}?", f"So the answer is {answer}."))
            kind = list(COPIES)[len(copies) % 4]
            if k % 2 == 0 and (words >= 300 or kind != "reworded"):
                first, last = COPIES[kind](rng, document, f"{question}?")
                copies.append((f"{first}{border}{last}", own[-1][1]))
                kinds.append((kind, len(own) - 1))
    found = find_duplicates(records("pool", own + copies), {})
    assert set(range(len(own))) <= set(found.kept.tolist())
    matched = {p.row - len(own): (p.of_row, p.kind) for p in found.pairs}
    assert len(matched) >= 0.95 * len(copies)
    for k, (kind, of_row) in enumerate(kinds):
        assert k not in matched or matched[k] == (of_row, "near" if kind == "reworded" else "re-spaced")
    if words >= 300:  # what they share is above the threshold
        assert found.apart["pool in pool"]["other question"] >= 0.9 * (len(own) - 6)


def test_hundreds_of_questions_on_one_document_take_few_comparisons(records, monkeypatch):
    """300 questions made by one template, on one document; copies of 30 with another word in the template."""
    compared = []
    monkeypatch.setattr(dedup, "jaccard", lambda a, b: compared.append(1) or jaccard(a, b))
    rng = np.random.default_rng(8)
    vocabulary = [typed(rng) for _ in range(3000)]
    document = " ".join(prose(rng, 100, vocabulary))
    ask = lambda i, verb: f"{document}\nWhat does clause {i} {verb} of {vocabulary[i]} and {vocabulary[3 * i % 3000]}?"
    own = [(ask(i, "say"), f"It says {typed(rng)}.") for i in range(300)]
    copies = [(ask(i, "tell"), own[i][1]) for i in range(0, 300, 10)]
    found = find_duplicates(records("pool", own + copies), {})
    assert all(p.row >= 300 and p.of_row == 10 * (p.row - 300) for p in found.pairs)
    assert len(found.pairs) >= 28
    assert len(compared) < 20 * 300  # all with all: 45,000


def test_what_differs_decides_however_much_is_shared(records):
    rng = np.random.default_rng(9)
    document = " ".join(prose(rng, 150, WORDS))
    ask = lambda question, answer="It is so.": (f"{document}\n{question}", answer)
    first = ask("How many of the 12 riders of the old company reached the northern harbour in time?")
    others = {
        "other numbers": ask("How many of the 13 riders of the old company reached the northern harbour in time?"),
        "other question": ask(
            "How many of the 12 riders of the old company never reached the northern harbour in time?"
        ),
        "other response": (first[0], "It is false."),
    }
    for why, other in others.items():
        found = find_duplicates(records(why.replace(" ", "-"), [first, other]), {})
        assert found.pairs == () and found.apart == {"pool in pool": {why: 1}}
    reworded = ask("How many of the 12 riders of the old firm reached the northern harbour in time?")
    found = find_duplicates(records("reworded", [first, reworded]), {})
    assert [(p.row, p.kind) for p in found.pairs] == [(1, "near")] and found.apart == {}
    told = report(found, {"pool": ["a", "b"]}, DedupSettings())
    assert told["counts"] == {"pool in pool": {"near": 1}} and told["apart"] == {}


def test_another_question_on_a_document_of_the_test_set_is_no_leak(records):
    rng = np.random.default_rng(10)
    document = " ".join(prose(rng, 200, WORDS))
    test = records("test", [(f"{document}\nWho wrote the oldest letter?", "")])
    answer = " ".join(prose(rng, 60, WORDS))
    pool = [
        (f"{document}\nWhere do ships arrive in spring?", answer),
        (f"{document}\nWHO wrote the oldest letter", answer),
    ]
    found = find_duplicates(records("pool", pool), {"test": test}, held_out=["test"])
    assert [(p.row, p.kind) for p in found.pairs] == [(1, "prompt")]


def test_a_result_is_kept_and_depends_on_what_it_says(records, tmp_path, monkeypatch):
    pool = records("pool", [("a b c", "d e f g"), ("a b c", "d e f g"), ("x", "y")])
    first = find_duplicates(pool, {}, cache_dir=tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(dedup, "_sketch", lambda *a: (_ for _ in ()).throw(AssertionError("searched again")))
        assert find_duplicates(pool, {}, cache_dir=tmp_path / "cache") == first
        with pytest.raises(AssertionError, match="searched again"):
            find_duplicates(pool, {}, settings=DedupSettings(0.9), cache_dir=tmp_path / "cache")
        with pytest.raises(AssertionError, match="searched again"):
            find_duplicates(pool.subset([0, 2]), {}, cache_dir=tmp_path / "cache")


def test_bad_settings_and_names_are_refused(records):
    for options in ({"threshold": 0.0}, {"threshold": 1.1}, {"shingle": 0}, {"permutations": 0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            DedupSettings(**options)
    pool = records("pool", [("a", "b")])
    with pytest.raises(ConfigError, match="pool"):
        find_duplicates(pool, {"pool": pool})
    with pytest.raises(ConfigError, match="dev"):
        find_duplicates(pool, {"test": pool}, held_out=["dev"])
