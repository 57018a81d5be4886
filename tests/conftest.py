"""Settings and fixtures that every test shares."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight simulated devices, so that sharding is tested on any machine; one device remains the default.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("ntkjax", "beartype.beartype")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64():
    """Double precision for the duration of one test: where the mathematics is exact, 1e-10 is asked for."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real data and checkpoints beside the repository; tests that use it skip where it is absent."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not (path / "data").is_dir():
        pytest.skip("no ../shared beside this checkout")
    return path
