"""Rows (a list of dicts) as Markdown, CSV and LaTeX, and numbers as text.

A column selection is a list of keys, or a dict ``{key: header}``; without one, all keys in the order in
which they first appear. A key that a row lacks is an empty cell. Numbers are formatted with ``format_value``
except in CSV, which holds them in full.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

Rows = Sequence[Mapping[str, Any]]
Columns = Sequence[str] | Mapping[str, str] | None


def format_value(value: Any, digits: int = 3) -> str:
    """A cell's text: floats with ``digits`` significant digits, whole parts in full; None is empty."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if hasattr(value, "item") and not isinstance(value, str):  # NumPy scalars
        return format_value(value.item(), digits)
    if not isinstance(value, float):
        return str(value)
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "-∞"}.get(value, "nan")
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    leading_zeros = -math.floor(math.log10(abs(value))) - 1 if 0 < abs(value) < 1 else 0
    return f"{value:,.{max(0, digits - whole + leading_zeros)}f}"


def format_estimate(
    mean: float | int,
    low: float | int | None = None,
    high: float | int | None = None,
    *,
    percent: bool = False,
    digits: int | None = None,
) -> str:
    """``0.462 [0.431, 0.493]``, with ``percent`` ``46.2 [43.1, 49.3]``; without an interval the mean alone.

    Args:
      digits: decimals; 1 for percent, else 3.
    """
    digits = (1 if percent else 3) if digits is None else digits
    number = lambda x: f"{x * (100 if percent else 1):.{digits}f}"
    if low is None or high is None:
        return number(mean)
    return f"{number(mean)} [{number(low)}, {number(high)}]"


def format_spread(
    mean: float | int, sd: float | int | None, *, percent: bool = False, digits: int | None = None
) -> str:
    """``0.462 ± 0.012``: mean and standard deviation (over seeds); without one the mean alone."""
    digits = (1 if percent else 3) if digits is None else digits
    number = lambda x: f"{x * (100 if percent else 1):.{digits}f}"
    return number(mean) if sd is None else f"{number(mean)} ± {number(sd)}"


def cells(rows: Rows, columns: Columns = None) -> tuple[list[str], list[list[str]], list[bool]]:
    """(headers, rows of cell texts, whether each column is numeric and so aligned to the right)."""
    selected = _columns(rows, columns)
    body = [[format_value(row.get(key)) for key in selected] for row in rows]
    numeric = []
    for column, key in enumerate(selected):
        texts = [line[column] for line in body if line[column]]
        values = [row[key] for row in rows if row.get(key) is not None]
        numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        # "46.2 [43.1, 49.3]" and "0.46 ± 0.01" are numbers to the eye.
        looks = all(re.match(r"[-+−]?[\d.]+( [\[±]|%|$)", text) for text in texts)
        numeric.append(bool(texts) and (numbers or looks))
    return list(selected.values()), body, numeric


def to_markdown(rows: Rows, columns: Columns = None) -> str:
    """A GitHub-flavoured Markdown table, ending in a newline; markup in cells is escaped."""
    headers, body, numeric = cells(rows, columns)
    if not headers:
        return ""
    grid = [[_markdown(text) for text in line] for line in [headers, *body]]
    widths = [max(3, *(len(line[i]) for line in grid)) for i in range(len(headers))]
    pad = lambda text, i: text.rjust(widths[i]) if numeric[i] else text.ljust(widths[i])
    lines = ["| " + " | ".join(pad(text, i) for i, text in enumerate(line)) + " |" for line in grid]
    rule = ["-" * (widths[i] - 1) + ":" if numeric[i] else "-" * widths[i] for i in range(len(headers))]
    lines.insert(1, "| " + " | ".join(rule) + " |")
    return "\n".join(lines) + "\n"


def to_csv(rows: Rows, columns: Columns = None) -> str:
    """CSV with a header line; numbers in full precision, None as an empty field."""
    selected = _columns(rows, columns)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(selected.values())
    writer.writerows([row.get(key) for key in selected] for row in rows)
    return out.getvalue()


def to_latex(rows: Rows, columns: Columns = None, *, caption: str = "", label: str = "") -> str:
    r"""A booktabs table (``\usepackage{booktabs}``), in a ``table`` float if there is a caption or label."""
    headers, body, numeric = cells(rows, columns)
    line = lambda texts: " & ".join(map(escape_latex, texts)) + r" \\"
    spec = "".join("r" if right else "l" for right in numeric)
    tabular = [
        rf"\begin{{tabular}}{{{spec}}}",
        r"\toprule",
        line(headers),
        r"\midrule",
        *map(line, body),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    if caption or label:
        tabular = [r"\begin{table}", r"\centering", *tabular]
        if caption:
            tabular.append(rf"\caption{{{escape_latex(caption)}}}")
        if label:
            tabular.append(rf"\label{{{label}}}")
        tabular.append(r"\end{table}")
    return "\n".join(tabular) + "\n"


_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "−": "$-$",
    "∞": r"$\infty$",
    "–": "--",
    "\n": " ",
}


def escape_latex(text: str) -> str:
    """``text`` as LaTeX shows it letter for letter, in one line."""
    return "".join(_LATEX.get(letter, letter) for letter in text)


def _markdown(text: str) -> str:
    text = re.sub(r"([\\`*|~])", r"\\\1", text).replace("&", "&amp;").replace("<", "&lt;")
    # Inside a word an underscore is a letter; at its border it would start emphasis.
    text = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)
    text = text.replace("](", "]\\(").replace("][", "]\\[")
    return re.sub(r"\s*\n\s*", " ", text).strip()


def _columns(rows: Rows, columns: Columns) -> dict[str, str]:
    if columns is None:
        columns = list(dict.fromkeys(key for row in rows for key in row))
    return dict(columns) if isinstance(columns, Mapping) else {key: key for key in columns}
