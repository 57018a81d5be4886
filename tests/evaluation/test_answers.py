"""Answers: equal only where a person would say so, choices never equal to one another, and read whole out of text."""

import itertools

import pytest

from ntkjax.errors import ConfigError
from ntkjax.evaluation.answers import (
    compile_pattern,
    count_answers,
    default_pattern,
    find_choices,
    fold_typography,
    last_answer,
    match_choice,
    normalise_answer,
    read_choice,
    same_answer,
)

PATTERN = compile_pattern(default_pattern("So the answer is {}."))

EQUAL = [
    # blanks, quotes, dashes, markup, full-width forms, the full stop of the sentence
    ("Yes", " yes. "),
    ("the  Thing", "the thing"),
    ("non\u00a0breaking", "non breaking"),
    ("It’s raining", "It's raining"),
    ("“Paris”", "Paris"),
    ("«Paris»", '"Paris"'),
    ("'Paris'", "Paris"),
    ("**neutral**", "neutral"),
    ("`x = 1`", "x = 1"),
    ("*B*", "B"),
    ("**“Paris.”**", "Paris"),
    ("(B)", "B"),
    ("B)", "B"),
    ("−5", "-5"),
    ("1990–1995", "1990-1995"),
    ("well‑known", "well-known"),
    ("１２３", "123"),
    ("ＡＢＣ", "ABC"),
    ("ﬁve", "five"),
    ("café", "cafe\u0301"),
    ("5 µm", "5 μm"),
    ("U.S.", "U.S"),
    ("U.S..", "U.S."),
    ("soft\u00adware", "software"),
    ("and so on…", "and so on..."),
    ("京都。", "京都"),
    # plain numbers
    ("1,000", "1000"),
    ("1,000,000.50", "1000000.5"),
    ("10,00,000", "1000000"),
    ("1\u202f000", "1000"),
    ("18.0", "18"),
    ("+5", "5"),
    ("0", "-0"),
    ("0.10", ".1"),
    ("5.", "5"),
    ("12345678901234567890123456789012.0", "12345678901234567890123456789012"),
    # the case of ordinary words
    ("Paris", "paris"),
    ("PARIS", "Paris"),
    ("No", "no"),
    ("NO", "no"),
    ("It is so", "it is so"),
    ("A dog", "a dog"),
    ("Not enough information", "not enough information"),
    ("GDP", "gdp"),
    ("NASA", "nasa"),
    ("10 AM", "10 am"),
    ("5 Apples", "5 apples"),
    ("COVID-19", "Covid-19"),
    ("Élan", "élan"),
    ("МОСКВА", "Москва"),
]
DIFFERENT = [
    # signs, comparison marks, brackets, powers
    ("<5 mm", ">5 mm"),
    ("≤5", "≥5"),
    ("-5", "5"),
    ("±5", "5"),
    ("~5", "5"),
    (".5", "5"),
    ("$5", "5"),
    ("5%", "5"),
    ("5°", "5"),
    ("(0, 1]", "[0, 1)"),
    ("(0, 1)", "[0, 1]"),
    ("{1}", "(1)"),
    ("(5)", "5"),
    ("10³", "103"),
    ("10^3", "103"),
    ("H₂O", "H2O"),
    ("x²", "x2"),
    ("½", "1/2"),
    ("5!", "5"),
    ("n!", "n"),
    ("A*", "A"),
    ("A+", "A"),
    ("*p", "p"),
    ("__init__", "init"),
    ("why?", "why"),
    ("'a", "a"),
    ("C#", "C"),
    # numbers
    ("1,00", "100"),
    ("3,5", "3.5"),
    ("3,5", "35"),
    ("1.5", "15"),
    ("1 000", "10 00"),
    ("007", "7"),
    ("0101", "101"),
    ("12345678901234567890123456789012", "12345678901234567890123456789013"),
    ("0.12345678901234567890123456789012", "0.12345678901234567890123456789013"),
    ("1e5", "15"),
    ("IV", "4"),
    # units and the case of symbols
    ("5 mm", "5 cm"),
    ("5 mm", "5"),
    ("5 mW", "5 MW"),
    ("5mW", "5MW"),
    ("mW", "MW"),
    ("5 Mbps", "5 mbps"),
    ("5 Cal", "5 cal"),
    ("Rr", "rr"),
    ("Rr", "RR"),
    ("AABB", "aabb"),
    ("AaBb", "AABB"),
    ("Aa", "aa"),
    ("Co", "CO"),
    ("mg", "Mg"),
    ("US", "us"),
    ("IT", "it"),
    ("x", "X"),
    ("x1", "X1"),
    ("vitamin A", "vitamin a"),
    ("pH", "PH"),
    ("toString", "tostring"),
    ("1 k", "1 K"),
    # other words
    ("yes", "no"),
    ("a.m.", "p.m."),
    ("U.S.", "U.K."),
    ("cafe", "café"),
    ("not neutral", "neutral"),
    ("...", "."),
]


@pytest.mark.parametrize(("a", "b"), EQUAL)
def test_equal(a, b):
    assert same_answer(a, b) and same_answer(b, a)


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_different(a, b):
    assert not same_answer(a, b) and not same_answer(b, a)


@pytest.mark.parametrize("text", sorted({text for pair in EQUAL + DIFFERENT for text in pair}))
def test_the_normal_form_is_its_own(text):
    once = normalise_answer(text)
    assert normalise_answer(once) == once != ""
    assert fold_typography(fold_typography(text)) == fold_typography(text)


def test_canonical_numbers_are_plain():
    assert normalise_answer("1,000,000") == "1000000"
    assert normalise_answer("100") == "100"
    assert normalise_answer("-.50") == "-0.5"
    assert normalise_answer("+") == "+"


# -- choices --


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_each_of_two_choices_is_itself(a, b):
    assert (match_choice(a, [a, b]), match_choice(b, [a, b])) == (0, 1)


@pytest.mark.parametrize(("a", "b"), EQUAL)
def test_two_choices_are_never_equal(a, b):
    assert (match_choice(a, [a, b]), match_choice(b, [a, b])) == (0, 1)


@pytest.mark.parametrize(
    ("answer", "choices", "index"),
    [
        ("NEUTRAL", ["negative", "neutral"], 1),
        ("neither", ["negative", "neutral"], None),
        ("5 mW", ["5 MW", "5 mW"], 1),
        ("5 mw", ["5 MW", "5 mW"], None),  # it could be either
        ("5 mw", ["5 mW", "6 mW"], 0),  # no other choice differs in case only
        ("b", ["A", "B"], 1),
        ("(b)", ["A", "B"], 1),
        ("1,000", ["1000", "100"], 0),
        ("3.1", ["3.10", "3.1"], 1),
        ("3.100", ["3.10", "3.1"], None),
        ("“yes.”", ["no", "yes"], 1),
        ("yes", ["no", "yes", "yes"], 1),  # listed twice, word for word
        ("", ["no", "yes"], None),
    ],
)
def test_match_choice(answer, choices, index):
    assert match_choice(answer, choices) == index


def test_find_choices_says_which_are_meant():
    assert find_choices("5 mw", ["5 MW", "6 MW", "5 mW"]) == [0, 2]


def test_count_answers():
    answers = [("Yes", None), ("yes", None), ("yes.", None), ("yes", ["no", "yes"]), ("no", None)]
    assert count_answers(answers) == {"yes": 4, "no": 1}
    assert count_answers([("YES", ["no", "yes"])] * 2) == {"yes": 2}  # as the choice is written
    assert count_answers([("3.10", ["3.1", "3.10"]), ("3.1", ["3.1", "3.10"])]) == {"3.1": 1, "3.10": 1}
    assert count_answers([]) == {}


# -- reading --


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So the answer is yes.", "yes"),
        ("Because. So the answer is no. So the answer is yes.", "yes"),
        ("so the ANSWER  is: (B).", "B"),
        ("So the answer is 3.5.", "3.5"),
        ("So the answer is 3.5. That is more.", "3.5"),
        ("So the answer is .5.", ".5"),
        ("So the answer is -5", "-5"),
        ("So the answer is $1,200.", "$1,200"),
        ("So the answer is (0, 1].", "(0, 1]"),
        ("So the answer is <5 mm.", "<5 mm"),
        ("So the answer is A*.", "A*"),
        ("So the answer is 5!", "5!"),
        ("So the answer is Yes! It is.", "Yes"),
        ('So the answer is "not enough information"!\nNext line.', "not enough information"),
        ("So the answer is U.S.", "U.S."),
        ("So the answer is U.S..", "U.S."),  # as the template writes it
        ("So the answer is U.S. dollars.", "U.S. dollars"),
        ("So the answer is 9 a.m. The shop opens then.", "9 a.m."),
        ("So the answer is e.g. cats.", "e.g. cats"),
        ("So the answer is approx. 5. More follows.", "approx. 5"),
        ("So the answer is No. 5.", "No. 5"),
        ("So the answer is no. 5 is less.", "no"),
        ("So the answer is Dr. Smith.", "Dr. Smith"),
        ("So the answer is Apple Inc. and others.", "Apple Inc. and others"),
        ("So the answer is B. Because it is.", "B"),
        ("So the\nanswer is **neutral**.", "neutral"),
        ("So the answer is **neutral.** For one thing,", "neutral"),
        ("So the answer is “Paris”, I think", "“Paris”, I think".translate(str.maketrans("“”", '""'))),
        ("So the answer is yes,", "yes"),
        ("So the answer is 京都。それは", "京都"),
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
    assert last_answer("#### a. b", compile_pattern(r"#### (.*)")) == "a. b"  # the group says where it ends


@pytest.mark.parametrize(
    ("text", "choices", "choice"),
    [
        ("5!", ["5", "5!"], "5!"),
        ("5!", ["5", "6"], None),
        ("yes, because it is", ["yes", "no"], "yes"),
        ("yes because it is", ["yes", "no"], "yes"),
        ("Yes! It is.", ["yes", "no"], "yes"),
        ("**yes.** It is", ["yes", "no"], "yes"),
        ('"yes."', ["yes", "no"], "yes"),
        ("yes or no", ["yes", "no"], None),
        ("maybe yes", ["yes", "no"], None),
        ("**B**: the second", ["A", "B"], "B"),
        ("A because", ["A", "B"], "A"),
        ("(b).", ["A", "B"], "B"),
        ("a bird", ["A", "B"], None),
        ("5 mm", ["5", "6"], None),
        ("5, 6 and 7", ["5", "6"], None),
        ("5, since", ["5", "6"], "5"),
        ("5 - 3", ["5", "3"], None),
        ("10³", ["10", "1000"], None),
        ("0.5.", ["0", "0.5"], "0.5"),
        ("1,000.", ["1", "1000"], "1000"),
        ("(0, 1].", ["[0, 1)", "(0, 1]"], "(0, 1]"),
        (">5 mm.", ["<5 mm", ">5 mm"], ">5 mm"),
        ("new york", ["new", "New York"], "New York"),
        ("New York City.", ["New York", "New York City"], "New York City"),
        ("J. Smith.", ["J", "J. Smith"], "J. Smith"),
        ("U.S. It is large.", ["U.S.", "France"], "U.S."),
        ("5 mW.", ["5 MW", "5 mW"], "5 mW"),
        ("5 mw.", ["5 MW", "5 mW"], None),
        ("rr, since", ["Rr", "rr"], "rr"),
        ("he left. So she did", ["he left. So", "he left. So she did"], "he left. So she did"),
        ("", ["yes", "no"], None),
    ],
)
def test_read_choice(text, choices, choice):
    found = read_choice(f"Let me see. So the answer is {text}", PATTERN, choices)
    assert (None if found is None else choices[found]) == choice


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_a_choice_said_by_the_template_is_read_back(a, b):
    choices = [a, b]
    for index, choice in enumerate(choices):
        if choice.strip(" ."):
            assert read_choice(f"So the answer is {choice}.", PATTERN, choices) == index


def test_settings_that_cannot_work():
    with pytest.raises(ConfigError, match=r"nothing before the \{\}"):
        default_pattern("{}.")
    with pytest.raises(ConfigError, match="is not a regular expression"):
        compile_pattern("(")
    with pytest.raises(ConfigError, match="has no group"):
        compile_pattern("answer")


# -- properties --


@pytest.mark.parametrize("examples", [150, pytest.param(2500, marks=pytest.mark.slow)])
def test_properties(examples):
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies as st

    pieces = st.sampled_from([*itertools.chain(*EQUAL, *DIFFERENT), ".", ",", "**", '"', "-", "A", "\u00a0", "３"])
    texts = st.one_of(st.text(max_size=12), st.lists(pieces, max_size=3).map("".join))

    @hypothesis.settings(deadline=None, max_examples=examples, derandomize=True)
    @hypothesis.given(texts, texts)
    def normal_form(a, b):
        once = normalise_answer(a)
        assert normalise_answer(once) == once and fold_typography(fold_typography(a)) == fold_typography(a)
        assert (once == "") == (not fold_typography(a))
        assert same_answer(a, a) and same_answer(a, b) == same_answer(b, a)

    @hypothesis.settings(deadline=None, max_examples=examples, derandomize=True)
    @hypothesis.given(st.lists(texts, min_size=2, max_size=4, unique=True))
    def choices_are_themselves(choices):
        assert [match_choice(choice, choices) for choice in choices] == list(range(len(choices)))

    @hypothesis.settings(deadline=None, max_examples=examples, derandomize=True)
    @hypothesis.given(texts, st.lists(texts, min_size=1, max_size=3))
    def reading_never_fails(text, choices):
        line = f"So the answer is {text}"
        last_answer(line, PATTERN)
        found = read_choice(line, PATTERN, choices)
        assert found is None or 0 <= found < len(choices)

    @hypothesis.settings(deadline=None, max_examples=examples, derandomize=True)
    @hypothesis.given(st.integers(), st.integers())
    def integers_of_any_size(a, b):
        assert same_answer(f"{a:,}", str(a)) and same_answer(str(a), str(b)) == (a == b)

    for check in (normal_form, choices_are_themselves, reading_never_fails, integers_of_any_size):
        check()
