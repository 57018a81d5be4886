"""The pages that are made from the sources: methods, kernels, commands and the API reference.

Sources are parsed, never imported, so that neither jax nor the package need be installed where the site is built.
`pages` gives every page; `docs/hooks.py` hands them to mkdocs.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("data", "models", "ntk", "selection", "training", "evaluation")
"""Packages with a page of the reference, by the names in their ``__all__``."""
ERRORS = "ntkjax.errors"
COMMANDS, METHODS = "ntkjax.commands", "ntkjax.selection.methods"
REPRESENTATIONS, ALGORITHMS = "ntkjax.selection.representations", "ntkjax.selection.algorithms"
KERNELS, EXACT = "ntkjax.ntk.kernels", "ntkjax.ntk.exact"
"""The modules that hold the tables of commands, methods and kernels, and the exact kernels."""


@dataclasses.dataclass(frozen=True)
class Definition:
    """A class, function or assignment at the top of a module."""

    module: str
    name: str
    node: ast.stmt

    @property
    def path(self) -> str:
        """Dotted name."""
        return f"{self.module}.{self.name}"


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of a config dataclass: its annotation and default as written, its docstring; and the class of options
    that it holds, with ``prefixed`` False where their flags stand without the field's name."""

    name: str
    annotation: str
    default: str | None
    help: str
    group: Definition | None = None
    prefixed: bool = True


@functools.cache
def parse(module: str) -> ast.Module:
    """The syntax tree of a module of the package."""
    path = ROOT / (module.replace(".", "/") + ".py")
    path = path if path.exists() else ROOT / module.replace(".", "/") / "__init__.py"
    return ast.parse(path.read_text(encoding="utf-8"))


def statements(module: str) -> Iterator[ast.stmt]:
    """Statements at the top of a module, those under ``if TYPE_CHECKING`` included."""
    for node in parse(module).body:
        yield from node.body if isinstance(node, ast.If) else [node]


def targets(node: ast.stmt) -> list[str]:
    """The names that a statement assigns."""
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return [node.target.id] if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) else []


def definition(module: str, name: str) -> Definition:
    """Where ``name`` of ``module`` is defined: imports are followed, and ``f = wrapper(...)(_f)`` leads to ``_f``.

    Raises:
      KeyError: the module has no such name.
    """
    for node in statements(module):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return Definition(module, name, node)
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name and node.module is not None:
                    return definition(node.module, alias.name)
        if name in targets(node):
            value = node.value if isinstance(node, ast.Assign) else None
            if isinstance(value, ast.Call) and isinstance(value.func, ast.Call):
                wrapped = [argument.id for argument in value.args if isinstance(argument, ast.Name)]
                return definition(module, wrapped[-1])
            return Definition(module, name, node)
    raise KeyError(f"{module} has no {name}")


def value_of(module: str, name: str) -> ast.expr:
    """The expression that ``name`` is assigned."""
    node = definition(module, name).node
    assert isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None, name
    return node.value


def public_names(module: str) -> list[str]:
    """The names in ``__all__``."""
    return list(ast.literal_eval(value_of(module, "__all__")))


def summary(node: ast.AST) -> str:
    """The first paragraph of a docstring, on one line."""
    text = ast.get_docstring(node) or ""  # type: ignore[arg-type]
    return " ".join(text.split("\n\n")[0].split())


def methods() -> dict[str, Definition]:
    """``--method`` -> the class that it names."""
    return classes_of(METHODS)


def classes_of(package: str) -> dict[str, Definition]:
    """Name -> class, of the ``TABLE`` of a package."""
    table: dict[str, str] = ast.literal_eval(value_of(package, "TABLE"))
    places = {name: where.split(".") for name, where in table.items()}
    return {name: definition(f"{package}.{module}", cls) for name, (module, cls) in places.items()}


def kernels() -> dict[str, tuple[str, Definition]]:
    """Name of a kernel (``spectral:m`` where it has a size) -> (its summary, the function that its entry calls)."""
    table, found = value_of(KERNELS, "KERNELS"), {}
    assert isinstance(table, ast.Dict)
    for key, entry in zip(table.keys, table.values, strict=True):
        assert key is not None and isinstance(entry, ast.Call)
        parts = {part.arg: part.value for part in entry.keywords}
        maker = parts["build"]
        assert isinstance(maker, ast.Lambda) and isinstance(maker.body, ast.Call)
        name = ast.literal_eval(key) + (":m" if "sized" in parts and ast.literal_eval(parts["sized"]) else "")
        found[name] = ast.literal_eval(parts["summary"]), definition(KERNELS, ast.unparse(maker.body.func))
    return found


def commands() -> dict[str, Definition]:
    """Name of a command -> its config class."""
    return {name: config for name, (_, config) in command_parts().items()}


def command_parts() -> dict[str, tuple[Definition, Definition]]:
    """Name of a command -> the function that does its work, and its config class."""
    found = {}
    for name, module in ast.literal_eval(value_of(COMMANDS, "COMMANDS")).items():
        made = value_of(f"{COMMANDS}.{module}", "COMMAND")
        assert isinstance(made, ast.Call)
        config, run = made.args[:2]
        assert isinstance(config, ast.Name) and isinstance(run, ast.Name)
        found[name] = definition(f"{COMMANDS}.{module}", run.id), definition(f"{COMMANDS}.{module}", config.id)
    return found


def public_definitions() -> dict[str, Definition]:
    """Every name of ``ntkjax`` itself: those it imports for type checkers, and the commands with their configs."""
    lazy = (node for block in parse("ntkjax").body if isinstance(block, ast.If) for node in block.body)
    names = [alias.name for node in lazy if isinstance(node, ast.ImportFrom) for alias in node.names]
    found = {name: definition("ntkjax", name) for name in names}
    for name, (run, config) in command_parts().items():
        found |= {name.replace("-", "_"): run, config.name: config}
    return dict(sorted(found.items()))


def method_options() -> list[Field]:
    """The options of all methods; the help of each ends with the methods that have it."""
    options: dict[str, Field] = {}
    having: dict[str, list[str]] = {}
    for method, selector in methods().items():
        for field in fields(selector):
            options.setdefault(field.name, field)
            having.setdefault(field.name, []).append(method)
    return [dataclasses.replace(o, help=f"{o.help} Methods: {', '.join(having[o.name])}.") for o in options.values()]


def part_options() -> list[Field]:
    """The options of all representations and algorithms."""
    every = [*classes_of(REPRESENTATIONS).values(), *classes_of(ALGORITHMS).values()]
    return list({field.name: field for part in every for field in fields(part)}.values())


def fields(config: Definition) -> list[Field]:
    """The fields of a dataclass, those of its bases first; bases with a star are the options of all methods, or of all
    representations and algorithms."""
    assert isinstance(config.node, ast.ClassDef)
    found: dict[str, Field] = {}
    for base in reversed(config.node.bases):
        inherited = []
        if isinstance(base, ast.Starred):
            inherited = part_options() if "part_option" in ast.unparse(base) else method_options()
        elif isinstance(base, ast.Name):
            inherited = fields(definition(config.module, base.id))
        found |= {field.name: field for field in inherited if field.name not in found}
    if not any("dataclass" in ast.unparse(decorator) for decorator in config.node.decorator_list):
        return list(found.values())
    body = config.node.body
    for node, after in zip(body, [*body[1:], None], strict=True):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        if ast.unparse(node.annotation).startswith("ClassVar"):
            continue
        text = ""
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
            text = " ".join(after.value.value.split())
        group, prefixed = options_in(config.module, node.annotation)
        value = value_of(config.module, node.value.id) if isinstance(node.value, ast.Name) else node.value
        default = None if value is None else ast.unparse(value)
        found[node.target.id] = Field(node.target.id, ast.unparse(node.annotation), default, text, group, prefixed)
    return list(found.values())


def options_in(module: str, annotation: ast.expr) -> tuple[Definition | None, bool]:
    """(the dataclass of options that a field holds, whether its flags are prefixed)."""
    inner, prefixed = annotation, True
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value).endswith("Annotated"):
        assert isinstance(annotation.slice, ast.Tuple)
        inner, prefixed = annotation.slice.elts[0], False
    if not isinstance(inner, ast.Name):
        return None, prefixed
    try:
        found = definition(module, inner.id)
    except KeyError:  # a builtin
        return None, prefixed
    return (found, prefixed) if isinstance(found.node, ast.ClassDef) else (None, prefixed)


def flag(field: Field) -> str:
    """The flag of a field as the command line spells it, without dashes."""
    return field.name.replace("_", "-")


def flags(config: Definition) -> set[str]:
    """Every flag of a command, without dashes: ``train.learning-rate``."""
    found = set()
    for field in fields(config):
        if field.group is None:
            found.add(flag(field))
        else:
            inner = flags(field.group)
            found |= {f"{flag(field)}.{name}" for name in inner} if field.prefixed else inner
    return found


def row(*cells: str) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def shown_default(field: Field) -> str:
    """A default as one would give it on the command line."""
    if field.default is None:
        return "required"
    value = {"False": "off", "True": "on", "()": "none", "None": "none"}.get(field.default, field.default)
    return f"`{value.strip(chr(39))}`" if value == field.default else value


def flag_table(config: Definition, prefix: str = "") -> list[str]:
    """The fields that hold no further options, as a table."""
    lines = [row("flag", "default", "what"), "|---|---|---|"]
    for field in fields(config):
        if field.group is None:
            positional = field.annotation.startswith("Positional")
            name = field.name.upper() if positional else f"--{prefix}{flag(field)}"
            lines.append(row(f"`{name}`", shown_default(field), field.help))
    return lines if len(lines) > 2 else []


def commands_page() -> str:
    """Every command with its flags; groups of flags that several commands share stand once, at the end."""
    lines = ["# Commands and flags", "", "Made from the config classes. `ntkjax COMMAND --help` prints the same.", ""]
    groups: dict[str, tuple[Definition, set[str]]] = {}
    for name, config in commands().items():
        lines += [f"## ntkjax {name}", "", summary(config.node), "", *flag_table(config), ""]
        shared = []
        for field in fields(config):
            if field.group is not None:
                prefix = f"{flag(field)}." if field.prefixed else ""
                groups.setdefault(field.group.name, (field.group, set()))[1].add(prefix)
                shown = f", as `--{prefix}FLAG`" if prefix else ""
                default = f", default `{field.default}`" if field.default not in (None, f"{field.group.name}()") else ""
                shared.append(f"[{field.group.name}](#{field.group.name.lower()}){shown}{default}")
        lines += ["Further flags: " + "; ".join(shared) + ".", ""] if shared else []
    lines += ["## Groups of flags", ""]
    for name, (group, prefixes) in sorted(groups.items()):
        given = sorted(prefix for prefix in prefixes if prefix)
        shown = " Prefixed with " + ", ".join(f"`--{prefix}`" for prefix in given) + "." if given else ""
        lines += [f"### {name}", "", summary(group.node) + shown, "", *flag_table(group), ""]
    return "\n".join(lines)


def block(path: str, level: int, *, heading: str | None = None, members: bool = False) -> list[str]:
    """A mkdocstrings directive."""
    options = [f"      heading_level: {level}"]
    options += [f'      heading: "{heading}"'] if heading else []
    options += [] if members else ["      members: false"]
    return [f"::: {path}", "    options:", *options, ""]


def methods_page() -> str:
    """Every selection method: its summary, formula, source and options."""
    lines = ["# Selection methods", "", "Made from `METHODS` and the docstrings. `--method NAME` takes:", ""]
    lines += [row("method", "what it is"), "|---|---|"]
    lines += [row(f"[`{name}`](#{name})", summary(parse(method.module))) for name, method in methods().items()]
    lines += [""]
    for name, method in methods().items():
        lines += [f"## {name}", "", summary(parse(method.module)), "", *block(method.path, 3)]
    for package, title, option in ((REPRESENTATIONS, "Representations", "representation"),
                                   (ALGORITHMS, "Algorithms", "algorithm")):  # fmt: skip
        parts = {part.path: (name, part) for name, part in reversed(classes_of(package).items())}  # once each
        lines += [f"## {title}", "", f"`--method parts --{option} NAME` takes:", ""]
        lines += [row(option, "what it is"), "|---|---|"]
        lines += [row(f"`{name}`", summary(parse(part.module))) for name, part in classes_of(package).items()] + [""]
        for name, part in reversed(parts.values()):
            lines += block(part.path, 3, heading=name)
    return "\n".join(lines)


def kernels_page() -> str:
    """Every kernel that has a name, and the exact kernels of any function."""
    module = ast.get_docstring(parse(KERNELS)) or ""
    lines = ["# Kernels", "", "Made from the table of kernels and the docstrings. `--kernel NAME` takes:", ""]
    lines += [row("kernel", "what it is"), "|---|---|"]
    lines += [row(f"`{name}`", text) for name, (text, _) in kernels().items()]
    lines += ["", "## How they are derived", "", module, "", "## The functions", ""]
    for path in dict.fromkeys(maker.path for _, maker in kernels().values()):
        lines += block(path, 3)
    lines += ["## Exact kernels of any function", "", ast.get_docstring(parse(EXACT)) or "", ""]
    for name in ("empirical_ntk", "trace_ntk", "mean_trace_ntk", "centred_trace_ntk"):
        lines += block(f"{EXACT}.{name}", 3)
    return "\n".join(lines)


def reference_pages() -> dict[str, str]:
    """One page for each package, and one that lists the names of ``ntkjax`` itself."""
    found = {}
    for package in PACKAGES:
        module = f"ntkjax.{package}"
        lines = [f"# {module}", "", ast.get_docstring(parse(module)) or "", ""]
        for name in public_names(module):
            lines += block(definition(module, name).path, 2, members=True)
        found[f"reference/{package}.md"] = "\n".join(lines)
    lines = [f"# {COMMANDS}", "", ast.get_docstring(parse(COMMANDS)) or "", ""]
    for run, config in command_parts().values():
        lines += [*block(run.path, 2), *block(config.path, 2, members=True)]
    found["reference/commands.md"] = "\n".join(lines)
    errors = [node.name for node in parse(ERRORS).body if isinstance(node, ast.ClassDef)]
    lines = [f"# {ERRORS}", "", ast.get_docstring(parse(ERRORS)) or "", ""]
    found["reference/errors.md"] = "\n".join([*lines, *(x for n in errors for x in block(f"{ERRORS}.{n}", 2))])
    lines = ["# ntkjax", "", ast.get_docstring(parse("ntkjax")) or "", "", row("name", "what"), "|---|---|"]
    for name, home in public_definitions().items():
        lines.append(row(f"[`ntkjax.{name}`][{home.path}]", summary(home.node)))
    lines += [
        "",
        "The commands take a config object, or its fields as keywords: options of groups without a prefix by their own",
        'names (`lora_rank=8`), prefixed groups as objects or dicts (`train={"epochs": 2}`). The fields are those in',
        "[Commands and flags](../commands.md).",
    ]
    found["reference/index.md"] = "\n".join(lines)
    return found


def pages() -> dict[str, str]:
    """Every generated page: path below docs/ -> Markdown."""
    own = {"commands.md": commands_page(), "methods.md": methods_page(), "kernels.md": kernels_page()}
    return own | reference_pages()
