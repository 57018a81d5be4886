"""Tables: what a reader of the format gets back is what was put in."""

from __future__ import annotations

import csv
import io
import math

import numpy as np
import pytest

from ntkjax.report.tables import (
    cells,
    escape_latex,
    format_estimate,
    format_spread,
    format_value,
    to_csv,
    to_latex,
    to_markdown,
)

NASTY = "a|b \\ *c* _d_ e_f `g` <b>h</b> [i](j) &amp; 50% $x^2$ #1 {k} ~l~"
ROWS = [
    {"method": "ntk", "mean": 0.4621, "n": 9000, "text": NASTY},
    {"method": "random", "mean": 0.441, "n": 12, "text": "two\nlines", "late": True},
]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (True, "yes"),
        (1234567, "1,234,567"),
        (0.46214, "0.462"),
        (12.3456, "12.3"),
        (1234.56, "1,235"),
        (0.00123456, "0.00123"),
        (1.23456e-7, "1.23e-07"),
        (-0.0712, "-0.0712"),
        (123456789.0, "1.23e+08"),
        (0.0, "0.000"),
        (math.nan, "nan"),
        (-math.inf, "-∞"),
        (np.float32(0.5), "0.500"),
        (np.int64(7), "7"),
        (np.bool_(False), "no"),
        ("0.1", "0.1"),
    ],
)
def test_values_as_text(value, text):
    assert format_value(value) == text


def test_estimates_as_text():
    assert format_estimate(0.46214, 0.4312, 0.4929) == "0.462 [0.431, 0.493]"
    assert format_estimate(0.46214, 0.4312, 0.4929, percent=True) == "46.2 [43.1, 49.3]"
    assert format_estimate(-0.5, digits=1) == "-0.5"
    assert format_estimate(0.5, 0.0, 1.0, digits=2) == "0.50 [0.00, 1.00]", "a bound of zero is a bound"
    assert format_spread(0.46214, 0.0121) == "0.462 ± 0.012"
    assert format_spread(0.46214, None, percent=True) == "46.2"
    assert format_estimate(math.nan) == "nan"


def test_csv_reads_back_in_full_precision():
    back = list(csv.DictReader(io.StringIO(to_csv(ROWS))))
    assert [row["text"] for row in back] == [row["text"] for row in ROWS]
    assert [float(row["mean"]) for row in back] == [0.4621, 0.441]
    assert [row["late"] for row in back] == ["", "True"]
    assert list(back[0]) == ["method", "mean", "n", "text", "late"]


def test_columns_choose_order_and_headers():
    headers, body, numeric = cells(ROWS, {"n": "examples", "method": "Method"})
    assert headers == ["examples", "Method"]
    assert body == [["9,000", "ntk"], ["12", "random"]]
    assert numeric == [True, False]
    assert to_csv(ROWS, ["method"]) == "method\nntk\nrandom\n"
    assert cells([{"a": "46.2 [43.1, 49.3]", "b": "0.46 ± 0.01", "c": "3 of 4", "d": None}])[2] == [
        True,
        True,
        False,
        False,
    ]


def test_markdown_reads_back_as_the_texts_that_were_put_in():
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable(["table", "strikethrough"])
    tokens = parser.parse(to_markdown(ROWS))
    inline = [token for token in tokens if token.type == "inline"]
    kinds = {child.type for token in inline for child in token.children}
    assert kinds <= {"text", "text_special"}, "markup in a cell was taken for markup"
    texts = ["".join(child.content for child in token.children) for token in inline]
    headers, body, _ = cells(ROWS)
    assert texts == [*headers, *(text.replace("\n", " ") for line in body for text in line)]
    aligned = [token.attrs.get("style") for token in tokens if token.type == "th_open"]
    assert aligned == [None, "text-align:right", "text-align:right", None, None]


def test_no_columns_no_table():
    assert to_markdown([]) == ""
    assert to_markdown([], ["a"]).splitlines() == ["| a   |", "| --- |"]


def test_latex_is_escaped_letter_for_letter():
    assert escape_latex("50% & $x_1^2$ #{a} ~ \\") == (
        r"50\% \& \$x\_1\textasciicircum{}2\$ \#\{a\} \textasciitilde{} \textbackslash{}"
    )
    table = to_latex([{"a_b": "x & y", "v": "1.0 ± 0.1"}], caption="50% of it", label="tab:x")
    assert table == "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            r"\begin{tabular}{lr}",
            r"\toprule",
            r"a\_b & v \\",
            r"\midrule",
            r"x \& y & 1.0 $\pm$ 0.1 \\",
            r"\bottomrule",
            r"\end{tabular}",
            r"\caption{50\% of it}",
            r"\label{tab:x}",
            r"\end{table}",
            "",
        ]
    )
