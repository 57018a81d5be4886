"""Compiled programs kept on disk."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import pytest

from ntkjax.pipeline.programs import keep_programs

SCRIPT = """
import jax, jax.monitoring
from ntkjax.pipeline import programs
programs.MIN_SECONDS = 0.0
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
folder = programs.keep_programs()
print(jax.jit(lambda x: jax.numpy.sin(x) @ x.T)(jax.numpy.ones((7, 3)))[0, 0])
print("hits", hits.count("/jax/compilation_cache/cache_hits"), "folder", folder)
"""


def run(cache, **variables):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_COMP", "JAX_PERS"))}
    environment = {**inherited, "NTKJAX_CACHE": str(cache), "NTKJAX_PROGRAMS": "", **variables}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    first, last = done.stdout.splitlines()[-2:]
    return float(first), int(last.split()[1]), last.split()[3]


def test_a_second_process_finds_the_programs_of_the_first(tmp_path):
    value, hits, folder = run(tmp_path)
    assert hits == 0 and folder.startswith(str(tmp_path)) and any((tmp_path / "programs").rglob("*-cache"))
    again, hits, _ = run(tmp_path)
    assert hits >= 1 and again == value


def test_a_cache_that_cannot_be_made_is_said_and_no_error(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NTKJAX_CACHE", str(tmp_path / "file"))
    monkeypatch.setenv("NTKJAX_PROGRAMS", "")
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        assert keep_programs() is None and jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert "programs are not kept" in capsys.readouterr().err


@pytest.mark.parametrize("variables", ({"NTKJAX_PROGRAMS": "off"}, {"JAX_COMPILATION_CACHE_DIR": "elsewhere"}))
def test_it_can_be_switched_off_and_leaves_the_users_own_directory(tmp_path, variables):
    variables = {name: str(tmp_path / "own") if value == "elsewhere" else value for name, value in variables.items()}
    assert run(tmp_path / "ours", **variables)[2] == "None"
    assert not (tmp_path / "ours").exists()
