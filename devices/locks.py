"""An order for what one device does to one address space: operations on overlapping page ranges take turns.

The host serves requests as they come, each in a task of its own, and filters the events that a device caused itself. Were a range fault
and a migration of the same pages under way at once, the device could program words that its own migration has just made
untrue, and nobody would tell it. Drivers serialise the two with a lock for each range (drm_gpusvm) or for the whole space (test_hmm);
this is the former. What the *host* begins (invalidations, copies out) never waits for this lock: it may be what the holder waits for.

Lock order: at most one range is held by a task at a time. Fair: an operation waits for every earlier one that overlaps it.
"""

from __future__ import annotations

from types import TracebackType

import trio

from hmmnet.sleeping import Completion


class Turn:
    """One operation's turn on [start, end), as an async context manager."""

    __slots__ = ("_turns", "end", "ended", "start")

    def __init__(self, turns: list[Turn], start: int, end: int) -> None:
        self._turns = turns
        self.start = start
        self.end = end
        self.ended: Completion | None = None
        """For those who wait for the end of this one, once there are some."""

    async def __aenter__(self) -> None:
        earlier = [other for other in self._turns if other.start < self.end and self.start < other.end]
        self._turns.append(self)
        try:
            for other in earlier:
                await other.over()
        except BaseException:
            self._end()
            raise

    async def over(self) -> None:
        """Return when it has ended."""
        if self in self._turns:
            if self.ended is None:
                self.ended = Completion()
            await self.ended.wait()
        else:
            await trio.lowlevel.checkpoint()

    def _end(self) -> None:
        self._turns.remove(self)
        if self.ended is not None:
            self.ended.set()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()


class RangeLock:
    """Turns on page ranges of one address space."""

    def __init__(self) -> None:
        self._turns: list[Turn] = []

    def hold(self, start: int, end: int) -> Turn:
        """To be entered: wait for earlier operations that overlap [start, end), then have the range alone."""
        return Turn(self._turns, start, end)

    @property
    def held(self) -> int:
        """Operations under way or waiting."""
        return len(self._turns)
