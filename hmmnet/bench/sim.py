"""How fast the simulated world is: operations of a campaign with all checkers on, and one seed of it.

The reference is a plain Python loop on the same core, measured in turn with it: computers differ, and this says what ours costs on any.
"""

from __future__ import annotations

import time
from statistics import median

from hmmnet.campaign.campaign import rarely_collected
from hmmnet.campaign.draw import OPERATIONS, draw
from hmmnet.campaign.trial import run_program

from .measurement import Goal, Measurement, measured, median_ratio

SEEDS = 40
"""Programs of the standard campaign: some seconds."""
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


def measure(seeds: int = SEEDS) -> list[Measurement]:
    """``sim.operations_per_s`` and ``sim.seed_ms``; the reference is rounds of the loop for each second, and milliseconds of the loop."""
    ours, loops, operations = [], [], 0
    run_program(draw(0, "none"))
    with rarely_collected():  # as a campaign's seeds are run
        for seed in range(seeds):
            loops.append(reference_loop())
            program = draw(seed)
            began_s = time.perf_counter()
            operations += run_program(program).outcome.operations
            ours.append(time.perf_counter() - began_s)
    loop_s, ratio = median(loops), median_ratio(ours, loops)
    return [
        measured(
            "sim.operations_per_s",
            operations / sum(ours),
            "1/s",
            OPERATIONS_GOAL,
            LOOPS / loop_s,
            operations / sum(ours) / (LOOPS / loop_s),
        ),
        measured("sim.seed_ms", median(ours) * 1e3 * 200 / OPERATIONS, "ms", SEED_GOAL, loop_s * 1e3, ratio),
    ]


BENCHMARKS = {"sim.operations_per_s": measure, "sim.seed_ms": measure}
"""Which function measures what."""
