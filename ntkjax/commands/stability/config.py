"""The options of ``ntkjax stability``, and the arms it trains."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from tyro.conf import arg

from ntkjax.errors import ConfigError
from ntkjax.evaluation.choices import check_template
from ntkjax.evaluation.options import DEFAULT_TEMPLATE
from ntkjax.models import LanguageModel
from ntkjax.ntk.kernels import describe_kernels, parse
from ntkjax.ntk.regression import FORMULAS
from ntkjax.pipeline.options import DataOptions, ModelOptions
from ntkjax.training import TrainConfig

KernelNames = Annotated[tuple[str, ...], arg(help=f"Kernels to follow; may be empty. {describe_kernels()}.")]
"""Names of `ntkjax.ntk.kernels.KERNELS`, with the table as their help on the command line."""
USUAL_EPOCHS = (1, 2, 4, 8, 12, 16, 20)


NO_EFFECT = ("memory_gib", "keep_checkpoints")
"""Options that change no result: they may differ between a run and its continuation."""


@dataclasses.dataclass(frozen=True)
class StabilityConfig:
    """Fine-tune several ways and follow the tangent kernel and the linearised model along the epochs."""

    model: str
    """Hugging Face directory (config.json and safetensors), hub id, or `real` (`make real-model` fetches it)."""
    data: tuple[str, ...]
    """Training files; every seed draws its examples from them."""
    out: str
    """Run directory; a run that was stopped goes on there."""
    test: tuple[str, ...] = ()
    """Held-out files with choices: accuracy of the fine-tuned and the linearised model and of kernel regression."""
    pool: tuple[str, ...] = ()
    """Files whose examples are scored at every checkpoint. Without them the probe examples score each other."""
    n: int = 64
    """Training examples."""
    probe: int = 32
    """How many of them the kernels are computed on."""
    test_n: int = 200
    """Most test questions, the first ones of the files."""
    pool_n: int = 256
    """Most pool examples, drawn once for all runs."""
    top: int | None = None
    """N of the top-N overlap of scores. None: a quarter of what is scored."""
    ranks: tuple[int, ...] = (4, 16)
    """LoRA ranks; each is run at every one of learning_rates."""
    learning_rates: tuple[float, ...] = (1e-3,)
    """Peak learning rates of LoRA."""
    full_learning_rates: tuple[float, ...] = (1e-4,)
    """Peak learning rates of full fine-tuning; none: not run."""
    lora_scale: float = 2.0
    """alpha / rank, the same for every rank (the paper's alpha 32 at rank 16)."""
    lora_targets: tuple[str, ...] = ("all-linear",)
    kernels: KernelNames = ("sum_logits", "centred_spectral:16")
    """Kernels to follow, names of ntkjax.ntk.kernels.KERNELS; may be empty."""
    at: tuple[int, ...] | None = None
    """Epochs at which to look; 0 and the last are added. None: 1, 2, 4, 8, 12, 16, 20, as far as training goes."""
    formulas: tuple[str, ...] = FORMULAS
    """Kernels of the regression over the choices: sgd, asymmetric_signgd, signgd; none: no regression."""
    outputs: Literal["likelihood", "logits"] = "likelihood"
    """The outputs of a question: log p of each choice's own tokens, or the logit of its first one."""
    answer_template: str = DEFAULT_TEMPLATE
    """The response whose likelihood decides between choices; {} is the choice."""
    seeds: int = 3
    """Runs of every arm, with seeds seed, seed + 1, ...: each draws examples, their order and fresh LoRA factors."""
    seed: int = 0
    memory_gib: float = 1.0
    """Gradients held at a time."""
    keep_checkpoints: bool = False
    """Keep the checkpoint of every epoch after its kernels are computed (parameters and both moments, each)."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Dtype of the frozen weights."""
    remat: bool = False
    """Recompute each layer in the backward pass: less memory, about a third more time."""
    reading: Annotated[DataOptions, arg(name="")] = DataOptions()
    train: TrainConfig = TrainConfig(epochs=20)
    """Its learning_rate, save_every and keep_checkpoints are set for each run."""

    def __post_init__(self):
        for name in self.kernels:
            parse(name)
        check_template(self.answer_template)
        unknown = [name for name in self.formulas if name not in FORMULAS]
        if unknown:
            raise ConfigError(f"formulas: unknown {', '.join(unknown)}; expected some of {', '.join(FORMULAS)}")
        if not arms_of(self):
            raise ConfigError("nothing to run: give ranks and learning_rates, or full_learning_rates")
        if min([*self.learning_rates, *self.full_learning_rates]) <= 0:
            raise ConfigError("learning_rates and full_learning_rates must be above 0")
        for name in ("seeds", "test_n", "pool_n"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 3 <= self.probe <= self.n:
            raise ConfigError(f"probe must be from 3 to n = {self.n} training examples, got {self.probe}")
        if self.memory_gib <= 0 or self.lora_scale <= 0:
            raise ConfigError("memory_gib and lora_scale must be above 0")
        if self.train.steps is not None or self.train.epochs != int(self.train.epochs):
            raise ConfigError("stability counts in whole epochs: leave train.steps out and give a whole train.epochs")
        if any(not 0 <= epoch <= self.epochs for epoch in self.at or ()):
            raise ConfigError(f"at: expected epochs from 0 to train.epochs = {self.epochs}, got {list(self.at or ())}")

    @property
    def epochs(self) -> int:
        """Epochs of fine-tuning."""
        return int(self.train.epochs)

    @property
    def epochs_looked_at(self) -> list[int]:
        """0, those of ``at``, and the last, in order."""
        chosen = [epoch for epoch in USUAL_EPOCHS if epoch < self.epochs] if self.at is None else self.at
        return sorted({0, *chosen, self.epochs})


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way of fine-tuning: LoRA of some rank, or all parameters (rank None), at a learning rate."""

    rank: int | None
    learning_rate: float

    @property
    def parameters(self) -> str:
        """What is trained, for the names of folders."""
        return "all" if self.rank is None else f"lora-r{self.rank}"

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.parameters}-lr{self.learning_rate:g}"

    @property
    def label(self) -> str:
        """Its name in tables."""
        return f"{'full' if self.rank is None else f'LoRA r={self.rank}'}, lr {self.learning_rate:g}"


def arms_of(config: StabilityConfig) -> list[Arm]:
    """Every arm of a config: LoRA by rank and rate, then full fine-tuning."""
    lora = [Arm(rank, rate) for rank in config.ranks for rate in config.learning_rates]
    return lora + [Arm(None, rate) for rate in config.full_learning_rates]


def model_options(config: StabilityConfig, rank: int | None) -> ModelOptions:
    """The model with LoRA of that rank, or without."""
    lora = {} if rank is None else {"lora_rank": rank, "lora_alpha": config.lora_scale * rank}
    return ModelOptions(
        config.model,
        parameters="all" if rank is None else "lora",
        lora_targets=config.lora_targets,
        dtype=config.dtype,
        remat=config.remat,
        **lora,
    )


def _rank(model: LanguageModel) -> int | None:
    return None if model.lora_config is None else model.lora_config.rank


def _first_of_its_kind(config: StabilityConfig, arm: Arm) -> bool:
    """The kernel before training knows no learning rate: one regression for each set of trained parameters."""
    return arm == next(other for other in arms_of(config) if other.rank == arm.rank)
