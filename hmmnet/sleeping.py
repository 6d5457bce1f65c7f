"""Sleep, as cheap as the clock of the run makes it.

A sleep of trio's is a cancel scope that comes to its deadline: it is entered and left, registered, cancelled, and an exception goes through
the task that sleeps. In real time nobody notices. In virtual time sleeps are what most rounds of the scheduler are for, and a clock that
decides when time passes can just wake who sleeps (`WakingClock`): for a quarter of the price, at the same moments, in the same order.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncGenerator, Generator
from typing import Any

import trio
from outcome import Outcome
from trio.lowlevel import Abort, Task, current_clock, current_task, reschedule, wait_task_rescheduled


class _Word(Outcome[None]):
    """What a task hears that is woken: nothing. Unlike an `outcome.Value` it can be said again."""

    __slots__ = ()

    def unwrap(self) -> None:
        """See `Outcome.unwrap`."""

    def send(self, gen: Generator[Any, None, object]) -> Any:
        """See `Outcome.send`."""
        return gen.send(None)

    async def asend(self, agen: AsyncGenerator[Any, None]) -> Any:
        """See `Outcome.asend`."""
        return await agen.asend(None)


WORD = _Word()
"""One for all: `reschedule` makes one for each task, if it is given none."""


class WakingClock(trio.abc.Clock):
    """A clock that wakes tasks by itself."""

    @abstractmethod
    def wake_at(self, deadline_s: float, who: list[Task]) -> None:
        """Reschedule the tasks in `who` at `deadline_s`, which is not over. Whoever is taken out until then is not."""

    async def sleep_until(self, deadline_s: float) -> None:
        """Return at `deadline_s`, which is not over; can be cancelled."""
        who = [current_task()]
        self.wake_at(deadline_s, who)

        def leave(_: object) -> Abort:
            who.clear()
            return Abort.SUCCEEDED

        await wait_task_rescheduled(leave)


class Bell:
    """Wakes one task that waits for it, for a while at most. Such a wait costs what a sleep does: nearly always the bell rings in time."""

    __slots__ = ("_who",)

    def __init__(self) -> None:
        self._who: list[Task] = []
        """Who waits; taken out by whoever wakes it: the bell, the clock or a cancellation."""

    def ring(self) -> bool:
        """Whether somebody waits, and goes on now."""
        if self._who:
            reschedule(self._who.pop(), WORD)
            return True
        return False

    async def heard(self) -> None:
        """Return when it rings."""
        self._who = [current_task()]
        await wait_task_rescheduled(self._leave)

    async def heard_at_last(self) -> None:
        """Return when it rings, cancelled or not."""
        self._who = [current_task()]
        await wait_task_rescheduled(_stay)

    async def heard_by(self, deadline_s: float) -> None:
        """Return when it rings, or at that moment of trio's clock."""
        clock = current_clock()
        if isinstance(clock, WakingClock) and deadline_s > clock.current_time():
            who = self._who = [current_task()]
            clock.wake_at(deadline_s, who)
            await wait_task_rescheduled(self._leave)
        else:
            with trio.move_on_at(deadline_s):
                await self.heard()

    def _leave(self, _: object) -> Abort:
        self._who.clear()
        return Abort.SUCCEEDED


def _stay(_: object) -> Abort:
    return Abort.FAILED


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
