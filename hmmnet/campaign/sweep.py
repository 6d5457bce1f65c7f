"""The systematic sweep: one fault at a time, at every protocol point and every message in turn, until nothing is left.

As the kernel's fail-nth: with *n* = 1, 2, 3 ... the *n*-th time that a point is reached (or the *n*-th message) is the one that is hit,
and the sweep of that pair ends when a whole run goes by without a hit. No chance is left: what the scenario can reach is hit.

After each hit everything is healed, and everything that a campaign demands must hold. How a run ended:

- ``same``: every operation ended well;
- ``refused``: some operation ended with an error that says why, nothing is lost;
- ``lost``: pages whose only copy died with a device were lost, and said so;
- ``wrong``: a violation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from hmmnet.faults import Controls, MessageFault, Plan, Way
from hmmnet.faults.points import POINTS, Point
from hmmnet.sim import Trace

from .program import Harm, Hit, Program
from .trial import run_program

OUTCOMES = ("same", "refused", "lost", "wrong")
NTH_MAX = 500
"""Hits of one pair in one scenario: more would be a point inside a loop over pages."""
MESSAGES = {"control": ("loss", "delay", "duplicate", "reorder"), "bulk": ("loss", "delay", "duplicate", "reorder", "corrupt")}
DEATH = "death"
SECONDS = {"delay": 0.005, "pause": 0.2}
BROKEN_BY_FAILURE = frozenset({"session.bye"})
"""Points behind the end of every run: what is hit there has nothing to come back to."""


@dataclass(frozen=True)
class Pair:
    """A place and a fault. `kind` is ``point`` or ``message``."""

    kind: str
    place: str
    fault: str

    def program(self, base: Program, nth: int) -> Program:
        """`base` with the fault at the `nth` time."""
        if self.kind == "point":
            return msgspec.structs.replace(base, hits=(Hit(self.place, self.fault, nth=nth, seconds=SECONDS.get(self.fault, 0.0)),))
        if self.fault == DEATH:
            return msgspec.structs.replace(base, harms=(Harm(nth, "message", int(self.place[-1]), 0.001),))
        device, channel = self.place.split()
        latency_s = 0.01 if self.fault in {"delay", "reorder"} else 0.0
        fault = MessageFault(self.fault, Way(device, channel="bulk" if channel == "bulk" else "control"), Controls(nth=nth), latency_s)
        return msgspec.structs.replace(base, faults=(Plan([fault]).as_toml(),))


@dataclass
class Cell:
    """What came of one pair over all scenarios."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    """Violations, each with how to repeat it."""

    @property
    def hits(self) -> int:
        """How often it was hit."""
        return sum(self.outcomes.values())


@dataclass(frozen=True)
class Hits:
    """One run: whether its fault happened, and how it ended."""

    hit: bool
    outcome: str
    wrong: str = ""


def applies(point: Point, action: str) -> bool:
    """Whether that can be done there. Where a point concerns no device, one of them crashes or hangs at that moment (see `Hit`)."""
    return action != "call" and point.name not in BROKEN_BY_FAILURE


def pairs() -> list[Pair]:
    """Every pair that there can be."""
    found = [Pair("point", point.name, action) for point in POINTS.values() for action in point.actions if applies(point, action)]
    for device in ("dev0", "dev1"):
        found += [Pair("message", f"{device} {channel}", fault) for channel, faults in MESSAGES.items() for fault in faults]
        found.append(Pair("message", device, DEATH))
    return found


def try_pair(pair: Pair, base: Program, nth: int) -> Hits:
    """Run the scenario with that fault at that time."""
    program = pair.program(base, nth)
    verdict = run_program(program, trace=Trace() if pair.fault == DEATH else None)
    outcome = verdict.outcome
    hit = bool(outcome.faults) if pair.kind == "point" or pair.fault != DEATH else outcome.faults["message"] > 0
    if pair.kind == "point":
        hit = outcome.faults[f"{pair.fault} at {pair.place}"] > 0
    if verdict.violations:
        return Hits(hit, "wrong", f"{verdict.violations[0].checker}: {verdict.violations[0].what}")
    return Hits(hit, "lost" if outcome.lost else "refused" if outcome.refused else "same")


def sweep(
    scenarios: list[Program],
    *,
    chosen: list[Pair] | None = None,
    nth_max: int = NTH_MAX,
    first_only: bool = False,
    on_run: Callable[[Pair, Program, int, Hits], None] = lambda *_: None,
) -> dict[Pair, Cell]:
    """Every pair (or the `chosen`), in every scenario, at every time up to `nth_max`.

    `first_only`: once a scenario has hit a pair, the others are not tried.
    """
    table = {pair: Cell() for pair in (pairs() if chosen is None else chosen)}
    for pair, cell in table.items():
        for base in scenarios:
            for nth, found in _until_missed(pair, base, nth_max):
                on_run(pair, base, nth, found)
                cell.outcomes[found.outcome] += 1
                if found.outcome == "wrong":
                    cell.wrong.append(f"{base.mix} nth={nth}: {found.wrong}")
            if first_only and cell.hits:
                break
    return table


def _until_missed(pair: Pair, base: Program, nth_max: int) -> Iterator[tuple[int, Hits]]:
    for nth in range(1, nth_max + 1):
        found = try_pair(pair, base, nth)
        if found.hit:
            yield nth, found
        elif found.outcome == "wrong":
            yield nth, found
            return
        else:
            return


def as_json(table: dict[Pair, Cell]) -> dict[str, Any]:
    """Plain data: coverage, and a list of cells."""
    hit = sum(cell.hits > 0 for cell in table.values())
    return {
        "pairs": len(table),
        "hit": hit,
        "coverage": round(hit / max(1, len(table)), 4),
        "runs": sum(cell.hits for cell in table.values()),
        "cells": [
            {"kind": pair.kind, "place": pair.place, "fault": pair.fault, "outcomes": dict(cell.outcomes), "wrong": cell.wrong}
            for pair, cell in table.items()
        ],
    }


def as_markdown(table: dict[Pair, Cell]) -> str:
    """The coverage table: places x faults x outcomes."""
    faults = list(dict.fromkeys(pair.fault for pair in table))
    places = list(dict.fromkeys(pair.place for pair in table))
    cells = {(pair.place, pair.fault): cell for pair, cell in table.items()}
    lines = [f"| place | {' | '.join(faults)} |", f"| --- |{' --- |' * len(faults)}"]
    for place in places:
        shown = [_shown(cells.get((place, fault))) for fault in faults]
        lines.append(f"| `{place}` | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def _shown(cell: Cell | None) -> str:
    """``12 same, 3 refused``; a dash where the fault does not apply."""
    if cell is None:
        return "-"
    return ", ".join(f"{cell.outcomes[name]} {name}" for name in OUTCOMES if cell.outcomes[name]) or "not hit"
