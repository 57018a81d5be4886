"""What all processes of a job must have alike, compared before they work together: flags, versions, inputs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ntkjax.errors import ConfigError
from ntkjax.files import plain
from ntkjax.job import process, texts
from ntkjax.store import flatten

SAME_FILES = "Give model and data that all processes see by the same path, with the same content."


def check_alike(what: str, facts: Mapping[str, Any], remedy: str) -> None:
    """Compare ``facts`` (nested, of JSON values) with those of the other processes; all of them ask at the same place.

    Raises:
      ConfigError: on every process, where one has others than process 0; each fact that differs is named.
    """
    if process()[1] == 1:
        return
    first, *others = (json.loads(text) for text in texts(json.dumps(plain(flatten(dict(facts))))))
    for index, own in enumerate(others, 1):
        lines = [
            f"{name}: {_shown(first, name)} on process 0, {_shown(own, name)} on process {index}"
            for name in sorted({*first, *own})
            if (name in first, first.get(name)) != (name in own, own.get(name))
        ]
        if lines:
            listed = "\n  ".join(lines)
            raise ConfigError(
                f"process {index} of {len(others) + 1} has other {what} than process 0:\n  {listed}\n{remedy}"
            )


def _shown(facts: Mapping[str, Any], name: str) -> str:
    return json.dumps(facts[name], ensure_ascii=False) if name in facts else "absent"
