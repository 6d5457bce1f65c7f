"""When each chunk of a stream may leave. Pure; the caller owns time.

By absolute deadlines: a chunk's moment follows from the stream's start and what was granted since, not from when the last chunk really
left, so the errors of single sleeps do not add up. A sender that is late may make up for it by sending faster, within `CATCH_UP_S`; what is
beyond is lost, as it would be on a link.

A moment that is still to come was granted at the rate of then. When the rate changes, what the links have carried until now stays carried,
and what they have not takes longer, or less: all moments beyond now are as much farther away, or nearer, as the new rate is lower, or
higher. So a transfer takes what its links give it at the rate of each stretch, and who sleeps until a moment is told to look again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

CATCH_UP_S = 0.020
"""Real seconds that may be made up for: some scheduling delays of a busy computer, and few enough that a link is not flooded afterwards."""


class Grant(NamedTuple):
    """A chunk may leave at `start_s`; the link is done with it at `finish_s`, and it is there at `arrive_s`. Emulated seconds."""

    start_s: float
    finish_s: float
    arrive_s: float


class Pacer(Protocol):
    """Gives each chunk its time; `arbiter.Flow` at the host, `Pace` where the host's grant was sent along."""

    @property
    def stalled(self) -> bool:
        """Whether there is no way now: links are down. Where the arbiter is at the other end, that drops what comes."""
        ...

    @property
    def last(self) -> Grant:
        """What was granted last, as it is now: what is to come of it may change."""
        ...

    @property
    def there_s(self) -> float:
        """When all that was granted is there, as it is now: infinitely long ago, if nothing was; infinite, if some waits for a link."""
        ...

    def grant(self, nbytes: int, now_s: float, catch_up_s: float) -> Grant:
        """When the next `nbytes` may leave and are there; `catch_up_s` is `CATCH_UP_S` in emulated seconds."""
        ...

    def watch(self, changed: Callable[[], object]) -> None:
        """From now on call `changed`, and nobody else, when the rate has changed, or what was granted."""
        ...


class Schedule:
    """From `start_s` on at `bytes_per_s`, there `latency_s` later; the rest may change."""

    stalled = False

    def __init__(self, start_s: float, bytes_per_s: float, latency_s: float) -> None:
        self.start_s = start_s
        self.bytes_per_s = bytes_per_s
        self.latency_s = latency_s
        self.last = Grant(start_s, start_s, -math.inf)
        self._old_way_s = -math.inf
        """When the last is there that left when it took longer to get there."""
        self._changed: Callable[[], object] | None = None

    @property
    def there_s(self) -> float:
        """See `Pacer`."""
        return max(self.last.arrive_s, self._old_way_s)

    def watch(self, changed: Callable[[], object]) -> None:
        """See `Pacer`."""
        self._changed = changed

    def grant(self, nbytes: int, now_s: float, catch_up_s: float = 0.0) -> Grant:
        """See `Pacer`."""
        start_s = max(self.last.finish_s, now_s - catch_up_s)
        finish_s = start_s + nbytes / self.bytes_per_s
        self.last = grant = Grant(start_s, finish_s, finish_s + self.latency_s)
        return grant

    def begin_at(self, start_s: float) -> None:
        """It has not begun, behind turns of single pages (see `singles`), and does so then."""
        by_s = start_s - self.start_s
        self.last = Grant(*(moment_s + by_s for moment_s in self.last))
        self.start_s = start_s
        self._tell()

    def change_rate(self, bytes_per_s: float, now_s: float) -> None:
        """Go on at another rate."""
        if bytes_per_s == self.bytes_per_s:
            return
        since_s, factor = max(now_s, self.start_s), self.bytes_per_s / bytes_per_s
        self.bytes_per_s = bytes_per_s
        start_s, finish_s, _ = self.last
        if finish_s > since_s:
            if start_s > since_s:
                start_s = since_s + (start_s - since_s) * factor
            finish_s = since_s + (finish_s - since_s) * factor
            self.last = Grant(start_s, finish_s, finish_s + self.latency_s)
        self._tell()

    def _change_latency(self, latency_s: float, now_s: float) -> None:
        """What leaves from now on takes so long to get there; what has left goes the old way still."""
        start_s, finish_s, arrive_s = self.last
        if finish_s > now_s and arrive_s > -math.inf:
            self.last = Grant(start_s, finish_s, finish_s + latency_s)
            arrive_s = now_s + self.latency_s if now_s > self.start_s else -math.inf
        self._old_way_s = max(self._old_way_s, arrive_s)
        self.latency_s = latency_s
        self._tell()

    def _tell(self) -> None:
        if self._changed is not None:
            self._changed()


class Pace(Schedule):
    """A grant that came in a message, for who sends at the other end. Credits may change the rate."""

    def hear(self, bytes_per_s: float, start_s: float | None, now_s: float) -> None:
        """A credit tells the rate, and, if that has changed, when it begins: now, for who hears late; nothing new for who has begun."""
        self.change_rate(bytes_per_s, now_s)
        if start_s is not None and self.start_s > now_s and start_s != self.start_s:
            self.begin_at(max(start_s, now_s))


class _Unpaced:
    """As fast as it goes."""

    stalled = False
    last = Grant(-math.inf, -math.inf, -math.inf)
    there_s = -math.inf

    def grant(self, nbytes: int, now_s: float, catch_up_s: float) -> Grant:  # noqa: ARG002 - the interface of Pacer
        """See `Pacer`."""
        return Grant(now_s, now_s, now_s)

    def watch(self, changed: Callable[[], object]) -> None:
        """See `Pacer`: nothing changes."""


UNPACED = _Unpaced()
