"""Reading an answer out of generated text, and comparing answers."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

from ntkjax.errors import ConfigError

STRIPPED = " \t\r\n\"'`*_.,:;!?()[]{}<>“”‘’"
"""Characters taken off both ends of an answer. Signs and units (- + $ %) stay: they carry meaning."""

_NUMBER = re.compile(r"[+-]?(\d+|\d{1,3}(,\d{3})+)(\.\d+)?")


def answer_marker(answer_template: str) -> str:
    """What stands before the answer in the template: ``"So the answer is {}."`` gives ``"So the answer
    is"``.
    """
    return answer_template.partition("{}")[0].rstrip()


def default_pattern(answer_template: str) -> str:
    """Regular expression for the answer after the template's marker.

    Group 1 runs to the end of the sentence (a full stop followed by a blank or the end, so "3.5" stays
    whole), of the line or of the text. Case and the amount of blank space do not matter.
    """
    words = [re.escape(w) for w in answer_marker(answer_template).split()]
    if not words:
        raise ConfigError(
            f"answer_template {answer_template!r} has nothing before the {{}}, so an answer cannot be found "
            f"in generated text; "
            "give answer_pattern, a regular expression whose group 1 is the answer"
        )
    return r"(?i)" + r"\s+".join(words) + r"[ \t]*:?[ \t]*(\S.*?)[ \t]*(?:\.(?=\s|$)|\n|$)"


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


def last_answer(text: str, pattern: re.Pattern[str]) -> str | None:
    """Group 1 of the last match, punctuation stripped; None where the marker is absent or nothing follows
    it.
    """
    found = None
    for match in pattern.finditer(text):
        found = match
    if found is None or found.group(1) is None:
        return None
    answer = found.group(1).strip(STRIPPED)
    return answer or None


def normalise_answer(answer: str) -> str:
    """One form for equal answers: Unicode NFKC, case folded, blanks collapsed, outer punctuation off, numbers
    canonical.

    Numbers lose thousands separators, a plus sign and trailing zeros: "1,000.50" and "1000.5" are equal.
    """
    text = " ".join(unicodedata.normalize("NFKC", answer).casefold().split()).strip(STRIPPED)
    # "-.5" and the like are left as text; so is anything with a unit.
    if _NUMBER.fullmatch(text):
        try:
            number = Decimal(text.replace(",", "")).normalize()
        except InvalidOperation:
            return text
        return f"{number + 0:f}"
    return text


def same_answer(first: str, second: str) -> bool:
    """Whether two answers are equal after `normalise_answer`."""
    return normalise_answer(first) == normalise_answer(second)


def match_choice(answer: str, choices: Sequence[str]) -> int | None:
    """Index of the first choice equal to the answer; None where there is none."""
    wanted = normalise_answer(answer)
    for c, choice in enumerate(choices):
        if normalise_answer(choice) == wanted:
            return c
    return None
