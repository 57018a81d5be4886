"""What a comparison compiles ahead are the programs that it runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

SCRIPT = """
import sys
from pathlib import Path

import jax

import ntkjax.commands.adapt.command as adapt
from ntkjax import cli
from ntkjax.pipeline.study import runs

jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
told, *arguments = sys.argv[1:]
tell = lambda name: Path(told, name).write_text("\\n".join(f.name for f in Path(told, "programs").iterdir()))
asked, do_all = runs.Runner.programs, adapt.do_all


def compiled(runner, tasks):
    for program in asked(runner, tasks):
        program.lower().compile()
        yield program
    tell("before")


def waiting(runner, *others, **options):
    runner.ahead.wait("any: all have been asked for then")
    do_all(runner, *others, **options)


# On a CPU nothing is compiled ahead; here it is, and all of it before the first task.
runs.worthwhile = lambda mesh: 1
runs.Runner.programs, adapt.do_all = compiled, waiting
code = cli.main(arguments)
tell("after")
sys.exit(code)
"""
LONG = ("train_step", "embed_batch", "add_direction", "score_batch")


def kept(listing: Path) -> Counter[str]:
    """How many programs of each long pass the cache held. A program is kept as ``jit_NAME-HASH-cache``."""
    names = [line.removeprefix("jit_").partition("-")[0] for line in listing.read_text().split() if "atime" not in line]
    return Counter(name for name in names if name in LONG)


def test_the_programs_compiled_ahead_are_those_that_are_run(files, tmp_path):
    flags = [
        *files.flags("model", "domain", "pool", "test"),
        "--n",
        "6",
        "--seeds",
        "1",
        "--out",
        str(tmp_path / "run"),
    ]
    flags += ["--arms", "base", "domain-only", "ntk-selector", "--lora-rank", "2", "--token-budget", "1024"]
    flags += ["--train.epochs", "1", "--train.batch-size", "4", "--warmup.batch-size", "4", "--packing", "on"]
    (tmp_path / "programs").mkdir()
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs"), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), "adapt", *flags]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after = kept(tmp_path / "before"), kept(tmp_path / "after")
    assert set(before) == set(LONG)
    assert after == before, "a pass ran a program that was not compiled ahead"
