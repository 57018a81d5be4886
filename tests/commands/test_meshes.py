"""`--mesh` from the command line: the same selection and the same adapter as on one device, on eight simulated ones."""

from __future__ import annotations

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from ntkjax.cli import main

COMMON = ["--lora-rank", "2", "--token-budget", "512"]
SELECT = [*COMMON, "--n", "5", "--warmup.batch-size", "4", "--warmup.learning-rate", "1e-3"]
TUNE = [*COMMON, "--train.batch-size", "6", "--train.steps", "3", "--train.learning-rate", "1e-3"]


@pytest.fixture(autouse=True)
def eight():
    if len(jax.local_devices()) != 8:
        pytest.skip("needs 8 devices")


def run(command: str, files, out, *flags: str) -> int:
    data = files.flags("model", "domain", "pool") if command == "select" else files.flags("model", "domain", "dev")
    return main([command, *data, *(SELECT if command == "select" else TUNE), "--out", str(out), *flags])


def check_adapters(a, b) -> None:
    one, other = (load_file(out / "adapter" / "adapter_model.safetensors") for out in (a, b))
    for name, value in one.items():
        np.testing.assert_allclose(other[name], value, rtol=0, atol=1e-5 * max(1.0, np.abs(value).max()), err_msg=name)


@pytest.mark.slow
def test_select_chooses_the_same_on_a_mesh(files, tmp_path):
    """Twelve domain and forty pool examples: most batches have rows that four devices do not divide."""
    assert run("select", files, tmp_path / "one") == 0
    assert run("select", files, tmp_path / "mesh", "--mesh", "data=4,model=2", "--weights", "fully-sharded") == 0
    one, mesh = (pq.read_table(tmp_path / name / "scores.parquet") for name in ("one", "mesh"))
    for name in ("votes", "rank", "selected"):
        assert one[name].to_pylist() == mesh[name].to_pylist(), name
    scores = [table["score"].to_numpy() for table in (one, mesh)]
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-5)
    check_adapters(tmp_path / "one", tmp_path / "mesh")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["less", "influence", "ntk --aggregation max --scores sketch"])
def test_methods_on_gradients_choose_the_same_on_a_mesh(files, tmp_path, method):
    flags = ["--sketch-size", "64", "--warmup.epochs", "2", "--method", *method.split()]
    assert run("select", files, tmp_path / "one", *flags) == 0
    assert run("select", files, tmp_path / "mesh", "--mesh", "data=4,model=2", *flags) == 0
    one, mesh = (pq.read_table(tmp_path / name / "scores.parquet")["score"].to_numpy() for name in ("one", "mesh"))
    np.testing.assert_allclose(mesh, one, atol=1e-4 * np.nanmax(np.abs(one)))


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--mesh auto", "--mesh 2,4", "--mesh 4,2 --weights fully-sharded"])
def test_finetune_ends_the_same_on_a_mesh(files, tmp_path, flags):
    assert run("finetune", files, tmp_path / "one") == 0
    assert run("finetune", files, tmp_path / "mesh", *flags.split()) == 0
    check_adapters(tmp_path / "one", tmp_path / "mesh")


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("data=3", "there are 8: the nearest that fits is data=8, model=1"),
        ("data=1,model=8", "embed/weight (260, 16): axis 0 does not divide over model=8 devices; model=4 would"),
        ("all", "expected data=D,fsdp=F,model=M"),
    ],
)
def test_a_mesh_that_does_not_divide_is_refused_with_one_that_does(files, tmp_path, capsys, mesh, message):
    assert run("finetune", files, tmp_path / "run", "--mesh", mesh) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
