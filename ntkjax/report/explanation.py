"""The page of ``ntkjax explain``: one HTML file that shows examples with their scores taken apart; it fetches nothing.

Data lie in the page as compressed JSON: one part with a line for every example, read when the page opens, and parts of
`BLOCK` examples with tokens, read when they come into view, so that 10,000 examples open at once. Parts of a score are
rounded to 1/127 of the largest of the example, of layers and modules to 1/999; the files beside it have all digits.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ntkjax.files import write_lines

BLOCK = 128
LEVELS, TABLE_LEVELS = 127, 999
TEMPLATE = Path(__file__).with_name("explanation.html")


@dataclasses.dataclass(frozen=True)
class ShownExample:
    """A pool example on the page.

    Attributes:
      id, source, place: its name, where it comes from, ``FILE:LINE``.
      group: place in ``Explanation.groups``. score, rank: of the selection; None and 0 where it was chosen without one.
      texts: the T tokens as text. learned: bool [T], tokens that are learned.
      parts: float [T], each token's part of the score; None where there are none.
      table: float [layers, modules], likewise; None where there are none.
      near: (domain example, cosine) of the nearest.
    """

    id: str
    source: str
    place: str
    group: int
    score: float | None
    rank: int
    texts: Sequence[str]
    learned: np.ndarray
    parts: np.ndarray | None = None
    table: np.ndarray | None = None
    near: Sequence[tuple[int, float]] = ()


@dataclasses.dataclass(frozen=True)
class DomainExample:
    """A domain example on the page; ``pulled``: (id, place among the shown examples or -1, cosine, chosen or not)."""

    id: str
    prompt: str
    response: str
    pulled: Sequence[tuple[str, int, float, bool]] = ()


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The content of the page.

    Attributes:
      title, lead: heading and the sentence below it.
      facts: (name, value) of the run.
      groups: (label, shown, of how many).
      scale: paragraphs on what a score means; those of the first place in short.
      layers, modules: names of the axes of tables; empty without.
      own: the mean score of the domain's own examples, in whose terms scores are given; None: no such number.
      links: what the cosines are of; empty where there are none.
      no_parts: why there are no parts of scores; empty where there are.
    """

    title: str
    lead: str
    facts: Sequence[tuple[str, str]]
    groups: Sequence[tuple[str, int, int]]
    scale: Sequence[str]
    examples: Sequence[ShownExample]
    domain: Sequence[DomainExample] = ()
    layers: Sequence[str] = ()
    modules: Sequence[str] = ()
    own: float | None = None
    links: str = ""
    no_parts: str = ""


def write_explanation(path: str | Path, content: Explanation) -> Path:
    """Write the page, whole or not at all; gives the path.

    Raises:
      UserError: the file cannot be written.
    """
    return write_lines(path, _page(content))


def _page(content: Explanation) -> Iterator[str]:
    before, after = TEMPLATE.read_text(encoding="utf-8").split("<!-- DATA -->")
    yield before.replace("<!-- TITLE -->", html.escape(content.title))
    yield _script("overview", _overview(content))
    for number, start in enumerate(range(0, len(content.examples), BLOCK)):
        block = [_tokens(example) for example in content.examples[start : start + BLOCK]]
        yield _script(f"block-{number}", block)
    yield after


def _script(name: str, value: Any) -> str:
    """A JSON value as zlib's bytes in base64, in a script that no browser runs."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    data = base64.b64encode(zlib.compress(text.encode("ascii"), 6)).decode("ascii")
    return f'<script type="text/plain" id="{name}">{data}</script>'


def _overview(content: Explanation) -> dict[str, Any]:
    sources = sorted({example.source for example in content.examples})
    number = {source: k for k, source in enumerate(sources)}
    near = [[[row, _short(cosine)] for row, cosine in example.near] for example in content.examples]
    return {
        "title": content.title,
        "lead": content.lead,
        "facts": [list(fact) for fact in content.facts],
        "groups": [list(group) for group in content.groups],
        "scale": list(content.scale),
        "layers": list(content.layers),
        "modules": list(content.modules),
        "own": content.own,
        "links": content.links,
        "noParts": content.no_parts,
        "block": BLOCK,
        "levels": [LEVELS, TABLE_LEVELS],
        "sources": sources,
        "means": _means(content),
        "examples": {
            "id": [example.id for example in content.examples],
            "place": [example.place for example in content.examples],
            "source": [number[example.source] for example in content.examples],
            "group": [example.group for example in content.examples],
            "score": [None if example.score is None else _short(example.score) for example in content.examples],
            "rank": [example.rank for example in content.examples],
            "learned": [int(np.sum(example.learned)) for example in content.examples],
            "near": near if any(near) else [],
        },
        "domain": [
            [
                item.id,
                item.prompt,
                item.response,
                [[*pulled[:2], _short(pulled[2]), int(pulled[3])] for pulled in item.pulled],
            ]
            for item in content.domain
        ],
    }


def _means(content: Explanation) -> list[list[list[float]] | None]:
    """For each group the mean table of its examples."""
    means: list[list[list[float]] | None] = []
    for group in range(len(content.groups)):
        tables = [e.table for e in content.examples if e.group == group and e.table is not None]
        means.append([list(map(_short, row)) for row in np.mean(tables, axis=0)] if tables else None)
    return means


def _tokens(example: ShownExample) -> list[Any]:
    """[text, lengths of its tokens, 1 where learned, [scale, levels] of parts, the same of the table]."""
    lengths = [len(text.encode("utf-16-le", "surrogatepass")) // 2 for text in example.texts]  # as JavaScript counts
    learned = np.asarray(example.learned, int).tolist()
    return [
        "".join(example.texts),
        lengths,
        learned,
        _levels(example.parts, LEVELS),
        _levels(example.table, TABLE_LEVELS),
    ]


def _levels(values: np.ndarray | None, levels: int) -> list[Any] | None:
    """[size of the largest, the values as whole numbers of 1/levels of it]."""
    if values is None:
        return None
    largest = float(np.max(np.abs(values), initial=0))
    scaled = np.zeros(values.shape, int) if largest == 0 else np.rint(values / largest * levels).astype(int)
    return [_short(largest), scaled.tolist()]


def _short(value: float) -> float:
    """Six digits."""
    return float(f"{value:.6g}")
