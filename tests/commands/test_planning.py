"""`plan`: what devices that are not here would hold, receive and take, against what can be counted by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from ntkjax.assets import tiny_lm_path
from ntkjax.cli import main
from ntkjax.commands.plan import collectives, command
from ntkjax.commands.plan.command import PlanConfig, candidates, forward_flops, held, read_config, share_of
from ntkjax.devices import DEVICES, parse_devices, peak_tflops, simulated_devices
from ntkjax.errors import ConfigError
from ntkjax.models import LoraConfig, load_lm
from ntkjax.models.layers import ModelSpec

HLO = """
HloModule jit_f

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}

%inner (p: f32[8]) -> f32[8] {
  ROOT %r = f32[8]{0} all-reduce(%p), replica_groups={{0,1},{2,3}}, to_apply=%add
}

%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %w = bf16[4,6]{1,0} all-gather(%x), replica_groups=[1,4]<=[4], dimensions={0}
  %c = f32[8]{0} call(%y), to_apply=%inner
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %loop = (s32[], f32[8]) while(%t), condition=%cond, body=%body
  %s = (f32[3]{0}, f32[5]{0}) all-to-all(%u, %v), replica_groups=mesh['axis_0'=1,'axis_1'=4] {'axis_1'}
  %g = (bf16[2]{0}, bf16[8]{0}) all-gather-start(%h), replica_groups={{0,1,2,3}}
}
"""


def test_what_stands_in_the_loop_over_layers_counts_once_a_layer():
    """By hand: all-reduce 2 (g - 1) / g of 8, all-gather (g - 1) / g of 24 a layer and of 8, all-to-all 3/4 of 8."""
    counted = collectives.count(HLO, devices=4, layers=10)
    assert counted == {"all-reduce": 10 * 8.0, "all-gather": 10 * 18.0 + 6.0, "all-to-all": 6.0}


def test_a_loop_s_body_is_found_whatever_it_calls():
    assert [(name, kind, size, group) for name, kind, size, group in collectives.operations(HLO, 4)] == [
        ("inner", "all-reduce", 8, 2),
        ("body", "all-gather", 24, 4),
        ("main", "all-to-all", 8, 4),
        ("main", "all-gather", 8, 4),
    ]


def counted(**sizes: int) -> collectives.Counted:
    content = json.loads((Path(tiny_lm_path()) / "config.json").read_text())
    settings = {"config": content, "dtype": "float32", "rank": 4, "fsdp": 1, "model": 1, "rows": 4, "length": 16}
    return collectives.compiled(settings | sizes)


def test_one_device_receives_nothing_and_split_weights_are_gathered_once_a_batch():
    """Beside the kernels of the layers, what is split is the embedding, and what is looked up in it moves."""
    assert counted().elements == {} and counted().bytes_a_token > 0
    config = load_lm(tiny_lm_path()).config
    kernels = config.num_layers * sum(inputs * outputs for inputs, outputs, _ in config.linears.values())
    few, many = counted(fsdp=2), counted(fsdp=2, rows=8, length=32)
    for found in (few, many):
        assert found.elements.get("all-reduce", 0) < 0.05 * kernels
        assert kernels / 2 <= found.elements["all-gather"] < 1.3 * kernels / 2
    # Four times the tokens: the weights are the same, and no activation of a product is sent.
    assert many.elements["all-gather"] < 1.1 * few.elements["all-gather"]


def test_tensor_parallel_layers_sum_their_results_twice_a_layer_and_pass():
    """Megatron's count: the outputs of attention and MLP, [tokens, D] each, of value and tangent."""
    config = load_lm(tiny_lm_path()).config
    found = counted(model=2)
    least = config.num_layers * 2 * 2 * (4 * 16) * config.hidden_size
    assert least <= found.elements["all-reduce"] < 2 * least and "all-to-all" not in found.elements


def test_a_token_s_flops_are_those_of_its_matrices():
    model = load_lm(tiny_lm_path())
    layers = sum(np.prod(layer["kernel"].shape) for part in ("attention", "mlp")
                 for name, layer in model.params["layers"][part].items() if "kernel" in layer)  # fmt: skip
    c = model.config
    assert forward_flops(c, 0) == 2 * layers
    assert forward_flops(c, 10) - forward_flops(c, 0) == c.num_layers * 4 * c.num_heads * c.head_dim * 5
    routed = read_config(str(Path(__file__).parents[1] / "golden" / "mixtral"))[1]
    inner = sum(i * o for name, (i, o, _) in routed.linears.items() if name.startswith("mlp/") and name != "mlp/router")
    rest = sum(i * o for name, (i, o, _) in routed.linears.items()) - inner
    assert forward_flops(routed, 0) == 2 * routed.num_layers * (rest + routed.experts_per_token * inner)


def test_a_device_holds_its_share_of_the_weights():
    config = read_config(str(tiny_lm_path()))[1]
    spec = ModelSpec(config, LoraConfig(rank=2), "bfloat16")
    model = load_lm(tiny_lm_path(), lora=LoraConfig(rank=2), dtype="bfloat16")
    adapters = sum(leaf.nbytes for leaf in jax.tree.leaves(model.lora))
    everything = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    assert held(config, spec, (4, 1, 1)) == everything + 3 * adapters
    assert 0.45 < held(config, spec, (1, 2, 1)) / held(config, spec, (2, 1, 1)) < 0.75  # adapters and norms are whole
    shapes, least = candidates(config, spec, 4, memory=1.5 * everything / 0.9)
    assert shapes[0][0] == (4, 1, 1) and least < 0.6 * everything
    tight, _ = candidates(config, spec, 4, memory=0.9 * everything / 0.9)
    assert tight and (4, 1, 1) not in [mesh for mesh, _ in tight]


def test_devices_are_named_with_their_number():
    assert parse_devices("64 x v5e") == (64, "v5e") and parse_devices("h100") == (1, "H100")
    for text in ("0 x H100", "8 H100", "8 x H1000", ""):
        with pytest.raises(ConfigError, match="expected COUNT x NAME with a name of B200, H200"):
            parse_devices(text)
    assert peak_tflops("NVIDIA H100 80GB HBM3") == DEVICES["H100"].tflops and peak_tflops("cpu") is None
    assert peak_tflops("NVIDIA H100 PCIe") == 756 and peak_tflops("TPU v5 lite") == 197


def test_the_plan_of_a_small_model_names_the_mesh_and_why(capsys):
    assert main(["plan", str(tiny_lm_path()), "--devices", "2 x A100", "--examples", "1e6", "--length", "16",
                 "--token-budget", "32", "--share", "0.5"]) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert "Use --mesh data=2,model=1: each device holds the whole model, and nothing is sent." in said
    assert "| data=2,model=1" in said and "not measured on A100 here" in said and "31 A100-hours" in said
    config = read_config(str(tiny_lm_path()))[1]
    hours = 2 * 1e6 * 300 * forward_flops(config, 16) / (2 * 312e12 * 0.5) / 3600
    assert f"score every example: {hours:.3g} hours, {2 * hours:.3g} device-hours." in said


@pytest.mark.parametrize("mesh", [(2, 1, 2), (1, 4, 1)])
def test_what_is_sent_counts_for_every_batch_of_the_places_of_rows(mesh, monkeypatch):
    """1e9 elements of 2 bytes a batch, over links of 300e9 bytes a second; devices along "model" share their rows."""
    monkeypatch.setattr(command, "candidates", lambda *_: ([(mesh, 1e9)], 1e9))
    monkeypatch.setattr(command, "compiled", lambda settings: collectives.Counted({"all-reduce": 1e9}, 100.0))
    config = command.PlanConfig(str(tiny_lm_path()), "4 x A100", examples=1e6, tokens=300, token_budget=4096)
    shape = command.run(config, progress=False).shapes[0]
    batches = 3e8 / (mesh[0] * mesh[1] * 4096)
    assert shape.link_hours == pytest.approx(batches * 2e9 / 300e9 / 3600, rel=1e-12)
    model = read_config(str(tiny_lm_path()))[1]
    gathered = 2 * sum(i * o for i, o, _ in model.linears.values()) if mesh[1] > 1 else 0
    stream = 2 * 2 * model.hidden_size  # two bytes more than its dtype has, of the value and of its tangent
    assert shape.working_bytes == pytest.approx((100.0 / 2 + stream) * 4096 + gathered, rel=1e-12)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere", "--devices", "H100"], "nowhere: no such file; expected the config.json of a model"),
        ([str(tiny_lm_path()), "--devices", "7 y H100"], "--devices '7 y H100': expected COUNT x NAME"),
        ([str(tiny_lm_path()), "--devices", "H100", "--share", "2"], "--share is 2.0: expected a share above 0"),
        ([str(tiny_lm_path()), "--devices", "H100", "--examples", "nan"], "--examples is nan: expected a number of at"),
        ([str(tiny_lm_path()), "--devices", "H100", "--tokens", "inf"], "--tokens is inf: expected a number of at"),
        ([str(tiny_lm_path()), "--devices", "H100", "--length", "9000"], "--length 9000 is more than --token-budget"),
        ([str(tiny_lm_path()), "--devices", f"{10**20}xH100"], "expected at most 1,000,000 devices"),
    ],
)
def test_what_cannot_be_planned_is_told(words, said, capsys):
    assert main(["plan", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rates", "said"),
    [
        ('{"rows": [{"pass": "forward", "of_peak": 0.5}]}', "no score with a share of the peak"),
        ("[]", "no score with a share of the peak"),
        ('{"rows": 3}', "no score with a share of the peak"),
        ('{"rows": [1, {"pass": "score", "of_peak": "0.5"}]}', "of_peak is '0.5', no share above 0"),
        ("{", "not valid JSON"),
    ],
)
def test_rates_that_no_benchmark_wrote_are_named(rates, said, tmp_path, capsys):
    path = tmp_path / "rates.json"
    path.write_text(rates)
    assert main(["plan", str(tiny_lm_path()), "--devices", "H100", "--rates", str(path)]) == 2
    error = capsys.readouterr().err
    assert str(path) in error and said in error and "expected a file of `make bench-gpu`" in error


def test_the_rates_of_a_benchmark_are_the_best_of_its_scores(tmp_path):
    path = tmp_path / "rates.json"
    rows = [{"pass": "score", "of_peak": 0.2}, {"pass": "score", "of_peak": 0.3}, {"pass": "forward", "of_peak": 0.5}]
    path.write_text(json.dumps({"rows": rows}))
    assert share_of(PlanConfig(str(tiny_lm_path()), "H100", rates=str(path))) == 0.3


def test_a_config_json_that_is_cut_has_a_remedy_for_models(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type":')
    assert main(["plan", str(tmp_path), "--devices", "H100"]) == 2
    error = capsys.readouterr().err
    assert "config.json:1: not valid JSON" in error and "copy it again" in error and "output directory" not in error


def test_a_model_that_no_mesh_holds_is_told(tmp_path, capsys):
    content = json.loads((Path(tiny_lm_path()) / "config.json").read_text())
    huge = content | {"hidden_size": 65536, "num_hidden_layers": 400, "intermediate_size": 262144}
    (tmp_path / "config.json").write_text(json.dumps(huge))
    assert main(["plan", str(tmp_path), "--devices", "2 x L4"]) == 0
    assert "No mesh holds the model: split most, a device holds" in capsys.readouterr().out


GRADIENT = """
import sys
import jax, numpy as np
from ntkjax.models import LoraConfig, load_lm
from ntkjax.ntk.kernel import as_kernel
from ntkjax.ntk.scores import mean_direction
from ntkjax.parallel import make_mesh, shard_batch
from ntkjax.types import Batch
tokens = np.arange(8 * 16, dtype=np.int32).reshape(8, 16) % 250
lengths = np.full(8, 16, np.int32)
batch = Batch(tokens, np.broadcast_to(np.arange(16) > 6, (8, 16)), lengths, np.arange(8, dtype=np.int32))
found = []
for mesh, rule in ((None, "tensor"), (make_mesh(data=2, fsdp=2), "tensor"), (make_mesh(data=4), "fully-sharded")):
    model = load_lm(sys.argv[1], lora=None, mesh=mesh, weights=rule)
    batches = [shard_batch(batch, mesh)]
    found.append(mean_direction(as_kernel(model.nll_fn), model.select_params("all"), batches).outputs)
one, *others = [jax.tree.map(np.asarray, direction) for direction in found]
for other in others:
    print(max(np.abs(a - b).max() / np.abs(a).max() for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other))))
"""


def test_gradients_of_gathered_weights_are_those_of_one_device():
    env = os.environ | {"XLA_FLAGS": simulated_devices(os.environ.get("XLA_FLAGS", ""), 4), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", GRADIENT, str(tiny_lm_path())], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    worst = [float(line) for line in done.stdout.split()]
    assert len(worst) == 2 and max(worst) < 1e-5
