"""The models that have a name, such as ``real``, a small instruct model that experiments run on: where they are looked
for.

``make real-model`` puts them there (`ntkjax.assets.make_real_model`).
"""

from __future__ import annotations

import os
from pathlib import Path

from ntkjax.errors import CheckpointError

REAL = "real"
"""What names it wherever a model directory is asked for; a directory of that name here goes first."""
DIRECTORIES = {REAL: "SmolLM2-135M-Instruct", "gemma3": "gemma-3-270m"}
"""Name -> its directory in `models_folder`."""
_FOLDER = "NTKJAX_MODELS"


def models_folder() -> Path:
    """``$NTKJAX_MODELS``, else ``build/models`` in the working directory."""
    return Path(os.environ.get(_FOLDER) or Path("build") / "models").expanduser()


def real_directory(name: str = REAL) -> Path:
    """The directory of the model ``name``, one of `DIRECTORIES`. Raises CheckpointError where it is not there."""
    directory = models_folder() / DIRECTORIES[name]
    if not directory.is_dir():
        make = "make real-model" if name == REAL else f"make real-model MODEL={name}"
        raise CheckpointError(
            f"model {name!r}: {directory} is not there; expected the model that `{make}` fetches: run that in "
            f"the checkout of ntkjax and this command in the same folder, or let {_FOLDER} name the folder that holds "
            f"{directory.name}"
        )
    return directory
