"""Transfers of a page or a few, which a CPU waits for: too short for a flow and its messages. Pure but for `pass_by`; the caller owns time.

They share every link one after the other, by absolute times: whoever comes while others pass, from whatever device, has a turn behind them.
Where flows are open on the way, singles pass at the share that one more flow would get, all of them together. While somebody really sleeps
until his turn is over (`Singles.pass_by`) there *is* one more flow, so that the others go slower by as much; what is shorter than a sleep
they do not notice. When a fault changes what the links carry, whatever has not passed takes longer, or less (see `turns`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import attrgetter

from .arbiter import Arbiter, Flow
from .clock import EmulatedClock
from .turns import Turn

_DUE: Callable[[Turn], float] = attrgetter("due_s")


class Singles:
    """The way from memory `source` to memory `target`. Raises TopologyError when there is none."""

    def __init__(self, arbiter: Arbiter, source: str, target: str) -> None:
        self.links = arbiter.route(source, target)
        self._arbiter = arbiter
        self._ends = source, target
        self.latency_s = sum(link.latency_s for link in self.links)
        self._late = [late_s for link in self.links for _, late_s in link.late]
        self._last: Turn | None = None
        self._flow: Flow | None = None
        self._holders = 0

    def turn(self, nbytes: int, start_s: float) -> Turn:
        """`nbytes` are ready to leave at `start_s`: when they leave, and when they are there."""
        begin_s, after = start_s, self._last
        if after is not None:
            if after.passed_s > start_s:
                begin_s = after.passed_s
            else:
                after = None
        keeps: list[float] | Flow
        if self._flow is not None:
            keeps = self._flow
            passed_s = begin_s + nbytes / keeps.bytes_per_s
        else:
            for link in self.links:
                if link.free_s > begin_s:
                    begin_s = link.free_s
            passed_s, keeps = begin_s, []
            for link in self.links:
                link.free_s = free_s = begin_s + nbytes * (link.flows + 1) / link.capacity_bytes_per_s
                keeps.append(free_s)
                if free_s > passed_s:
                    passed_s = free_s
        latency_s = self.passes_s() if self._late else self.latency_s
        turn = self._last = Turn(self.links, (start_s, begin_s, passed_s), latency_s, after, keeps)
        self._arbiter.turns.add(turn, start_s)
        return turn

    def passes_s(self, count: int = 1) -> float:
        """How long as many ways take as the next `count` transfers go: the latency of the links, and what faults add to it."""
        return count * self.latency_s + sum(late_s() for _ in range(count) for late_s in self._late)

    async def pass_by(self, turn: Turn, clock: EmulatedClock) -> float:
        """Return when `turn`, given by this way, is over; as links change it is at another time, which is returned."""
        with self.held(clock.now):
            await clock.sleep_until_then(partial(_DUE, turn), turn)
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
