"""What an evaluation measures: the options of every command that evaluates, and those that only Python has."""

from __future__ import annotations

import dataclasses

from ntkjax.data.prompts import LossTurns
from ntkjax.evaluation.choices import DEFAULT_TEMPLATE


@dataclasses.dataclass(frozen=True)
class EvaluationOptions:
    """What is measured on the test examples."""

    answer_template: str = DEFAULT_TEMPLATE
    """The response whose likelihood decides between choices; {} is the choice."""
    generation: bool = False
    """Also generate answers greedily and read "So the answer is X" from them."""
    max_new_tokens: int = 128
    """Longest generated answer."""


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
