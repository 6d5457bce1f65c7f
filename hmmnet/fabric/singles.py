"""Transfers of a page or a few, which a CPU waits for: too short for a flow and its messages. Pure but for `pass_by`; the caller owns time.

They share every link one after the other, by absolute times: whoever comes while others pass, from whatever device, has a turn behind them.
Where flows are open on the way, singles pass at the share that one more flow would get, all of them together. While somebody really sleeps
until his turn is over (`Singles.pass_by`) there *is* one more flow, so that the others go slower by as much; what is shorter than a sleep
they do not notice. When a fault changes what the links carry, whatever has not passed takes longer, or less, as with flows (see `pace`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import attrgetter

from hmmnet.sleeping import Bell

from .arbiter import Arbiter, Flow
from .clock import EmulatedClock
from .link import Link, carry_bytes_per_s


class Turn(Bell):
    """One that is slept for: the links are done with it at `passed_s`, and it is there at `due_s`. Rings when that has changed."""

    __slots__ = ("_bytes_per_s", "_links", "_passed_s", "due_s")

    def __init__(self, links: tuple[Link, ...], bytes_per_s: float, passed_s: float, due_s: float) -> None:
        super().__init__()
        self.due_s = due_s
        self._links = links
        self._bytes_per_s = bytes_per_s
        self._passed_s = passed_s

    def follow(self, now_s: float) -> None:
        """Links have changed."""
        bytes_per_s = carry_bytes_per_s(self._links)
        ahead_s = self._passed_s - now_s
        if bytes_per_s != self._bytes_per_s and ahead_s > 0:
            late_s = ahead_s * (self._bytes_per_s / bytes_per_s - 1)
            self._passed_s += late_s
            self.due_s += late_s
            self.ring()
        self._bytes_per_s = bytes_per_s


_DUE: Callable[[Turn], float] = attrgetter("due_s")


class Singles:
    """The way from memory `source` to memory `target`. Raises TopologyError when there is none."""

    def __init__(self, arbiter: Arbiter, source: str, target: str) -> None:
        self.links = arbiter.route(source, target)
        self._arbiter = arbiter
        self._changed = arbiter.changed
        self._bytes_per_s = carry_bytes_per_s(self.links)
        """As of `_changed`: an Interconnect has another way for what comes later."""
        self._ends = source, target
        self.latency_s = sum(link.latency_s for link in self.links)
        self._late = [late_s for link in self.links for _, late_s in link.late]
        self._next_s = -math.inf
        self._flow: Flow | None = None
        self._holders = 0

    def turn(self, nbytes: int, start_s: float) -> tuple[float, float]:
        """`nbytes` are ready to leave at `start_s`: when they leave, and when they are there."""
        begin_s = max(start_s, self._next_s)
        if self._flow is not None:
            self._next_s = begin_s + nbytes / self._flow.bytes_per_s
            return begin_s, self._next_s + (self.passes_s() if self._late else self.latency_s)
        for link in self.links:
            if link.free_s > begin_s:
                begin_s = link.free_s
        takes_s = 0.0
        for link in self.links:
            share_s = nbytes * (link.flows + 1) / link.capacity_bytes_per_s
            link.free_s = begin_s + share_s
            if share_s > takes_s:
                takes_s = share_s
        self._next_s = begin_s + takes_s
        return begin_s, self._next_s + (self.passes_s() if self._late else self.latency_s)

    def passes_s(self, count: int = 1) -> float:
        """How long as many ways take as the next `count` transfers go: the latency of the links, and what faults add to it."""
        return count * self.latency_s + sum(late_s() for _ in range(count) for late_s in self._late)

    async def pass_by(self, due_s: float, clock: EmulatedClock) -> float:
        """Return when the turn that was given last, until `due_s`, is over; as links change it is at another time, which is returned."""
        turn = Turn(self.links, self._bytes_per_s, min(self._next_s, due_s), due_s)
        if self._changed != self._arbiter.changed:
            turn.follow(clock.now())
        followers, follow = self._arbiter.followers, turn.follow
        followers[follow] = None
        try:
            with self.held(clock.now):
                await clock.sleep_until_then(partial(_DUE, turn), turn)
        finally:
            del followers[follow]
        return turn.due_s

    @contextmanager
    def held(self, now: Callable[[], float]) -> Iterator[None]:
        """Around a sleep until a turn is over: flows on the way share it with the sleepers, who count as one."""
        if self._flow is None:
            self._flow = self._arbiter.open_flow(*self._ends, now(), empty=True)
        self._holders += 1
        try:
            yield
        finally:
            self._holders -= 1
            if not self._holders:
                self._flow.close(now())
                self._flow = None
