"""Making a failing program short: delta debugging over faults, actors, steps, regions and devices; then what is left of each.

Every candidate is a run of its own with one outcome, so the search needs no repeats. It fails "in the same way" when the same checker
complains; what it complains of may differ in its details. Zeller and Hildebrandt, Simplifying and Isolating Failure-Inducing Input, 2002.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import msgspec

from .crew import Violation
from .machines import devices_of, without_device
from .program import Program, Step
from .trial import Verdict, run_program
from .words import ON_EVERY_REGION

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
        found = run(program).violations
        self._checkers = {one.checker for one in found[:1]}
        if found:
            self.best = _noted(program, found[0])

    @property
    def fails(self) -> bool:
        """Whether the program fails at all."""
        return bool(self._checkers)

    def shrink(self) -> Program:
        """The shortest that was found; as it was, if it does not fail. Interrupted, it leaves the shortest so far in `best`."""
        if self.fails:
            before = None
            while before != self.best and self.runs < self._runs_max:
                before = self.best
                for field in ("harms", "faults", "planned", "hits"):
                    self._reduce(field)
                self._leave_out(lambda program: range(program.actors), without_actor)
                self._reduce("steps")
                self._leave_out(lambda program: range(len(program.regions)), without_region)
                self._leave_out(lambda program: range(len(devices_of(program.machine))), without_device_number)
                self._simplify()
        return self.best

    def _still(self, candidate: Program) -> bool:
        """Whether `candidate` fails in the same way; then it is the best from now on."""
        if self.runs >= self._runs_max:
            return False
        self.runs += 1
        found = self._run(candidate).violations
        if found and found[0].checker in self._checkers:
            self.best = _noted(candidate, found[0])
            self._on_run(self.runs, self.best)
            return True
        return False

    def _with(self, **changes: Any) -> bool:
        return self._still(msgspec.structs.replace(self.best, **changes))

    def _reduce(self, field: str) -> None:
        """ddmin over the elements of a tuple."""
        items: Sequence[Any] = getattr(self.best, field)
        if not items or self._still(without(self.best, field, 0, len(items))):
            return
        parts = 2
        while len(items) > 1 and self.runs < self._runs_max:
            size = -(-len(items) // parts)
            for start in range(0, len(items), size):
                end = min(len(items), start + size)
                if end - start < len(items) and self._still(without(self.best, field, start, end)):
                    parts = max(parts - 1, 2)
                    break
            else:
                if size == 1:
                    return
                parts = min(parts * 2, len(items))
            items = getattr(self.best, field)

    def _leave_out(self, numbers: Callable[[Program], range], leave_out: Callable[[Program, int], Program]) -> None:
        """One after the other, from the last on, of what there must be one of at least."""
        for number in reversed(numbers(self.best)):
            if len(numbers(self.best)) > 1:
                self._still(leave_out(self.best, number))

    def _simplify(self) -> None:
        """No limit of memory, no victims, all faults from the beginning, and accesses of one word (or page)."""
        if self.best.limit_pages:
            self._with(limit_pages=0)
        if self.best.victims:
            self._with(victims=0)
        for number, planned in enumerate(self.best.planned):
            if planned.at:
                self._with(planned=_put(self.best.planned, number, msgspec.structs.replace(planned, at=0)))
        for number, step in enumerate(self.best.steps):
            if step.count > 1:
                self._with(steps=_put(self.best.steps, number, msgspec.structs.replace(step, count=1)))


def _noted(program: Program, violation: Violation) -> Program:
    return msgspec.structs.replace(program, note=f"{violation.checker}: {violation.what}")


def without(program: Program, field: str, start: int, end: int) -> Program:
    """`program` without elements [start, end) of a field; without steps, what waits for operations that have ended waits for fewer."""
    items: Sequence[Any] = getattr(program, field)
    less = msgspec.structs.replace(program, **{field: (*items[:start], *items[end:])})
    if field != "steps":
        return less
    earlier = {
        name: tuple(msgspec.structs.replace(one, at=_earlier(one, start, end)) for one in getattr(program, name))
        for name in ("planned", "harms")
    }
    return msgspec.structs.replace(less, **earlier)


def _earlier(one: Any, start: int, end: int) -> int:
    """When it is due without steps [start, end). Harms that wait for messages wait for as many."""
    at = int(one.at)
    return at if getattr(one, "kind", "") == "message" else at - max(0, min(end, at) - start)


def without_actor(program: Program, actor: int) -> Program:
    """`program` without an actor and its steps; those behind it move up."""
    left = tuple(msgspec.structs.replace(step, actor=step.actor - (step.actor > actor)) for step in program.steps if step.actor != actor)
    return msgspec.structs.replace(program, actors=program.actors - 1, steps=left)


def without_region(program: Program, region: int) -> Program:
    """`program` without a region and the steps that mean it; all others mean the same as before."""
    regions = (*program.regions[:region], *program.regions[region + 1 :])
    return msgspec.structs.replace(program, regions=regions, steps=tuple(_on_others(program, region)))


def _on_others(program: Program, region: int) -> Iterator[Step]:
    for step in program.steps:
        first, beside = (1, 2) if step.kind in ON_EVERY_REGION else (0, 0)  # the lanes come first there, and the counters last
        number = step.region % (len(program.regions) + beside)
        if number != region + first:
            yield msgspec.structs.replace(step, region=number - (number > region + first))


def without_device_number(program: Program, number: int) -> Program:
    """`program` without a device and the steps that mean it; all others mean the same as before."""
    names = devices_of(program.machine)

    def moved(items: Sequence[Any]) -> tuple[Any, ...]:
        numbered = ((item, item.device % len(names)) for item in items)
        return tuple(msgspec.structs.replace(item, device=at - (at > number)) for item, at in numbered if at != number)

    machine = without_device(program.machine, names[number])
    return msgspec.structs.replace(program, machine=machine, steps=moved(program.steps), harms=moved(program.harms))


def _put(items: tuple[T, ...], at: int, item: T) -> tuple[T, ...]:
    return (*items[:at], item, *items[at + 1 :])
