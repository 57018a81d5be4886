"""When two answers are equal, which choice an answer is, and what the answer in a generated text is.

Equality is what a person would say (`normalise_answer`). Only typography is folded; signs, comparison marks, brackets,
powers, units and the case of symbols stay, since they carry meaning: "<5 mm" is not ">5 mm", "(0, 1]" is not "[0, 1)",
"Rr" is not "rr". Two choices of one question are never equal (`find_choices`).
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from ntkjax.errors import ConfigError

_SPELLINGS = str.maketrans(
    {
        **dict.fromkeys("‘’‚‛‹›", "'"),
        **dict.fromkeys("“”„‟«»", '"'),
        **dict.fromkeys("‐‑‒–—―−﹣", "-"),
        **dict.fromkeys("\u00ad\u200b\u2060\ufeff", ""),  # soft hyphen and blanks of no width
        **{code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)},  # full-width forms of ASCII
        **dict(zip("ﬀﬁﬂﬃﬄﬅﬆ", ("ff", "fi", "fl", "ffi", "ffl", "st", "st"))),
        "…": "...",
        "µ": "μ",  # the micro sign and the Greek letter
    }
)
_SEPARATOR = re.compile("(?<=[0-9])[\u00a0\u2007\u2009\u202f](?=[0-9]{3}(?![0-9]))")
"""Blanks that do not break a line, in front of three digits: thousands separators."""
_WRAPPERS = ("**", "*", "`", '"', "'")
_LABEL = re.compile(r"\(?([A-Za-z])\)")
_NUMBER = re.compile(r"([+-]?)([0-9]+|[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}|)(?:\.([0-9]+))?")
_WORD = re.compile(r"(?:[^\W\d_][\u0300-\u036f]*)+")
_SHORT_WORDS = frozenset(
    ("am", "an", "as", "at", "be", "by", "do", "go", "he", "if", "in", "is")
    + ("me", "my", "no", "of", "ok", "on", "or", "so", "to", "up", "we")
)
"""Words of two letters, whatever their case."""
_NAMES_IN_CAPITALS = frozenset(("it", "us"))
"""Words of two letters that are names where both are capitals."""

# -- equality --


def fold_typography(answer: str) -> str:
    """The answer in one typography: canonical Unicode (NFC), plain quotes, hyphens, digits and blanks, blank runs
    as one blank, without what stands around it (quotes, ``**`` or `````, the brackets of a label "(B)", the full
    stop of the sentence).

    Compatibility forms are kept apart (10³ is not 103), but for ligatures and full-width forms. Never empty where the
    answer is not blank.
    """
    text = _plain_characters(answer)
    while (shorter := _unwrap(text)) != text:
        text = shorter
    return text


def _plain_characters(text: str) -> str:
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).translate(_SPELLINGS))
    return " ".join(_SEPARATOR.sub("", text).split())


def _unwrap(text: str) -> str:
    """Without the outermost wrapper, or the last full stop, if there is one and something is left."""
    for mark in _WRAPPERS:
        inner = text[len(mark) : -len(mark)]
        if text == f"{mark}{inner}{mark}" and inner.strip() and mark[0] not in inner:
            return inner.strip()
    label = _LABEL.fullmatch(text)
    if label is not None:
        return label.group(1)
    if text.endswith((".", "。")) and (rest := text[:-1].rstrip()) and not rest.endswith(".."):
        return rest
    return text


def normalise_answer(answer: str) -> str:
    """The normal form: two answers are equal where theirs are.

    Typography is folded (`fold_typography`). A plain number loses thousands separators, a plus sign and the zeros that
    end its decimals; all digits count, however many. Of anything else the case of ordinary words is folded, and of
    nothing more: an ordinary word stands apart from digits, has no capital behind a small letter, and

    - has three letters or more (four behind a number, where units stand: "cal", "Cal"), with a vowel among them or all
      in one case ("gdp" and "GDP", not "Mbps" and "mbps"), and is not made of doubled letters (genotypes: "AABB"),
    - or is a common word of two letters ("no", "up"; not "mW", "Co", "US"), or "A" in front of a word.
    """
    text = fold_typography(answer)
    number = _NUMBER.fullmatch(text)
    if number is not None and (number.group(2) or number.group(3)):
        return _plain_number(*number.groups())
    return unicodedata.normalize("NFC", _WORD.sub(_fold_word, text))


def _plain_number(sign: str, whole: str, decimals: str | None) -> str:
    whole, decimals = whole.replace(",", "") or "0", (decimals or "").rstrip("0")
    zero = not decimals and not whole.strip("0")
    return ("-" if sign == "-" and not zero else "") + whole + (f".{decimals}" if decimals else "")


def _fold_word(match: re.Match[str]) -> str:
    word, before, after = match.group(), match.string[: match.start()], match.string[match.end() :]
    small = word.lower()
    if before[-1:].isalnum() or after[:1].isalnum() or "_" in (before[-1:], after[:1]) or not small.isalpha():
        return word
    if word == "A" and not before and re.match(r" [^\W\d_]{2}", after):
        return small
    if small in _SHORT_WORDS | _NAMES_IN_CAPITALS:
        forms = (small, small.title(), small.upper())
        return small if word in forms[: 2 if small in _NAMES_IN_CAPITALS else 3] else word
    pairs = len(word) % 2 == 0 and small[::2] == small[1::2]
    if pairs or len(word) < (4 if re.search(r"[0-9] $", before) else 3):
        return word
    vowel = any(letter in "aeiouy" or not letter.isascii() for letter in small)
    return small if word in (small, word.upper()) or (vowel and word == word.title()) else word


def same_answer(first: str, second: str) -> bool:
    """Whether a person would say that two answers are the same: equal after `normalise_answer`."""
    return normalise_answer(first) == normalise_answer(second)


# -- choices --

_FORMS: tuple[Callable[[str], str], ...] = (
    str,
    str.strip,
    fold_typography,
    normalise_answer,
    lambda text: fold_typography(text).casefold(),
)
"""How answer and choice are compared, the strictest first."""


def find_choices(answer: str, choices: Sequence[str]) -> list[int]:
    """The choices that the answer may be, by the strictest comparison that finds any.

    As written; but for blanks at the ends; but for typography; as `normalise_answer`; but for case. Several indices:
    the answer does not say which of them it is. A choice that is listed twice word for word counts once.
    """
    for form in _FORMS:
        wanted = form(answer)
        same = [c for c, choice in enumerate(choices) if form(choice) == wanted]
        if same:
            return same[:1] if len({choices[c] for c in same}) == 1 else same
    return []


def match_choice(answer: str, choices: Sequence[str]) -> int | None:
    """Index of the choice that the answer is; None where it is none of them, or could be several."""
    same = find_choices(answer, choices)
    return same[0] if len(same) == 1 else None


def count_answers(answers: Iterable[tuple[str, Sequence[str] | None]]) -> dict[str, int]:
    """How often each answer is given, commonest first, then by text.

    Args:
      answers: (answer, choices of its question or None). An answer that is a choice counts as that choice. Equal
        answers are one, named as it is most often written; not where two choices of a question have one normal form.
    """
    counts: dict[tuple[bool, str], Counter[str]] = {}
    for answer, choices in answers:
        index = match_choice(answer, choices or ())
        answer = answer if index is None or choices is None else choices[index]
        key = normalise_answer(answer)
        alone = all(choice == answer or normalise_answer(choice) != key for choice in choices or ())
        counts.setdefault((alone, key if alone else answer), Counter())[answer] += 1
    totals: Counter[str] = Counter()
    for of in counts.values():
        totals[min(of, key=lambda text: (-of[text], text))] += of.total()
    return dict(sorted(totals.items(), key=lambda item: (-item[1], item[0])))


# -- reading --

_CLOSERS = {"*": "*", "`": "`", '"': '"', "'": "'", "(": ")"}
_STOP = re.compile(r"""[.!?]["'”’)*`]*(?=\s|$)|。""")
_DOTTED = re.compile(r"(?:^|[^\w.])(?:[^\W\d_]\.)+[^\W\d_]$")
"""In front of a full stop: abbreviations such as U.S., a.m., e.g."""
_OPENERS = frozenset(
    ("A", "An", "And", "As", "Because", "But", "Due", "For", "He", "Hence", "However", "I", "If", "In", "It", "Its")
    + ("Since", "She", "So", "That", "The", "Their", "There", "Therefore", "These", "They", "This", "Those", "Thus")
    + ("We", "When", "Which", "While", "You")
)
"""Words that open a sentence; behind an abbreviation that may end one, any other word goes on with the answer."""
_GOES_ON = frozenset(
    ("approx", "ca", "cf", "vs", "e.g", "i.e", "fig", "eq", "eqs", "st", "mt", "dr", "mr", "mrs", "ms", "prof")
    + ("gen", "gov", "sen", "rep", "rev", "capt", "sgt", "col")
)
"""Abbreviations that something always follows."""
_BEFORE_A_NUMBER = frozenset(
    ("No", "Nos", "Vol", "Ch", "Sec", "Art", "p", "pp")
    + ("Jan", "Feb", "Mar", "Apr", "Jun", "Jul", "Aug", "Sep", "Sept", "Oct", "Nov", "Dec")
)
"""Abbreviations where a number follows, else words that may end a sentence."""
_MAY_END = frozenset(("etc", "inc", "ltd", "corp", "co", "jr", "sr", "bros"))
"""Abbreviations that end a sentence or do not."""


def answer_marker(answer_template: str) -> str:
    """What stands before the answer in the template: ``"So the answer is {}."`` gives ``"So the answer is"``."""
    return answer_template.partition("{}")[0].rstrip()


def default_pattern(answer_template: str) -> str:
    """Regular expression for what follows the template's marker, up to the end of the line or of the text,
    as the group ``sentence``.

    Case and the amount of blank space do not matter. Where in the line the answer ends is no matter for a regular
    expression: see `last_answer` and `read_choice`.
    """
    words = [re.escape(w) for w in answer_marker(answer_template).split()]
    if not words:
        raise ConfigError(
            f"answer_template {answer_template!r} has nothing before the {{}}, so an answer cannot be found "
            f"in generated text; "
            "give a template with words before the {}, such as 'So the answer is {}.'"
        )
    # The line is looked at, not consumed: a later marker in it is found as well.
    return r"(?i)" + r"\s+".join(words) + r"[ \t]*:?[ \t]*(?=(?P<sentence>\S[^\n]*))"


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Compile, and refuse a pattern without a group.

    Raises:
      ConfigError: not a regular expression, or no group 1.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"answer_pattern {pattern!r} is not a regular expression: {error}") from None
    if compiled.groups < 1:
        raise ConfigError(f"answer_pattern {pattern!r} has no group; put the answer in parentheses")
    return compiled


def _behind_last_marker(text: str, pattern: re.Pattern[str]) -> str | None:
    """Group 1 of the last match: the answer and, of a group ``sentence``, the rest of its line."""
    last = None
    for match in pattern.finditer(text):
        last = match
    return None if last is None else last.group(1)


def last_answer(text: str, pattern: re.Pattern[str]) -> str | None:
    """Group 1 of the last match, without what stands around it (as `fold_typography` takes it off, but the full stop of
    "U.S." is kept); None where the marker is absent or nothing but full stops follows it.

    Of a group ``sentence`` the answer is the first sentence: it ends at a full stop, question or exclamation mark in
    front of a blank, but not behind an abbreviation ("U.S. dollars", "approx. 5"), and an exclamation mark is part of
    the answer where it stands behind a number or a symbol ("5!").
    """
    behind = _behind_last_marker(text, pattern)
    if behind is None:
        return None
    answer = _tidy(_first_sentence(behind) if "sentence" in pattern.groupindex else behind)
    return answer if answer.strip(". …") else None


def _first_sentence(line: str) -> str:
    for match in _STOP.finditer(line):
        mark, closers = match.group()[0], match.group()[1:]
        before, after = line[: match.start()], line[match.end() :].split()
        if mark == "." and after and _is_abbreviated(before, after[0]):
            continue
        if mark == "!" and not re.search(r"""[^\W\d_]{2}["'”’)*`]*$""", before):
            continue
        return before + ("" if mark in "!?" else mark) + closers
    return line


def _is_abbreviated(before: str, following: str) -> bool:
    """Whether a full stop behind ``before`` is that of an abbreviation, and the answer goes on with ``following``."""
    word = re.split(r"[\s(\"'*`]", before)[-1]
    if word.lower() in _GOES_ON:
        return True
    if word in _BEFORE_A_NUMBER:
        return following[0].isdigit()
    return _has_own_stop(before) and following.strip(",;:") not in _OPENERS


def _has_own_stop(text: str) -> bool:
    """Whether the text ends on an abbreviation that may end a sentence and is written with a full stop."""
    return bool(_DOTTED.search(text)) or text.rpartition(" ")[2].lower() in _MAY_END


def _tidy(answer: str) -> str:
    """What was read, as it is shown: `fold_typography`, but with the full stop of an abbreviation, and without a comma
    or colon at the end."""
    text = _plain_characters(answer)
    while True:
        shorter = _unwrap(text)
        if text == f"{shorter}." and _has_own_stop(shorter):
            shorter = text
        shorter = re.sub(r"(?<=[^\s,;:])[,;:]+$", "", shorter)
        if shorter == text:
            return text
        text = shorter


def read_choice(text: str, pattern: re.Pattern[str], choices: Sequence[str]) -> int | None:
    """The choice that stands at the place of the answer, behind the last marker; None where none does.

    Of the choices that the text there begins with, the longest: as written but for typography, or but for case where
    no other choice of the question differs from it in case only. What follows must not go on with it (see
    `_ends_there`). A whole answer (`last_answer`) that is a choice counts with its length.
    """
    behind, answer = _behind_last_marker(text, pattern), last_answer(text, pattern)
    if behind is None or answer is None:
        return None
    line = _plain_characters(behind)
    matches: list[tuple[int, int, int]] = []
    whole = match_choice(answer, choices)
    if whole is not None:
        matches.append((len(fold_typography(answer)), 0, whole))
    for looseness, form in enumerate((fold_typography, lambda text: fold_typography(text).casefold())):
        forms = [form(choice) for choice in choices]
        start = line if looseness == 0 else line.casefold()
        for c, choice in enumerate(forms):
            twin = any(other == choice and choices[k] != choices[c] for k, other in enumerate(forms))
            if not twin and choice and _stands(start, choice, looseness > 0):
                matches.append((len(choice), -looseness, c))
    if not matches:
        return None
    longest = max(entry[:2] for entry in matches)
    best = {entry[2] for entry in matches if entry[:2] == longest}
    return min(best) if len({choices[c] for c in best}) == 1 else None


def _stands(line: str, choice: str, any_case: bool) -> bool:
    """Whether the line begins with the choice, marks of emphasis, quotes and a bracket around it or not."""
    opened = ""
    while True:
        if line.startswith(choice, len(opened)):
            rest, closed = line[len(opened) + len(choice) :], "".join(_CLOSERS[c] for c in reversed(opened))
            if _ends_there(choice, rest, closed, any_case):
                return True
        if line[len(opened) : len(opened) + 1] not in _CLOSERS:
            return False
        opened += line[len(opened)]


def _ends_there(choice: str, rest: str, closed: str, any_case: bool) -> bool:
    """Whether ``rest`` does not go on with the choice: it is empty or begins with punctuation of the sentence, or,
    behind a word, with a blank and a word other than "or", "and", "nor". A number in front of a unit, a sign or another
    number goes on, and so do "5!" and a bracket that was not opened."""
    if closed:
        point = re.match(r"[.,;:!?]?", rest)
        assert point is not None
        if rest.startswith(closed):
            rest = rest[len(closed) :]
        elif rest.startswith(closed, point.end()):
            rest = rest[: point.end()] + rest[point.end() + len(closed) :]
        elif set(closed) - set("*"):
            return False
    word = choice[-1].isalpha() and len(choice) > 1
    label = len(choice) == 1 and choice.isalpha() and not any_case
    if re.match(r"[.;](\s|$)|。|$", rest):
        return True
    if rest[0] in ",:":
        return bool(re.match(r"[,:](\s|$)" if word else r"[,:](\s+\D|$)", rest))
    if rest[0] in "!?":
        return word and bool(re.match(r"[!?]+(\s|$)", rest))
    return (word or label) and bool(re.match(r" (?!(?:or|and|nor)\b)(?:[^\W\d_]|- |\()", rest))
