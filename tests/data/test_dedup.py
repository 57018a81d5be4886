"""Duplicates: every pair that brute force finds, none that it does not, and the right row of each group kept."""

from __future__ import annotations

import functools
import json
import re

import numpy as np
import pytest

import ntkjax.data.dedup as dedup
from ntkjax.data import read_records
from ntkjax.data.dedup import DedupSettings, find_duplicates, jaccard, normalise, report, shingles, word_hashes
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


def test_jaccard_is_that_of_sets_of_tuples():
    rng = np.random.default_rng(0)
    for count in (0, 1, 3, 10, 55):
        a = sentence(rng)
        b = " ".join(changed(rng, a, count))
        found = [shingles(word_hashes(normalise(text)), 5) for text in (" ".join(a), b)]
        assert jaccard(*found) == similarity(" ".join(a), b)
    one = lambda text: shingles(word_hashes(normalise(text)), 5)
    assert jaccard(one("two words"), one("Two  WORDS")) == 1 and jaccard(one("two words"), one("two other")) == 0
    assert jaccard(one(""), one("")) == 0


@pytest.mark.parametrize("words", [20, 48, 49, 100])
def test_one_word_changed_in_the_middle(words):
    rng = np.random.default_rng(1)
    a = [f"w{i}" for i in range(words)]
    b = a[: words // 2] + sentence(rng, 1) + a[words // 2 + 1 :]
    found = jaccard(*[shingles(word_hashes(" ".join(text)), 5) for text in (a, b)])
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
    """400 texts of 60 words in 100 families, the members further and further from the first."""
    rng = np.random.default_rng(2)
    texts = []
    for _ in range(100):
        first = sentence(rng)
        texts += [first] + [changed(rng, first, count) for count in (1, 2, 8)]
    texts = [" ".join(texts[i]) for i in rng.permutation(len(texts))]
    pool = records("pool", [(t[:100], t[100:]) for t in texts])
    found = find_duplicates(pool, {})
    joined = [" ".join(f"{t[:100]} {t[100:]}".split()) for t in texts]
    kept, expected = [], {}
    for j, text in enumerate(joined):  # greedy in row order, every kept row compared
        best = max(((similarity(text, joined[i]), -i) for i in kept), default=(0.0, 0))
        if best[0] >= 0.8:
            expected[j] = best[0]
        else:
            kept.append(j)
    missed = set(expected) - {p.row for p in found.pairs}
    assert len(expected) > 100
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


def test_exact_means_equal_up_to_case_width_and_white_space(records):
    pool = records(
        "pool", [("What  is 3 + 4?", "Seven."), ("what is ３ + 4?", " SEVEN.\n"), ("What is 3 - 4?", "Seven.")]
    )
    found = find_duplicates(pool, {})
    assert [(p.row, p.of_row, p.kind, p.similarity) for p in found.pairs] == [(1, 0, "exact", 1.0)]
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
    b, c = ["x"] * 4 + a[4:], ["x"] * 4 + a[4:55] + ["y"] * 5
    say = lambda words: (" ".join(words[:30]), " ".join(words[30:]))
    found = find_duplicates(records("pool", [say(a), say(b), say(c)]), {}, settings=DedupSettings(0.8))
    text = lambda words: " ".join(words)
    assert similarity(text(a), text(b)) >= 0.8 and similarity(text(b), text(c)) >= 0.8 > similarity(text(a), text(c))
    assert found.kept.tolist() == [0, 2]


def test_crowded_buckets_are_counted_and_exact_ones_still_found(records, monkeypatch, tmp_path):
    """Same first 49 words, different ends: members of a template. Few comparisons are made, and copies are found."""
    monkeypatch.setattr(dedup, "CROWD", 4)
    compared = []
    monkeypatch.setattr(dedup, "jaccard", lambda a, b: compared.append(1) or jaccard(a, b))
    rng = np.random.default_rng(6)
    head = sentence(rng, 49)
    pairs = [(" ".join(head), " ".join(sentence(rng, 20))) for _ in range(60)]
    found = find_duplicates(records("pool", [*pairs, pairs[-1]]), {}, cache_dir=tmp_path / "crowd")
    assert [(p.row, p.of_row, p.kind) for p in found.pairs] == [(60, 59, "exact")]
    assert found.crowded > 0 and len(compared) < 61 * 4 * 22


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


def test_words_of_scripts_without_spaces(records):
    assert dedup.WORD.findall("汉字 ab12 かな한글 x+y") == ["汉", "字", "ab12", "か", "な", "한", "글", "x", "+", "y"]


def test_bad_settings_and_names_are_refused(records):
    for options in ({"threshold": 0.0}, {"threshold": 1.1}, {"shingle": 0}, {"permutations": 0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            DedupSettings(**options)
    pool = records("pool", [("a", "b")])
    with pytest.raises(ConfigError, match="pool"):
        find_duplicates(pool, {"pool": pool})
    with pytest.raises(ConfigError, match="dev"):
        find_duplicates(pool, {"test": pool}, held_out=["dev"])
