"""The benchmarks by name, and who measures each.

Every file beside this one that measures has a table `BENCHMARKS`: figure -> function. One function may give several figures, in one
interleaved run, because figures that share a reference must be measured with it. Names of figures are the public interface (`hmmnet bench
NAME`, and what is compared over time).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Any, TypeAlias

from hmmnet.errors import WrongUse

from .measurement import Measurement

MODULES = ("wire", "dma", "host", "machine", "sim")
Function: TypeAlias = Callable[[], Sequence[Measurement | dict[str, Any]]]


@dataclass(frozen=True)
class Suite:
    """`function` measures `figures`."""

    function: Function
    figures: tuple[str, ...]

    def measure(self) -> list[Measurement]:
        """Run it."""
        return [found if isinstance(found, Measurement) else Measurement(**found) for found in self.function()]


def suites() -> list[Suite]:
    """All of them, in the order in which they are measured."""
    by_function: dict[Function, list[str]] = {}
    for module in MODULES:
        table: dict[str, Function] = import_module(f"hmmnet.bench.{module}").BENCHMARKS
        for figure, function in table.items():
            by_function.setdefault(function, []).append(figure)
    return [Suite(function, tuple(figures)) for function, figures in by_function.items()]


def _wanted(figure: str, name: str | None) -> bool:
    return name is None or figure == name or figure.startswith(name + ".")


def select(name: str | None) -> list[Suite]:
    """The suites that measure `name`: a figure, or a group such as ``bridge``; all without a name. Raises WrongUse with a guess."""
    found = suites()
    chosen = [suite for suite in found if any(_wanted(figure, name) for figure in suite.figures)]
    if not chosen:
        figures = [figure for suite in found for figure in suite.figures]
        guess = get_close_matches(str(name), [*figures, *sorted({figure.split(".")[0] for figure in figures})], n=1)
        hint = f'; did you mean "{guess[0]}"? There' if guess else "; there"
        raise WrongUse(f'no benchmark is called "{name}"{hint} are {", ".join(figures)}')
    return chosen


def run(name: str | None, announce: Callable[[Suite], None]) -> Iterator[Measurement]:
    """Measure what `select` gives, one suite after another; `announce` is told before each, because each takes seconds."""
    for suite in select(name):
        announce(suite)
        for measurement in suite.measure():
            if _wanted(measurement.name, name):
                yield measurement
