"""One process of a job whose mesh spans processes: `python mesh_worker.py FOLDER` does the steps of FOLDER/steps.json,
one after another, and writes what they gave to FOLDER/results.INDEX.json.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

from ntkjax.job import process, start
from ntkjax.parallel import mesh_of, spread, to_host

SIZES = {"kernel": (2, 8, 16), "scale": (16,), "count": ()}
"""Shapes of a small state, by the rule of `placed`."""


def command(argv: list[str]) -> dict:
    """The command line, in this process: its exit code, and what it printed."""
    from ntkjax.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def unlike(argv: list[str], flags: list[list[str]], folders: list[str], versions: list[str]) -> dict:
    """The command line, with flags, a working directory and a version of jax that each process has for itself."""
    from ntkjax.pipeline import versions as module

    index, real = process()[0], module._version
    module._version = lambda name: versions[index] if name == "jax" else real(name)
    try:
        with contextlib.chdir(folders[index]):
            return command([*argv, *flags[index]])
    finally:
        module._version = real


def load(model: str, mesh: str | None, keep: str) -> dict:
    """A checkpoint on a mesh, all its weights written to the file ``keep``: bytes that were read of it, counted where
    they are read, and reported."""
    import numpy as np

    from ntkjax.models import load_lm, safetensors_file
    from ntkjax.models.lm import paths

    counted, read_into = [], safetensors_file.read_into

    def counting(stream, first, view):
        counted.append(len(view))
        read_into(stream, first, view)

    safetensors_file.read_into = counting
    try:
        loaded = load_lm(model, lora=None, mesh=mesh_of(mesh))
    finally:
        safetensors_file.read_into = read_into
    leaves = {path: to_host(leaf) for path, leaf in paths(loaded.params).items()}
    if process()[0] == 0:
        np.savez(keep, **leaves)
    report = loaded.report
    return {"counted": sum(counted), "reported": report.bytes_read, "all": report.weight_bytes}


def state() -> dict:
    """A state of random bits, NaN and infinities among them."""
    import numpy as np

    rng, made = np.random.default_rng(7), {}
    for name, shape in SIZES.items():
        made[name] = rng.integers(0, 2**32, shape, np.uint32).view(np.float32)
    return made


def placed(mesh: str | None) -> dict:
    """The state on a mesh, the kernel split over fsdp and model, all else on every device; without one on one."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    if mesh is None:
        return jax.tree.map(jnp.asarray, state())
    spec = {"kernel": PartitionSpec(None, "fsdp", "model")}
    where = lambda name: NamedSharding(mesh_of(mesh), spec.get(name, PartitionSpec()))
    return {name: spread(value, where(name)) for name, value in state().items()}


def save(folder: str, mesh: str | None) -> dict:
    """That state as the checkpoint of step 3, by all processes."""
    from ntkjax.training.checkpoint import Checkpoints

    checkpoints = Checkpoints(Path(folder), None, together=process()[1] > 1)
    checkpoints.save(3, placed(mesh), {"step": 3})
    checkpoints.close()
    return {"files": sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("ocdbt.process_*"))}


def restore(folder: str, mesh: str | None) -> dict:
    """Whether each array of the checkpoint comes back on this mesh with the same bits."""
    import jax
    import numpy as np

    from ntkjax.training.checkpoint import Checkpoints

    like = jax.tree.map(lambda leaf: leaf * 0, placed(mesh))
    checkpoints = Checkpoints(Path(folder), None, together=process()[1] > 1)
    found, progress = checkpoints.restore(3, like)
    checkpoints.close()
    bits = lambda value: np.atleast_1d(to_host(value)).view(np.uint32)
    same = {name: bool(np.array_equal(bits(found[name]), bits(value))) for name, value in state().items()}
    layouts = {name: str(leaf.sharding) == str(like[name].sharding) for name, leaf in found.items()}
    return {"same": same, "as_asked": layouts, "progress": progress}


def main() -> None:
    folder = Path(sys.argv[1])
    index, _ = start()
    results = []
    for step in json.loads((folder / "steps.json").read_text()):
        results.append(globals()[step.pop("do")](**step))
        (folder / f"results.{index}.json").write_text(json.dumps(results))
    from ntkjax.job import barrier

    barrier("done")


if __name__ == "__main__":
    main()
