"""How an experiment is started: options from the command line, programs kept, and a user's error told in a line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import tyro

from ntkjax.errors import UserError
from ntkjax.pipeline.programs import keep_programs


def start(main: Callable[[Any], Any], config: type) -> None:
    """``main`` with the ``config`` that the command line gives; compiled programs are kept, as ``ntkjax`` keeps them.

    What the user can mend ends with exit code 2 and the message alone.
    """
    options = tyro.cli(config)
    keep_programs()
    try:
        main(options)
    except UserError as error:
        print(f"{sys.argv[0]}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def both_or_neither(data: object, model: object) -> None:
    """Real text needs a model that reads it, and such a model needs real text.

    Raises:
      UserError: one of --data and --model is there without the other.
    """
    if (data is None) != (model is None):
        given, missing = ("--model", "--data, the folder with pool/ and the domains") if data is None else (
            "--data", "--model, a directory, a hub id or real: the embedded model cannot read real text")  # fmt: skip
        raise UserError(f"{given} needs {missing}")
