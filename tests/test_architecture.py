"""Rules that are checked on the sources: imports between parts, forbidden imports, lengths, docstrings."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "ntkjax"

# A part may import the parts of the groups before its own. Within a group the parts stand alone (training and
# selection), except in the first two.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "types", "rng", "files"),
    ("store", "remote", "ahead", "parallel", "job", "fingerprint", "tangents", "devices", "preemption"),
    ("data",),
    ("models",),
    ("ntk",),
    ("training", "evaluation", "selection"),
    ("report", "assets"),  # assets: the embedded model's recipe trains it
    ("pipeline",),
    ("commands",),
    ("cli",),
)
FREE_GROUPS = {0, 1}
# ntk sees functions, never a model class or a tokenizer; report reads files only.
ONLY = {
    "ntk": {"errors", "types", "rng", "files", "store", "ahead", "parallel", "tangents"},
    "report": {"errors", "types", "files"},
}
FORBIDDEN = ("torch", "tensorflow")
PRIVATE_JAX = ("jax._src", "jaxlib", "jax.interpreters", "jax.core", "jax.extend.core")
# What a traced program is made of: its parts and their names change from one jax to the next.
PROGRAM_PARTS = ("eqns", "jaxpr", "jaxprs", "invars", "outvars", "constvars", "primitive")
JAX_ADAPTER = "ntk/neural_tangents.py"
MAX_FILE_LINES = 700
MAX_FUNCTION_LINES = 80


def sources(root: Path) -> Iterator[tuple[Path, str, ast.Module]]:
    for path in sorted(root.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        yield path, text, ast.parse(text)


def imports(path: Path, tree: ast.Module, root: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import, lazy ones included."""
    package = [root.name, *path.relative_to(root).parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"


def part_of(path: Path, root: Path) -> str:
    """The part of the house a file is: its folder, or its own name at the top."""
    first = path.relative_to(root).parts[0]
    return first.removesuffix(".py")


def allowed(part: str) -> set[str]:
    """Parts that ``part`` may import, itself included."""
    if part in ONLY:
        return ONLY[part] | {part}
    level = next(i for i, group in enumerate(LAYERS) if part in group)
    below = {name for group in LAYERS[:level] for name in group}
    return below | {part} | (set(LAYERS[level]) if level in FREE_GROUPS else set())


def layer_faults(root: Path) -> list[str]:
    known = {name for group in LAYERS for name in group}
    faults = []
    for path, _, tree in sources(root):
        part, where = part_of(path, root), path.relative_to(root)
        if part in ("__init__", "__main__"):  # the public names, above everything
            continue
        if part not in known:
            faults.append(f"{where}: {part} has no place in LAYERS")
            continue
        for line, name in imports(path, tree, root):
            pieces = name.split(".")
            if pieces[0] == root.name and len(pieces) > 1 and pieces[1] not in allowed(part):
                faults.append(f"{where}:{line}: {part} must not import {'.'.join(pieces[:2])}")
    return faults


# Of the commands only these import others.
COMMANDS_OF = {"demo": {"adapt", "select"}}


def command_faults(root: Path) -> list[str]:
    """Imports of one command by another, but for those of `COMMANDS_OF`."""
    faults, folder = [], root / "commands"
    every = {path.stem for path in folder.iterdir() if path.stem not in ("__init__", "base", "__pycache__")}
    for path, _, tree in sources(folder):
        own = path.relative_to(folder).parts[0].removesuffix(".py")
        for line, name in imports(path, tree, root):
            pieces = name.split(".")
            if pieces[:2] != [root.name, "commands"] or len(pieces) < 3 or pieces[2] not in every:
                continue
            if pieces[2] != own and pieces[2] not in COMMANDS_OF.get(own, set()):
                faults.append(f"commands/{path.relative_to(folder)}:{line}: {own} must not import {pieces[2]}")
    return faults


def module_graph(root: Path) -> dict[str, set[str]]:
    """Imports between the modules of the package, lazy ones included: an import inside a function hides a circle."""
    names = {}
    for path, _, _ in sources(root):
        parts = [root.name, *path.relative_to(root).with_suffix("").parts]
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph: dict[str, set[str]] = {name: set() for name in names}
    for name, path in names.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for _, target in imports(path, tree, root):
            # `from a.b import c` means the module a.b.c if there is one, else the name c of a.b.
            module = target if target in names else target.rpartition(".")[0]
            if module in names and module != name:
                graph[name].add(module)
    return graph


def find_cycle(graph: dict[str, set[str]]) -> list[str] | None:
    finished: set[str] = set()

    def visit(node: str, trail: list[str]) -> list[str] | None:
        if node in trail:
            return trail[trail.index(node) :] + [node]
        if node in finished:
            return None
        for target in sorted(graph[node]):
            cycle = visit(target, [*trail, node])
            if cycle:
                return cycle
        finished.add(node)
        return None

    return next((cycle for node in sorted(graph) if (cycle := visit(node, []))), None)


def import_faults(root: Path) -> list[str]:
    faults = []
    for path, _, tree in sources(root):
        where = str(path.relative_to(root))
        for line, name in imports(path, tree, root):
            within = lambda banned, name=name: name == banned or name.startswith(banned + ".")
            if any(map(within, FORBIDDEN)):
                faults.append(f"{where}:{line}: imports {name}")
            private = any(map(within, PRIVATE_JAX)) or (within("jax") and "._" in name)
            if private and where != JAX_ADAPTER:
                faults.append(f"{where}:{line}: private jax name {name}")
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute) or where == JAX_ADAPTER:
                continue
            name = ast.unparse(node)
            if name.startswith("jax._") or name in PRIVATE_JAX:
                faults.append(f"{where}:{node.lineno}: private jax name {name}")
            if node.attr in PROGRAM_PARTS:
                faults.append(f"{where}:{node.lineno}: reads .{node.attr} of a traced program")
    return faults


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def length_faults(root: Path) -> list[str]:
    faults = []
    for path, text, tree in sources(root):
        where = path.relative_to(root)
        lines = text.count("\n")
        if lines > MAX_FILE_LINES:
            faults.append(f"{where}: {lines} lines")
        for function in functions(tree):
            length = (function.end_lineno or 0) - function.lineno + 1
            first = function.body[0]
            if ast.get_docstring(function) is not None:
                length -= (first.end_lineno or 0) - first.lineno + 1
            if length > MAX_FUNCTION_LINES:
                faults.append(f"{where}:{function.lineno}: {function.name} has {length} lines")
    return faults


def docstring_faults(root: Path) -> list[str]:
    """Modules and public classes, functions and methods without a docstring; nested functions are private."""
    faults = []
    for path, _, tree in sources(root):
        where = path.relative_to(root)
        if ast.get_docstring(tree) is None and path.read_text(encoding="utf-8").strip():
            faults.append(f"{where}:1: the module has no docstring")
        scopes: list[ast.Module | ast.ClassDef] = [tree]
        while scopes:
            scope = scopes.pop()
            for node in scope.body:
                if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    continue
                if node.name.startswith("_"):
                    continue
                # A method of a few lines whose class is documented may speak for itself.
                brief = isinstance(node, ast.FunctionDef) and len(node.body) <= 2 and scope is not tree
                if ast.get_docstring(node) is None and not brief:
                    faults.append(f"{where}:{node.lineno}: {node.name} has no docstring")
                if isinstance(node, ast.ClassDef):
                    scopes.append(node)
    return faults


def unpackaged_faults(root: Path) -> list[str]:
    """Folders with code but no __init__.py: an installed package would lack them."""
    folders = {path.parent for path, _, _ in sources(root)}
    return sorted(str(folder.relative_to(root)) for folder in folders if not (folder / "__init__.py").exists())


def test_every_folder_with_code_is_a_package():
    assert unpackaged_faults(PACKAGE) == []


def test_imports_point_downwards_only():
    assert layer_faults(PACKAGE) == []


def test_no_command_imports_another():
    assert command_faults(PACKAGE) == []


def test_no_import_cycles():
    graph = module_graph(PACKAGE)
    assert len(graph) > 5 and any(graph.values()), "the walk found no package: the test has tested nothing"
    assert find_cycle(graph) is None


def test_no_private_jax_and_no_torch_or_tensorflow():
    assert import_faults(PACKAGE) == []


def test_files_and_functions_are_short():
    assert length_faults(PACKAGE) == []


def test_public_names_have_docstrings():
    assert docstring_faults(PACKAGE) == []


BAD = {
    "errors.py": '"""x."""\nfrom ntkjax import types\n',
    "types.py": '"""x."""\nfrom . import errors\nimport jax._src.core\n',
    "models/lm.py": '"""."""\nimport jax\ndef f():\n    from ntkjax.selection.rows import x\n    jax._src.y\n',
    "data/records.py": '"""x."""\nfrom ..cli import main\nimport torch.nn\nfrom jax.interpreters import ad\n',
    "ntk/scores.py": '"""x."""\nimport ntkjax.models.load\n',
    "ntk/repeated.py": '"""x."""\nfrom jax.extend import core\nx = jax.extend.core.Jaxpr\nfor e in x.jaxpr.eqns: e\n',
    "ntk/neural_tangents.py": '"""x."""\nfrom jax._src import core\n',
    "training/loop.py": '"""x."""\nfrom ntkjax.selection import base\nfrom ntkjax.data import records\n',
    "commands/b/work.py": '"""x."""\nfrom ntkjax.commands.adapt import x\n',
    "commands/demo.py": '"""x."""\nfrom ntkjax.commands.adapt import x\nfrom ntkjax.commands.b import work\n',
    "commands/adapt.py": '"""x."""\n',
    "report/page.py": '"""x."""\nfrom ntkjax.store import y\n',
    "cli.py": "def main():\n    "
    + "x = 1\n    " * 90
    + "\n\nclass A:\n    def b(self): x = y = z = 1; y; z\n    def _c(self): ...\n",
    "long.py": '"""x."""\n' + "x = 1\n" * 701,
}


@pytest.fixture
def bad_package(tmp_path) -> Path:
    for name, text in BAD.items():
        file = tmp_path / "ntkjax" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path / "ntkjax"


def test_the_rules_catch_a_bad_package(bad_package):
    assert layer_faults(bad_package) == [
        "data/records.py:2: data must not import ntkjax.cli",
        "long.py: long has no place in LAYERS",
        "models/lm.py:4: models must not import ntkjax.selection",
        "ntk/scores.py:2: ntk must not import ntkjax.models",
        "report/page.py:2: report must not import ntkjax.store",
        "training/loop.py:2: training must not import ntkjax.selection",
    ]
    assert command_faults(bad_package) == [
        "commands/b/work.py:2: b must not import adapt",
        "commands/demo.py:3: demo must not import b",
    ]
    assert unpackaged_faults(bad_package) == [
        ".",
        "commands",
        "commands/b",
        "data",
        "models",
        "ntk",
        "report",
        "training",
    ]
    assert find_cycle(module_graph(bad_package)) == ["ntkjax.errors", "ntkjax.types", "ntkjax.errors"]
    assert import_faults(bad_package) == [
        "data/records.py:3: imports torch.nn",
        "data/records.py:4: private jax name jax.interpreters.ad",
        "models/lm.py:5: private jax name jax._src.y",
        "models/lm.py:5: private jax name jax._src",
        "ntk/repeated.py:2: private jax name jax.extend.core",
        "ntk/repeated.py:4: reads .eqns of a traced program",
        "ntk/repeated.py:3: private jax name jax.extend.core",
        "ntk/repeated.py:4: reads .jaxpr of a traced program",
        "types.py:3: private jax name jax._src.core",
    ]
    assert length_faults(bad_package) == ["cli.py:1: main has 91 lines", "long.py: 702 lines"]
    assert docstring_faults(bad_package) == [
        "cli.py:1: the module has no docstring",
        "cli.py:1: main has no docstring",
        "cli.py:94: A has no docstring",
        "cli.py:95: b has no docstring",
        "models/lm.py:3: f has no docstring",
    ]
