"""Sleep, as cheap as the clock of the run makes it.

A sleep of trio's is a cancel scope that comes to its deadline: it is entered and left, registered, cancelled, and an exception goes through
the task that sleeps. In real time nobody notices. In virtual time sleeps are what most rounds of the scheduler are for, and a clock that
decides when time passes can just wake who sleeps (`WakingClock`): for a quarter of the price, at the same moments, in the same order.
"""

from __future__ import annotations

from abc import abstractmethod

import trio
from trio.lowlevel import current_clock


class WakingClock(trio.abc.Clock):
    """A clock that wakes tasks by itself."""

    @abstractmethod
    async def sleep_until(self, deadline_s: float) -> None:
        """Return at `deadline_s`, which is not over; can be cancelled."""


async def sleep(seconds: float) -> None:
    """`trio.sleep`. Raises ValueError for less than nothing."""
    clock = current_clock()
    if seconds > 0 and isinstance(clock, WakingClock):
        await clock.sleep_until(clock.current_time() + seconds)
    else:
        await trio.sleep(seconds)


async def sleep_until(deadline_s: float) -> None:
    """`trio.sleep_until`."""
    clock = current_clock()
    if isinstance(clock, WakingClock) and deadline_s > clock.current_time():
        await clock.sleep_until(deadline_s)
    else:
        await trio.sleep_until(deadline_s)
