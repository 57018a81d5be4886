"""What a message tells the user to do exists: every flag, command, option and name in a message is looked up.

Messages are the texts in the package's calls of the UserError family, of ``RecordProblem`` and of functions named
``_fail``; flags and commands are looked for in every text of the package, help included.
"""

from __future__ import annotations

import argparse
import ast
import re
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import tyro

import ntkjax
from ntkjax import errors
from ntkjax.commands import COMMANDS, load_command

PACKAGE = Path(ntkjax.__file__).parent
OWN_PARSER = {"assets/make_tiny_lm.py", "assets/make_real_model.py"}
"""Scripts whose flags are their own, or pip's."""
OTHER_PROGRAMS = {"--no-deps": "pip", "--porcelain": "git", "--xla_force_host_platform_device_count": "xla"}
OTHER_PACKAGES = {
    *("JAX_COORDINATOR_ADDRESS", "JAX_ENABLE_X64", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"),  # the environment, of jax
    *("safe_serialization", "max_shard_size", "pad_token", "eos_token", "tokenizer_config", "lm_head"),  # transformers
    "to_parquet",  # datasets
}
MESSAGES = {
    "RecordProblem",
    "_fail",
    *(name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.UserError)),
}
FLAG = re.compile(r"(?<![\w-])--[a-z][\w.-]*[\w]")
SWITCHED = re.compile(r"\b(?:with|switch|turn) (\w+) (?:on|off)\b")
NAMED = re.compile(r"\b[A-Za-z][a-z0-9]*(?:_[A-Za-z0-9]+)+\b|\b[A-Za-z_]\w*(?=[(=]\w)")


@cache
def trees() -> dict[str, ast.Module]:
    paths = sorted(PACKAGE.rglob("*.py"))
    return {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


@cache
def actions() -> dict[str, argparse.Action]:
    """Flag -> what parses it, of every command."""
    found = {}
    for command in map(load_command, COMMANDS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            parser = tyro.extras.get_parser(command.config)
        found |= {flag: action for action in parser._actions for flag in action.option_strings}
    return found


def leaf(flag: str) -> str:
    """``--train.micro-batch-tokens`` -> ``micro_batch_tokens``, as config.yaml and Python spell it."""
    return flag.lstrip("-").split(".")[-1].replace("-", "_")


def texts(node: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, text) of every string in a node, the values of an f-string as ``{}``."""
    inside = set()
    for part in ast.walk(node):
        if isinstance(part, ast.JoinedStr):
            inside |= {id(value) for value in part.values}
            yield part.lineno, "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in part.values)
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str) and id(part) not in inside:
            yield part.lineno, part.value


def everything() -> Iterator[tuple[str, str]]:
    for name, tree in trees().items():
        if name not in OWN_PARSER:
            yield from ((f"{name}:{line}", text) for line, text in texts(tree))


def messages() -> Iterator[tuple[str, str]]:
    for name, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                if called in MESSAGES:
                    yield from ((f"{name}:{line}", text) for line, text in texts(node))


@cache
def names() -> frozenset[str]:
    """What Python code of the package calls something: functions, parameters, fields, attributes, keys."""
    found = {leaf(flag) for flag in actions()} | {part for name in trees() for part in re.split(r"[/.]", name)}
    for tree in trees().values():
        said = {id(part) for node in ast.walk(tree) if isinstance(node, ast.Call) for part in node.args}
        for node in ast.walk(tree):
            for field in ("name", "id", "arg", "attr"):
                value = getattr(node, field, None)
                found |= {value} if isinstance(value, str) else set()
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said:
                found |= {node.value} if node.value.isidentifier() else set()
    return frozenset(found)


def wrong_flags(where: str, text: str) -> list[str]:
    """Flags in a text that no command has, and values of them that they do not take."""
    found = []
    for match in FLAG.finditer(text):
        flag = match.group()
        if flag in OTHER_PROGRAMS:
            continue
        if flag not in actions():
            found.append(f"{where}: no command has {flag}")
    return found


def wrong_commands(where: str, text: str) -> list[str]:
    """``ntkjax WORD`` where WORD is no command."""
    words = re.findall(r"`ntkjax ([a-z-]+)|(?:run|with|use) ntkjax ([a-z-]+)", text)
    return [f"{where}: no command {a or b}" for a, b in words if (a or b) not in COMMANDS]


def wrong_names(where: str, text: str) -> list[str]:
    """Options said to be switched that cannot be, and names that nothing has."""
    switches = {
        leaf(flag) for flag, action in actions().items() if "off" in (action.choices or ()) or action.nargs == 0
    }
    found = [f"{where}: {word!r} is no switch" for word in SWITCHED.findall(text) if word not in switches]
    known = names() | OTHER_PACKAGES
    return found + [f"{where}: nothing is called {word}" for word in NAMED.findall(text) if word not in known]


def test_flags_exist():
    assert [line for where, text in everything() for line in wrong_flags(where, text)] == []


def test_commands_exist():
    assert [line for where, text in everything() for line in wrong_commands(where, text)] == []


def test_options_and_names_exist():
    assert [line for where, text in messages() for line in wrong_names(where, text)] == []


def test_there_is_something_to_check():
    """The collector sees what it should: flags, commands and messages of every layer."""
    said = [text for _, text in messages()]
    assert len(said) > 300 and sum(bool(FLAG.search(text)) for text in said) > 10
    assert {"--out", "--train.micro-batch-tokens", "--dedup.mode", "--no-remat"} <= set(actions())
    layers = {where.partition("/")[0] for where, _ in messages()}
    assert {"data", "models", "training", "evaluation", "commands", "pipeline", "selection", "ntk"} <= layers


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (wrong_flags, "or --overwrite to compute the rows again."),
        (wrong_flags, "lower --tokens-budget"),
        (wrong_flags, "give --train.micro_batch_tokens"),
        (wrong_names, "or start over with resume off"),
        (wrong_names, "switch choices off for the likelihood alone"),
        (wrong_names, "raise max_lengths"),
        (wrong_names, "load with LoraSettings(rank=4)"),
        (wrong_commands, "make it with `ntkjax prepare`"),
        (wrong_commands, "run ntkjax choose first"),
    ],
)
def test_a_remedy_that_does_not_exist_is_found(check, text):
    assert len(check("x.py:1", text)) == 1


@pytest.mark.parametrize(
    "text",
    ["lower --token-budget or use --remat", "raise max_length", "load with LoraConfig(rank=4)", "`ntkjax select`, with "
     "stage1 off", "pip install --no-deps neural-tangents", "is not one of {} (--lora-rank {})"],
)  # fmt: skip
def test_a_remedy_that_exists_is_not(text):
    assert wrong_flags("x", text) + wrong_names("x", text) + wrong_commands("x", text) == []
