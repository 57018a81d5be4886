"""Outcomes on disk: whole or not at all, resumed where a run stopped, never mixed with other settings."""

import json

import jax.numpy as jnp
import pytest

from ntkjax.errors import ConfigError, DataError
from ntkjax.evaluation.outcomes import Outcome, OutcomeLog, read_outcomes, write_outcomes
from ntkjax.fingerprint import weights_fingerprint

BASES = [Outcome("a", "s", "yes", ["no", "yes"]), Outcome("b", "s"), Outcome("ü", "s")]


def test_write_and_read_back(tmp_path):
    outcomes = [
        Outcome("a", "s", logprobs=[-0.1, -1 / 3], correct_raw=True, generated="ü\n"),
        Outcome("b", "s", nll=2.5),
    ]
    write_outcomes(tmp_path / "o.jsonl", outcomes)
    assert read_outcomes(tmp_path / "o.jsonl") == outcomes
    assert [p.name for p in tmp_path.iterdir()] == ["o.jsonl"]


def test_bad_files(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_outcomes(tmp_path / "o.jsonl")
    good = json.dumps(Outcome("a", "s").to_json())
    for bad in ("{", '{"id": "a", "source": "s", "colour": 1}', '{"id": "a"}', "3"):
        (tmp_path / "o.jsonl").write_text(good + "\n" + bad + "\n")
        with pytest.raises(DataError, match=r"o\.jsonl:2: not an outcome"):
            read_outcomes(tmp_path / "o.jsonl")


def test_pieces_join(tmp_path):
    log = OutcomeLog(tmp_path / "o.jsonl", {"max_length": 8})
    log.add("choices", {0: {"correct_raw": True, "logprobs": [-2.0, -1.0]}})
    log.add("likelihood", {1: {"nll": 0.5}, 0: {"nll": 1.5}})
    outcomes = log.finish(BASES)
    assert (outcomes[0].correct_raw, outcomes[0].nll, outcomes[0].gold) == (True, 1.5, "yes")
    assert (outcomes[1].correct_raw, outcomes[1].nll) == (None, 0.5)
    assert read_outcomes(tmp_path / "o.jsonl") == outcomes
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.jsonl", "o.jsonl.settings.json"]
    assert OutcomeLog(tmp_path / "o.jsonl", {"max_length": 8}).finished == outcomes


@pytest.mark.parametrize("torn", ["", '{"kind": "choi', '{"kind": "choices", "row": 1, "nll": 2.0}'])
def test_resume_after_a_kill(tmp_path, torn):
    log = OutcomeLog(tmp_path / "o.jsonl", {"max_length": 8})
    log.add("choices", {0: {"correct_raw": True}})
    with (tmp_path / "o.jsonl.part").open("a") as file:
        file.write(torn)  # killed while writing: no line end
    again = OutcomeLog(tmp_path / "o.jsonl", {"max_length": 8})
    assert again.finished is None
    assert again.done("choices") == {0} and again.done("likelihood") == set()
    again.add("choices", {1: {"correct_raw": False}})
    third = OutcomeLog(tmp_path / "o.jsonl", {"max_length": 8})
    assert third.done("choices") == {0, 1}
    assert [o.correct_raw for o in third.finish(BASES)] == [True, False, None]


@pytest.mark.parametrize("line", ["junk", "3", '{"row": 1}', '{"kind": "choices", "row": [1]}'])
def test_a_damaged_line_is_named(tmp_path, line):
    OutcomeLog(tmp_path / "o.jsonl", {"max_length": 8}).add("choices", {0: {"correct_raw": True}})
    with (tmp_path / "o.jsonl.part").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=r"o\.jsonl\.part:3: not a piece of an evaluation .*; remove the file"):
        OutcomeLog(tmp_path / "o.jsonl", {"max_length": 8})


def test_killed_before_the_first_line_was_whole(tmp_path):
    (tmp_path / "o.jsonl.part").write_text('{"max_le')
    log = OutcomeLog(tmp_path / "o.jsonl", {"max_length": 8})
    log.add("choices", {0: {"correct_raw": True}})
    assert OutcomeLog(tmp_path / "o.jsonl", {"max_length": 8}).done("choices") == {0}


def test_other_settings_are_refused(tmp_path):
    log = OutcomeLog(tmp_path / "o.jsonl", {"max_length": 8, "weights": "aa"})
    log.add("choices", {0: {"correct_raw": True}})
    with pytest.raises(ConfigError, match=r"another weights: 'aa' there, 'bb' now; delete it"):
        OutcomeLog(tmp_path / "o.jsonl", {"max_length": 8, "weights": "bb"})
    log.finish(BASES)
    with pytest.raises(ConfigError, match=r"another max_length: 8 there, 9 now"):
        OutcomeLog(tmp_path / "o.jsonl", {"max_length": 9, "weights": "aa"})
    (tmp_path / "o.jsonl.settings.json").unlink()
    with pytest.raises(ConfigError, match="cannot be read, so it is unknown"):
        OutcomeLog(tmp_path / "o.jsonl", {"max_length": 8, "weights": "aa"})


def test_in_memory():
    log = OutcomeLog(None, {})
    log.add("choices", {2: {"correct_raw": False}})
    assert log.finish(BASES)[2].correct_raw is False


def test_fingerprint_sees_values_names_shapes_and_types():
    w = jnp.arange(6, dtype=jnp.float32).reshape(2, 3)
    base = weights_fingerprint({"a": w})
    assert base == weights_fingerprint({"a": w + 0})
    others = [
        {"b": w},
        {"a": w.reshape(3, 2)},
        {"a": w.at[1, 2].add(1e-6)},
        {"a": w.astype(jnp.bfloat16)},
        {"a": w, "b": w},
    ]
    prints = [weights_fingerprint(o) for o in others]
    assert len({base, *prints}) == 1 + len(others)
    assert weights_fingerprint({"a": jnp.zeros((0, 3)), "s": jnp.float32(1)})
