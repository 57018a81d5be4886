"""The toy problem of these tests."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def toy(load_file) -> ModuleType:
    """toy_problem.py beside this file."""
    return load_file(Path(__file__).with_name("toy_problem.py"))
