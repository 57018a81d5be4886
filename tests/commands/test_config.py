"""Config dataclasses to dicts and back: exact round trips, and errors that name the key."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from ntkjax.errors import ConfigError
from ntkjax.pipeline.config_io import config_from_dict, config_to_dict


@dataclasses.dataclass(frozen=True)
class Lora:
    rank: int = 16
    targets: tuple[str, ...] = ("all-linear",)


@dataclasses.dataclass(frozen=True)
class Adapt:
    model: Path
    schedule: Literal["linear", "cosine", 1] = "linear"
    rate: float = 2e-5
    lora: Lora | None = Lora()
    pool: list[Path] = dataclasses.field(default_factory=list)
    window: tuple[int, float] = (1, 0.5)
    limit: int | None = None
    seed_or_name: int | str = 0
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    parts: tuple[Lora, ...] = ()
    anything: Any = None
    verbose: bool = False

    def __post_init__(self):
        if self.rate < 0:
            raise ValueError("rate must not be negative")


FULL = Adapt(
    model=Path("a/b"),
    schedule="cosine",
    rate=float("inf"),
    lora=Lora(4, ("q", "v")),
    pool=[Path("x.jsonl"), Path("ü.jsonl")],
    window=(3, 2.0),
    limit=7,
    seed_or_name="3",
    weights={"a": 0.1},
    parts=(Lora(1), Lora(2)),
    anything=[1, {"a": None}],
    verbose=True,
)


@pytest.mark.parametrize("config", [FULL, Adapt(Path("m")), Adapt(Path("m"), lora=None)])
def test_a_config_survives_yaml(config):
    text = yaml.safe_dump(config_to_dict(config), allow_unicode=True)
    back = config_from_dict(Adapt, yaml.safe_load(text))
    assert back == config
    assert [type(p) for p in back.pool] == [type(p) for p in config.pool]
    assert type(back.seed_or_name) is type(config.seed_or_name)


def test_a_rate_written_without_a_point_is_a_number():
    assert yaml.safe_load("2e-5") == "2e-5", "YAML 1.1 reads it as text"
    assert config_from_dict(Adapt, yaml.safe_load("{model: m, rate: 2e-5}")).rate == 2e-5
    assert config_from_dict(Adapt, {"model": "m", "rate": 1}).rate == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modle": "x"}, "config.yaml: unknown key modle. Valid keys: model, schedule, rate"),
        ({"lora": {"rnak": 1}}, "config.yaml: unknown key lora.rnak. Valid keys: rank, targets"),
        ({"lora": {"rank": "big"}}, "config.yaml: lora.rank: expected int, got 'big'"),
        ({"lora": 3}, "config.yaml: lora: expected a mapping with keys among rank, targets; got 3"),
        ({"schedule": "step"}, "schedule: expected one of 'linear', 'cosine', 1, got 'step'"),
        ({"schedule": True}, "schedule: expected one of"),
        ({"limit": 1.5}, "limit: expected int, got 1.5"),
        ({"limit": True}, "limit: expected int, got True"),
        ({"rate": "fast"}, "rate: expected float, got 'fast'"),
        ({"rate": True}, "rate: expected float, got True"),
        ({"rate": None}, "rate: expected float, got None"),
        ({"verbose": 1}, "verbose: expected bool, got 1"),
        ({"pool": "x.jsonl"}, "pool: expected list[Path], got 'x.jsonl'"),
        ({"pool": ["a", 3]}, "pool[1]: expected Path, got 3"),
        ({"window": [1]}, "window: expected tuple[int, float], got [1]"),
        ({"seed_or_name": 1.5}, "seed_or_name: expected int or str, got 1.5"),
        ({"weights": {"a": "x"}}, "weights.a: expected float, got 'x'"),
        ({"parts": [{}, {"x": 1}]}, "unknown key parts[1].x"),
        ({"rate": -1.0}, "config.yaml: rate must not be negative"),
    ],
)
def test_errors_name_the_key_and_what_was_expected(change, message):
    with pytest.raises(ConfigError) as caught:
        config_from_dict(Adapt, {"model": "m"} | change, where="config.yaml")
    assert message in str(caught.value)


def test_a_missing_key_and_a_wrong_whole_are_named():
    with pytest.raises(ConfigError, match="here: missing key model"):
        config_from_dict(Adapt, {}, where="here")
    with pytest.raises(ConfigError, match=r"here: expected a mapping .*got \[\]"):
        config_from_dict(Adapt, [], where="here")


def test_what_could_not_be_read_back_is_refused():
    with pytest.raises(TypeError, match="plain values only"):
        config_to_dict(Adapt(Path("m"), anything=object()))
