"""SIGTERM, the notice that a machine is about to be taken away (Slurm, Kubernetes and spot machines send it).

Passes write rows as they go and can be stopped anywhere: there SIGTERM raises `Preempted`. Training holds a state that
only a checkpoint keeps: there it is noted, and the loop saves after the step at hand before it raises.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from ntkjax.job import everyone

EXIT_CODE = 128 + signal.SIGTERM
EVERY = 8
"""Steps between two questions to the other processes, each of which waits for all of them."""


class Preempted(KeyboardInterrupt):
    """This process was asked to end; like Ctrl-C, no ``except Exception`` holds it."""


class _Handler:
    """What SIGTERM does: signals are the process's, and so is this."""

    def __init__(self) -> None:
        self.deferred, self.noted = 0, False

    def __call__(self, number: int, frame: object) -> None:
        # A second SIGTERM is raised at once: whoever sends it does not wait for a checkpoint.
        if self.deferred and not self.noted:
            self.noted = True
            return
        raise Preempted("SIGTERM")


_HANDLER = _Handler()
AGAIN_SECONDS = 0.05
_ASKED_BY = {Preempted: signal.SIGTERM, KeyboardInterrupt: signal.SIGINT}


def _sent_again(dropped: Any, otherwise: Callable[[Any], object]) -> None:
    """What `sys.unraisablehook` does: Python drops what is raised in a callback of the garbage collector or in a
    ``__del__``, where a signal may happen to be handled (jax has such a callback). It is sent once more then."""
    number = _ASKED_BY.get(dropped.exc_type)
    if number is None:
        otherwise(dropped)
        return
    # Not at once: it would be handled in here, and dropped as well.
    timer = threading.Timer(AGAIN_SECONDS, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()


@contextlib.contextmanager
def heeded() -> Iterator[None]:
    """Inside, SIGTERM raises `Preempted`, or is noted where it is `deferred`; a second one raises in any case. Neither
    it nor Ctrl-C is lost where Python drops exceptions.

    Only the main thread can ask for it, where nobody else handles SIGTERM.
    """
    free = threading.current_thread() is threading.main_thread()
    if not free or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    before = sys.unraisablehook
    sys.unraisablehook = functools.partial(_sent_again, otherwise=before)
    signal.signal(signal.SIGTERM, _HANDLER)
    try:
        yield
    finally:
        sys.unraisablehook = before
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _HANDLER.noted = False


@contextlib.contextmanager
def deferred(together: bool = False) -> Iterator[Callable[[int], bool]]:
    """Inside, SIGTERM is noted: gives a function of the step, which tells whether to save and end now.

    Args:
      together: the steps are those of all processes of the job, which must all ask at every step: at every `EVERY`-th
        they tell one another, and are told to end at the same one, whichever of them was noticed.
    """

    def must_end(step: int) -> bool:
        if not together:
            return _HANDLER.noted
        # All processes ask at the same steps, whether or not they were told to end: one that stopped alone would leave
        # the others in a collective that never ends.
        return step % EVERY == 0 and any(everyone(_HANDLER.noted))

    _HANDLER.deferred += 1
    try:
        yield must_end
    finally:
        _HANDLER.deferred -= 1
