"""Pages: everything in one file, every text escaped, every link and section in its place."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import pytest

from ntkjax.errors import UserError
from ntkjax.report import sections
from ntkjax.report.files import NamedTable, Report, write_report
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


SELECTION = {
    "diagnostics": {"rank_correlation_with_length": -0.5, "something_new": 3, "sources_offered": {"a": 2}},
    "examples": {
        "chosen": [{"prompt": "chosen prompt", "response": "r", "score": 0.3}],
        "just_missed": [{"prompt": "missed prompt", "response": "r", "score": 0.2}],
        "lowest": [{"prompt": "lowest prompt", "response": "r", "score": 0.1}],
    },
}
SCORED = sections.Scored([0.1, 0.2, 0.3], [3, 4, 5], [False, False, True], {"a": 2, "b": 1}, {"b": 1})


def test_the_sections_show_what_they_are_given():
    shown = [
        *sections.asked("ntkjax replay x", "seeds: 3", points=["two arms"]),
        *sections.failed([{"method": "broken", "message": "upside down"}], "Try again."),
        *sections.named_table("Cost", [{"a": 1}], text="in seconds"),
        *sections.Choice.of(SELECTION).sections(list(SCORED.figures().values())),
        *sections.made_with({"jax": "0.10.2", "torch": None, "seeds": {}}, seeds=[0, 1], seconds={"whole run": 12.5}),
        *sections.caveats(["Two seeds are few."]),
    ]
    page = Reader(render_page(Page("t", "", shown)))
    text = "\n".join(page.texts)
    for expected in (
        *("ntkjax replay x", "seeds: 3", "two arms", "upside down", "Try again.", "Cost", "in seconds"),
        *("rank correlation with length", "-0.500", "near ±1", "something new"),
        *("chosen prompt", "missed prompt", "lowest prompt", "Chosen", "Rejected"),
        *("0.10.2", "Seeds: 0, 1.", "12.5", "Two seeds are few."),
    ):
        assert expected in text, expected
    assert "torch" not in text, "what is not installed is not listed"
    assert "sources_offered" not in text and len(page.named("img")) == 3


def test_what_there_is_nothing_of_has_no_section():
    nothing = [*sections.failed([], "x"), *sections.named_table("x", []), *sections.caveats([])]
    assert nothing == [] and sections.Choice({}, {}).sections() == []


def test_a_report_is_written_and_the_plots_of_the_last_one_go(tmp_path):
    full = [{"arm": "a", "value": 0.123456}]
    tables = {"main": NamedTable("Main", [{"arm": "a"}], full), "none": NamedTable("None", [])}
    for name in ("one", "two"):
        write_report(tmp_path, Report(Page("t", "", []), "# t\n", tables, {name: PNG}))
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["two.png"]
    assert sorted(path.name for path in (tmp_path / "tables").iterdir()) == ["main.csv", "main.md", "main.tex"]
    assert "0.123456" in (tmp_path / "tables" / "main.csv").read_text() and (tmp_path / "results.md").exists()
    assert (tmp_path / "report.html").exists()


def test_the_file_is_written_whole_or_an_error_names_it(tmp_path):
    path = write_page(tmp_path / "deep" / "report.html", Page("größe", "", []))
    assert "größe" in path.read_text(encoding="utf-8") and not list(tmp_path.rglob("*.tmp"))
    with pytest.raises(UserError, match=r"cannot be written"):
        write_page(path / "report.html", Page("t", "", []))
