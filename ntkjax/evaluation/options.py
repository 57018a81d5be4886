"""What an evaluation measures: the options of every command that evaluates, and those that only Python has."""

from __future__ import annotations

import dataclasses
from typing import Literal

from ntkjax.data.prompts import LossTurns
from ntkjax.errors import ConfigError

DEFAULT_TEMPLATE = "So the answer is {}."
"""The response whose likelihood decides between choices, where nothing else is said."""


@dataclasses.dataclass(frozen=True)
class EvaluationOptions:
    """What is measured on the test examples."""

    answer_template: str = DEFAULT_TEMPLATE
    """The response whose likelihood decides between choices; {} is the choice."""
    generation: bool = False
    """Also generate answers greedily and read "So the answer is X" from them."""
    max_new_tokens: int = 128
    """Longest generated answer."""
    shots: int = 0
    """Solved examples in front of every question, drawn once from the file of --shots-from with a fixed seed."""
    shots_from: str | None = None
    """File that the shots are drawn from; examples whose question is asked in the test data are not drawn."""

    def __post_init__(self) -> None:
        """Raise ConfigError for shots without a file, a file without shots, or a negative number."""
        if self.shots < 0:
            raise ConfigError(f"--shots is {self.shots}; expected 0 or more; leave it out for none")
        if self.shots and self.shots_from is None:
            raise ConfigError(
                f"--shots is {self.shots}, without a file; expected --shots-from; give it a file of examples"
            )
        if self.shots_from is not None and not self.shots:
            raise ConfigError(f"--shots-from is {self.shots_from}, and --shots is 0; expected at least 1; give --shots")


@dataclasses.dataclass(frozen=True)
class Batching:
    """How examples are put into batches. The length decides what is cut; the rest changes results by rounding alone.

    Attributes:
      max_length: longest sequence, tokens; prompts are cut from the left to fit and the cuts counted.
      token_budget: tokens in a batch, padding included.
      packing: several examples a row, in likelihood and choices.
    """

    max_length: int
    token_budget: int
    packing: bool = False


@dataclasses.dataclass(frozen=True)
class TaskOptions:
    """Tasks of lm-evaluation-harness (the extra lm-eval) that are run on the model."""

    tasks: tuple[str, ...] = ()
    """Names that lm-eval knows, such as arc_easy, or YAML files of tasks; with commas or blanks between them."""
    task_shots: int | None = None
    """Few-shot examples of every task. None: what the task says."""
    task_limit: int | None = None
    """Samples of every task, from its first. None: all."""
    task_chat_template: bool = False
    """Put the tasks' prompts under the model's chat template, the shots as turns."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a number below its least."""
        for name, least in (("task_shots", 0), ("task_limit", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} is {value}; expected {least} or more; leave it out for all")

    @property
    def names(self) -> tuple[str, ...]:
        """Each task once, in the order given."""
        return tuple(dict.fromkeys(name.strip() for text in self.tasks for name in text.split(",") if name.strip()))


@dataclasses.dataclass(frozen=True)
class EvaluationSettings(EvaluationOptions):
    """The options of the commands, and what the commands decide themselves."""

    answer_pattern: str | None = None
    """Regular expression for reading generated answers; None derives it from the template."""
    choices: bool | None = None
    """Accuracy over choices. None: of the examples that have choices and an answer, which may be none; True: an error
    if there are none."""
    likelihood: bool = True
    """NLL of the records' own responses."""
    loss_turns: LossTurns = "all"
    """Which assistant turns of a conversation the NLL is taken over, see `ntkjax.data.tokenise`."""
    on_bad_record: Literal["raise", "skip"] = "raise"
    """What is done with a bad record in the file of the shots."""
