"""SIGTERM while a model is trained: the step at hand is saved, and the run that goes on ends as one never stopped."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from ntkjax.preemption import EXIT_CODE, Preempted, deferred, heeded
from ntkjax.training import TrainConfig, fit

SETTINGS = {"epochs": 3, "batch_size": 6, "max_buckets": 1, "learning_rate": 0.1, "save_every": 1000}


def test_training_saves_the_step_at_hand_and_goes_on_bit_for_bit(toy, tmp_path):
    nll_fn, params = toy.make_model()
    data, config = toy.make_data(30, 0), TrainConfig(**SETTINGS)
    whole = fit(nll_fn, params, data, config, seed=0, progress=False, out_dir=tmp_path / "whole")

    class Noticed(toy.Dying):
        """SIGTERM arrives while the batch of the fifth step is made."""

        def collate(self, indices, *, rows, length):
            self.made = getattr(self, "made", 0) + 1
            if self.made == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().collate(indices, rows=rows, length=length)

    with heeded(), pytest.raises(Preempted, match=r"stopped after step [45]"):
        fit(nll_fn, params, Noticed(data, -1), config, seed=0, progress=False, out_dir=tmp_path / "stopped")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    again = fit(nll_fn, params, data, config, seed=0, progress=False, out_dir=tmp_path / "stopped")
    assert again.steps == whole.steps == 15
    jax.tree.map(np.testing.assert_array_equal, again.params, whole.params)
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "stopped")]
    assert len(lines[0]) == len(lines[1])


def test_elsewhere_it_ends_the_work_at_once():
    with heeded(), pytest.raises(Preempted):
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    assert not issubclass(Preempted, Exception) and EXIT_CODE == 143


def test_a_second_notice_ends_what_the_first_was_deferred_in():
    with heeded(), pytest.raises(Preempted), deferred() as must_end:
        assert not must_end(0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert must_end(1)
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()


def test_processes_ask_one_another_at_every_eighth_step():
    with heeded(), deferred(together=True) as must_end:
        assert not must_end(8)
        os.kill(os.getpid(), signal.SIGTERM)
        assert [step for step in range(1, 25) if must_end(step)] == [8, 16, 24]


def test_a_handler_of_somebody_else_stays():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    try:
        with heeded(), deferred() as must_end:
            os.kill(os.getpid(), signal.SIGTERM)
            assert heard == [1] and not must_end(0)
    finally:
        signal.signal(signal.SIGTERM, before)


COMMAND = """
import os, signal, sys
import ntkjax.commands.show as show
from ntkjax.cli import main
from ntkjax.commands.base import Command
def run(config, *, progress=True):
    os.kill(os.getpid(), signal.SIGTERM); signal.pause()
show.COMMAND = Command(show.COMMAND.config, run, show.COMMAND.describe)
sys.exit(main(["show", "--model", "m", "--data", "d"]))
"""


def test_the_command_line_says_so_and_exits_with_143():
    done = subprocess.run([sys.executable, "-c", COMMAND], capture_output=True, text=True)
    assert done.returncode == EXIT_CODE, done.stderr
    assert "ended by SIGTERM; run the same command again to go on" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGTERM, Preempted), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_that_python_drops_is_sent_again(number, raised):
    """Handled while the garbage collector calls back, its exception goes nowhere."""
    handled = []

    def within(phase: str, info: dict) -> None:
        if not handled:
            handled.append(phase)
            signal.raise_signal(number)

    gc.callbacks.append(within)
    try:
        with pytest.raises(raised) as caught, heeded():
            gc.collect()
            assert handled
            for _ in range(600):
                time.sleep(0.05)
        assert caught.type is raised
    finally:
        gc.callbacks.remove(within)
