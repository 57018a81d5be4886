"""``ntkjax plan``: a forecast of a selection on devices that are not here: memory, hours, the mesh and why.

What is measured and what is not: sizes of weights follow from config.json, what is sent between devices is counted from
the compiled program (`ntkjax.commands.plan.collectives`), peaks and links are those of data sheets (`ntkjax.devices`);
the share of the peak that a pass reaches is an assumption, `--share`, unless a benchmark's rates are given.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm
from tyro.conf import Positional

from ntkjax.commands.base import Command
from ntkjax.commands.plan.collectives import Counted, compiled
from ntkjax.devices import DEVICES, parse_devices
from ntkjax.errors import ConfigError, UserError
from ntkjax.files import read_json
from ntkjax.models.config import ModelConfig
from ntkjax.models.functions import param_shapes
from ntkjax.models.layers import ModelSpec
from ntkjax.models.lm import paths
from ntkjax.models.lora import LoraConfig
from ntkjax.parallel import AXES, describe_mesh, weight_sharding
from ntkjax.report.tables import to_markdown

PAPER_GPU_HOURS = 31
"""A100-hours that arXiv 2511.07380 reports for its selection."""
USABLE = 0.9
"""Share of a device's memory that a program can have."""
TRAINED_COPIES = 4
"""Of the trained parameters: themselves, their direction, and two moments of the warm-up."""
FORWARD, SCORE = 1, 2
"""Forward passes that a token costs: the score's tangent pass costs as much as its primal pass."""
CANDIDATES, MOST = 3, 10
"""Mesh shapes whose program is compiled: those that split the weights least, so many, or more until one fits."""


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """Forecast hours, memory and mesh of a selection on devices that are not here, from config.json alone."""

    model: Positional[str]
    """config.json of a model, or a directory that holds it; no weights are read."""
    devices: str
    """COUNT x NAME: "8 x H100", "64 x v5e"."""
    examples: float = 1.8e6
    """Of the pool."""
    tokens: float = 300
    """Tokens of an example, on average."""
    n: int = 9000
    """N; stage 1 leaves 4 N candidates."""
    lora_rank: int = 16
    dtype: str = "bfloat16"
    """Of the frozen weights."""
    length: int = 2048
    """Tokens of a packed row."""
    token_budget: int = 8192
    """Tokens in a batch of one device, which has as many whole rows."""
    share: float = 0.3
    """Share of a device's peak that the matrix products of a pass reach. The default is that of the score of a model of
    0.6 billion parameters on one H100, as measured (experiments/README.md, "On one GPU"); 8 billion reached 0.55."""
    rates: str | None = None
    """build/bench_gpu.json of `make bench-gpu` on one such device: the best share that its scores reached."""

    def __post_init__(self):
        parse_devices(self.devices)
        for name in ("examples", "tokens", "n", "lora_rank", "length", "token_budget"):
            if not 1 <= getattr(self, name) < float("inf"):  # neither is NaN
                raise ConfigError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}: expected a number of at least 1"
                )
        if self.length > self.token_budget:
            raise ConfigError(
                f"--length {self.length} is more than --token-budget {self.token_budget}: expected a batch of a device "
                "that holds a row at least; raise --token-budget or lower --length"
            )
        if not 0 < self.share <= 1:
            raise ConfigError(f"--share is {self.share}: expected a share above 0 and at most 1")
        if self.dtype not in ("bfloat16", "float16", "float32"):
            raise ConfigError(f"--dtype {self.dtype}: expected bfloat16, float16 or float32")


@dataclasses.dataclass(frozen=True)
class Shape:
    """One way to use the devices, and what it costs.

    Attributes:
      mesh: sizes of data, fsdp and model. held_bytes: weights, and trained parameters with their copies, of a device.
      working_bytes: of the score: what the compiled program needs for each token, halved for 16-bit arrays, which the
        compiler of a CPU holds in 32; and the weights of a gathered layer.
      received_bytes: that a device receives for a batch, by operation; a batch has the whole rows in `token_budget` for
        each place along data and fsdp.
      compute_hours, link_hours: of the scores of the whole pool: products at ``share`` of the peak; what is received at
        the link's full rate, as if nothing overlapped.
    """

    mesh: tuple[int, int, int]
    held_bytes: float
    working_bytes: float
    received_bytes: dict[str, float]
    compute_hours: float
    link_hours: float

    @property
    def memory_bytes(self) -> float:
        """Of one device."""
        return self.held_bytes + self.working_bytes

    @property
    def hours(self) -> float:
        """Both, one after the other."""
        return self.compute_hours + self.link_hours


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `plan` found.

    Attributes:
      parameters: of the model. flops: of a token's forward pass. shapes: those that were compiled, the best first of
        those that fit; fits: how many do. too_large: what a device would hold under the shape that splits most.
      share: of the peak. ways: hours by way of selecting, of the first shape.
    """

    parameters: int
    flops: float
    shapes: tuple[Shape, ...]
    fits: int
    too_large: float
    share: float
    ways: dict[str, float]


# -- work --


def read_config(path: str) -> tuple[dict[str, Any], ModelConfig]:
    """The content of config.json, and the model it describes."""
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():
        raise UserError(f"{file}: no such file; expected the config.json of a model, or a directory that holds it")
    content = read_json(file, remedy="every model directory in Hugging Face format has a whole one; copy it again")
    return content, ModelConfig.from_hf(content, str(file))


def forward_flops(config: ModelConfig, length: float) -> float:
    """Multiplications and additions of one token's forward pass without the head, which is folded away: the linear
    layers (of the experts those a token is routed to), and causal attention over length / 2 tokens."""
    routed = max(1, config.experts_per_token or 1)
    linear = 0
    for name, (inputs, outputs, _) in config.linears.items():
        times = routed if config.num_experts and name.startswith("mlp/") and name != "mlp/router" else 1
        linear += times * inputs * outputs
    attention = 2 * 2 * config.num_heads * config.head_dim * length / 2
    return config.num_layers * (2.0 * linear + attention)


def held(config: ModelConfig, spec: ModelSpec, mesh: tuple[int, int, int]) -> float:
    """Bytes of weights and of the trained parameters' copies on one device; ConfigError: an axis does not divide."""
    abstract = jax.sharding.AbstractMesh(mesh, AXES)
    total = 0.0
    for path, leaf in paths(param_shapes(spec)).items():
        parts = weight_sharding(path, leaf.shape, abstract, config.split(path)).spec
        names = [
            name for entry in parts if entry is not None for name in ([entry] if isinstance(entry, str) else entry)
        ]
        share = float(np.prod([abstract.shape[name] for name in names], dtype=np.float64)) if names else 1.0
        copies = TRAINED_COPIES if "lora_" in path else 1
        total += copies * np.prod(leaf.shape, dtype=np.float64) * leaf.dtype.itemsize / share
    return total


def candidates(
    config: ModelConfig, spec: ModelSpec, count: int, memory: float
) -> tuple[list[tuple[tuple[int, int, int], float]], float]:
    """Mesh shapes of ``count`` devices that hold the weights, with the bytes that a device holds, those first that
    split the weights least; and the bytes under the shape that splits them most."""
    shapes, least = [], float("inf")
    divisors = [d for d in range(1, count + 1) if count % d == 0]
    for model in (d for d in divisors if d <= 8):  # beyond a node, its links are slower than any table here says
        for fsdp in (d for d in divisors if count % (model * d) == 0):
            mesh = (count // (model * fsdp), fsdp, model)
            try:
                size = held(config, spec, mesh)
            except ConfigError:  # an axis does not divide
                continue
            least = min(least, size)
            if size < USABLE * memory:
                shapes.append((mesh, size))
    return sorted(shapes, key=lambda shape: (shape[0][1] * shape[0][2], shape[0][2])), least


def share_of(config: PlanConfig) -> float:
    """``--share``, or the best that a benchmark's scores reached."""
    if config.rates is None:
        return config.share
    expected = "expected a file of `make bench-gpu`, whose scores have a share of the peak"
    content = read_json(Path(config.rates), remedy=expected)
    rows = content.get("rows") if isinstance(content, dict) else None
    scores = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    shares = [row["of_peak"] for row in scores if row.get("pass") == "score" and row.get("of_peak")]
    if not shares:
        raise UserError(f"{config.rates}: no score with a share of the peak; {expected}")
    wrong = [value for value in shares if not (isinstance(value, int | float) and 0 < value <= 1)]
    if wrong:
        raise UserError(f"{config.rates}: of_peak is {wrong[0]!r}, no share above 0 and at most 1; {expected}")
    return max(shares)


def run(config: PlanConfig, *, progress: bool = True) -> Plan:
    """Compile the score for the smallest mesh shapes that hold the model, and count.

    Raises:
      UserError: config.json or the rates cannot be read, or a program cannot be compiled.
    """
    content, shape = read_config(config.model)
    count, name = parse_devices(config.devices)
    device, share = DEVICES[name], share_of(config)
    spec = ModelSpec(shape, LoraConfig(rank=config.lora_rank), config.dtype)
    possible, least = candidates(shape, spec, count, 1e9 * device.memory_gb)
    flops = forward_flops(shape, min(config.length, config.tokens))
    rate = count * device.tflops * 1e12 * share  # FLOP a second of all devices
    pool = config.examples * config.tokens
    shapes = []
    inside = lambda shape: shape.memory_bytes <= USABLE * 1e9 * device.memory_gb
    itemsize = np.dtype("float32" if config.dtype == "float32" else "float16").itemsize
    for mesh, size in tqdm(possible[:MOST], desc="compiling", unit="mesh", disable=not progress):
        if len(shapes) >= CANDIDATES and any(map(inside, shapes)):
            break
        counted = _compiled(content, config, mesh)
        working = counted.bytes_a_token * config.token_budget * itemsize / 4
        # The residual stream and its tangent are float32 whatever the dtype.
        working += 2 * (4 - itemsize) * shape.hidden_size * config.token_budget
        if mesh[1] > 1:
            layer = sum(inputs * outputs for inputs, outputs, _ in shape.linears.values()) * max(1, shape.num_experts)
            working += itemsize * layer / mesh[2]
        received = {kind: itemsize * elements for kind, elements in counted.elements.items()}
        # The devices along "model" have the same rows.
        batches = pool / (mesh[0] * mesh[1] * _rows(config) * config.length)
        links = batches * sum(received.values()) / (1e9 * device.link_gb) / 3600
        hours = SCORE * pool * flops / rate / 3600
        shapes.append(Shape(mesh, size, working, received, hours, links))
    ordered = sorted(shapes, key=lambda shape: (not inside(shape), shape.hours))
    ways: dict[str, float] = {}
    if ordered:
        best = ordered[0]
        each = best.hours / pool / SCORE  # hours of a token's forward pass, sending included
        scored = min(config.examples, 4 * config.n) * config.tokens
        ways = {
            "score every example": SCORE * pool * each,
            "stage 1, then score 4 N (the paper's way)": (FORWARD * pool + SCORE * scored) * each,
        }
    parameters = sum(
        int(np.prod(leaf.shape)) for path, leaf in paths(param_shapes(spec)).items() if "lora_" not in path
    )
    return Plan(parameters, flops, tuple(ordered), sum(map(inside, shapes)), least, share, ways)


def _rows(config: PlanConfig) -> int:
    """Of a device's batch."""
    return config.token_budget // config.length


def _compiled(content: dict[str, Any], config: PlanConfig, mesh: tuple[int, int, int]) -> Counted:
    _, fsdp, model = mesh
    rows = _rows(config)
    settings = {"config": content, "dtype": config.dtype, "rank": config.lora_rank, "fsdp": fsdp, "model": model}
    return compiled(settings | {"rows": rows * fsdp, "length": config.length})


# -- report --


def describe(config: PlanConfig, planned: Plan) -> str:
    """The table of shapes, the hours of each way, and what they rest on."""
    count, name = parse_devices(config.devices)
    device = DEVICES[name]
    lines = [
        f"{planned.parameters / 1e9:.3g} B parameters in {config.dtype}, {planned.flops / 1e9:.3g} GFLOP a token "
        f"forward; {config.examples:,.0f} examples of {config.tokens:g} tokens; {count} x {name}: "
        f"{device.memory_gb:g} GB, {device.tflops:g} TFLOP/s, {device.link_gb:g} GB/s to the others, each."
    ]
    if not planned.shapes:
        least = f"split most, a device holds {planned.too_large / 1e9:.3g} GB of {device.memory_gb:g}"
        return "\n".join([*lines, f"No mesh holds the model: {least}. More devices, or larger ones."])
    rows = []
    for shape in planned.shapes:
        rows.append({
            "mesh": mesh_text(shape.mesh),
            "held (GB)": f"{shape.held_bytes / 1e9:.3g}",
            "working (GB)": f"{shape.working_bytes / 1e9:.3g}",
            "received a batch (GB)": f"{sum(shape.received_bytes.values()) / 1e9:.3g}",
            "by": ", ".join(sorted(kind for kind, size in shape.received_bytes.items() if size)) or "-",
            "compute (h)": f"{shape.compute_hours:.3g}",
            "links (h)": f"{shape.link_hours:.3g}",
            "fits": "yes" if shape.memory_bytes <= USABLE * 1e9 * device.memory_gb else "no",
        })  # fmt: skip
    lines += ["", to_markdown(rows), ""]
    lines += [f"{way}: {hours:.3g} hours, {hours * count:.3g} device-hours." for way, hours in planned.ways.items()]
    lines += [f"The paper reports {PAPER_GPU_HOURS} A100-hours for its selection.", "", reason(config, planned)]
    told = f"from {config.rates}" if config.rates else "--share"
    lines += [
        f"Rests on: products at {100 * planned.share:.0f}% of the peak ({told}), not measured on {name} here; links at "
        "their full rate, nothing overlapped; what is sent counted from the program compiled for the mesh without its "
        "data axis, on simulated devices. Reading, tokenising and compiling are not counted."
    ]
    return "\n".join(lines)


def reason(config: PlanConfig, planned: Plan) -> str:
    """Which mesh to use, and why."""
    best, (_, name) = planned.shapes[0], parse_devices(config.devices)
    if not planned.fits:
        return (
            f"None of these fits: {mesh_text(best.mesh)} needs {best.memory_bytes / 1e9:.3g} GB of "
            f"{USABLE * DEVICES[name].memory_gb:.3g}; a smaller --token-budget, or more devices."
        )
    whole = best.mesh[1] * best.mesh[2] == 1
    why = "each device holds the whole model, and nothing is sent" if whole else (
        f"the least split that leaves room for the working memory is {best.mesh[1] * best.mesh[2]} ways"
    )  # fmt: skip
    if not whole and len(planned.shapes) > 1:
        why += f"; of the {planned.fits} shapes that fit it takes the fewest hours"
    return f"Use --mesh {mesh_text(best.mesh)}: {why}."


def mesh_text(sizes: tuple[int, int, int]) -> str:
    """As `--mesh` takes it."""
    return str(describe_mesh(jax.sharding.AbstractMesh(sizes, AXES)))


COMMAND = Command(PlanConfig, run, describe)
