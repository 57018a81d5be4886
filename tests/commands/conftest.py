"""A tiny random model in Hugging Face format and a few records: enough for every stage, in seconds."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ntkjax.models import ModelConfig, init_lm, save_merged

CHOICES = ["red", "blue"]


@dataclasses.dataclass(frozen=True)
class Files:
    root: Path
    model: str
    domain: str
    pool: str
    test: str
    dev: str

    def flags(self, *names: str) -> list[str]:
        return [word for name in names for word in (f"--{name}", getattr(self, name))]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows(kind: str, count: int, pool: bool = False) -> list[dict]:
    made = []
    for i in range(count):
        answer = CHOICES[i % 2]
        reason = f"{kind} {i} " * (1 + i % 4) if pool else ""
        row = {"id": f"{kind}-{i}", "source": f"{kind}-{i % 3}", "prompt": f"Colour of {kind} {i}?"}
        row["response"] = f"{reason}So the answer is {answer}."
        made.append(row if pool else row | {"answer": answer, "choices": CHOICES})
    return made


@pytest.fixture
def stopped() -> Callable[[Any, str, int], AbstractContextManager[None]]:
    """``with stopped(module, name, at):``: the ``at``-th call of ``module.name`` is stopped as by Ctrl-C."""

    @contextlib.contextmanager
    def within(module: Any, name: str, at: int):
        real, seen = getattr(module, name), []

        def stop(*args: Any, **kwargs: Any) -> Any:
            seen.append(1)
            if len(seen) == at:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, name, stop)
            yield

    return within


@pytest.fixture(scope="session")
def files(tmp_path_factory, toy_chat_tokenizer) -> Files:
    root = tmp_path_factory.mktemp("stages")
    config = ModelConfig(
        family="llama", vocab_size=260, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
        intermediate_size=24,
    )  # fmt: skip
    model = init_lm(config, seed=0, tokenizer=toy_chat_tokenizer)
    save_merged(root / "model", model, {})
    return Files(
        root,
        str(root / "model"),
        write(root / "domain.jsonl", rows("ball", 12)),
        write(root / "pool.jsonl", rows("cube", 40, pool=True)),
        write(root / "test.jsonl", rows("disc", 10)),
        write(root / "dev.jsonl", rows("ring", 6)),
    )


@pytest.fixture(scope="session")
def jobs(load_file) -> ModuleType:
    """jobs.py beside this file: `select` in processes of its own."""
    return load_file(Path(__file__).with_name("jobs.py"))


@pytest.fixture(scope="session")
def study(load_file) -> ModuleType:
    """small_study.py beside this file: the study that these tests run."""
    return load_file(Path(__file__).with_name("small_study.py"))


@pytest.fixture(scope="session")
def done(study, files, tmp_path_factory) -> Path:
    """The run directory of that study, finished."""
    folder = tmp_path_factory.mktemp("study")
    assert study.run(files, folder) == 0
    return folder / "out"


QUICK = ["--lora-rank", "2", "--token-budget", "1024", "--train.epochs", "1", "--train.batch-size", "4"]
"""Flags that make training quick."""
