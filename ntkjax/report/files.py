"""The files of a report: results.md, tables/, plots/ and report.html, all from one object."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path

from ntkjax.files import write_bytes, write_text
from ntkjax.report.page import Page, write_page
from ntkjax.report.tables import Rows, to_csv, to_latex, to_markdown


@dataclasses.dataclass(frozen=True)
class NamedTable:
    """A table with its heading and a text above it; ``numbers``: the same in full numbers, for CSV
    (None: the rows themselves)."""

    heading: str
    rows: Rows
    numbers: Rows | None = None
    text: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """A report before it is written.

    Attributes:
      page: report.html.
      markdown: results.md.
      tables: name of the file -> table; those without rows are not written.
      plots: name of the file -> PNG.
    """

    page: Page
    markdown: str
    tables: Mapping[str, NamedTable]
    plots: Mapping[str, bytes]


def write_report(out: Path, report: Report) -> None:
    """Write results.md, tables/NAME.md, .tex and .csv, plots/NAME.png and report.html into ``out``.

    Tables and plots of an earlier report go: they may have been about other runs.

    Raises:
      UserError: a file cannot be written.
    """
    for folder in ("tables", "plots"):
        shutil.rmtree(out / folder, ignore_errors=True)
    for name, table in report.tables.items():
        if table.rows:
            write_text(out / "tables" / f"{name}.md", to_markdown(table.rows))
            latex = to_latex(table.rows, caption=table.heading, label=f"tab:{name}")
            write_text(out / "tables" / f"{name}.tex", latex)
            write_text(out / "tables" / f"{name}.csv", to_csv(table.numbers or table.rows))
    for name, png in report.plots.items():
        write_bytes(out / "plots" / f"{name}.png", png)
    write_text(out / "results.md", report.markdown)
    write_page(out / "report.html", report.page)
