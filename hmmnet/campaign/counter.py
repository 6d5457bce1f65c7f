"""The history of a word that is only ever added one to, atomically, and loaded.

Each addition returns what it found, so additions that ended have their *slots*: the one that found 3 took the word from 3 to 4. What cannot
be explained is found when the first access ends after which no order is left (tried against all orders in the tests). An access that
shows value v says of each slot below v that it was taken before this access ended, and of the others that they were taken after it had
begun. Both moments rise with the slots, so additions whose slots nobody knows (they are under way, or failed, and may have been done before
their error or never) are given to slots that somebody must have taken, one by one, the addition that ended first before others: where that
fails, nothing else works (a matching in a convex bipartite graph; Glover 1967).
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from heapq import heappop, heappush
from operator import itemgetter

from .history import Clock

NEVER_ENDED = math.inf


class Counter:
    """One such word, 0 at first. Moments are ticks of `clock`."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._slots: set[int] = set()
        """What additions have found."""
        self._unknown: dict[int, float] = {}
        """Additions without a slot, by when they began: when they failed."""
        self._failed = 0
        self._shown: list[tuple[int, int]] = [(0, 0)]
        """(when, the least that an access beginning later must find), both ascending."""
        self._holes: list[int] = []
        """Slots below that least that nobody is known to have taken, ascending."""
        self._after: list[tuple[int, int]] = []
        """(value, when the last access began that showed no more), both ascending."""

    @property
    def begun(self) -> int:
        """Additions so far, but for those that were refused."""
        return len(self._slots) + len(self._unknown)

    def add_begins(self) -> int:
        """An addition begins; when. `add_ends`, `add_fails` or `add_refused` ends it."""
        began = self.clock.tick()
        self._unknown[began] = NEVER_ENDED
        return began

    def add_refused(self, began: int) -> None:
        """The one that began then has not been done, and will not be."""
        del self._unknown[began]

    def add_fails(self, began: int) -> None:
        """The one that began then may have been done, and will not be from now on."""
        self._unknown[began] = self.clock.tick()
        self._failed += 1

    def add_ends(self, began: int, old: int) -> str:
        """The one that began then returned `old`; what is wrong with that."""
        known = self.begun
        del self._unknown[began]
        if old in self._slots:
            return f"two additions found {old}: one is lost"
        self._slots.add(old)
        at = bisect_left(self._holes, old)
        if self._holes[at : at + 1] == [old]:
            del self._holes[at]
        if old >= known:
            return f"{old} was there before this addition, of {known} so far: one was done twice"
        return self._sees(began, old, old + 1)

    def load_ends(self, began: int, value: int) -> str:
        """A load that began then returned `value`; what is wrong with that."""
        if value > self.begun:
            return f"{value} is more than the {self.begun} additions so far"
        return self._sees(began, value, value)

    def is_over(self, value: int) -> str:
        """No addition is under way; what is wrong with a load that returns `value` then."""
        done = len(self._slots)
        if done <= value <= done + self._failed:
            return self.load_ends(self.clock.tick(), value)
        failed = f", and {self._failed} that failed" if self._failed else ""
        return f"{value} is not the number of additions, which is {done}{failed}"

    def _sees(self, began: int, value: int, after: int) -> str:
        """An access that began then found `value`, and left `after`."""
        shown = self._shown
        floor = shown[bisect_right(shown, (began, -1)) - 1][1]
        if value < floor:
            return f"{value} is older than {floor}, which somebody had seen before"
        if after > shown[-1][1]:
            self._holes += (slot for slot in range(shown[-1][1], after) if slot not in self._slots)
            shown.append((self.clock.tick(), after))
        self._hides(began, value)
        taken = self._not_taken() if self._holes else None
        return "" if taken is None else f"{value} fits no order: no addition is left that can have found {taken}"

    def _hides(self, began: int, value: int) -> None:
        """Slots from `value` on were not taken when an access had not begun that began then."""
        after = self._after
        at = bisect_right(after, (value, math.inf))
        if at and after[at - 1][1] >= began:
            return
        end = at
        while end < len(after) and after[end][1] <= began:
            end += 1
        after[at - (at > 0 and after[at - 1][0] == value) : end] = [(value, began)]

    def _not_taken(self) -> int | None:
        """A slot that must have been taken by now, by an addition that nobody knows, and for which there is none."""
        left, fitting, following = list(self._unknown.items()), list[float](), 0  # they are in the order in which they began
        for slot in self._holes:
            until = self._shown[bisect_right(self._shown, slot, key=itemgetter(1))][0]
            while following < len(left) and left[following][0] < until:
                heappush(fitting, left[following][1])
                following += 1
            since = self._begins_after(slot)
            while fitting and fitting[0] <= since:
                heappop(fitting)
            if not fitting:
                return slot
            heappop(fitting)
        return None

    def _begins_after(self, slot: int) -> int:
        """A moment after which it was taken."""
        at = bisect_right(self._after, (slot, math.inf))
        return self._after[at - 1][1] if at else 0
