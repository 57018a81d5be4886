"""What ships in the package for ``ntkjax demo``: a tiny pre-trained model and a generated task whose truth is known."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from ntkjax.assets.planted import PlantedTask, planted_task, write_planted_task
from ntkjax.assets.settings import DEMO, DemoSettings

__all__ = ["DEMO", "DemoSettings", "PlantedTask", "planted_task", "study_path", "tiny_lm_path", "write_planted_task"]


def tiny_lm_path() -> Path:
    """Directory of the tiny model in Hugging Face format (config.json, model.safetensors, tokenizer files)."""
    return Path(str(files("ntkjax.assets") / "tiny-lm"))


def study_path() -> Path:
    """The study of all selectors on the embedded task: ``ntkjax study embedded``."""
    return Path(str(files("ntkjax.assets") / "study.yaml"))
