"""Pages: everything in one file, every text escaped, every link and section in its place."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import pytest

from ntkjax.errors import UserError
from ntkjax.report.comparison import comparison_page, headline_rows
from ntkjax.report.page import (
    Bullets,
    Code,
    Details,
    Examples,
    Figure,
    Heading,
    Page,
    Table,
    Text,
    render_page,
    write_page,
)

# One black pixel.
PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")
VOID = {"meta", "img", "br", "link"}
ATTACK = "<script>alert(1)</script>\"'&"


class Reader(HTMLParser):
    """Collects tags, attributes and texts, and checks that every tag is closed in order."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if data.strip() and "style" not in self._open:
            self.texts.append(data.strip())

    def named(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


def everything(text: str) -> Page:
    return Page(
        title=text,
        lead=text,
        footer=text,
        sections=[
            Heading(f"One {text}"),
            Text(f"{text}\n\nsecond paragraph"),
            Text(text, kind="note"),
            Heading("Two"),
            Bullets([text]),
            Code(text),
            Heading("Three", 3),
            Table([{text: text, "n": 1}, {text: "b", "n": 2}], caption=text, best=[1]),
            Figure(PNG, alt=text, caption=text),
            Heading("Four"),
            Examples([{"prompt": text, "response": text, "score": 0.5, "id": text, "none": None}]),
            Details(text, [Code(text), Details("inner", [Text(text)])]),
        ],
    )


def test_every_text_is_shown_as_it_is():
    html = render_page(everything(ATTACK))
    page = Reader(html)
    assert page.named("script") == []
    assert sum(ATTACK in text for text in page.texts) >= 16
    assert page.named("img")[0]["alt"] == ATTACK


def test_the_page_needs_nothing_from_outside():
    html = render_page(everything("x"))
    page = Reader(html)
    assert page.named("link") == [] and "@import" not in html and "url(" not in html
    for _, attributes in page.tags:
        for key in ("src", "href"):
            assert attributes.get(key, "#").startswith(("#", "data:"))
    assert "http" not in re.sub(r"base64,[^\"]*", "", html)
    picture = page.named("img")[0]["src"].removeprefix("data:image/png;base64,")
    assert base64.b64decode(picture).startswith(b"\x89PNG")
    assert "prefers-color-scheme: dark" in html and page.named("meta")[1]["name"] == "viewport"


def test_contents_lead_to_the_chapters():
    page = Reader(render_page(everything("x")))
    chapters = [attributes["id"] for attributes in page.named("h2")]
    assert chapters == ["one-x", "two", "four"]
    assert [attributes["href"] for attributes in page.named("a")] == [f"#{name}" for name in chapters]


def test_bold_and_code_are_the_only_marks():
    html = render_page(Page("t", "**a<b** and `c<d` and *e*", []))
    assert "<strong>a&lt;b</strong> and <code>c&lt;d</code> and *e*" in html


def test_long_examples_say_how_much_is_left_out():
    page = Reader(render_page(Page("t", "", [Examples([{"prompt": "p" * 30, "response": "r"}], longest=10)])))
    assert "pppppppppp … [20 more characters]" in page.texts and "r" in page.texts


def test_the_best_row_stands_out_and_numbers_are_aligned():
    html = render_page(everything("x"))
    rows = [attributes.get("class") for attributes in Reader(html).named("tr")]
    assert rows == [None, None, "best"]
    assert '<td class="number">2</td>' in html


RUN = {
    "title": "finance",
    "command": "ntkjax adapt --n 3",
    "settings": {"lora": {"rank": 4}, "pool": ["a", "b"], "limit": None},
    "methods": [
        {"method": "random", "mean": 0.44, "low": 0.42, "high": 0.46, "seeds": [0.43, 0.45], "steps": 7},
        {"method": "ntk", "mean": 0.462, "low": 0.431, "high": 0.493, "seeds": [0.45, 0.474], "steps": 8},
    ],
    "columns": {"steps": "optimiser steps"},
    "differences": [{"comparison": "ntk - random", "mean": 0.022, "low": -0.01, "high": 0.05, "p": 0.2}],
    "extra": [{"heading": "Precision at N", "text": "of the planted skills", "rows": [{"method": "ntk", "p": 0.6}]}],
    "selections": [
        {
            "method": "ntk",
            "diagnostics": {"rank_correlation_with_length": -0.5, "something_new": 3},
            "scores": [0.1, 0.2, 0.3],
            "lengths": [3, 4, 5],
            "selected": [False, False, True],
            "offered": {"a": 2, "b": 1},
            "chosen": {"b": 1},
            "chosen_examples": [{"prompt": "chosen prompt", "response": "r", "score": 0.3}],
            "rejected_examples": [{"prompt": "rejected prompt", "response": "r", "score": 0.1}],
        }
    ],
    "training": {"ntk": [(0, 1.0), (1, 0.5)]},
    "dev": {"ntk": [(0, 1.0), (1, 0.5)]},
    "versions": {"jax": "0.10.2", "torch": None, "seeds": {"seed": 0}},
    "seeds": {"seed": [0, 1]},
    "runtime": {"score": 12.5},
    "caveats": ["Two seeds are few."],
}


def test_a_comparison_shows_all_that_the_run_holds():
    page = Reader(render_page(comparison_page(RUN)))
    text = "\n".join(page.texts)
    for expected in (
        *("ntkjax adapt --n 3", "rank: 4", "pool: a, b", "limit: none"),
        *("46.2 [43.1, 49.3]", "45.0, 47.4", "optimiser steps", "2.2 [-1.0, 5.0]", "Precision at N"),
        *("rank correlation with length", "-0.500", "something new", "chosen prompt", "rejected prompt"),
        *("0.10.2", "seed 0, 1", "12.5", "Two seeds are few."),
    ):
        assert expected in text, expected
    assert "torch" not in text, "what is not installed is not listed"
    assert len(page.named("img")) == 6
    best = [i for i, attributes in enumerate(page.named("tr")) if attributes.get("class") == "best"]
    assert best == [2], "the second method has the highest mean"


@pytest.mark.parametrize("kept", [(), ("methods",), ("selections",), ("dev", "versions"), ("training", "seeds")])
def test_every_part_of_a_comparison_may_be_absent(kept):
    page = comparison_page({name: RUN[name] for name in kept})
    Reader(render_page(page))
    assert bool(page.sections) == bool(kept)


def test_a_selection_may_lack_its_scores():
    bare = {"method": "random", "offered": {"a": 1}, "chosen": {"a": 1}}
    page = Reader(render_page(comparison_page({"selections": [bare]})))
    assert len(page.named("img")) == 1


def test_of_losses_the_lowest_is_best_and_nothing_is_in_percent():
    run = RUN | {"metric": "response NLL (nats per token)", "percent": False, "lower_is_better": True}
    assert headline_rows(run)[1]["response NLL (nats per token)"] == "0.462 [0.431, 0.493]"
    tables = [section for section in comparison_page(run).sections if isinstance(section, Table)]
    assert tables[0].best == (0,)


def test_the_file_is_written_whole_or_an_error_names_it(tmp_path):
    path = write_page(tmp_path / "deep" / "report.html", Page("größe", "", []))
    assert "größe" in path.read_text(encoding="utf-8") and not list(tmp_path.rglob("*.tmp"))
    with pytest.raises(UserError, match=r"cannot be written"):
        write_page(path / "report.html", Page("t", "", []))
