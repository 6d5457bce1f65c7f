"""When each chunk of a stream may leave. Pure; the caller owns time.

By absolute deadlines: a chunk's moment follows from the stream's start and what was granted since, not from when the last chunk really
left, so the errors of single sleeps do not add up. A sender that is late may make up for it by sending faster, within `CATCH_UP_S`; what is
beyond is lost, as it would be on a link.
"""

from __future__ import annotations

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

    def grant(self, nbytes: int, now_s: float, catch_up_s: float) -> Grant:
        """When the next `nbytes` may leave and are there; `catch_up_s` is `CATCH_UP_S` in emulated seconds."""
        ...


class Pace:
    """A grant that came in a message: from `start_s` on at `bytes_per_s`, there `latency_s` later. Credits may change the rate."""

    stalled = False

    def __init__(self, start_s: float, bytes_per_s: float, latency_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self._next_s = start_s
        self._latency_s = latency_s

    def grant(self, nbytes: int, now_s: float, catch_up_s: float) -> Grant:
        """See `Pacer`."""
        start_s = max(self._next_s, now_s - catch_up_s)
        self._next_s = finish_s = start_s + nbytes / self.bytes_per_s
        return Grant(start_s, finish_s, finish_s + self._latency_s)


class _Unpaced:
    """As fast as it goes."""

    stalled = False

    def grant(self, nbytes: int, now_s: float, catch_up_s: float) -> Grant:  # noqa: ARG002 - the interface of Pacer
        """See `Pacer`."""
        return Grant(now_s, now_s, now_s)


UNPACED = _Unpaced()
