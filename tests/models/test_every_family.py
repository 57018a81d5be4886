"""What holds for every family, on its checkpoints in tests/golden: a new family needs no test of its own for it."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from ntkjax.models.families import FAMILIES

_spec = importlib.util.spec_from_file_location("family_checks", Path(__file__).with_name("family_checks.py"))
assert _spec is not None and _spec.loader is not None
checks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(checks)

BY_FAMILY = checks.cases_by_family()
# Each compiles programs of its own: quick is the newest setting of the families whose blocks are least alike.
QUICK = ("llama", "gemma2", "gpt_neox", "phi3")
SETTINGS = [
    pytest.param(name, marks=() if family in QUICK and name == names[-1] else pytest.mark.slow)
    for family, names in BY_FAMILY.items()
    for name in names
    if not (checks.GOLDEN / name / "adapter").exists()
]
every_setting = pytest.mark.parametrize("name", SETTINGS)


def test_every_family_has_two_settings() -> None:
    assert BY_FAMILY.keys() == FAMILIES.keys()
    assert {name: cases for name, cases in BY_FAMILY.items() if len(cases) < 2} == {}


@pytest.mark.parametrize("name", checks.CASES)
def test_a_configuration_is_read_as_it_is_written(name: str) -> None:
    config, again = checks.config_round_trip(name)
    assert again == config and isinstance(hash(config), int)


@every_setting
def test_adapters_and_merged_weights_are_read_as_they_are_written(name: str, tmp_path: Path) -> None:
    assert max(checks.written_difference(name, tmp_path)) < 2e-5


@every_setting
def test_scores_are_products_of_explicit_gradients(name: str) -> None:
    assert checks.score_difference(name) < 1e-4


@every_setting
def test_caches_and_packed_choices_give_what_whole_rows_give(name: str) -> None:
    cached, whole = checks.cached_and_whole(name)
    assert cached == whole and len(cached) == 8
    assert checks.packed_difference(name) < 2e-5


def test_a_check_that_meets_another_model_fails(monkeypatch) -> None:
    """The scores of a model whose attention has another scale are not those of the formula."""
    model = checks.adapted(checks.GOLDEN / "llama3")
    other = dataclasses.replace(model.spec, config=dataclasses.replace(model.config, query_scale=0.9))
    monkeypatch.setattr(checks, "pooled", lambda m, p, of, f=checks.pooled: f(
        dataclasses.replace(m, spec=other), p, of
    ))  # fmt: skip
    assert checks.score_difference("llama3") > 1e-3
