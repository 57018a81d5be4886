"""``ntkjax doctor``: how many digits of logits, scores and gradients hold on the device at hand, dtype by dtype.

The same examples are computed alone (each a batch of one row at its exact length), padded (the same at twice the
longest length), batched (all rows of one batch) and reordered (that batch from its last row to its first), in every
dtype and at every precision of matrix products that JAX has for the backend. The mathematics of all of them is the
same, so each is compared with one reference: float32 at the highest precision, alone.
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
from ntkjax.ntk import KernelFunctions, build
from ntkjax.ntk.metrics import spearman
from ntkjax.ntk.rows import NonFiniteError, collect_rows, real_rows
from ntkjax.ntk.scores import mean_direction, scores_along
from ntkjax.pipeline.inputs import inputs_of
from ntkjax.pipeline.load import Loaded, load_data, load_model, longest
from ntkjax.pipeline.options import DataOptions, ModelOptions
from ntkjax.pipeline.run_dir import RunDir
from ntkjax.report.tables import to_markdown
from ntkjax.rng import numpy_rng
from ntkjax.types import Batch, Params

Dtype = Literal["float32", "bfloat16", "float16"]

BARS: dict[str, float] = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.0125}
"""How far a result may be from the reference, relative to its largest value.

float32 has 24 bits of significand, an error of 2^-24 = 6e-8 in each operation; the bar leaves room for sums over
thousands of terms and tens of layers, and none for products of operands rounded to TensorFloat-32 (11 bits, 5e-4).
bfloat16 has 8 bits, an error of 2^-9 = 2e-3 in each rounding of the residual stream, of which a score has passed some
dozens; float16 has three bits more, so its bar is an eighth of that.
"""

PRECISIONS: dict[str, tuple[str, ...]] = {
    "gpu": ("default", "tensorfloat32", "highest"),
    "tpu": ("default", "BF16_BF16_F32_X3", "highest"),
}
"""Backend: the values of ``jax_default_matmul_precision`` that differ there; default and highest elsewhere."""

LAYOUTS = ("alone", "padded", "batched", "reordered")
KERNELS = ("sum_logits", "loss")
QUANTITIES = ("logits", *(f"{kernel} {what}" for kernel in KERNELS for what in ("gradient", "scores")))

TEXTS = (
    ("What is the capital of France?", "Paris."),
    ("Add 17 and 25.", "17 + 25 = 42, so the answer is 42."),
    ("Why is the sky blue?", "Air scatters short waves of light more than long ones, and blue is short."),
    ("Name three colours.", "Red, green and blue; mixed as light they give white. Other triples would do as well."),
)
"""Prompt and response of the examples where no data are given: of different lengths, in any tokenizer."""


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
    lora_rank: int = 8
    """Rank of the adapters whose gradients and scores are computed; both factors are drawn at random."""
    seed: int = 0
    """Seed of the adapters."""
    out: str | None = None
    """Run directory: results.json and results.md. None: the table is only printed."""
    reading: Annotated[DataOptions, arg(name="")] = DataOptions()

    def __post_init__(self):
        unknown = [dtype for dtype in self.dtypes if dtype not in get_args(Dtype)]
        if unknown or not self.dtypes:
            raise ConfigError(
                f"--dtypes: found {', '.join(unknown) or 'none'}; expected some of {', '.join(get_args(Dtype))}"
            )
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
        ``differences``, from the reference by quantity, relative to its largest value; ``spearman`` of the scores by
        kernel. Against the reference, float32 at the highest precision with every example alone.
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
    model = load_model(config.model_options("float32"), seed=config.seed)
    data, loaded = examples(config, model)
    run = None
    if config.out is not None:
        inputs = inputs_of(model, config.model_options("float32"), data=loaded)
        run = RunDir.create(config.out, "doctor", config, inputs=inputs)
    reference, rows = measure(model, data, config, "highest", "alone"), []
    asked = [(dtype, *setting) for dtype in dict.fromkeys(config.dtypes) for setting in settings()]
    for dtype, precision, layout in tqdm(asked, desc="doctor", disable=not progress, unit="setting"):
        if dtype != model.spec.dtype:
            model = load_model(config.model_options(dtype), seed=config.seed)
        found = measure(model, data, config, precision, layout)
        rows.append({"dtype": dtype, "precision": precision, "layout": layout} | compared(found, reference, dtype))
    device = f"{jax.devices()[0].device_kind} ({jax.default_backend()})"
    result = Diagnosis(device, rows, [remedy(row, rows) for row in rows if not row["agrees"]])
    if run is not None:
        run.write_json("results.json", dataclasses.asdict(result) | {"bars": BARS, "examples": len(data)})
        run.write_text("results.md", to_markdown(table(result)))
    failed = [row for row in rows if asked_in_full(row) and not row["agrees"]]
    if failed:
        raise UserError(
            f"{config.model}: float32 results on {device} differ from float32 at the highest precision, one example "
            f"at a time, by more than {BARS['float32']:g} of the largest value: {', '.join(map(title, failed))}; "
            f"expected agreement. {' '.join(result.remedies)}\n\n{to_markdown(table(result))}"
        )
    return result


def settings() -> Iterator[tuple[str, str]]:
    """(precision, layout) of every row of a dtype: all layouts as commands run them, one batch at other precisions."""
    for precision in PRECISIONS.get(jax.default_backend(), ("default", "highest")):
        yield from ((precision, layout) for layout in (LAYOUTS if precision == "default" else ("batched",)))


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
    return TokenisedDataset.from_sequences(sequences, [len(prompt) for prompt in prompts]), None


def batches_of(data: TokenisedDataset, layout: str, limit: int) -> list[Batch]:
    """The examples in the ``layout``, one of LAYOUTS, none longer than ``limit`` tokens."""
    rows = np.arange(len(data))
    if layout in ("batched", "reordered"):
        return [data.collate(rows if layout == "batched" else rows[::-1])]
    wide = min(2 * int(data.lengths.max()), limit)
    return [data.collate([row], length=wide if layout == "padded" else int(data.lengths[row])) for row in rows]


def drawn_adapters(model: LanguageModel, seed: int) -> Params:
    """LoRA factors of a model that was trained a little: B is drawn too, since at B = 0 the gradient of A is 0."""
    drawn = lambda path, leaf: (0.01 * numpy_rng(seed, "doctor", path).standard_normal(leaf.shape)).astype(leaf.dtype)
    leaves = paths(model.lora).items()
    return unflatten({path: drawn(path, leaf) if path.endswith("lora_b") else leaf for path, leaf in leaves})


def measure(
    model: LanguageModel, data: TokenisedDataset, config: DoctorConfig, precision: str, layout: str
) -> dict[str, np.ndarray]:
    """Every one of QUANTITIES by name, float64 on the host.

    ``logits`` [n, V]: where the last token of the response is predicted. ``KERNEL gradient`` [P]: the examples' mean
    gradient. ``KERNEL scores`` [n]: the inner product of each example's gradient with it.
    """
    batches, params = batches_of(data, layout, longest(model, config.reading)), drawn_adapters(model, config.seed)
    last, rows = model.output("apply", "last"), len(data)
    functions = KernelFunctions(model.hidden_fn, model.head_fn({}), model.nll_fn)
    try:
        with jax.default_matmul_precision(precision):
            logits = ((real_rows(batch), _values(last, params, batch)) for batch in batches)
            found = {"logits": collect_rows(logits, rows=rows, what="logits")}
            for name in KERNELS:
                kernel = build(name, functions, params, seed=config.seed)
                mean = mean_direction(kernel, params, batches)
                leaves = [np.ravel(np.asarray(leaf)) for leaf in jax.tree.leaves(mean.outputs)]
                found[f"{name} gradient"] = np.concatenate(leaves)
                found[f"{name} scores"] = scores_along(kernel, params, [mean], batches, rows=rows)[:, 0]
    except NonFiniteError as error:
        raise UserError(f"{config.model}, {model.spec.dtype}, {precision}, {layout}: {error}") from error
    return {name: np.asarray(values, np.float64) for name, values in found.items()}


@jax.jit
def _values(fn: Any, params: Params, batch: Batch) -> Array:
    return fn(params, batch)


def compared(found: dict[str, np.ndarray], reference: dict[str, np.ndarray], dtype: str) -> dict[str, Any]:
    """The numbers of a row: max |x - reference| / max |reference| by quantity, Spearman of the scores by kernel."""
    differences = {
        name: float(np.max(np.abs(found[name] - reference[name])) / max(float(np.max(np.abs(reference[name]))), 1e-300))
        for name in QUANTITIES
    }
    ranks = {name: spearman(found[f"{name} scores"], reference[f"{name} scores"]) for name in KERNELS}
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
    """The line for a row that does not agree: which, and the setting that mends it, by what the other rows show."""
    if row["dtype"] != "float32":
        return f"{title(row)}: use --dtype float32."
    full = [r for r in rows if r["dtype"] == "float32" and r["precision"] == "highest"]
    if row["precision"] != "highest" and all(r["agrees"] for r in full):
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
        | {"Spearman": f"{min(row['spearman'].values()):.4f}"}
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
            f"{result.device}. Digits that agree with float32 at the highest precision, one example at a time: "
            "-log10(max difference / largest value).",
            *result.remedies,
            f"{agree} of {len(result.rows)} rows agree within their bars; float32 is as asked for.",
        ]
    )


COMMAND = Command(DoctorConfig, doctor, describe)
