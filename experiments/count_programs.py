"""Question: how many programs does a whole command compile, and how long does that take?

Command:  python experiments/count_programs.py adapt --model DIR --domain ... --out ... --packing on
          (any command of ntkjax and its flags; programs that were kept are not read; jax logs to stderr)
Hardware: any.
Expect:   experiments/README.md, "Programs of a whole comparison".
"""

from __future__ import annotations

import collections
import logging
import os
import re
import sys

os.environ["NTKJAX_PROGRAMS"] = "off"

import jax

from ntkjax.cli import main
from ntkjax.report.tables import to_markdown

FINISHED = re.compile(r"Finished XLA compilation of (?:jit\()?([^ )]+)\)? in ([\d.e-]+) sec")
LARGE = 0.15
"""Seconds: what compiles faster is a single operation or two."""


class Count(logging.Handler):
    """Keeps the seconds of every compilation by the name of the function."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, list[float]] = collections.defaultdict(list)

    def emit(self, record: logging.LogRecord) -> None:
        """One line of jax's log of compilations."""
        if match := FINISHED.match(record.getMessage()):
            self.seconds[match[1]].append(float(match[2]))


def count(arguments: list[str]) -> tuple[Count, int]:
    """(what was compiled, exit code) of a command."""
    handler = Count()
    logging.getLogger("jax").addHandler(handler)
    with jax.log_compiles():
        return handler, main(arguments)


def rows(counted: Count) -> list[dict[str, object]]:
    """One row for each function that takes long to compile, the longest first, and their sum."""
    large = {name: took for name, took in counted.seconds.items() if sum(took) / len(took) >= LARGE}
    longest = sorted(large.items(), key=lambda item: -sum(item[1]))
    every = [second for took in counted.seconds.values() for second in took]
    made = [{"function": name, "programs": len(took), "seconds": round(sum(took), 1)} for name, took in longest]
    return [*made, {"function": "all, small ones too", "programs": len(every), "seconds": round(sum(every), 1)}]


if __name__ == "__main__":
    counted, code = count(sys.argv[1:])
    print(to_markdown(rows(counted)))
    sys.exit(code)
