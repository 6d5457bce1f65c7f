"""How fast the simulated world is: operations of a campaign with all checkers on, and one seed of it.

A seed is a machine's whole life: it is built, works, is healed, must converge, and is taken down. With the campaign's 200 operations a
third of that is not work, so there are two figures: ``sim.operations_per_s`` of long lives, which is what work costs once it runs (with
``.200``: of the campaign's own seeds), and ``sim.seed_ms``, one seed of the campaign with all that belongs to it.

The reference is a plain Python loop on the same core, measured in turn with it: computers differ, and this says what ours costs on any.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from statistics import median

from hmmnet.campaign.campaign import rarely_collected
from hmmnet.campaign.draw import OPERATIONS, draw
from hmmnet.campaign.trial import run_program
from hmmnet.errors import HmmnetError

from .measurement import Goal, Measurement, measured, median_ratio

SEEDS = 40
"""Programs of the standard campaign: some seconds."""
LONG_SEEDS = 8
LONG_OPERATIONS = 2000
"""Programs of the same draw that live longer. Faults that come once are as many in each; those with a chance come as often."""
LOOPS = 200_000
"""Rounds of the reference loop: some ten milliseconds."""
OPERATIONS_GOAL = Goal(3000.0, at_least=True, of="value")
SEED_GOAL = Goal(100.0, at_least=False, of="value")


def reference_loop() -> float:
    """Seconds for `LOOPS` rounds of arithmetic, a call and a dictionary in plain Python."""
    began_s = time.perf_counter()
    table: dict[int, int] = {}
    for i in range(LOOPS):
        table[i & 255] = _step(i)
    return time.perf_counter() - began_s


def _step(i: int) -> int:
    return i * 7 + 3


def measure(seeds: int = SEEDS, long_seeds: int = LONG_SEEDS) -> list[Measurement]:
    """``sim.operations_per_s`` and ``sim.seed_ms``; the reference is rounds of the loop for each second, and milliseconds of the loop.

    Raises HmmnetError when a program goes wrong.
    """
    run_program(draw(0, "none"))
    with rarely_collected():  # as a campaign's seeds are run
        long = _run(long_seeds, LONG_OPERATIONS)
        standard = _run(seeds, OPERATIONS)
    return [
        _rate("sim.operations_per_s", long, OPERATIONS_GOAL),
        _rate(f"sim.operations_per_s.{OPERATIONS}", standard, None),
        measured(
            "sim.seed_ms",
            median(standard.ours) * 1e3,
            "ms",
            SEED_GOAL,
            median(standard.loops) * 1e3,
            median_ratio(standard.ours, standard.loops),
        ),
    ]


@dataclass
class _Lives:
    """What programs took: seconds of each, and of the reference before it."""

    ours: list[float] = field(default_factory=list)
    loops: list[float] = field(default_factory=list)
    operations: int = 0


def _run(seeds: int, operations: int) -> _Lives:
    lives = _Lives()
    for seed in range(seeds):
        lives.loops.append(reference_loop())
        program = draw(seed, operations=operations)
        began_s = time.perf_counter()
        verdict = run_program(program)
        lives.ours.append(time.perf_counter() - began_s)
        if verdict.violations:  # what a life cost that ended at once, or went wrong, is no figure
            raise HmmnetError(f"seed {seed} of {operations} operations: {verdict.violations[0].what}")
        lives.operations += verdict.outcome.operations
    return lives


def _rate(name: str, lives: _Lives, goal: Goal | None) -> Measurement:
    rate, reference = lives.operations / sum(lives.ours), LOOPS / median(lives.loops)
    return measured(name, rate, "1/s", goal, reference, rate / reference)


BENCHMARKS = {"sim.operations_per_s": measure, "sim.seed_ms": measure}
"""Which function measures what."""
