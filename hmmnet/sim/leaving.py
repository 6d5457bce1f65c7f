"""What a program leaves its machine with, which then closes: should that not end, this is what went wrong first (`run.run_virtual`)."""

from __future__ import annotations

import math

import trio

from .clock import JumpClock

ENDS = (trio.Cancelled, KeyboardInterrupt, GeneratorExit)
"""What ends a program of which nothing is wrong."""


def left_by(error: BaseException) -> None:
    """The program leaves its machine with that. What only ends it hides nothing: a machine inside may have been left by an error."""
    clock, own = trio.lowlevel.current_clock(), _own(error)
    if isinstance(clock, JumpClock) and own is not None:
        clock.left_by = own


def leaves() -> None:
    """The program leaves its machine, by whatever."""
    clock = trio.lowlevel.current_clock()
    if isinstance(clock, JumpClock):
        clock.failures.begin_anew()


def _own(error: BaseException) -> BaseException | None:
    """What is wrong with a program, a verdict of pytest too (no Exception); None of those that only end it."""
    if isinstance(error, BaseExceptionGroup):
        return error.split(ENDS)[1]
    return None if isinstance(error, ENDS) else error


def closed() -> None:
    """The machine has; unless that is being cancelled, what the program left it by is no longer of interest."""
    clock = trio.lowlevel.current_clock()
    if isinstance(clock, JumpClock) and trio.current_effective_deadline() > -math.inf:
        clock.left_by = None
