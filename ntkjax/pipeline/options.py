"""Options that several commands share: a dataclass is a group of command-line flags and a block of config.yaml."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, TypeVar

from ntkjax.data.dedup import DedupSettings
from ntkjax.data.prompts import LossTurns
from ntkjax.data.rows import Packing
from ntkjax.errors import ConfigError
from ntkjax.models.quantised import FORMATS
from ntkjax.parallel import WeightRule, parse_mesh
from ntkjax.selection.diversity import DiversityOptions
from ntkjax.selection.methods import METHODS, all_option_classes

Part = TypeVar("Part")


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The language model and which of its parameters are differentiated and trained."""

    model: str
    """Hugging Face directory (config.json and safetensors), hub id, or `real` (`make real-model` fetches it)."""
    adapter: str | None = None
    """PEFT adapter directory to start from; its rank, alpha and targets replace the lora flags."""
    parameters: Literal["lora", "all"] = "lora"
    """What theta is: fresh LoRA factors, or every weight of the model."""
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_targets: tuple[str, ...] = ("all-linear",)
    """Layers that carry LoRA: all-linear (every one but the head), names such as q_proj, or regular expressions."""
    dtype: Literal["float32", "bfloat16", "float16", "auto", "int8", "nf4"] = "float32"
    """Dtype of the frozen weights. LoRA factors, norms and softmax stay in float32. int8, nf4: the linear layers of the
    blocks in 8 or 4 bits with a scale for every 64 inputs of an output, all else in bfloat16."""
    remat: bool = False
    """Recompute each layer in the backward pass: less memory, about a third more time."""
    mesh: str | None = None
    """Devices, those of all processes of the job: data=4,fsdp=2,model=2 splits the rows of a batch over 8 and the
    weights over 4 (4,2: data=4,model=2); auto: all on data. Default: one device, and in a job of several processes one
    model in each."""
    weights: WeightRule = "tensor"
    """How weights lie on the mesh. tensor: split over fsdp and model; fully-sharded: over data as well. What is split
    over fsdp or data is gathered, a layer when it is needed."""

    def __post_init__(self):
        if self.mesh is not None:
            parse_mesh(self.mesh)  # a mistake is told before anything is read
        if self.parameters == "all" and self.dtype in FORMATS:
            raise ConfigError(
                f"--dtype {self.dtype} holds weights as integers, which --parameters all would train; expected "
                "--parameters lora or a floating-point dtype"
            )
        if self.lora_rank < 1:
            raise ConfigError(f"lora_rank must be at least 1, got {self.lora_rank}")


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """How records are read, tokenised and batched."""

    on_bad_record: Literal["raise", "skip"] = "raise"
    """raise: the first bad record ends the run and is named; skip: bad records are counted and listed."""
    max_length: int = 2048
    """Longest sequence in tokens. Longer conversations lose whole turns from the front, then their prompt tokens on the
    left; every truncation is counted."""
    loss_turns: LossTurns = "all"
    """Which assistant turns of a conversation are trained and scored. all: every one with its end token; last: the last
    turn alone. A message with weight 0 or train false is never trained."""
    token_budget: int = 8192
    """Tokens (rows x length) in a batch of one device, in passes that do not train; where a mean gradient is taken, at
    most 8192 of them."""
    packing: Packing = "auto"
    """on: rows of 2048 tokens hold several whole examples, one compiled program a pass and hardly any padding; off: one
    example a row, padded; auto: on for an accelerator, off for a CPU. Results are the same up to rounding."""

    def __post_init__(self):
        if self.max_length < 2:
            raise ConfigError(f"max_length must be at least 2 tokens, got {self.max_length}")
        if self.token_budget < 1:
            raise ConfigError(f"token_budget must be at least 1 token, got {self.token_budget}")


@dataclasses.dataclass(frozen=True)
class DedupOptions:
    """Duplicates and leakage: pool examples that repeat one another, the domain, or a held-out set."""

    mode: Literal["remove", "report", "off"] = "remove"
    """remove: the pool loses them before anything is scored; report: they are only listed; off: not looked for."""
    threshold: float = 0.8
    """Jaccard similarity of two texts' sets of word shingles from which they are near-duplicates; 1: equal sets."""
    shingle: int = 5
    """Words of a shingle. Fewer find looser resemblance."""

    def __post_init__(self):
        self.settings  # noqa: B018  # checked when made

    @property
    def settings(self) -> DedupSettings:
        """How texts are compared."""
        return DedupSettings(threshold=self.threshold, shingle=self.shingle)


@dataclasses.dataclass(frozen=True)
class MethodOption:
    """Which method selects."""

    method: str = "ntk"
    """Selection method, a name from ntkjax.selection.METHODS; --method NAME --help shows its options alone."""


@dataclasses.dataclass(frozen=True)
class SelectorOptions(DiversityOptions, *reversed(all_option_classes()), MethodOption):  # pyright: ignore
    """NTK-Selector (arXiv 2511.07380) and the choices that it leaves open; other methods take those they have.

    The method, a pass for diversity, and the options of every method by inheritance from their dataclasses
    (`ntkjax.selection.methods`), where each stands once with its default and its help: tyro reads the strings below the
    fields of base classes. A new method's options are here as soon as it is in the table.
    """

    def __post_init__(self) -> None:
        """Check the options of the pass for diversity and of the chosen method; those of other methods are not used.

        Raises:
          ConfigError: see the dataclasses of the options.
        """
        part_of(self, DiversityOptions)
        if self.method in METHODS:
            part_of(self, METHODS[self.method])


COMMON = {field.name for cls in (DiversityOptions, MethodOption) for field in dataclasses.fields(cls)}
"""Options that a selection has whatever its method."""


def part_of(options: Any, cls: type[Part]) -> Part:
    """``cls`` with the values of ``options``, which has all of its fields."""
    return cls(**{field.name: getattr(options, field.name) for field in dataclasses.fields(cls)})  # type: ignore[arg-type]


def has_option(method: str, name: str) -> bool:
    """Whether ``name`` is an option of the method; those of the pass for diversity, and ``method``, are of all."""
    return name in COMMON or any(field.name == name for field in dataclasses.fields(METHODS[method]))


def check_method(name: str) -> str:
    """``name`` if it is a selection method.

    Raises:
      ConfigError: it is not; the message lists those there are.
    """
    if name not in METHODS:
        raise ConfigError(f"unknown selection method {name!r}; expected one of {', '.join(METHODS)}")
    return name


def check_used(options: SelectorOptions) -> None:
    """Raise ConfigError for an unknown method, and where an option that it does not have is not at its default.

    For a single selection. A study's options are for all of its methods, each of which takes those it has.
    """
    check_method(options.method)
    selector = part_of(options, METHODS[options.method])
    idle = {field.name for field in dataclasses.fields(selector)} - selector.used_options()
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value != field.default and field.name in idle and field.name not in COMMON:
            used = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(selector.used_options()))
            raise ConfigError(
                f"--{field.name.replace('_', '-')} is {value!r}, and --method {options.method} makes no use of it with "
                f"the other options as they are; expected some of {used}. Leave it out"
            )
        if value != field.default and not has_option(options.method, field.name):
            having = ", ".join(name for name in METHODS if has_option(name, field.name))
            raise ConfigError(
                f"--{field.name.replace('_', '-')} is {value!r}, and --method {options.method} has no such option; "
                f"expected it with --method {having}. Leave it out, or choose such a method"
            )
