"""What a run was made with: versions of the libraries, platform, devices, the commit of the sources."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

_LIBRARIES = (
    *("ntkjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "numpy", "scipy"),
    *("transformers", "tokenizers", "safetensors", "datasets", "neural-tangents", "torch"),
)


def versions() -> dict:
    """Versions of Python and the libraries that decide a result, platform, devices, git commit (or None)."""
    import jax  # here, since asking for devices starts the backend

    devices = jax.devices()
    return {
        "python": platform.python_version(),
        **library_versions(),
        "platform": platform.platform(),
        "processor": platform.machine(),
        "backend": jax.default_backend(),
        "device_kind": devices[0].device_kind,
        "device_count": len(devices),
        "process_count": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS"),
        "git_commit": _git_commit(),
    }


def library_versions() -> dict[str, str | None]:
    """Versions of the libraries that decide a result; None for one that is not installed."""
    return {name: _version(name) for name in _LIBRARIES}


def package_version() -> str | None:
    """The version of ntkjax; None where it is run from its sources without being installed."""
    return _version("ntkjax")


def _version(name: str) -> str | None:
    """Installed version of a distribution; None where it is not installed (ntkjax run from its sources)."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Commit of the checkout that this package lies in, with "+changes" where the tree differs from it."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # installed as a package, or another project's repository above
        return None
    try:
        git = lambda *args: subprocess.run(
            ["git", *args], cwd=root, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
