"""The model named ``real``: a small instruct model that experiments run on, and where it is looked for.

``make real-model`` puts it there (`ntkjax.assets.make_real_model`).
"""

from __future__ import annotations

import os
from pathlib import Path

from ntkjax.errors import CheckpointError

REAL = "real"
"""What names it wherever a model directory is asked for; a directory of that name here goes first."""
DIRECTORY = "SmolLM2-135M-Instruct"
_FOLDER = "NTKJAX_MODELS"


def models_folder() -> Path:
    """``$NTKJAX_MODELS``, else ``build/models`` in the working directory."""
    return Path(os.environ.get(_FOLDER) or Path("build") / "models").expanduser()


def real_directory() -> Path:
    """The directory of the real model. Raises CheckpointError where it is not there."""
    directory = models_folder() / DIRECTORY
    if not directory.is_dir():
        raise CheckpointError(
            f"model {REAL!r}: {directory} is not there; expected the model that `make real-model` fetches: run that in "
            f"the checkout of ntkjax and this command in the same folder, or let {_FOLDER} name the folder that holds "
            f"{DIRECTORY}"
        )
    return directory
