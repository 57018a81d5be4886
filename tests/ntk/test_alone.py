"""``ntkjax.ntk`` needs six packages and nothing else: from the imports, and in an environment that has no others."""

from __future__ import annotations

import ast
import functools
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NEEDED = {"jax", "numpy", "scipy", "jaxtyping", "tqdm", "tensorstore"}

PROGRAM = """
import numpy as np
import jax.numpy as jnp
from typing import NamedTuple
import jax
from ntkjax.ntk import centred_trace_ntk, kernel_scores, trace_ntk

class Rows(NamedTuple):
    x: jax.Array
    index: jax.Array

rng = np.random.default_rng(0)
params = {"w": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)}
rows = lambda count: Rows(jnp.asarray(rng.normal(size=(count, 3)), jnp.float32), jnp.arange(count))
outputs = lambda p, b: jnp.tanh(b.x @ p["w"])
pool, domain = rows(5), rows(2)
jacobian = lambda b: np.asarray(jax.jacobian(lambda p: outputs(p, b))(params)["w"], np.float64).reshape(len(b.x), 4, -1)
first, second = jacobian(domain), jacobian(pool)
scores = kernel_scores(outputs, params, [domain], [pool], rows=5).scores[:, 0]
np.testing.assert_allclose(scores, np.einsum("icp,jcp->ij", first, second).mean(axis=0), rtol=1e-4)
np.testing.assert_allclose(trace_ntk(outputs, params, pool), np.einsum("icp,jcp->ij", second, second), rtol=1e-4)
centred = second - second.mean(axis=1, keepdims=True)
expected = np.einsum("icp,jcp->ij", centred, centred)
np.testing.assert_allclose(centred_trace_ntk(outputs, params, pool), expected, rtol=1e-4, atol=1e-5)
import ntkjax
print(ntkjax.__file__)
"""
"""Scores and exact kernels of a toy function, against its Jacobian."""


def path_of(module: str) -> Path | None:
    """The file of a module of the package, None where there is none of that name."""
    base = ROOT / module.replace(".", "/")
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.exists()), None)


def imported(module: str) -> Iterator[str]:
    """Every module that ``module`` imports, lazily or not, but for type checkers; `a.b` for ``from a import b`` too."""
    path = path_of(module)
    assert path is not None, module
    left = [ast.parse(path.read_text(encoding="utf-8"))]
    while left:
        node = left.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            left += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{path}: a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (argument.value for argument in node.args if isinstance(argument, ast.Constant))
        left += ast.iter_child_nodes(node)


@functools.cache
def reached() -> dict[str, set[str]]:
    """Module of the package -> top-level packages that it imports, for all that ``import ntkjax.ntk`` can run."""
    found: dict[str, set[str]] = {}
    todo = ["ntkjax.ntk", *(f"ntkjax.ntk.{path.stem}" for path in (ROOT / "ntkjax" / "ntk").glob("[!_]*.py"))]
    while todo:
        module = todo.pop()
        if module in found:
            continue
        names = set(imported(module))
        found[module] = {name.split(".")[0] for name in names if not name.startswith("ntkjax")}
        parents = [module.rsplit(".", count)[0] for count in range(1, module.count(".") + 1)]
        inside = [name for name in names if name.startswith("ntkjax") and path_of(name) is not None]
        todo += [*parents, *inside]
    return found


def test_it_imports_six_packages_and_no_others():
    allowed = NEEDED | set(sys.stdlib_module_names)
    strange = {(module, name) for module, names in reached().items() for name in names - allowed}
    assert strange == set()  # neural-tangents is looked for when its backend is asked for, never imported by name
    assert {"jax", "numpy", "jaxtyping", "tqdm"} <= set().union(*reached().values())


def test_it_reaches_no_room_above_it():
    rooms = {module.split(".")[1] for module in reached() if "." in module}
    assert rooms & {"data", "models", "selection", "training", "evaluation", "report", "pipeline"} == set()
    assert "tangents" in rooms and rooms & {"store", "job"} == set()


def test_an_import_of_another_package_would_be_seen(tmp_path, monkeypatch):
    (tmp_path / "ntkjax" / "ntk").mkdir(parents=True)
    (tmp_path / "ntkjax" / "__init__.py").write_text("")
    (tmp_path / "ntkjax" / "other.py").write_text("def late():\n    import optax\n")
    (tmp_path / "ntkjax" / "ntk" / "__init__.py").write_text("from ntkjax import other\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert reached.__wrapped__()["ntkjax.other"] == {"optax"}


@pytest.mark.slow
def test_it_scores_and_builds_exact_kernels_beside_just_those_packages(tmp_path):
    import jax

    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = functools.partial(subprocess.run, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    version = {"jax": f"jax=={jax.__version__}"}
    packages = [version.get(name, name) for name in sorted(NEEDED)]
    installed = run([python, "-m", "pip", "install", "-q", *packages])
    if installed.returncode:
        pytest.skip(f"pip cannot install here: {installed.stderr[-300:]}")
    source = tmp_path / "source"  # a copy, because building leaves files beside the sources
    shutil.copytree(ROOT / "ntkjax", source / "ntkjax", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    installed = run([python, "-m", "pip", "install", "-q", "--no-deps", str(source)])
    assert installed.returncode == 0, installed.stderr
    result = run([python, "-c", PROGRAM])
    assert result.returncode == 0, result.stderr
    assert str(tmp_path / "env") in result.stdout  # the installed package, not the one in the checkout
    assert run([python, "-c", "import optax"]).returncode  # nothing else is there
