"""Tables of classes by name: what a user adds is one file in a package and one line in its table."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any


def load_table(package: str, table: Mapping[str, str]) -> dict[str, type[Any]]:
    """Name -> class, for a table of names and "module.Class" within ``package``."""

    def load(where: str) -> type[Any]:
        module, _, name = where.partition(".")
        return getattr(importlib.import_module(f"{package}.{module}"), name)

    return {name: load(where) for name, where in table.items()}
