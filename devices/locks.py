"""An order for what one device does to one address space: operations on overlapping page ranges take turns.

The host serves requests as they come, each in a task of its own, and filters the events that a device caused itself. Were a range fault
and a migration of the same pages under way at once, the device could program words that its own migration has just made
untrue, and nobody would tell it. Drivers serialise the two with a lock for each range (drm_gpusvm) or for the whole space (test_hmm);
this is the former. What the *host* begins (invalidations, copies out) never waits for this lock: it may be what the holder waits for.

Lock order: at most one range is held by a task at a time. Fair: an operation waits for every earlier one that overlaps it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio


@dataclass(eq=False)
class _Turn:
    start: int
    end: int
    ended: trio.Event = field(default_factory=trio.Event)


class RangeLock:
    """Turns on page ranges of one address space."""

    def __init__(self) -> None:
        self._turns: list[_Turn] = []

    @asynccontextmanager
    async def hold(self, start: int, end: int) -> AsyncIterator[None]:
        """Wait for earlier operations that overlap [start, end), then have the range alone."""
        turn = _Turn(start, end)
        earlier = [other for other in self._turns if other.start < end and start < other.end]
        self._turns.append(turn)
        try:
            for other in earlier:
                await other.ended.wait()
            yield
        finally:
            self._turns.remove(turn)
            turn.ended.set()

    @property
    def held(self) -> int:
        """Operations under way or waiting."""
        return len(self._turns)
