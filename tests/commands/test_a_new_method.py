"""A selection method is one file and one line: both are added to a copy of the package, and everything knows it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
METHOD = '''"""A method of this test: nearest to any domain example."""

import dataclasses

import numpy as np

from ntkjax.errors import ConfigError
from ntkjax.selection.base import Selection, SelectionProblem, select_top
from ntkjax.selection.embeddings import EmbeddingMethod, embed_both
from ntkjax.selection.options import Options
from ntkjax.selection.vote import nearest


@dataclasses.dataclass(frozen=True)
class ToyOptions(Options):
    """Options of ``toy``."""

    toy_sign: float = 1.0
    """Plus for the nearest, minus for the furthest."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.toy_sign == 0:
            raise ConfigError("toy_sign must not be 0")


@dataclasses.dataclass(frozen=True)
class ToySelector(ToyOptions, EmbeddingMethod):
    """score_j = toy_sign max_i cos(phi_i, phi_j)."""

    def __call__(self, problem: SelectionProblem) -> Selection:
        domain, read_pool = embed_both(problem, problem.embed_fn, "embeddings")
        near = nearest(domain, read_pool, rows=len(problem.pool), k=1)
        report = {"toy_sign": self.toy_sign}
        return select_top("toy", self.toy_sign * near.highest.astype(np.float64), problem.n, diagnostics=report)
'''
LINE = '    "toy": "toy.ToySelector",\n'
CALLS = """
import contextlib, io, json, sys
from ntkjax.cli import main

printed = {}
for name, arguments in json.loads(sys.argv[1]).items():
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as end:
            code = end.code
    printed[name] = [code, out.getvalue(), err.getvalue()]
sys.path.insert(0, "docs")
import generate

printed["docs"] = [generate.methods()["toy"].path, generate.methods_page(), generate.commands_page()]
print(json.dumps(printed))
"""


@pytest.fixture(scope="module")
def printed(files, tmp_path_factory) -> dict[str, list]:
    """[exit code, output, errors] of each command of a package with one more method."""
    root = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "ntkjax", root / "ntkjax", ignore=shutil.ignore_patterns("tiny-lm", "__pycache__"))
    (root / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "generate.py", root / "docs")
    methods = root / "ntkjax" / "selection" / "methods"
    (methods / "toy.py").write_text(METHOD)
    table = (methods / "__init__.py").read_text()
    (methods / "__init__.py").write_text(table.replace("TABLE = {\n", "TABLE = {\n" + LINE))
    study = {
        "model": {"model": files.model, "lora_rank": 2}, "pool": files.pool, "budgets": 6,
        "domains": {"ball": {"train": files.domain, "dev": files.dev, "test": files.test}},
        "methods": [{"method": "toy", "toy_sign": -1.0}], "dedup": {"mode": "off"},
    }  # fmt: skip
    (root / "study.json").write_text(json.dumps(study))
    select = ["select", *files.flags("model", "domain", "pool"), "--n", "5", "--lora-rank", "2", "--skip-warmup"]
    select += ["--method", "toy", "--dedup.mode", "off", "--out"]
    calls = {
        "help": ["select", "--method", "toy", "--help"],
        "help of all": ["select", "--help"],
        "forecast": [*select, "never", "--dry-run"],
        "selection": [*select, "run", "--toy-sign", "-1"],
        "refused": [*select, "never", "--toy-sign", "0"],
        "of another": [*select[:-5], "--method", "random", "--toy-sign", "2", "--out", "never"],
        "study": ["study", "study.json", "--out", "study", "--list"],
    }
    environment = os.environ | {"PYTHONPATH": str(root), "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, "-c", CALLS, json.dumps(calls)], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) | {"root": [str(root)]}


def test_its_help_shows_its_option_and_no_other_methods(printed):
    code, text, _ = printed["help"]
    assert code == 0 and "--toy-sign" in text and "Plus for the nearest" in text and "--diversity" in text
    listed = set(re.findall(r"^\W*(--[\w-]+)", text, re.MULTILINE))  # not those that a description names
    assert "--toy-sign" in listed and listed.isdisjoint({"--probes", "--stage1", "--kernel"})
    every = printed["help of all"][1]
    assert "toy options" in every and "quad options" in every and "--toy-sign" in every


def test_it_is_forecast_by_what_it_says_it_costs(printed):
    code, text, _ = printed["forecast"]
    assert code == 0 and "toy, counted" in text
    assert not (Path(printed["root"][0]) / "never").exists()


def test_it_selects_and_reports(printed):
    code, text, error = printed["selection"]
    assert code == 0, error
    content = json.loads((Path(printed["root"][0]) / "run" / "selection.json").read_text())
    assert content["method"] == "toy" and content["diagnostics"]["toy_sign"] == -1.0
    assert "rank_correlation_with_length" in content["diagnostics"] and "toy_sign" in text
    assert len((Path(printed["root"][0]) / "run" / "selected.jsonl").read_text().splitlines()) == 5


def test_its_checks_hold_before_anything_is_read(printed):
    assert printed["refused"][0] == 2 and "toy_sign must not be 0" in printed["refused"][2]
    code, _, error = printed["of another"]
    assert code == 2 and "--toy-sign is 2.0, and --method random has no such option" in error and "toy" in error


def test_a_study_has_an_arm_for_it(printed):
    code, text, error = printed["study"]
    assert code == 0, error
    assert "toy" in text


def test_the_documentation_has_it(printed):
    path, methods, commands = printed["docs"]
    assert path == "ntkjax.selection.methods.toy.ToySelector"
    assert "## toy" in methods and "nearest to any domain example" in methods
    assert "`--toy-sign`" in commands and "Methods: toy." in commands
