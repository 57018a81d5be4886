"""Locks hold names and versions only, and every requirement has its reason."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
PINNED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.!+]+")


def normalised(requirement: str) -> str:
    """``jax[cuda13]>=0.10`` -> ``jax``, spelled as package indexes compare names."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name is not None, requirement
    return re.sub(r"[-_.]+", "-", name.group()).lower()


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_each_line_is_a_name_and_a_version(lock):
    lines = lock.read_text().splitlines()
    assert lines
    assert [line for line in lines if not PINNED.fullmatch(line)] == []
    assert len({normalised(line) for line in lines}) == len(lines)


@pytest.mark.parametrize(
    "line",
    ["jax", "jax>=0.10", "jax @ https://host/jax.whl", "--index-url x", "-e .", "jax==0.1 --hash=sha256:0"],
)
def test_the_pattern_refuses_anything_else(line):
    assert not PINNED.fullmatch(line)


@pytest.mark.parametrize("name", ["py311.txt", "py312-jax011.txt", "py312.txt", "py313.txt"])
def test_the_locks_hold_every_requirement_and_no_tensorflow(name):
    locked = {normalised(line) for line in (ROOT / "requirements" / name).read_text().splitlines()}
    extras = project()["optional-dependencies"]
    wanted = {normalised(r) for r in project()["dependencies"] + extras["dev"] + extras["nt"]}
    assert wanted - locked == set()
    assert not locked & {"tensorflow", "torch", "ntkjax"}


def test_every_requirement_has_a_line_that_says_why():
    text = (ROOT / "requirements" / "README.md").read_text().lower()
    reasons = {normalised(name) for name in re.findall(r"[a-z0-9_-]+", text)}
    extras = project()["optional-dependencies"]
    wanted = {normalised(r) for r in project()["dependencies"] + extras["dev"] + extras["nt"]}
    assert wanted - reasons == set()


def locked_jax(lock: Path) -> str:
    """The minor version of jax in ``lock``; jaxlib's is the same."""
    found = dict(line.split("==") for line in lock.read_text().splitlines())
    minor = [".".join(found[name].split(".")[:2]) for name in ("jax", "jaxlib")]
    assert minor[0] == minor[1]
    return minor[0]


def test_the_bounds_say_what_the_matrix_tests():
    """Every Python and every jax between the bounds of pyproject.toml has a lock, and the matrix takes every lock."""
    makefile = (ROOT / "Makefile").read_text()
    matrix = dict(reversed(entry.split(":")) for entry in re.search(r"^MATRIX := (.*)$", makefile, re.M)[1].split())
    locks = {lock.stem: lock for lock in LOCKS if lock.name.startswith("py")}
    assert set(matrix) == set(locks)
    prefix = "Programming Language :: Python :: 3."
    pythons = {"3." + line.removeprefix(prefix) for line in project()["classifiers"] if line.startswith(prefix)}
    assert set(matrix.values()) == pythons
    assert all(name.startswith("py" + version.replace(".", "")) for name, version in matrix.items())
    low, high = re.search(r"jax>=0\.(\d+),<0\.(\d+)", " ".join(project()["dependencies"])).groups()
    assert {locked_jax(lock) for lock in locks.values()} == {f"0.{minor}" for minor in range(int(low), int(high))}
