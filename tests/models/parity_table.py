"""Writes the table of docs/families.md: every checkpoint of tests/golden against torch, transformers and peft.

    python tests/models/parity_table.py            # in an environment with torch, transformers and peft

The table stands between two marks in the page; the rest of the page stays as it is. `family_checks.py` says what each
column is.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import family_checks as checks

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"
BEGIN, END = "<!-- parity: begin -->\n", "<!-- parity: end -->\n"
HEAD = (
    "| family | checkpoint: setting | logits: difference (largest) | greedy | PEFT reads our adapter | transformers "
    "reads our merge | padded | packed choices | scores |\n|---|---|---|---|---|---|---|---|---|\n"
)


def row(family: str, name: str) -> str:
    """One checkpoint's line."""
    note = checks.CASES[name]["note"]
    difference, largest = checks.logit_difference(name)
    ours, theirs = checks.greedy_tokens(name)
    columns = [family, f"`{name}`: {note}", f"{difference:.1e} ({largest:.1f})", "equal" if ours == theirs else "NOT"]
    if (checks.GOLDEN / name / "adapter").exists():
        return "| " + " | ".join([*columns, *["read, see logits"], *["-"] * 4]) + " |\n"
    with tempfile.TemporaryDirectory() as folder:
        torch = checks.torch_differences(name, Path(folder))
    numbers = [
        torch["peft"],
        torch["export"],
        torch["padded"],
        checks.packed_difference(name),
        checks.score_difference(name),
    ]
    return "| " + " | ".join([*columns, *(f"{x:.1e}" for x in numbers)]) + " |\n"


def main() -> None:
    """Make the table anew, line after line on the screen as well."""
    lines = []
    for family, names in checks.cases_by_family().items():
        for name in names:
            lines.append(row(family, name))
            sys.stdout.write(lines[-1])
            sys.stdout.flush()
    page = PAGE.read_text()
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(before + BEGIN + HEAD + "".join(lines) + END + after)


if __name__ == "__main__":
    main()
