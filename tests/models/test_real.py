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
from ntkjax.models.real import DIRECTORIES, real_directory

ROOT = Path(__file__).resolve().parents[2]
DIRECTORY = DIRECTORIES["real"]


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
    with pytest.raises(CheckpointError, match=r"model 'gemma3': .*gemma-3-270m is not there; .*MODEL=gemma3`"):
        find_directory("gemma3")
    (tmp_path / "real").mkdir()
    assert find_directory("real") == Path("real")


@pytest.fixture
def there(monkeypatch):
    """The test is skipped where a model of that name is not there."""
    monkeypatch.chdir(ROOT)

    def look(name: str) -> str:
        try:
            real_directory(name)
        except CheckpointError as error:
            pytest.skip(f"make real-model: {error}")
        return name

    return look


@pytest.mark.slow
def test_gemma_completes_a_question(there) -> None:
    """It is not tuned to answer: it goes on with the text, greedily, and begins with the answer."""
    model = load_lm(there("gemma3"), lora=None)
    prompt = model.tokenizer.encode("Question: What is the capital of France?\nAnswer:")
    assert model.tokenizer.decode(generate(model, {}, [prompt], max_new_tokens=3)[0]).startswith(" Paris\n")


@pytest.mark.slow
def test_it_answers_a_question(there) -> None:
    """Through our rendering of its chat template, greedily, to its own end token."""
    model = load_lm(there("real"), lora=None)
    prompt = render_prompt(model.tokenizer, Example("0", "", "What is the capital of France?", None, "?"))
    answer = generate(model, {}, [prompt], max_new_tokens=20)[0]
    assert model.tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
    assert model.report.name == str((ROOT / real_directory()).resolve())
