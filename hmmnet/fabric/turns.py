"""Who waits on which links, and for how long when these change. Pure but for the bells of those who sleep; the caller owns time.

A turn (see `singles`) keeps each link of its way from its beginning until the link has carried its bytes, and begins when all links are
free: most of what it waits may be the queue of one link, while the others idle. So when a fault changes what one link carries, no moment
can be scaled as a whole. Turns are kept in the order in which they were given until they have passed, and a change goes through them as if
they were given anew: what a link has carried of a turn stays carried, what it has not takes longer, or less, and whoever comes behind
begins when those before him leave the links free. It costs a step for each turn that waits, when a fault changes links, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from hmmnet.sleeping import Bell

from .link import Link
from .pace import Schedule

QUEUE_LOOK = 64
"""Turns that are kept before it is looked which of them have passed; later, twice as many as had not at the last look. There wait as many
as pass within the millisecond that nobody sleeps for, one for each task that sleeps, and those of an access that has not paid yet."""


@dataclass
class Change:
    """What links carry has changed: by `slower` a transfer takes longer on each of those that did, and by the flows that did."""

    slower: Mapping[Link | Schedule, float]
    now_s: float
    free_s: dict[Link, float] = field(default_factory=dict)
    """When those who were asked already leave the links; now, where there are none."""

    def free(self, links: tuple[Link, ...]) -> float:
        """When whoever is next can have all of them."""
        return max([self.now_s, *(self.free_s[link] for link in links if link in self.free_s)])


class Turn(Bell):
    """It leaves at `begin_s`, the links are done with it at `passed_s`, and it is there at `due_s`. Rings when that has changed.

    Of its `times` the first is when it was ready, the others are the first two of those. One may sleep for it.
    """

    __slots__ = ("_after", "_keeps", "_latency_s", "_ready_s", "begin_s", "due_s", "links", "passed_s")

    def __init__(
        self,
        links: tuple[Link, ...],
        times: tuple[float, float, float],
        latency_s: float,
        after: Turn | None,
        keeps: list[float] | Schedule,
    ) -> None:
        super().__init__()
        self.links = links
        self._ready_s, self.begin_s, self.passed_s = times
        self.due_s = self.passed_s + latency_s
        self._latency_s = latency_s
        self._after = after
        """The one before it on its way, if that had not passed."""
        self._keeps = keeps
        """Until when it keeps each of its links; or nothing: it goes by a flow of those who sleep on its way (see `Singles.held`)."""

    def forget(self) -> None:
        """It has passed: those before it are of no matter any more."""
        self._after = None

    def follow(self, change: Change) -> None:
        """Links have changed, and those before it know."""
        keeps, old_s = self._keeps, max(self.begin_s, change.now_s)
        since_s = old_s
        if self.begin_s > change.now_s:
            since_s = change.free(self.links) if isinstance(keeps, list) else change.now_s
            if self._after is not None:
                since_s = max(since_s, self._after.passed_s)
            self.begin_s = since_s = max(since_s, self._ready_s)
        if isinstance(keeps, list):
            for at, link in enumerate(self.links):
                keeps[at] = change.free_s[link] = _moved(keeps[at], old_s, since_s, change.slower.get(link, 1.0))
            passed_s = max(keeps, default=since_s)
        else:
            passed_s = _moved(self.passed_s, old_s, since_s, change.slower.get(keeps, 1.0))
        if passed_s != self.passed_s:
            self.passed_s = passed_s
            self.due_s = passed_s + self._latency_s
            self.ring()


def _moved(moment_s: float, old_s: float, since_s: float, slower: float) -> float:
    """A moment beyond `old_s`, after which what is left begins at `since_s` and takes so much longer; one that has passed stays."""
    if moment_s <= old_s or (slower == 1.0 and since_s == old_s):
        return moment_s
    return since_s + (moment_s - old_s) * slower


class Starting(Protocol):
    """A flow that may not have begun."""

    start_s: float
    open: bool
    links: tuple[Link, ...]

    def begin_at(self, start_s: float) -> None:
        """See `Schedule`."""
        ...


class Start:
    """A flow begins behind turns on its links; while it has none, as behind those that it had."""

    def __init__(self, flow: Starting) -> None:
        self._flow = flow
        self._links = flow.links

    @property
    def passed_s(self) -> float:
        """When it waits no longer."""
        return self._flow.start_s if self._flow.open else -math.inf

    def forget(self) -> None:
        """See `Turn`: nothing is held."""

    def follow(self, change: Change) -> None:
        """See `Turn`."""
        self._links = self._flow.links or self._links
        start_s = change.free(self._links)
        if start_s != self._flow.start_s:
            self._flow.begin_at(start_s)


class Turns:
    """All that wait on the links of one machine, in the order in which they came."""

    def __init__(self) -> None:
        self._queue: list[Turn | Start] = []
        self._look_at = QUEUE_LOOK

    def __len__(self) -> int:
        """How many are kept; some of them may have passed."""
        return len(self._queue)

    def add(self, one: Turn | Start, now_s: float) -> None:
        """It is behind all others; `now_s` is now, or before."""
        if len(self._queue) >= self._look_at:
            self._forget(now_s)
            self._look_at = max(QUEUE_LOOK, 2 * len(self._queue))
        self._queue.append(one)

    def _forget(self, now_s: float) -> None:
        for one in self._queue:
            if one.passed_s <= now_s:
                one.forget()
        self._queue = [one for one in self._queue if one.passed_s > now_s]

    def follow(self, slower: Mapping[Link | Schedule, float], now_s: float) -> None:
        """A transfer takes so much longer now on these links, and by these flows: whoever has not passed learns when he does."""
        self._forget(now_s)
        change = Change(slower, now_s)
        for one in self._queue:
            one.follow(change)
        for link, free_s in change.free_s.items():
            link.free_s = free_s
