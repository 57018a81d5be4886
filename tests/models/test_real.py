"""The model named ``real``: where it is looked for, what is said where it is not, and what it answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from ntkjax.data.prompts import render_prompt
from ntkjax.data.records import Example
from ntkjax.errors import CheckpointError
from ntkjax.models import load_lm
from ntkjax.models.generate import generate
from ntkjax.models.load import find_directory
from ntkjax.models.real import DIRECTORY, real_directory

ROOT = Path(__file__).resolve().parents[2]


def test_where_it_is_looked_for(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NTKJAX_MODELS", raising=False)
    with pytest.raises(
        CheckpointError, match=rf"model 'real': build/models/{DIRECTORY} is not there; .*`make real-model`"
    ):
        find_directory("real")
    (tmp_path / "build/models" / DIRECTORY).mkdir(parents=True)
    assert find_directory("real") == Path("build/models") / DIRECTORY
    monkeypatch.setenv("NTKJAX_MODELS", str(tmp_path / "elsewhere"))
    with pytest.raises(
        CheckpointError, match=rf"elsewhere/{DIRECTORY} is not there; .*let NTKJAX_MODELS name the folder"
    ):
        find_directory("real")
    (tmp_path / "elsewhere" / DIRECTORY).mkdir(parents=True)
    assert find_directory("real") == tmp_path / "elsewhere" / DIRECTORY
    (tmp_path / "real").mkdir()
    assert find_directory("real") == Path("real")


@pytest.fixture
def real(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    try:
        real_directory()
    except CheckpointError as error:
        pytest.skip(f"make real-model: {error}")


@pytest.mark.slow
def test_it_answers_a_question(real) -> None:
    """Through our rendering of its chat template, greedily, to its own end token."""
    model = load_lm("real", lora=None)
    prompt = render_prompt(model.tokenizer, Example("0", "", "What is the capital of France?", None, "?"))
    answer = generate(model, {}, [prompt], max_new_tokens=20)[0]
    assert model.tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
    assert model.report.name == str((ROOT / real_directory()).resolve())
