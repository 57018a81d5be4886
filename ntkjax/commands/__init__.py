"""The commands. From this table follow the command line, ``ntkjax.X``, ``ntkjax.XConfig`` and what each prints.

A new command is one module here (a folder where it is long) that ends with
``COMMAND = Command(config, run, describe)``, and one line in the table. The modules are imported when they are asked
for. Steps that commands share are in ``ntkjax.pipeline``; no command imports another, but ``demo``, which runs
``adapt`` and ``select``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `import ntkjax.ntk` passes here, and needs none of what a command does
    from ntkjax.commands.base import Command

COMMANDS = {
    "select": "select.command",
    "finetune": "finetune",
    "evaluate": "evaluate",
    "adapt": "adapt.command",
    "demo": "demo",
    "verify": "verify.command",
    "stability": "stability.command",
    "study": "study.command",
    "validate": "validate.command",
    "doctor": "doctor",
    "explain": "explain.command",
    "show": "show",
    "import-gguf": "import_gguf",
    "replay": "replay",
    "plan": "plan.command",
    "launch": "launch",
}
"""Name of the command: its module in this folder."""


def load_command(name: str) -> Command:
    """The command of that name; KeyError where there is none."""
    return importlib.import_module(f"ntkjax.commands.{COMMANDS[name]}").COMMAND
