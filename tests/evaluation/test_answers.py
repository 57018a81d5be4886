"""Answers out of text: by example, since that is how people write them."""

import pytest

from ntkjax.errors import ConfigError
from ntkjax.evaluation.answers import (
    compile_pattern,
    default_pattern,
    last_answer,
    match_choice,
    normalise_answer,
    same_answer,
)

PATTERN = compile_pattern(default_pattern("So the answer is {}."))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So the answer is yes.", "yes"),
        ("Because. So the answer is no. So the answer is yes.", "yes"),
        ("so the ANSWER  is: (B).", "B"),
        ("So the answer is 3.5.", "3.5"),
        ("So the answer is -5", "-5"),
        ("So the answer is $1,200.", "$1,200"),
        ('So the answer is "not enough information"!\nNext line.', "not enough information"),
        ("So the answer is U.S. dollars.", "U.S"),
        ("So the\nanswer is **neutral**.", "neutral"),
        ("So the answer is", None),
        ("So the answer is ...", None),
        ("The answer may be yes.", None),
        ("", None),
    ],
)
def test_last_answer(text, answer):
    assert last_answer(text, PATTERN) == answer


def test_a_pattern_of_ones_own():
    pattern = compile_pattern(r"####\s*(\S+)")
    assert last_answer("so #### 7\n#### 18", pattern) == "18"


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("Yes", " yes. ", True),
        ("1,000", "1000", True),
        ("18.0", "18", True),
        ("+5", "5", True),
        ("-5", "5", False),
        ("5%", "5", False),
        ("0.10", ".1", False),
        ("1,00", "100", False),
        ("the  Thing", "the thing", True),
        ("ﬁve", "five", True),
        ("0", "-0", True),
    ],
)
def test_same_answer(a, b, same):
    assert same_answer(a, b) is same


def test_canonical_numbers_are_plain():
    assert normalise_answer("1,000,000") == "1000000"
    assert normalise_answer("100") == "100"


def test_match_choice():
    assert match_choice("NEUTRAL", ["negative", "neutral"]) == 1
    assert match_choice("neither", ["negative", "neutral"]) is None


def test_settings_that_cannot_work():
    with pytest.raises(ConfigError, match=r"nothing before the \{\}"):
        default_pattern("{}.")
    with pytest.raises(ConfigError, match="is not a regular expression"):
        compile_pattern("(")
    with pytest.raises(ConfigError, match="has no group"):
        compile_pattern("answer")
