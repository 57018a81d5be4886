"""Writes the table of docs/families.md: checkpoints of tests/golden against torch, transformers and peft.

    python tests/models/parity_table.py            # the two newest settings of each family (--all: every one)
    python tests/models/parity_table.py CASE ...   # these lines alone; the others stay as they are

In an environment with torch, transformers and peft, as `make test-torch` makes it.

The table stands between two marks in the page; the rest of the page stays as it is. `family_checks.py` says what each
column is.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

# Many small programs, each run once: the compiler's expensive passes do not pay.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

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


def main(asked: list[str]) -> None:
    """Make the lines that are asked for, each written as soon as it is there."""
    families = {name: family for family, names in checks.cases_by_family().items() for name in names}
    newest = [name for names in checks.cases_by_family().values() for name in names[-2:]]
    for name in [*families] if asked == ["--all"] else asked or newest:
        line = row(families[name], name)
        sys.stdout.write(line)
        sys.stdout.flush()
        before, rest = PAGE.read_text().split(BEGIN)
        table, after = rest.split(END)
        lines = {key: old for old in table.splitlines(keepends=True) for key in families if f"| `{key}`:" in old}
        lines[name] = line
        body = "".join(lines[key] for key in families if key in lines)
        PAGE.write_text(before + BEGIN + HEAD + body + END + after)


if __name__ == "__main__":
    main(sys.argv[1:])
