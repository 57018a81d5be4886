"""A fault of one record: what was found, what was expected, and the remedy."""

from __future__ import annotations

from typing import Any

from ntkjax.errors import DataError


class RecordProblem(Exception):
    """What is wrong with one record: what was found, what was expected, what to do."""

    def __init__(self, found: str, expected: str, remedy: str):
        super().__init__(printable(f"{found}; expected {expected}; {remedy}"))

    def at(self, place: str) -> DataError:
        """The error for the user, with its place in front: ``FILE:LINE: ...``."""
        return DataError(f"{place}: {self}")


def printable(text: str) -> str:
    """``text`` with half surrogate pairs, which no file or terminal takes, as escapes such as ``\\ud800``."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def kind_of(value: Any) -> str:
    """What a decoded value is, for a message: ``text``, ``a list``, ..."""
    names = {str: "text", bool: "true or false", int: "a number", float: "a number"}
    names |= {list: "a list", dict: "an object", type(None): "null"}
    return names.get(type(value), f"of type {type(value).__name__}")
