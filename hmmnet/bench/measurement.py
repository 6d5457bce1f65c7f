"""One measured figure beside its reference.

Machines differ and are noisy, so a figure alone says little: each comes with a *reference* measured in the same run, interleaved with
ours, and the ratio of the medians. The ratio is what goals are set for.

Two directions, told by the goal's sign in text: "at least" (reference time over ours, or our rate over the reference's; 1 means as
fast as the reference) and "at most" (our time over the reference's, or a plain quantity such as megabytes).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Goal:
    """What a figure is to reach. `of` is ``ratio`` or ``value``: which of the two the limit is for."""

    limit: float
    at_least: bool
    of: str = "ratio"

    def met_by(self, value: float, ratio: float | None) -> bool:
        """Whether a measurement reaches this goal; a goal for a ratio is missed when there is no ratio."""
        figure = ratio if self.of == "ratio" else value
        if figure is None:
            return False
        return figure >= self.limit if self.at_least else figure <= self.limit

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:g}" + ("x" if self.of == "ratio" else "")


@dataclass(frozen=True)
class Measurement:
    """A figure of `hmmnet bench`: `value` in `unit`, the `reference` in the same unit (None: there is none), their `ratio`, the goal as
    text.
    """

    name: str
    value: float
    unit: str
    reference: float | None
    ratio: float | None
    goal: str
    met: bool

    def as_dict(self) -> dict[str, Any]:
        """As ``--json`` prints it."""
        return asdict(self)


def measured(
    name: str, value: float, unit: str, goal: Goal | None, reference: float | None = None, ratio: float | None = None
) -> Measurement:
    """Judge a figure against its goal; one without a goal is there for comparison and cannot miss it."""
    met = goal is None or goal.met_by(value, ratio)
    return Measurement(name, value, unit, reference, ratio, "" if goal is None else str(goal), met)


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """Ratio of two figures from interleaved rounds: the median of the rounds' ratios, so that drift of the machine cancels."""
    return median(a / b for a, b in zip(numerators, denominators, strict=True))
