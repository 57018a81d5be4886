"""Programs of coming passes, compiled in background threads while the device works on the present one.

A pass says what its program is by lowering it for the arguments that it will be called with, or their shapes. Once
compiled it lies in jax's persistent cache (`ntkjax.pipeline.programs`), where the pass finds it: nothing but time
depends on whether that was so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

import jax

THREADS = 3
"""Programs compiled at a time at most: each holds its own copy of the program while it is worked on."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A program to compile.

    Attributes:
      name: of the pass.
      lower: lowers it. It is called in another thread, and makes nothing but shapes where it can.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered]


class Ahead:
    """Programs that are being compiled.

    What goes wrong in them is told nobody: the pass meets it again, where it can be explained.
    """

    def __init__(self, asked: Future[dict[str, list[Future[None]]]] | None = None):
        self._asked = asked

    def wait(self, name: str) -> None:
        """Wait for the programs of that name, if there are any: the pass would otherwise compile them once more."""
        if self._asked is None or self._asked.exception() is not None:
            return
        for compiling in self._asked.result().get(name, ()):
            with contextlib.suppress(CancelledError):
                compiling.exception()


@contextlib.contextmanager
def compiled_ahead(programs: Callable[[], Iterable[Program]], threads: int) -> Iterator[Ahead]:
    """Compile what ``programs()`` gives in that many threads, the first ones first, until the ``with`` block ends; one
    that has begun by then goes on. With 0 threads it is not even asked."""
    if threads == 0:
        yield Ahead()
        return
    # Threads of its own for the asking: it lays out batches, which takes a while for a large pool.
    asking, pool = ThreadPoolExecutor(1), ThreadPoolExecutor(threads)

    def ask() -> dict[str, list[Future[None]]]:
        compiling: dict[str, list[Future[None]]] = {}
        for program in programs():
            compiling.setdefault(program.name, []).append(pool.submit(_compile, program))
        return compiling

    try:
        yield Ahead(asking.submit(ask))
    finally:
        for threads_of in (asking, pool):
            threads_of.shutdown(wait=False, cancel_futures=True)


def _compile(program: Program) -> None:
    program.lower().compile()


def worthwhile(mesh: jax.sharding.Mesh | None) -> int:
    """Threads for `compiled_ahead`: `THREADS` at most, and half of the machine's cores, on a single accelerator with a
    cache of programs; else 0.

    On a CPU the device that would be kept busy is the one that compiles. On a mesh the arguments' shardings are part of
    a program, and shapes alone do not have them.
    """
    kept = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if mesh is not None or not kept or jax.default_backend() == "cpu":
        return 0
    return min(THREADS, (os.cpu_count() or 1) // 2)
