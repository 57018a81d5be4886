"""README, docs/ and CONTRIBUTING name nothing that does not exist, and leave out nothing that they are to name.

Nothing here needs mkdocs: pages that are generated come from ``docs/generate.py``, which reads the sources.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import tomllib
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import ntkjax
from ntkjax.commands import COMMANDS, load_command
from ntkjax.ntk import kernels
from ntkjax.selection import METHODS

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("data", "models", "ntk", "selection", "training", "evaluation")
PROSE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINKED = [
    *PROSE,
    ROOT / "experiments/README.md",
    ROOT / "experiments/recipes/README.md",
    ROOT / "requirements/README.md",
]
RECIPES = ("kernel", "selector", "family", "data format", "command", "metric")
OF_OTHER_PROGRAMS = {
    *("no-deps", "nodes", "ntasks-per-node", "gpus-per-task", "worker", "command"),  # pip, srun, gcloud
    *("pool", "rows", "rounds", "model", "adapt", "profile", "help"),  # bench_score.py, bench_gpu.py; every command
}

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FLAG = re.compile(r"(?<![\w-])--([a-z][a-z0-9.-]*[a-z0-9])(?![\w])")
COMMAND = re.compile(r"\bntkjax ([a-z]+(?:-[a-z]+)*)\b")
names = lambda paths: [path.relative_to(ROOT).as_posix() for path in paths]


@pytest.fixture(scope="module")
def generate(load_file):
    return load_file(ROOT / "docs" / "generate.py")


@pytest.fixture(scope="module")
def pages(generate) -> dict[str, str]:
    return generate.pages()


def outside_pages() -> dict[str, str]:
    """Documents beside docs/ and their pages on the site, as docs/hooks.py has them."""
    tree = ast.parse((ROOT / "docs/hooks.py").read_text())
    found = (
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "OUTSIDE"
    )
    return ast.literal_eval(next(found))


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def slugs(text: str) -> set[str]:
    """Anchors of the headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", without_code(text), re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


def broken_links(path: Path, text: str, generated: dict[str, str]) -> list[str]:
    """Relative links of a document to files, pages or headings that are not there."""
    broken = []
    for link in LINK.findall(without_code(text)):
        target, _, anchor = link.partition("#")
        if "://" in link:
            continue
        file = (path.parent / target).resolve() if target else path
        page = file.relative_to(ROOT / "docs").as_posix() if file.is_relative_to(ROOT / "docs") else ""
        content = file.read_text() if file.suffix == ".md" and file.exists() else generated.get(page)
        is_there = content is not None or file.exists()
        if not is_there or (anchor and anchor not in slugs(content or "")):
            broken.append(link)
    return broken


# -- README --


def test_the_readme_is_short_and_begins_with_the_two_commands():
    text = (ROOT / "README.md").read_bytes()
    assert len(text) <= 9000
    head = text.decode().splitlines()[:20]
    assert any("make demo" in line for line in head) and any("make test" in line for line in head)


def test_the_readme_names_every_command_method_and_kernel():
    text = (ROOT / "README.md").read_text()
    assert set(COMMANDS) <= set(COMMAND.findall(text))
    wanted = {*METHODS, *kernels.kernel_names()}
    assert {name for name in wanted if f"`{name}`" not in text} == set()


# -- what documents name --


@pytest.mark.parametrize("path", LINKED, ids=names(LINKED))
def test_every_relative_link_leads_somewhere(path, pages):
    assert broken_links(path, path.read_text(), pages) == []


def test_a_broken_link_is_found(pages):
    text = "[a](docs/none.md) [b](README.md#no-such-heading) [c](LICENSE) [d](docs/methods.md) [e](README.md#more)"
    assert broken_links(ROOT / "x.md", text, pages) == ["docs/none.md", "README.md#no-such-heading"]


@pytest.mark.parametrize("path", PROSE, ids=names(PROSE))
def test_every_command_and_flag_that_is_named_exists(path):
    text = path.read_text()
    code = "\n".join(re.findall(r"`[^`\n]+`|```.*?```", text, re.DOTALL))
    assert set(COMMAND.findall(code)) - set(COMMANDS) == set()
    known = set().union(*(dataclass_flags(load_command(name).config) for name in COMMANDS))
    assert set(FLAG.findall(text)) - known - OF_OTHER_PROGRAMS == set()


def dataclass_flags(config: type, prefix: str = "") -> set[str]:
    """The flags of a config class, from the class itself."""
    hints = typing.get_type_hints(config, include_extras=True)
    found = set()
    for field in dataclasses.fields(config):
        hint, name = hints[field.name], prefix + field.name.replace("_", "-")
        bare = typing.get_origin(hint) is typing.Annotated and any(
            getattr(extra, "name", None) == "" for extra in hint.__metadata__
        )
        inner = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
        if dataclasses.is_dataclass(inner) and isinstance(inner, type):
            found |= dataclass_flags(inner, prefix if bare else f"{name}.")
        else:
            found.add(name)
    return found


def imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ntkjax"):
            yield from ((node.module, alias.name) for alias in node.names)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ntkjax":
            yield "ntkjax", node.attr


@pytest.mark.parametrize("path", PROSE, ids=names(PROSE))
def test_python_examples_parse_and_import_what_exists(path):
    missing = [
        (module, name)
        for block in code_blocks(path.read_text(), "python")
        for module, name in imported(ast.parse(block))
        if not hasattr(importlib.import_module(module), name)
    ]
    assert missing == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_there_and_its_files_exist(recipe):
    parts = re.split(r"<!-- recipe: (.+?) -->", (ROOT / "CONTRIBUTING.md").read_text())
    text = dict(zip(parts[1::2], parts[2::2], strict=True))[recipe]
    paths = re.findall(r"`((?:ntkjax|tests|docs)/[\w./-]+)`", text)
    assert [path for path in paths if path == path.lower() and not (ROOT / path).exists()] == []
    assert any(path.startswith("ntkjax/") for path in paths) and any(path.startswith("tests/") for path in paths)


# -- the map of the tree --


def mapped() -> set[str]:
    """Paths of the map, from its indentation."""
    text = (ROOT / "docs/house.md").read_text()
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
    folders = {path for path in modules if path.count("/") >= 2 and path.endswith("__init__.py")}
    assert listed == modules - folders
    assert {path for path in mapped() if not (ROOT / path).exists()} == set()


# -- generated pages --


def test_the_generated_tables_are_those_of_the_package(generate, pages):
    assert {name: method.name for name, method in generate.methods().items()} == {
        name: method.__name__ for name, method in METHODS.items()
    }
    assert list(generate.kernels()) == kernels.kernel_names()
    assert [text for text, _ in generate.kernels().values()] == [kind.summary for kind in kernels.KERNELS.values()]
    assert {name: config.name for name, config in generate.commands().items()} == {
        name: load_command(name).config.__name__ for name in COMMANDS
    }
    for page, wanted in (("methods.md", METHODS), ("kernels.md", kernels.KERNELS), ("commands.md", COMMANDS)):
        assert {name for name in wanted if name not in pages[page]} == set()


def test_the_generated_flags_are_those_of_the_classes(generate, pages):
    for name, config in generate.commands().items():
        flags = generate.flags(config)
        assert flags == dataclass_flags(load_command(name).config)
        assert {flag for flag in flags if "." not in flag and f"--{flag}`" not in pages["commands.md"]} <= {
            "file",
            "study",
            "run",
            "command",
        }


def test_the_table_of_methods_in_the_guide_is_complete():
    text = (ROOT / "docs/guide/methods.md").read_text()
    assert {name for name in METHODS if f"`{name}`" not in text} == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_has_its_entry_in_the_reference(package, pages):
    module = importlib.import_module(f"ntkjax.{package}")
    paths = re.findall(r"^::: (\S+)$", pages[f"reference/{package}.md"], re.M)
    entries = {path.rpartition(".")[2]: path.rpartition(".")[0] for path in paths}
    wanted = set(module.__all__)
    assert wanted - set(entries) == set()
    for name, home in entries.items():
        assert hasattr(importlib.import_module(home), name), (home, name)


def test_the_names_of_the_package_itself_are_listed_with_their_homes(pages):
    listed = re.findall(r"^\| \[`ntkjax\.(\w+)`\]\[(\S+)\]", pages["reference/index.md"], re.M)
    assert sorted(name for name, _ in listed) == sorted(ntkjax.__all__)
    for name, path in listed:
        home, _, defined = path.rpartition(".")
        theirs, ours = getattr(importlib.import_module(home), defined), getattr(ntkjax, name)
        assert theirs is ours or theirs is getattr(ours, "__wrapped__", None), (name, path)


def test_the_navigation_holds_every_page(pages):
    def leaves(nav: typing.Any) -> list[str]:
        if isinstance(nav, str):
            return [nav]
        return [leaf for item in (nav.values() if isinstance(nav, dict) else nav) for leaf in leaves(item)]

    given = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    listed = leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(listed) == sorted({*given, *pages, *outside_pages().values()})
    assert [source for source in outside_pages() if not (ROOT / source).exists()] == []


# -- what a stranger looks for --


def test_the_version_is_declared_once_and_named_alike():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "ntkjax.__version__"}
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == ntkjax.__version__
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest is not None and newest[1] == ntkjax.__version__


def test_the_licence_is_the_one_that_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / "LICENSE").read_text()
    assert project["license"] == yaml.safe_load((ROOT / "CITATION.cff").read_text())["license"] == "Apache-2.0"
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


def test_the_versions_of_python_and_ruff_are_the_same_everywhere():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    locks = {path.stem.removeprefix("py3") for path in (ROOT / "requirements").glob("py3??.txt")}
    assert {python.removeprefix("3.") for python in jobs["test"]["strategy"]["matrix"]["python"]} == locks
    hook = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["rev"].removeprefix("v")
    assert f"ruff=={hook}" in (ROOT / "requirements/py312.txt").read_text().splitlines()
