"""A kernel added by one entry in `KERNELS` is read, built, priced, verified and explained like the others."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkjax.cli import main
from ntkjax.errors import ConfigError
from ntkjax.models import ModelConfig, init_lm, save_merged
from ntkjax.ntk import Kernel, KernelFunctions, build, kernel_matrix, parse
from ntkjax.ntk.kernels import KERNELS, KernelKind, describe_kernels, kernel_names
from ntkjax.ntk.outputs import directions
from ntkjax.selection.cost import Sizes
from ntkjax.selection.methods.ntk import NtkSelector

ADD = """
from ntkjax.ntk.kernels import KERNELS, Kernel, KernelKind
from ntkjax.ntk.outputs import directions
KERNELS["coordinates"] = KernelKind(
    build=lambda f, params, m, seed: Kernel(directions(f.hidden_fn, [[1.0] * 16] * m), name=f"coordinates:{m}"),
    outputs=lambda m, width: m, approximates="centred_trace", summary="a kernel of a test", sized=True)
from ntkjax.cli import main
main(COMMAND)
"""
"""A program that adds a kernel and runs a command."""


def first_coordinates(functions, params, m, seed):
    """sum_{d < m} <grad h_d(x), grad h_d(x')>."""
    width = np.shape(functions.head(params) if callable(functions.head) else functions.head)[1]
    return Kernel(directions(functions.hidden_fn, np.eye(width, dtype=np.float32)[:m]), name=f"coordinates:{m}")


@pytest.fixture
def coordinates(monkeypatch):
    """The kernel of the first m coordinates of the hidden state, as an entry of the table."""
    kind = KernelKind(
        build=first_coordinates,
        outputs=lambda m, width: m,
        approximates="centred_trace",
        summary="the first m coordinates of the hidden state",
        sized=True,
    )
    monkeypatch.setitem(KERNELS, "coordinates", kind)
    return kind


def test_every_entry_stands_for_one_before_it_and_says_what_it_is():
    names = list(KERNELS)
    for position, (name, kind) in enumerate(KERNELS.items()):
        assert kind.approximates is None or kind.approximates in names[:position]
        assert kind.complete is None or (kind.complete in names[:position] and kind.sized and kind.nested == "sum")
        assert kind.nested == "none" or kind.sized
        assert 0 < len(kind.summary) <= 90 and "\n" not in kind.summary, name
    assert [name for name, kind in KERNELS.items() if kind.approximates is None] == ["trace"]
    assert [name for name, kind in KERNELS.items() if kind.single] == ["sum_logits", "loss"]


@pytest.mark.parametrize("name", ["trace", "centred_trace", "sum_logits", "loss", "hutchinson:3", "spectral:2"])
def test_the_outputs_of_an_entry_are_those_of_its_kernel(toy, name):
    params = toy.init(5)
    functions = KernelFunctions(toy.hidden_fn, params["head"], lambda p, b: jnp.sum(toy.hidden_fn(p, b), axis=1))
    kernel = build(name, functions, params, seed=0)
    shape = jax.eval_shape(kernel.outputs, params, toy.collate(toy.sequences(2, 1), range(2))).shape
    assert shape[1] == parse(name).outputs(toy.width)


def test_a_new_entry_is_parsed_built_and_named_in_the_message(toy, coordinates):
    assert str(parse("coordinates:3")) == "coordinates:3" and "coordinates:m" in kernel_names()
    with pytest.raises(ConfigError, match="coordinates:m"):
        parse("nothing")
    with pytest.raises(ConfigError, match="coordinates:16"):
        parse("coordinates")
    params, rows = toy.init(5), toy.collate(toy.sequences(4, 1), range(4))
    kernel = build("coordinates:3", KernelFunctions(toy.hidden_fn, params["head"]), params, seed=0)
    jacobian = jax.jacobian(lambda p: toy.hidden_fn(p, rows)[:, :3])(params)
    flat = np.concatenate([np.asarray(leaf).reshape(4, 3, -1) for leaf in jax.tree.leaves(jacobian)], axis=2)
    expected = np.einsum("icp,jcp->ij", flat, flat)
    np.testing.assert_allclose(kernel_matrix(kernel, params, rows), expected, rtol=1e-4)


def test_a_new_entry_decides_what_a_selection_costs(coordinates):
    sizes = Sizes(domain=10.0, pool=100.0, scored=40.0, rows=20, width=16, checkpoints=1)
    cost = lambda kernel: NtkSelector(kernel=kernel).forward_tokens(sizes)
    assert cost("coordinates:5") == cost("spectral:5") != cost("coordinates:4")


def test_a_new_entry_is_in_the_help(coordinates):
    assert "coordinates:m: the first m coordinates of the hidden state" in describe_kernels()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["select", "stability"])
def test_a_new_entry_is_in_the_help_of_the_command_line(command):
    program = ADD.replace("COMMAND", repr([command, "--help"]))
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False).stdout
    assert "coordinates:m: a kernel of a test" in " ".join(shown.replace("│", " ").split())


@pytest.mark.slow
def test_a_new_entry_is_a_row_of_every_ladder(coordinates, toy_chat_tokenizer, tmp_path):
    config = ModelConfig(
        family="llama", vocab_size=260, hidden_size=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8,
        intermediate_size=8,
    )  # fmt: skip
    save_merged(tmp_path / "model", init_lm(config, seed=0, tokenizer=toy_chat_tokenizer), {})
    rows = [{"prompt": f"Colour of ball {i}?", "response": f"{'red' if i % 2 else 'blue'}."} for i in range(8)]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [
        *("--model", str(tmp_path / "model"), "--data", str(tmp_path / "pool.jsonl"), "--out", str(tmp_path / "run")),
        *("--n", "6", "--n-domain", "2", "--n-full", "0", "--m", "2", "3", "--seeds", "1", "--bootstrap", "10"),
        *("--lora-rank", "1", "--cross-examples", "0", "--sketch-size", "8", "--max-signs", "0", "--skip-warmup"),
    ]
    assert main(["verify", *flags]) == 0
    ladder = json.loads((tmp_path / "run" / "results.json").read_text())["ladder"]
    for m in (2, 3):
        found = {row["against"]: row for row in ladder if row["approximation"] == f"coordinates:{m}"}
        assert set(found) == {"top", "step", "centred"} and found["step"]["reference"] == "centred_trace"
        assert found["top"]["passes"] == m
    assert any(row["approximation"] == "coordinates:2 sketched" for row in ladder)
    assert "coordinates:3" in (tmp_path / "run" / "ladder.md").read_text()
