"""Who reads a transport: a task of its own, or whoever waits for an answer and has nothing else to do.

An answer that a reading task receives has to wake the task that asked: a turn of trio's loop more, which costs as much as the rest of a
short round trip. So a task that waits *stands in*: it reads and delivers frames itself, whomever they are for, until its answer is among
them, and goes on at once. The reading task sleeps meanwhile, and takes over as soon as the stand-in leaves.

    reading task   reads --- wakes the only one who waits --- sleeps ........ looks, sleeps ........ looks, reads
    the asker      waits ............... goes on, asks again, stands in - has its answer, goes on - does something else

There is always one who reads, or one who is about to: whoever stops wakes the reading task, which looks in the next turn whether somebody
stands in by then. While several wait, the reading task stays: it hands out many answers in one turn.

A stand-in lends its time and nothing else. What a peer's frame makes the host wait for (an inline handler) is left to the reading task, so
that nobody's cancel scope reaches another's work; so is a transport that fails. A wait that ends otherwise than by a frame (the session
is lost) interrupts the stand-in's read with `nudge`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NoReturn, Protocol

import trio
from trio.lowlevel import Abort, Task, current_task, reschedule, wait_task_rescheduled

from .shortwait import Loop, known_loop


class Waiting(Protocol):
    """What a stand-in reads for."""

    answered: bool
    """Whether it has what it waits for."""


class Reader:
    """Reads one transport. `step` takes and delivers one frame, and returns what must be awaited before the next, if anything.

    `nudge` makes the task that is inside `step`, or the next that would wait there, come out of it with `trio.WouldBlock`. Without it
    nobody stands in.
    """

    def __init__(self, step: Callable[[], Awaitable[Awaitable[None] | None]], nudge: Callable[[], None] | None) -> None:
        self._step = step
        self._nudge = nudge
        self._reading = False
        """The reading task does."""
        self._standing = False
        """A stand-in does."""
        self._open = False
        """`run` runs, and others may stand in for it."""
        self._waiting = 0
        """Tasks that wait for an answer and do not read."""
        self._woke = False
        """The reading task has woken the only one of them, who may want to stand in."""
        self._sleeper: Task | None = None
        self._due = False
        """The reading task has been told to look, and has not run yet."""
        self._excused = False
        """It need not look: somebody stands in already."""
        self._loop: Loop | None = None
        self._left: Awaitable[None] | None = None

    @property
    def shared(self) -> bool:
        """Whether others may stand in at all."""
        return self._nudge is not None

    async def run(self) -> NoReturn:
        """Read until cancelled, or until the transport fails: raises what it does."""
        while self._nudge is None:
            more = await self._step()
            if more is not None:
                await more
        self._open = True
        try:
            while True:
                while self._standing or self._woke:
                    self._woke = False
                    self._sleeper = current_task()
                    try:
                        await wait_task_rescheduled(self._wake_up)
                    finally:
                        self._due = False
                        self._hold_to_it()
                self._reading = True
                try:
                    more, self._left = self._left or await self._step(), None
                    if more is not None:
                        await more
                except trio.WouldBlock:
                    continue  # a nudge that came late
                finally:
                    self._reading = False
        finally:
            self._open = False
            self.interrupt()

    def _wake_up(self, _: object) -> Abort:
        self._sleeper = None
        return Abort.SUCCEEDED

    def resume(self) -> None:
        """The reading task looks whether it has to read."""
        self._woke = False
        if self._sleeper is not None:
            sleeper, self._sleeper = self._sleeper, None
            self._due = True
            reschedule(sleeper)

    def _excuse(self) -> None:
        """The reading task need not look: whoever waits for a frame must not go a turn through the loop for that."""
        self._loop = self._loop or known_loop()
        if self._loop is not None:
            self._excused = True
            self._loop.excused += 1

    def _hold_to_it(self) -> None:
        if self._excused and self._loop is not None:
            self._excused = False
            self._loop.excused -= 1

    # --- for those who wait ----------------------------------------------------------------------------------------------------------

    @property
    def vacant(self) -> bool:
        """Whether somebody who waits may stand in: nobody reads, and nothing is left for the reading task."""
        return self._open and not (self._reading or self._standing) and self._left is None

    async def stand_in(self, waiting: Waiting) -> None:
        """Read until `waiting` is answered. Returns without an answer when reading is no longer a stand-in's business: then `sleep`."""
        self._standing = True
        if self._due:
            self._excuse()
        try:
            while self._open and not waiting.answered:
                try:
                    self._left = await self._step()
                except trio.WouldBlock:
                    continue
                if self._left is not None:
                    return
        except Exception:  # noqa: BLE001 - the transport's end: the reading task will meet the same, and it is its to raise
            return
        finally:
            self._standing = False
            if self._excused:
                self._hold_to_it()
            self.resume()

    async def sleep(self, wait: Callable[[], Awaitable[None]]) -> None:
        """`wait`, of somebody who waits while others read; whoever has the answer says `woke` and wakes it."""
        self._waiting += 1
        try:
            await wait()
        finally:
            self._waiting -= 1
            self.resume()

    def woke(self) -> None:
        """A task that slept is being rescheduled: if no other sleeps, it may stand in next time."""
        if self._open and self._reading and self._waiting == 1:
            self._woke = True

    def interrupt(self) -> None:
        """An answer has come by another way than a frame: a stand-in must look at once."""
        if self._standing and self._nudge is not None:
            self._nudge()
