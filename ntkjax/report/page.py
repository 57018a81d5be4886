"""A self-contained HTML page from simple sections: one file, no script, nothing fetched from anywhere.

Texts are plain: what looks like HTML is shown as it is. Two marks are understood in Text, captions and notes:
``**bold**`` and a pair of backticks for code.
"""

from __future__ import annotations

import base64
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ntkjax.files import write_text
from ntkjax.report.tables import Columns, Rows, cells


@dataclasses.dataclass(frozen=True)
class Heading:
    """A heading of level 2 (a chapter, listed in the contents) or 3."""

    text: str
    level: int = 2


@dataclasses.dataclass(frozen=True)
class Text:
    """Paragraphs, separated by blank lines. ``kind="note"`` sets them apart, e.g. for a caveat."""

    text: str
    kind: str = "plain"


@dataclasses.dataclass(frozen=True)
class Bullets:
    """A list of short texts."""

    items: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Code:
    """Text shown letter for letter: a command, a config file."""

    text: str


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows as in ``tables``; ``best`` names rows (by number) to print in bold."""

    rows: Rows
    columns: Columns = None
    caption: str = ""
    best: Sequence[int] = ()


@dataclasses.dataclass(frozen=True)
class Figure:
    """A PNG, with ``alt`` for readers who cannot see it."""

    png: bytes
    alt: str
    caption: str = ""


@dataclasses.dataclass(frozen=True)
class Examples:
    """Prompt and response pairs: dicts with ``prompt``, ``response`` and any further keys, shown as facts.

    Texts longer than ``longest`` characters are cut where shown, and marked with how much was left out.
    """

    items: Sequence[Mapping[str, Any]]
    longest: int = 600


@dataclasses.dataclass(frozen=True)
class Details:
    """Sections behind a line that opens on a click."""

    summary: str
    sections: Sequence[Section]


Section = Heading | Text | Bullets | Code | Table | Figure | Examples | Details


@dataclasses.dataclass(frozen=True)
class Page:
    """A page: its title, one sentence below it, the sections, and small print at its end."""

    title: str
    lead: str
    sections: Sequence[Section]
    footer: str = ""


def render_page(page: Page) -> str:
    """The page as one HTML text."""
    import jinja2  # here, so that commands without a report start fast

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"inline": _inline, "anchor": _anchor, "shortened": _shortened}
    environment.filters["paragraphs"] = lambda text: re.split(r"\n\s*\n", text.strip())
    environment.filters["base64"] = lambda png: base64.b64encode(png).decode("ascii")
    environment.tests["of_kind"] = lambda section, kind: type(section).__name__ == kind
    contents = [s.text for s in page.sections if isinstance(s, Heading) and s.level == 2]
    return environment.get_template("page.html").render(page=page, contents=contents, cells=cells, facts=_facts)


def write_page(path: str | Path, page: Page) -> Path:
    """Write the page to ``path`` (folders are made), whole or not at all; gives the path.

    Raises:
      UserError: the file cannot be written.
    """
    return write_text(path, render_page(page))


def _inline(text: str) -> Any:
    """Escaped text with `code` and **bold** as tags."""
    from markupsafe import Markup, escape

    html = str(escape(text))
    html = re.sub(r"`([^`]+)`", r"<code>\1</code>", html)
    return Markup(re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", html))


def _anchor(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _shortened(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    return f"{text[:longest].rstrip()} … [{len(text) - longest:,} more characters]"


def _facts(item: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is known of an example besides its texts, as (name, formatted value)."""
    rest = {key: value for key, value in item.items() if key not in ("prompt", "response") and value is not None}
    headers, body, _ = cells([rest])
    return list(zip(headers, body[0])) if rest else []
