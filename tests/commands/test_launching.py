"""`launch`: processes that start together, find each other and end together."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import psutil
import pytest

from ntkjax.cli import main
from ntkjax.commands.launch import LaunchConfig, environment, run_together
from ntkjax.errors import ConfigError

SELECT = ("select", "--model", "m")


def together(program: str, count: int, *, grace: float = 20.0):
    return run_together(
        [sys.executable, "-c", program], [os.environ | {"ME": str(i)} for i in range(count)], grace=grace
    )


def test_every_process_has_its_number_its_devices_and_the_same_coordinator():
    config = LaunchConfig(SELECT, processes=2, devices=2, platform="cuda")
    outer = {"XLA_FLAGS": "--a=1 --xla_force_host_platform_device_count=8", "HOME": "h"}
    first, second = (environment(config, i, 99, outer) for i in range(2))
    assert first["JAX_COORDINATOR_ADDRESS"] == second["JAX_COORDINATOR_ADDRESS"] == "127.0.0.1:99"
    assert [env["JAX_PROCESS_ID"] for env in (first, second)] == ["0", "1"] and first["JAX_NUM_PROCESSES"] == "2"
    assert [env["CUDA_VISIBLE_DEVICES"] for env in (first, second)] == ["0,1", "2,3"]
    assert first["XLA_FLAGS"] == "--a=1 --xla_force_host_platform_device_count=2" and first["HOME"] == "h"
    assert environment(config, 1, 99, outer | {"CUDA_VISIBLE_DEVICES": "4,5,6,7"})["CUDA_VISIBLE_DEVICES"] == "6,7"
    plain = environment(LaunchConfig(SELECT), 0, 99, outer)
    assert plain["XLA_FLAGS"] == outer["XLA_FLAGS"] and "CUDA_VISIBLE_DEVICES" not in plain


def test_gpus_that_are_not_there_are_named():
    config = LaunchConfig(SELECT, processes=2, devices=2)
    with pytest.raises(ConfigError, match=r"CUDA_VISIBLE_DEVICES names 3 .*2 x 2 = 4"):
        environment(config, 1, 99, {"CUDA_VISIBLE_DEVICES": "0,1,2"})


@pytest.mark.parametrize(
    ("command", "said"),
    [((), "no command was given"), (("show", "--model", "m"), "'show' does not run as several processes.*select")],
)
def test_only_commands_that_divide_their_work_are_launched(command, said):
    with pytest.raises(ConfigError, match=said):
        LaunchConfig(command)


def test_process_0_speaks_for_all(capfd):
    ended = together(
        "import os, sys; print('out', os.environ['ME']); print('err', os.environ['ME'], file=sys.stderr)", 3
    )
    assert ended.codes == (0, 0, 0) and ended.first is None and ended.exit_code == 0
    assert capfd.readouterr() == ("out 0\n", "err 0\n")


def test_when_one_process_fails_the_others_end_and_its_words_are_kept():
    program = (
        "import os, sys, time\n"
        "if os.environ['ME'] == '1': print('no such file', file=sys.stderr); sys.exit(2)\n"
        "time.sleep(600)"
    )
    ended = together(program, 3, grace=0.3)
    assert ended.first == 1 and ended.exit_code == 2 and ended.said == ("no such file",)
    assert ended.codes == (-signal.SIGTERM, 2, -signal.SIGTERM)


def test_a_process_that_does_not_listen_is_killed(tmp_path):
    program = (
        "import os, pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"deaf = pathlib.Path({str(tmp_path / 'deaf')!r})\n"
        "while os.environ['ME'] == '1':\n"
        "    if deaf.exists(): os.kill(os.getpid(), signal.SIGKILL)\n"
        "deaf.touch()\n"
        "time.sleep(600)"
    )
    ended = together(program, 2, grace=0.5)
    assert ended.codes == (-signal.SIGKILL, -signal.SIGKILL) and ended.first == 1 and ended.exit_code == 1


def test_sigterm_reaches_every_process_once():
    before = signal.getsignal(signal.SIGTERM)
    program = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\n"
        "print('ready', file=sys.stderr, flush=True); time.sleep(600)"
    )
    asked = threading.Timer(3.0, lambda: os.kill(os.getpid(), signal.SIGTERM))
    asked.start()
    ended = together(program, 2)
    assert set(ended.codes) <= {5, -signal.SIGTERM} and ended.exit_code != 0  # a slow process has no handler yet
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_mistake_of_the_user_ends_the_job_with_its_code(tmp_path, capfd):
    began = time.monotonic()
    words = ["launch", "--processes", "2", "--", "select", "--model", "nowhere", "--domain", "a", "--pool", "b"]
    assert main([*words, "--n", "3", "--out", str(tmp_path)]) == 2
    shown = capfd.readouterr()
    assert "nowhere" in shown.err and "Traceback" not in shown.err
    assert "ended with exit code 2; the others were ended" in shown.out and time.monotonic() > began
    assert "again" not in shown.out  # the same command would say the same


def test_a_platform_that_is_not_here_is_named(tmp_path, capfd):
    words = ["launch", "--processes", "2", "--platform", "abacus", "--", "evaluate", "--model", str(tmp_path)]
    assert main([*words, "--test", "a", "--mesh", "auto", "--out", str(tmp_path)]) == 2
    shown = capfd.readouterr()
    said = shown.err + shown.out
    assert "'abacus'" in said and "--platform" in said and "Traceback" not in said


@pytest.mark.parametrize("port", [0, -5, 70000])
def test_a_port_is_one(port):
    with pytest.raises(ConfigError, match=f"--port is {port}: expected a number from 1 to 65535"):
        LaunchConfig(SELECT, port=port)


@pytest.mark.slow
def test_a_launched_selection_is_that_of_one_process(files, tmp_path):
    import json

    flags = [*files.flags("model", "domain", "pool"), "--n", "5", "--lora-rank", "2", "--token-budget", "256"]
    assert main(["select", *flags, "--out", str(tmp_path / "one")]) == 0
    assert (
        main(["launch", "--processes", "2", "--devices", "1", "--", "select", *flags, "--out", str(tmp_path / "two")])
        == 0
    )
    chosen = lambda name: json.loads((tmp_path / name / "selection.json").read_text())["selected"]
    assert chosen("one") == chosen("two")


def test_what_a_process_has_started_ends_with_it(tmp_path):
    """It holds the process's stderr open, which would be waited for."""
    child = tmp_path / "child"
    program = (
        "import subprocess, sys; left = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
        f"open({str(child)!r}, 'w').write(str(left.pid)); print('cause', file=sys.stderr); sys.exit(3)"
    )
    ended = together(program, 1)
    assert (ended.codes, ended.first, ended.said) == ((3,), 0, ("cause",))
    left = int(child.read_text())
    deadline = time.monotonic() + 30
    while psutil.pid_exists(left) and psutil.Process(left).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "it goes on"
        time.sleep(0.05)
