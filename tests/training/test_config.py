"""TrainConfig refuses what cannot be meant, and names the field."""

from __future__ import annotations

import dataclasses

import pytest

from ntkjax.errors import ConfigError
from ntkjax.training import TrainConfig


def checked(**fields):
    """A config with these values, past the type checks of the test suite (a user has none) to its own."""
    config = TrainConfig()
    for name, value in fields.items():
        object.__setattr__(config, name, value)
    config.__post_init__()
    return config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", -1e-3),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("learning_rate", "1e-4"),
        ("lift_rank", 0),
        ("lift_interval", 0),
        ("loss_reweighting", "linear"),
        ("reweighting_temperature", 0.0),
        ("batch_size", 0),
        ("batch_size", 2.5),
        ("batch_size", True),
        ("steps", 0),
        ("epochs", 0),
        ("epochs", -1.0),
        ("schedule", "cubic"),
        ("warmup_ratio", 1.0),
        ("warmup_ratio", -0.1),
        ("b1", 1.0),
        ("b2", -0.5),
        ("eps", 0.0),
        ("weight_decay", -0.1),
        ("clip_norm", 0.0),
        ("domain_share", 1.0),
        ("domain_share", 0.0),
        ("eval_every", 0),
        ("save_every", -3),
        ("patience", 0),
        ("accumulation", 0),
        ("accumulation", 17),
        ("micro_batch_tokens", 0),
        ("max_buckets", 0),
        ("keep_checkpoints", 0),
        ("buckets", ()),
        ("buckets", (16, 8)),
        ("buckets", (1, 8)),
        ("restore_best", 1),
    ],
)
def test_bad_value_names_the_field(field, value):
    with pytest.raises(ConfigError, match=rf"\b{field} = "):
        checked(**{field: value})


def test_text_for_a_number_says_how_yaml_reads_it():
    with pytest.raises(ConfigError, match=r"1\.0e-4"):
        checked(learning_rate="1e-4")


def test_every_field_is_checked_for_its_type():
    """A new field must be added to the checks: anything of a wrong type is refused by name."""
    for field in dataclasses.fields(TrainConfig):
        with pytest.raises(ConfigError, match=rf"\b{field.name} = "):
            checked(**{field.name: ["not", "this"]})


def test_defaults_and_replacement():
    config = TrainConfig()
    assert (config.learning_rate, config.epochs, config.warmup_ratio) == (2e-5, 3, 0.03)
    assert dataclasses.replace(config, clip_norm=None, steps=7).steps == 7
    with pytest.raises(ConfigError):
        dataclasses.replace(config, batch_size=-1)
