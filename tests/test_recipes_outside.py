"""Recipes of CONTRIBUTING, followed from outside the package: one line in a table, and everything else follows."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import ntkjax
from ntkjax import commands
from ntkjax.cli import main
from ntkjax.commands.base import Command
from ntkjax.commands.select.forecast import count_examples
from ntkjax.data import formats, read_records
from ntkjax.data.problems import RecordProblem
from ntkjax.data.sources import count_records
from ntkjax.errors import ConfigError, DataError

# -- a data format: a reader, a counter, one line in FORMATS --


def read_toy(path: str, wanted: formats.Wanted) -> Iterator[formats.Item]:
    """``prompt -> response``, one record a line."""
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        prompt, arrow, response = line.partition(" -> ")
        found = {"prompt": prompt, "response": response}
        yield number, found if arrow else RecordProblem("no arrow", "prompt -> response", "add the response")


def count_toy(path: str) -> int | None:
    return len(Path(path).read_text(encoding="utf-8").splitlines())


@pytest.fixture
def toy_format(monkeypatch, tmp_path) -> Path:
    monkeypatch.setitem(formats.FORMATS, ".toy", formats.Format(read_toy, count_toy))
    path = tmp_path / "data" / "pool.toy"
    path.parent.mkdir()
    path.write_text("1 + 1 -> 2\n2 + 2 -> 4\n3 + 3 -> 6\n")
    return path


def test_a_format_from_outside_is_read(toy_format, tmp_path):
    for source in (toy_format, toy_format.parent):  # by its name, and as a file of a directory
        records = read_records(source, cache_dir=tmp_path / "cache")
        assert [(example.prompt, example.response) for example in records] == [
            ("1 + 1", "2"),
            ("2 + 2", "4"),
            ("3 + 3", "6"),
        ]
        assert records.location(1).endswith("pool.toy:2") and records.sources[0] == "pool"


def test_a_fault_in_a_format_from_outside_is_named_by_file_and_line(toy_format, tmp_path):
    toy_format.write_text("1 + 1 -> 2\n2 + 2\n3 + 3 -> 6\n")
    with pytest.raises(DataError, match=r"pool\.toy:2: no arrow; expected prompt -> response; add the response"):
        read_records(toy_format, cache_dir=tmp_path / "cache")
    kept = read_records(toy_format, cache_dir=tmp_path / "cache", on_bad_record="skip")
    assert [example.response for example in kept] == ["2", "6"] and kept.report["skipped"] == 1


def test_a_format_from_outside_is_counted_by_the_forecast(toy_format, tmp_path, monkeypatch):
    assert count_records(str(toy_format)) == 3
    records = read_records(toy_format, cache_dir=tmp_path / "cache").subset([0, 1])
    count = inspect.unwrap(count_examples)  # without the check that the sample is a `Loaded`, which has tokens too
    sample = type("Sample", (), {"records": records, "__len__": lambda self: 2})()
    assert count([str(toy_format)], sample) == (3, True)
    uncounted = formats.Format(read_toy, lambda path: None)
    monkeypatch.setitem(formats.FORMATS, ".toy", uncounted)
    assert count([str(toy_format)], sample)[1] is False


def test_a_format_from_outside_stands_in_the_message_about_unknown_ones(toy_format, tmp_path):
    (tmp_path / "pool.csv").write_text("a,b\n")
    with pytest.raises(DataError, match=r"unknown extension '\.csv'; expected one of .*\.jsonl.*\.parquet, \.toy;"):
        read_records(tmp_path / "pool.csv", cache_dir=tmp_path / "cache")


# -- a command: one module that ends with COMMAND, one line in COMMANDS --


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    """Add the numbers from 1 to n."""

    n: int
    """The last number."""
    start: int = 1
    """The first number."""


def toy(config: ToyConfig, *, progress: bool = True) -> int:
    """The sum."""
    if config.n < config.start:
        raise ConfigError(f"--n {config.n}: expected at least {config.start}; raise it")
    return int(np.arange(config.start, config.n + 1).sum())


@pytest.fixture
def toy_command(monkeypatch) -> None:
    module = ModuleType("ntkjax.commands.toy")
    module.__dict__["COMMAND"] = Command(ToyConfig, toy, lambda config, result: f"the sum to {config.n} is {result}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(commands.COMMANDS, "toy", "toy")


def test_a_command_from_outside_is_on_the_command_line(toy_command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if " toy " in line)
    assert "Add the numbers from 1 to n." in line
    with pytest.raises(SystemExit):
        main(["toy", "--help"])
    shown = capsys.readouterr().out
    assert "--n INT" in shown and "The last number." in shown and "--start INT" in shown
    assert main(["toy", "--n", "4"]) == 0
    assert capsys.readouterr().out == "the sum to 4 is 10\n"
    assert main(["toy", "--n", "0"]) == 2
    assert capsys.readouterr().err == "ntkjax: error: --n 0: expected at least 1; raise it\n"


def test_a_command_from_outside_is_a_function_with_its_config(toy_command):
    assert ntkjax.ToyConfig is ToyConfig
    assert ntkjax.toy(n=4) == ntkjax.toy(ToyConfig(4)) == 10 and ntkjax.toy(n=4, start=4) == 4
    assert list(inspect.signature(ntkjax.toy).parameters) == ["config", "progress", "n", "start"]
    with pytest.raises(ConfigError, match="unknown option m; ToyConfig has n, start"):
        ntkjax.toy(m=4)


def test_without_its_line_there_is_no_such_command(capsys):
    for name in ("toy", "ToyConfig"):
        with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
            getattr(ntkjax, name)
    with pytest.raises(SystemExit):
        main(["toy", "--n", "4"])
