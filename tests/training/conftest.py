"""The toy problem of these tests, loaded from its file (tests are not a package)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

TOY = Path(__file__).with_name("toy_problem.py")


@pytest.fixture(scope="session")
def toy():
    spec = importlib.util.spec_from_file_location("toy_problem", TOY)
    module = importlib.util.module_from_spec(spec)
    sys.modules["toy_problem"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module
