"""Making a failing program short: delta debugging over its harms, faults, hits and steps, then no limit and accesses of one word.

Every candidate is a run of its own with one outcome, so the search needs no repeats. It fails "in the same way" when the same checker
complains; what it complains of may differ in its details. Zeller and Hildebrandt, Simplifying and Isolating Failure-Inducing Input, 2002.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec

from .program import Program
from .trial import Verdict, run_program

T = TypeVar("T")
RUNS_MAX = 2_000
"""Candidates that are tried: some minutes."""


class Shrinker:
    """Makes `program`, which fails, short. `on_run` is told of each candidate: how many were run, how long the shortest is now."""

    def __init__(
        self,
        program: Program,
        *,
        runs_max: int = RUNS_MAX,
        run: Callable[[Program], Verdict] = run_program,
        on_run: Callable[[int, Program], None] = lambda _, __: None,
    ) -> None:
        self.best = program
        self.runs = 0
        self._run = run
        self._on_run = on_run
        self._runs_max = runs_max
        self._checkers = {one.checker for one in run(program).violations[:1]}

    @property
    def fails(self) -> bool:
        """Whether the program fails at all."""
        return bool(self._checkers)

    def shrink(self) -> Program:
        """The shortest that was found; as it was, if it does not fail."""
        if self.fails:
            before = None
            while before != self.best and self.runs < self._runs_max:
                before = self.best
                for field in ("harms", "faults", "hits", "steps"):
                    self._reduce(field)
                self._simplify()
        return self.best

    def _still(self, **changes: Any) -> bool:
        """Whether the best with `changes` fails in the same way; then it is the best from now on."""
        if self.runs >= self._runs_max:
            return False
        candidate = msgspec.structs.replace(self.best, **changes)
        self.runs += 1
        found = self._run(candidate).violations
        if found and found[0].checker in self._checkers:
            self.best = msgspec.structs.replace(candidate, note=f"{found[0].checker}: {found[0].what}")
            self._on_run(self.runs, self.best)
            return True
        return False

    def _reduce(self, field: str) -> None:
        """ddmin over the elements of a tuple."""
        items: Sequence[Any] = getattr(self.best, field)
        if not items or self._still(**{field: ()}):
            return
        parts = 2
        while len(items) > 1 and self.runs < self._runs_max:
            size = -(-len(items) // parts)
            for start in range(0, len(items), size):
                rest = (*items[:start], *items[start + size :])
                if len(rest) < len(items) and self._still(**{field: rest}):
                    parts = max(parts - 1, 2)
                    break
            else:
                if size == 1:
                    return
                parts = min(parts * 2, len(items))
            items = getattr(self.best, field)

    def _simplify(self) -> None:
        """No limit of memory, and accesses of one word (or page)."""
        if self.best.limit_pages:
            self._still(limit_pages=0)
        for number, step in enumerate(self.best.steps):
            if step.count > 1:
                self._still(steps=_with(self.best.steps, number, msgspec.structs.replace(step, count=1)))


def _with(items: tuple[T, ...], at: int, item: T) -> tuple[T, ...]:
    return (*items[:at], item, *items[at + 1 :])
