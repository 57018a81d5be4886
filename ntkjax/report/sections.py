"""Pieces of text and tables that several reports have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flat_diagnostics(diagnostics: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a selection's diagnostics, without its lists and tables."""
    return {name: value for name, value in diagnostics.items() if isinstance(value, int | float | str | bool)}
