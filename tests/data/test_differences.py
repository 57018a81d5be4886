"""What two texts that share most of their words say differently."""

from __future__ import annotations

import numpy as np
import pytest

from ntkjax.data.dedup import word_hashes
from ntkjax.data.differences import Words, changed_words, difference, uncovered, words_of


def compared(a: str, b: str) -> str | None:
    left, right = Words.of(a), Words.of(b)
    return difference(left, right, changed_words(left, right, (word_hashes(left.words), word_hashes(right.words)), 5))


def test_words_of_scripts_and_signs():
    assert words_of("汉字 ab12 かな한글 x+y") == ["汉", "字", "ab12", "か", "な", "한", "글", "x", "+", "y"]
    assert words_of("It's 1,000.5 - 3 (third-party)\u2014don\u2019t!") == [
        "it", "is", "1000.5", "-", "3", "third", "party", "dont",
    ]  # fmt: skip
    assert words_of("- 5 pears\n* a plum, -7") == ["5", "pears", "a", "plum", "-", "7"]
    assert words_of("?!") == ["?!"] and words_of("  ") == []


@pytest.mark.parametrize("text", ["One two. Three: four?\nFive 3.5 - 2", "", "?!", "。汉字。字"])
def test_sentences_belong_to_the_same_words(text):
    found = Words.of(text)
    assert list(found.words) == words_of(text) and len(found.sentences) == len(found.words)
    if text.startswith("One"):
        assert list(found.sentences) == [0, 0, 1, 2, 4, 4, 4, 4]  # two ends after one another leave an empty sentence


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("What is the capital of France?", "What's the capital city of France?"),
        ("What's 1,000 - 5?", "what is 1000-5"),
        ('The "quoted" (text) here...', "the quoted text here"),
        ("Name the ships that left the harbour at dawn.", "Name the ships that left the harbour at dawn.\nAnswer:"),
        ("The old keeper of the small lamp walked slowly home along the wet road that night.",
         "The old keeper of the tiny lamp walked slowly home along the wet road that night."),
    ],
)  # fmt: skip
def test_the_same(a, b):
    assert compared(a, b) is None and compared(b, a) is None


@pytest.mark.parametrize(
    ("a", "b", "what"),
    [
        ("What is 2 + 3?", "What is 2 + 4?", "numbers"),
        ("x + y", "x - y", "numbers"),
        ("It is -5 degrees", "It is 5 degrees", "numbers"),
        ("The answer is B.", "The answer is C.", "numbers"),
        ("They took three of the boats.", "They took four of the boats.", "numbers"),
        ("So the answer is red.", "So the answer is blue.", "words"),
        ("The guest is allowed to enter the hall.", "The guest isn't allowed to enter the hall.", "words"),
        ("The guest may enter.", "The guest may not enter.", "words"),
        ("Prices at the port of the old town are higher", "Prices at the port of the old town are lower", "words"),
        ("The parties may share information with employees.", "The parties shall destroy their information.", "words"),
        ("It is so.", "It is false.", "words"),
        ("So the answer is in.", "So the answer is on.", "words"),
        ("Man bites dog", "Dog bites man", "words"),
        ("I see", "I see. Now list every harbour, ship, captain and cargo named above.", "words"),
        ("这是猫。", "这是狗。", "words"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("shared", [0, 50, 1000])
def test_something_else_whatever_stands_before(a, b, what, shared):
    head = " ".join(f"w{i}" for i in range(shared)) + "\n"
    assert compared(head + a, head + b) == what == compared(head + b, head + a)
    assert compared(head + a, head + a) is None


def test_a_question_that_quotes_its_document():
    """The quoted words stand in both texts: only how often tells the questions apart."""
    words = [f"w{i}" for i in range(60)]
    ask = lambda start: f"{' '.join(words)}.\nIs it said that {' '.join(words[start : start + 12])}?"
    assert compared(ask(5), ask(40)) == "words"


def test_uncovered_words_against_all_runs():
    """The definition, word by word: outside what both begin and end with, in no run that both have equally often."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        a = rng.integers(1, 5, int(rng.integers(0, 25))).astype(np.uint64)
        b = rng.integers(1, 5, int(rng.integers(0, 25))).astype(np.uint64)
        start = next((k for k, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
        left, right = a[start:].tolist(), b[start:].tolist()
        end = next((k for k, (x, y) in enumerate(zip(left[::-1], right[::-1])) if x != y), min(len(left), len(right)))
        inner = [side[: len(side) - end] for side in (left, right)]
        grams = [[tuple(side[k : k + 3]) for k in range(len(side) - 2)] for side in inner]
        for side, own, whole, got in zip(inner, grams, (a, b), uncovered(a, b, 3)):
            alone = [True] * len(side)
            for k, gram in enumerate(own):
                if grams[0].count(gram) == grams[1].count(gram):
                    alone[k : k + 3] = [False] * 3
            assert got.tolist() == [False] * start + alone + [False] * end
            assert len(got) == len(whole)
