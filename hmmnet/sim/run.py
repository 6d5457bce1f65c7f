"""Trio runs in virtual time from a seed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import trio

from hmmnet.errors import HmmnetError
from hmmnet.faults.forms import Plannable
from hmmnet.topology.model import Personality, Topology

from .clock import JumpClock
from .interrupts import CtrlC
from .livelock import Livelock
from .machine import SimulatedMachine, simulated
from .schedule import seeded
from .trace import Trace
from .waits import waits

LIMIT_S = 3600.0
"""Virtual seconds that a run may take: heartbeats go on for ever, so a program that waits for nothing would, too."""

T = TypeVar("T")


class SimulationStuck(HmmnetError):
    """Virtual time went on and on, or stood still, and the program did not end."""


@dataclass(frozen=True)
class Simulation(Generic[T]):
    """What became of a simulation. `digest` names the run: equal digests, equal runs."""

    value: T
    seed: int
    digest: str
    messages: int
    virtual_s: float
    lines: list[str] = field(default_factory=list)
    """The trace, if it was to be kept."""


def run_virtual(main: Callable[..., Awaitable[T]], *arguments: Any, seed: int = 0, limit_s: float = LIMIT_S) -> T:
    """`trio.run` in virtual time, scheduled from `seed`.

    Raises SimulationStuck after `limit_s` virtual seconds, when things happen without an end while no time passes, and when nothing can
    happen any more (`clock`); it names faults that act, whom they hold, and who waits for what. So it does, with what and where, when
    something fails and is tried again without an end meanwhile (`livelock`), even where `main` has taken that for one more failure; what
    `main` ends with otherwise is a note then. Where the program had left its machine with an error by then, and only the closing did not
    end, that error is raised, with the SimulationStuck's text as a note, and from it unless it came of something else. Ctrl-C is
    KeyboardInterrupt, whatever ends with it.
    """
    clock, ctrl_c = JumpClock(), CtrlC()
    clock.limit_s = limit_s
    clock.tellers.append(waits)

    async def program() -> T:
        failed: BaseException | None = None
        try:
            with trio.move_on_after(limit_s) as clock.scope, ctrl_c.cancels(clock.scope):
                value = await main(*arguments)
                if clock.failures.first is None:
                    return value
        except BaseException as error:
            failed = error
            left = clock.left_by is not None and clock.scope is not None and clock.scope.cancel_called
            if not left and clock.failures.first is None:
                raise
        clock.failures.begin_anew()
        if clock.failures.first is not None:
            raise _fails_for_ever(clock.failures.first, failed, seed) from clock.failures.first
        if clock.stuck:
            said = f"time stands still at {trio.current_time():g} virtual seconds (seed {seed}): somebody goes in circles"
        else:
            how = "tasks wait for each other, shielded from that limit" if clock.deadlocked else "somebody waits for what never comes"
            said = f"no end after {limit_s:g} virtual seconds (seed {seed}): {how}"
        stuck = SimulationStuck("\n  ".join([said, *clock.told]))
        if clock.left_by is None:
            raise stuck
        first = clock.left_by if failed is None or _leaves(failed) <= _leaves(clock.left_by) else failed
        first.add_note(f"and then the machine did not close: {stuck}")
        if first.__cause__ is None and (first.__context__ is None or first.__suppress_context__):
            raise first from stuck
        raise first  # which says by itself what it came of

    with seeded(seed):
        try:
            value = trio.run(program, clock=clock)
        except BaseException as error:
            beside = isinstance(error, BaseExceptionGroup) and error.subgroup(KeyboardInterrupt) is not None
            if ctrl_c.came or beside:  # with what it interrupted, when that ended in an error, too
                raise KeyboardInterrupt from None
            raise
    if ctrl_c.came:
        raise KeyboardInterrupt
    return value


def _fails_for_ever(livelock: Livelock, failed: BaseException | None, seed: int) -> SimulationStuck:
    """`failed`: what the program has ended with, which may be that, something with it, or what it made of it."""
    stuck = SimulationStuck(f"{livelock} (seed {seed})")
    other = failed.split((Livelock, trio.Cancelled))[1] if isinstance(failed, BaseExceptionGroup) else failed
    if other is not None and not isinstance(other, (Livelock, trio.Cancelled)):
        stuck.add_note(f"and then the program ended with {other!r}")
    return stuck


def _leaves(error: BaseException) -> set[int]:
    """What is in a group, and in groups in it, by `id`."""
    return set().union(*map(_leaves, error.exceptions)) if isinstance(error, BaseExceptionGroup) else {id(error)}


def simulate(
    main: Callable[[SimulatedMachine], Awaitable[T]],
    topology: str | Path | Topology = "two-gpus",
    *,
    seed: int = 0,
    faults: Plannable = (),
    limit_s: float = LIMIT_S,
    keep: bool = False,
    personality: Personality | None = None,
) -> Simulation[T]:
    """Run `main(machine)` on a simulated machine of `topology`, with `faults`; the same `seed` gives the same run.

    `faults`: a plan, its file, faults, dictionaries, kinds (`hmmnet.faults.forms`); they begin when all devices are there. `keep`: with
    the lines of its trace. `personality`: as `hmmnet.launch`.

    Raises what `main` raises, TopologyError, PlanError, and SimulationStuck as `run_virtual`.
    """
    trace = Trace(keep=keep)

    async def inside() -> tuple[T, float]:
        async with simulated(topology, trace=trace, seed=seed, faults=faults, personality=personality) as machine:
            value = await main(machine)
        return value, trio.current_time()

    value, virtual_s = run_virtual(inside, seed=seed, limit_s=limit_s)
    return Simulation(value, seed, trace.digest, trace.count, virtual_s, trace.lines)
