"""The README's map of the tree is complete and holds nothing that is gone; its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def mapped() -> set[str]:
    """Paths of the map, from its indentation."""
    text = (ROOT / "README.md").read_text()
    block = next(part for part in text.split("```") if part.startswith("\nntkjax/\n"))
    folders: list[str] = []
    found = set()
    for line in block.strip("\n").splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders[depth:] = [name]
        found.add("".join(folders))
    return found


def test_the_map_names_every_module_and_nothing_else():
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "ntkjax").rglob("*.py")}
    listed = {path for path in mapped() if path.endswith(".py")}
    folders = {path for path in modules if path.count("/") == 2 and path.endswith("__init__.py")}
    assert listed == modules - folders
    assert {path for path in mapped() if not (ROOT / path).exists()} == set()


def test_the_commands_of_the_readme_exist():
    from ntkjax.stages import COMMANDS

    named = set(re.findall(r"`ntkjax (\w+)", (ROOT / "README.md").read_text()))
    assert set(COMMANDS) <= named


def test_the_two_commands_come_first():
    head = (ROOT / "README.md").read_text().splitlines()[:20]
    assert any("make demo" in line for line in head) and any("make test" in line for line in head)
