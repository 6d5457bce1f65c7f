"""A moment in a simulated run: when its so-and-so-many-th message is sent."""

from __future__ import annotations

import trio

from hmmnet.sim import Trace
from hmmnet.wire.memory_transport import Parts


class Countdown(Trace):
    """Sets `now` when message number `at` is sent."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.now = trio.Event()
        self._at = at

    def sent(self, now_s: float, way: str, parts: Parts) -> None:
        """See `Trace.sent`."""
        super().sent(now_s, way, parts)
        if self.count == self._at:
            self.now.set()
