"""Compiled programs are kept on disk from run to run, by jax's persistent compilation cache.

On an accelerator a program of one pass takes 5 to 30 seconds to compile, and a second run of the same command, or a
study's next process, needs the same ones. ``NTKJAX_PROGRAMS=off`` leaves jax's settings alone; so does a directory that
the user has set for jax itself (``JAX_COMPILATION_CACHE_DIR``).
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from pathlib import Path

import jax

from ntkjax.data.cache import default_cache_dir

SWITCH = "NTKJAX_PROGRAMS"
MAX_BYTES = 2 << 30  # the programs that were used longest ago make room for new ones
MIN_SECONDS = 0.5  # what compiles faster is not worth a file


def keep_programs() -> Path | None:
    """Make jax keep compiled programs under the cache directory, at most `MAX_BYTES` of them; returns where, or None
    where ``NTKJAX_PROGRAMS=off``, jax has a directory already, or ours cannot be made (which a line on stderr says).

    A program for a CPU may use any instruction of the machine that compiled it, so machines that share a home directory
    share programs only where their processors are alike.
    """
    given = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if os.environ.get(SWITCH, "").lower() == "off" or given:
        return None
    folder = default_cache_dir() / "programs" / processor()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(
            f"ntkjax: programs are not kept: {folder}: {error.strerror}; set NTKJAX_CACHE to another", file=sys.stderr
        )
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
    return folder


def processor() -> str:
    """Eight hexadecimal digits for the machine's kind of processor."""
    try:
        flags = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Feat"))]
    except OSError:
        flags = []
    return hashlib.sha256("\n".join([platform.machine(), platform.processor(), *flags[:1]]).encode()).hexdigest()[:8]
