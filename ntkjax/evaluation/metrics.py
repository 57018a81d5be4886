"""The table of metrics: what is measured of each example, and all that tables, reports and plots need to know of it.

A metric is one entry of `METRICS`. Where a value is printed, compared or drawn, its unit, decimals and direction are
read from the entry; no other module asks for a metric by its name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ntkjax.errors import UserError
from ntkjax.evaluation.outcomes import Outcome


@dataclasses.dataclass(frozen=True)
class Metric:
    """One number per example, whose mean over examples is reported.

    Attributes:
      name: its key in results.json.
      label: what it is, without the unit, as axes and columns show it.
      of: the value of one example: a field of `Outcome`, or a function of an outcome (true and false count as 1 and 0);
        None where the example has none, which leaves the example out of the mean.
      unit: of a value, e.g. "nats per token"; "" where there is none. Shares are shown in percent.
      share: values lie in [0, 1] and are shown times 100.
      higher_is_better: direction of improvement: which mean is printed in bold, which baseline counts as the strongest.
      headline: whether it may stand first in tables and plots; the first of the table that all methods have does.
      chance: whether always giving the commonest answer is the value of guessing that it is drawn against.
      column: heading of its column where it is not the label; without the unit.
      measure: row in the table of `evaluate` where it is not label and unit.
    """

    name: str
    label: str
    of: str | Callable[[Outcome], float | None]
    unit: str = ""
    share: bool = False
    higher_is_better: bool = True
    headline: bool = True
    chance: bool = False
    column: str = ""
    measure: str = ""

    @property
    def key(self) -> str:
        """The name under which comparisons of two runs list it: the field of the outcomes, or its own name."""
        return self.of if isinstance(self.of, str) else self.name

    @property
    def scale(self) -> int:
        """What values are multiplied with where they are printed: 100 for shares, else 1."""
        return 100 if self.share else 1

    @property
    def digits(self) -> int:
        """Decimals of intervals and differences."""
        return 1 if self.share else 4

    @property
    def axis_label(self) -> str:
        """Label and unit: ``response NLL (nats per token)``."""
        return self._with(self.label, self.unit)

    @property
    def column_label(self) -> str:
        """The heading of its column, with its unit in short: ``response NLL (nats/token)``."""
        return self._with(self.column or self.label, self._short_unit)

    @property
    def measure_label(self) -> str:
        """Its row in the table of `evaluate`."""
        return self.measure or (f"{self.label}, {self.unit}" if self.unit else self.label)

    @property
    def difference_unit(self) -> str:
        """The unit of a difference of two means, in short: ``points`` of percent for shares."""
        return "points" if self.share else self._short_unit or "1"

    @property
    def difference_label(self) -> str:
        """What a difference of two means is of, with its unit: ``accuracy (points)``."""
        return f"{self.column or self.label} ({self.difference_unit})"

    @property
    def _short_unit(self) -> str:
        return self.unit.replace(" per ", "/")

    def _with(self, text: str, unit: str) -> str:
        unit = "%" if self.share else unit
        return f"{text} ({unit})" if unit else text

    def value(self, outcome: Outcome | Mapping[str, Any]) -> float | None:
        """The value of one example, None where it has none.

        Raises:
          UserError: a value that is not finite.
        """
        if callable(self.of):
            found = self.of(outcome if isinstance(outcome, Outcome) else Outcome(**outcome))
        else:
            found = outcome.get(self.of) if isinstance(outcome, Mapping) else getattr(outcome, self.of)
        if found is not None and not math.isfinite(found):
            name = outcome["id"] if isinstance(outcome, Mapping) else outcome.id
            raise UserError(
                f"example {name!r}: {self.label} is {found}, not finite; expected a number, or None where there is "
                "none; correct the metric, or evaluate again"
            )
        return None if found is None else float(found)

    def better(self, value: float) -> float:
        """``value``, or its negative where lower is better: the larger the better."""
        return value if self.higher_is_better else -value

    def text(self, value: float) -> str:
        """A value as it is printed, shares in percent, without the unit."""
        return f"{self.scale * value:.{self.digits}f}"


_ENTRIES = (
    Metric(
        "accuracy", "accuracy", "correct_raw", share=True, chance=True, measure="accuracy, raw likelihood"
    ),  # of choices, by summed log-likelihood
    Metric(
        "accuracy_norm", "accuracy, by likelihood per token", "correct_norm", share=True, headline=False,
        chance=True, column="accuracy norm", measure="accuracy, norm likelihood",
    ),
    Metric(
        "accuracy_generated", "accuracy, generated", "correct_generated", share=True, chance=True,
        column="accuracy generated", measure="accuracy, generated answers",
    ),
    Metric("nll", "response NLL", "nll", unit="nats per token", higher_is_better=False),
)  # fmt: skip

METRICS: dict[str, Metric] = {metric.name: metric for metric in _ENTRIES}
"""Name in results.json -> metric, in the order in which they may stand first."""


def headline(has: Callable[[str], bool]) -> Metric | None:
    """The metric that stands first: the first of `METRICS` that may and for whose name ``has`` is true."""
    return next((metric for metric in METRICS.values() if metric.headline and has(metric.name)), None)


def values(outcomes: Sequence[Outcome], metric: Metric) -> np.ndarray | None:
    """The metric of every example that has it, float64 [n]; None where no example has."""
    found = [value for value in map(metric.value, outcomes) if value is not None]
    return np.asarray(found, np.float64) if found else None


def means(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """The mean of every metric that the outcomes have."""
    found = {name: values(outcomes, metric) for name, metric in METRICS.items()}
    return {name: float(table.mean()) for name, table in found.items() if table is not None}


def right_or_wrong(table: np.ndarray) -> bool:
    """Whether all values are 0 or 1, so that McNemar's test and Wilson's interval apply."""
    return bool(np.all(np.isin(table, (0.0, 1.0))))
