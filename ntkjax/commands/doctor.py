"""``ntkjax doctor``: how many digits of logits, scores and gradients hold on the device at hand, dtype by dtype.

The same examples are computed alone (each at its exact length in a batch of its own, whose other rows are filler),
padded (the same at the longest length), batched (all rows of one batch) and reordered (that batch from its last row to
its first), in every dtype and at every precision of matrix products that JAX has for the backend. The mathematics of
all of them is the same, so each is compared with one reference: float32 at the highest precision, alone (or as the
first of the layouts that are asked for has it).

Each length, dtype and precision compiles programs of its own, which takes almost all of the time: hence few lengths.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

import jax
import numpy as np
from jaxtyping import Array
from tqdm import tqdm
from tyro.conf import arg

from ntkjax.commands.base import Command
from ntkjax.data import TokenisedDataset
from ntkjax.errors import ConfigError, UserError
from ntkjax.models import LanguageModel
from ntkjax.models.lm import paths, unflatten
from ntkjax.ntk import KernelFunctions, build, parse
from ntkjax.ntk.metrics import spearman
from ntkjax.ntk.rows import NonFiniteError, collect_rows, real_rows
from ntkjax.ntk.scores import mean_direction, scores_along
from ntkjax.pipeline.inputs import inputs_of
from ntkjax.pipeline.load import Loaded, load_data, load_model, longest
from ntkjax.pipeline.options import DataOptions, ModelOptions
from ntkjax.pipeline.run_dir import RunDir
from ntkjax.report.tables import to_markdown
from ntkjax.rng import numpy_rng
from ntkjax.selection.options import KernelName
from ntkjax.types import Batch, Params

Dtype = Literal["float32", "bfloat16", "float16", "int8", "nf4"]

BARS: dict[str, float] = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.0125, "int8": 0.1, "nf4": 0.5}
"""How far a result may be from the reference, relative to its largest value.

float32 has 24 bits of significand, an error of 2^-24 = 6e-8 in each operation; the bar leaves room for sums over
thousands of terms and tens of layers, and none for products of operands rounded to TensorFloat-32 (11 bits, 5e-4).
bfloat16 has 8 bits, an error of 2^-9 = 2e-3 in each rounding of what a layer's products take and give, of which a score
has passed some dozens; float16 has three bits more, so its bar is an eighth of that. Measured on a CPU
(docs/guide/troubleshooting.md): 2e-6, 3e-2 and 2e-3.
"""

PRECISIONS: dict[str, tuple[str, ...]] = {
    "gpu": ("default", "tensorfloat32", "highest"),
    "tpu": ("default", "BF16_BF16_F32_X3", "highest"),
}
"""Backend: the values of ``jax_default_matmul_precision`` that differ there. Elsewhere (CPUs) there is one."""

Layout = Literal["alone", "padded", "batched", "reordered"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
QUANTITIES = ("logits", "gradient", "scores")

TEXTS = (
    ("What is the capital of France?", "Paris, on the Seine."),
    ("What is the capital of Spain?", "Madrid, far from the sea."),
    ("Why is the sky blue by day?", "Air scatters short waves of light more than long ones, and blue is short."),
    ("Why is the sky red at dusk?", "Light comes from the side, and its short waves are lost on the long way."),
)
"""Prompt and response of the examples where no data are given: two short ones, then two long ones. Each pair is cut to
the shorter of the two, so that there are two lengths in any tokenizer."""


@dataclasses.dataclass(frozen=True)
class DoctorConfig:
    """Check logits, scores and gradients on this device: alone, padded, batched, reordered, in several dtypes."""

    model: str
    """Hugging Face directory, hub id or `real`."""
    data: tuple[str, ...] = ()
    """Files whose first examples are computed. None: four short texts that ship with the command."""
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    """Dtypes of the weights to check; the reference is float32 in any case."""
    n: int = 4
    """Examples of --data that are computed."""
    layouts: tuple[Layout, ...] = LAYOUTS
    """How they lie; the first is that of the reference. batched alone compiles one length only: for many examples."""
    kernel: KernelName = "loss"
    lora_rank: int = 8
    """Rank of the adapters whose gradients and scores are computed; both factors are drawn at random."""
    seed: int = 0
    """Seed of the adapters."""
    out: str | None = None
    """Run directory: results.json and results.md. None: the table is only printed."""
    reading: Annotated[DataOptions, arg(name="")] = DataOptions()

    def __post_init__(self):
        if not self.dtypes:
            raise ConfigError(f"--dtypes: found none; expected some of {', '.join(get_args(Dtype))}")
        if not self.layouts:
            raise ConfigError(f"--layouts: found none; expected some of {', '.join(LAYOUTS)}")
        parse(self.kernel)
        if self.n < 2:
            raise ConfigError(f"--n is {self.n}: expected at least 2 examples, so that there is something to batch")

    def model_options(self, dtype: Dtype) -> ModelOptions:
        """The model in that dtype."""
        return ModelOptions(model=self.model, dtype=dtype, lora_rank=self.lora_rank)


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What `doctor` found.

    Attributes:
      device: kind and backend of the device.
      rows: one for each dtype, precision and layout: ``dtype``, ``precision``, ``layout``, ``bar``, ``agrees``;
        ``differences``, from the reference by quantity, relative to its largest value; ``spearman`` of the scores.
        Against the reference, float32 at the highest precision in the first layout, which is no row.
      remedies: one line for each row that does not agree.
    """

    device: str
    rows: list[dict[str, Any]]
    remedies: list[str]


# -- work --


def doctor(config: DoctorConfig, *, progress: bool = True) -> Diagnosis:
    """Compute and compare as ``config`` says; writes OUT/results.json and OUT/results.md where ``out`` is given.

    Raises:
      UserError: unusable model, data or options; a result that is NaN or infinite; a float32 result, at the default or
        the highest precision, further from the reference than its bar: the message holds the table.
    """
    if config.out is not None:
        RunDir.check(config.out, "doctor", config)
    loaded_as: Dtype = "float32"
    model = load_model(config.model_options(loaded_as), seed=config.seed)
    data, loaded = examples(config, model)
    run = None
    if config.out is not None:
        inputs = inputs_of(model, config.model_options("float32"), data=loaded)
        run = RunDir.create(config.out, "doctor", config, inputs=inputs)
    rows, precisions = [], PRECISIONS.get(jax.default_backend(), ("default",))
    first = ("float32", precisions[-1], config.layouts[0])
    every = list(settings(precisions, config.layouts))
    others = [(dtype, *setting) for dtype in dict.fromkeys(config.dtypes) for setting in every]
    asked = [first, *(setting for setting in others if setting != first)]
    for dtype, precision, layout in tqdm(asked, desc="doctor", disable=not progress, unit="setting"):
        if dtype != loaded_as:
            loaded_as = dtype
            model = load_model(config.model_options(dtype), seed=config.seed)
        digits = measure(model, data, config, precision, layout)
        if (dtype, precision, layout) == first:
            reference = digits
        else:
            rows.append({"dtype": dtype, "precision": precision, "layout": layout} | compared(digits, reference, dtype))
    device = f"{jax.devices()[0].device_kind} ({jax.default_backend()})"
    result = Diagnosis(device, rows, [remedy(row, rows) for row in rows if not row["agrees"]])
    if run is not None:
        run.write_json("results.json", dataclasses.asdict(result) | {"bars": BARS, "examples": len(data)})
        run.write_text("results.md", to_markdown(table(result)))
    failed = [row for row in rows if asked_in_full(row) and not row["agrees"]]
    if failed:
        raise UserError(
            f"{config.model}: float32 results on {device} differ from float32 at the highest precision, "
            f"{config.layouts[0]}, by more than {BARS['float32']:g} of the largest value: "
            f"{', '.join(map(title, failed))}; expected agreement. {' '.join(result.remedies)}\n\n"
            f"{to_markdown(table(result))}"
        )
    return result


def settings(precisions: tuple[str, ...], layouts: tuple[Layout, ...]) -> Iterator[tuple[str, str]]:
    """(precision, layout) of every row of a dtype: all layouts as commands run them, one at other precisions, that of
    one batch where it is among them.
    """
    one = "batched" if "batched" in layouts else layouts[0]
    for precision in precisions:
        yield from ((precision, layout) for layout in (layouts if precision == "default" else (one,)))


def examples(config: DoctorConfig, model: LanguageModel) -> tuple[TokenisedDataset, Loaded | None]:
    """The examples as tokens, and as they were read; `TEXTS` without ``config.data``.

    Raises:
      UserError: fewer than two examples.
    """
    if config.data:
        loaded = load_data(config.data, model, config.reading, limit=config.n)
        if len(loaded) < 2:
            raise UserError(
                f"{', '.join(config.data)}: examples found: {len(loaded)}; expected at least 2, add records"
            )
        return loaded.tokens, loaded
    encode = lambda text: list(model.tokenizer.encode(text, add_special_tokens=False))
    prompts, responses = ([encode(pair[side]) for pair in TEXTS] for side in (0, 1))
    sequences = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    shorter = [min(map(len, sequences[k - k % 2 : k - k % 2 + 2])) for k in range(len(sequences))]
    sequences = [sequence[:length] for sequence, length in zip(sequences, shorter, strict=True)]
    return TokenisedDataset.from_sequences(sequences, [len(prompt) for prompt in prompts]), None


def batches_of(data: TokenisedDataset, layout: str, limit: int) -> list[Batch]:
    """The examples in the ``layout``, one of LAYOUTS, none longer than ``limit`` tokens.

    All have as many rows, so that a length compiles once: those beside an example that is alone are filler.
    """
    rows, size, longest = np.arange(len(data)), len(data), int(data.lengths.max())
    wide = longest if data.lengths.min() < longest else min(2 * longest, limit)
    if layout in ("batched", "reordered"):
        return [data.collate(rows if layout == "batched" else rows[::-1], length=wide)]
    lengths = [wide if layout == "padded" else int(length) for length in data.lengths]
    return [data.collate([row], rows=size, length=length) for row, length in zip(rows, lengths, strict=True)]


def drawn_adapters(model: LanguageModel, seed: int) -> Params:
    """LoRA factors of a model that was trained a little: B is drawn too, since at B = 0 the gradient of A is 0."""
    drawn = lambda path, leaf: (0.01 * numpy_rng(seed, "doctor", path).standard_normal(leaf.shape)).astype(leaf.dtype)
    leaves = paths(model.lora).items()
    return unflatten({path: drawn(path, leaf) if path.endswith("lora_b") else leaf for path, leaf in leaves})


def measure(
    model: LanguageModel, data: TokenisedDataset, config: DoctorConfig, precision: str, layout: str
) -> dict[str, np.ndarray]:
    """Every one of QUANTITIES by name, float64 on the host.

    ``logits`` [n, V]: where the last token of the response is predicted. ``gradient`` [P]: the kernel's mean gradient
    over the examples. ``scores`` [n]: the inner product of each example's gradient with it.
    """
    batches, params = batches_of(data, layout, longest(model, config.reading)), drawn_adapters(model, config.seed)
    last, rows = model.output("apply", "last"), len(data)
    functions = KernelFunctions(model.hidden_fn, model.head_fn({}), model.nll_fn, model.sum_logits_fn)
    try:
        with jax.default_matmul_precision(precision):
            logits = ((real_rows(batch), _values(last, params, batch)) for batch in batches)
            measured = {"logits": collect_rows(logits, rows=rows, what="logits")}
            kernel = build(config.kernel, functions, params, seed=config.seed)
            mean = mean_direction(kernel, params, batches)
            leaves = [np.ravel(np.asarray(leaf)) for leaf in jax.tree.leaves(mean.outputs)]
            measured["gradient"] = np.concatenate(leaves)
            measured["scores"] = scores_along(kernel, params, [mean], batches, rows=rows)[:, 0]
    except NonFiniteError as error:
        raise UserError(f"{config.model}, {model.spec.dtype}, {precision}, {layout}: {error}") from error
    return {name: np.asarray(values, np.float64) for name, values in measured.items()}


@jax.jit
def _values(fn: Any, params: Params, batch: Batch) -> Array:
    return fn(params, batch)


def compared(measured: dict[str, np.ndarray], reference: dict[str, np.ndarray], dtype: str) -> dict[str, Any]:
    """The numbers of a row: max |x - reference| / max |reference| by quantity, Spearman of the scores."""
    differences = {
        name: float(np.max(np.abs(measured[name] - wanted)) / max(float(np.max(np.abs(wanted))), 1e-300))
        for name, wanted in ((name, reference[name]) for name in QUANTITIES)
    }
    ranks = spearman(measured["scores"], reference["scores"])
    agrees = max(differences.values()) <= BARS[dtype]
    return {"bar": BARS[dtype], "agrees": agrees, "differences": differences, "spearman": ranks}


def asked_in_full(row: dict[str, Any]) -> bool:
    """Whether the row is one of float32 products: not where the user lets JAX round them."""
    return row["dtype"] == "float32" and row["precision"] in ("default", "highest")


# -- report --


def title(row: dict[str, Any]) -> str:
    """``DTYPE, precision PRECISION, LAYOUT (worst quantity: its difference)``."""
    worst = max(row["differences"], key=row["differences"].get)
    return (
        f"{row['dtype']}, precision {row['precision']}, {row['layout']} ({worst}: {row['differences'][worst]:.1e}, "
        f"bar {row['bar']:g})"
    )


def remedy(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The line for a row that does not agree: which, and the setting that changes it, as the other rows show."""
    if row["dtype"] != "float32":
        return f"{title(row)}: use --dtype float32."
    full = [r for r in rows if r["dtype"] == "float32" and r["precision"] == "highest"]
    if row["precision"] != "highest" and full and all(r["agrees"] for r in full):
        return f"{title(row)}: set JAX_DEFAULT_MATMUL_PRECISION=highest (jax_default_matmul_precision in Python)."
    return (
        f"{title(row)}: no precision mends it: an example's result depends on its padding or on the other rows of its "
        "batch. For exact scores run with --token-budget 1, one example in a batch."
    )


def table(result: Diagnosis) -> list[dict[str, Any]]:
    """A row for each setting: the digits of every quantity, Spearman of the scores, the largest difference."""
    digits = lambda difference: "all" if difference == 0 else f"{max(0.0, -math.log10(difference)):.1f}"
    return [
        {"dtype": row["dtype"], "precision": row["precision"], "examples": row["layout"]}
        | {name: digits(row["differences"][name]) for name in QUANTITIES}
        | {"Spearman": f"{row['spearman']:.4f}"}
        | {"largest difference": f"{max(row['differences'].values()):.1e}", "bar": f"{row['bar']:g}"}
        | {"agrees": row["agrees"]}
        for row in result.rows
    ]


def describe(config: DoctorConfig, result: Diagnosis) -> str:
    """The table of digits, what it is compared with, and a line for each row that does not agree."""
    agree = sum(row["agrees"] for row in result.rows)
    return "\n".join(
        [
            to_markdown(table(result)),
            f"{result.device}. Digits that agree with float32 at the highest precision, examples {config.layouts[0]}: "
            "-log10(max difference / largest value).",
            *result.remedies,
            f"{agree} of {len(result.rows)} rows agree within their bars; float32 is as asked for.",
        ]
    )


COMMAND = Command(DoctorConfig, doctor, describe)
