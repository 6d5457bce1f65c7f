"""One direction of an interconnect link: what it can carry, and what it has carried. Pure arithmetic; the caller owns time.

Two times are kept for what crossed a link. *Granted* is the time the model says it took: the union of the intervals that the arbiter
gave out. *Taken* is the time it took: from the same starts to the moments when the data had really arrived. Bytes over the first is
what the model asked for, over the second what the emulation reached.

The emulation *kept up* when it took no more than was granted, plus `TOLERANCE`, plus `LAUNCH_S` a transfer: a real driver needs that long
to set a copy going, so the model's short transfers may be late by as much. Where it did not keep up, the run's times are not to
be trusted; a smaller rate of the clock mends it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass

TOLERANCE = 0.1
LAUNCH_S = 10e-6
"""Emulated seconds. Launching a copy on a GPU takes 5 to 10 us from the driver's call to the first byte."""
INTERVALS_MAX = 4096
"""Intervals kept apart; beyond, the older half is summed up, which an interval that begins that late can no longer meet."""


class Stretch:
    """The length of a union of intervals, added in any order."""

    def __init__(self) -> None:
        self._starts: list[float] = []
        self._ends: list[float] = []
        self._folded_s = 0.0
        self._folded_until_s = float("-inf")

    def add(self, start_s: float, end_s: float) -> None:
        """Count ``[start_s, end_s)``, where it was not counted before."""
        if start_s < self._folded_until_s:
            start_s = self._folded_until_s
        if end_s <= start_s:
            return
        starts, ends = self._starts, self._ends
        if not ends or start_s > ends[-1]:  # nearly always it is the last, or goes on with the last
            starts.append(start_s)
            ends.append(end_s)
        elif start_s >= starts[-1]:
            ends[-1] = max(ends[-1], end_s)
        else:
            self._join(start_s, end_s)
        if len(self._starts) > INTERVALS_MAX:
            self._fold(INTERVALS_MAX // 2)

    def _join(self, start_s: float, end_s: float) -> None:
        low, high = bisect_left(self._ends, start_s), bisect_right(self._starts, end_s)
        if low < high:
            start_s, end_s = min(start_s, self._starts[low]), max(end_s, self._ends[high - 1])
        self._starts[low:high] = [start_s]
        self._ends[low:high] = [end_s]

    def _fold(self, count: int) -> None:
        self._folded_s += sum(self._ends[:count]) - sum(self._starts[:count])
        self._folded_until_s = self._ends[count - 1]
        del self._starts[:count], self._ends[:count]

    @property
    def length_s(self) -> float:
        """The length so far."""
        return self._folded_s + sum(self._ends) - sum(self._starts)


@dataclass(frozen=True)
class LinkReport:
    """What one direction of a link did. Rates in bytes per emulated second; 0 where nothing was moved."""

    link: str
    source: str
    target: str
    capacity_bytes_per_s: float
    asked_bytes_per_s: float
    reached_bytes_per_s: float
    kept_up: bool
    bytes_moved: int
    transfers: int


class Link:
    """One direction of a link between two ends."""

    def __init__(self, name: str, source: str, target: str, capacity_bytes_per_s: float, latency_s: float) -> None:
        self.name = name
        self.source = source
        self.target = target
        self.capacity_bytes_per_s = capacity_bytes_per_s
        self.latency_s = latency_s
        self.late: tuple[tuple[int, Callable[[], float]], ...] = ()
        """What faults add, by their numbers: each is asked once of each transfer (`arbiter.Arbiter` sets it)."""
        self.bytes_moved = 0
        self.transfers = 0
        self.flows = 0
        """Flows that are open over this link (`arbiter.Arbiter` counts them)."""
        self.free_s = float("-inf")
        """When the last transfer without a flow has passed (`singles.Singles` sets it, and `turns.Turns`)."""
        self._granted = Stretch()
        self._taken = Stretch()

    def record(self, nbytes: int, start_s: float, due_s: float, arrived_s: float) -> None:
        """A transfer of `nbytes` was granted ``[start_s, due_s)`` and had arrived at `arrived_s`."""
        self.bytes_moved += nbytes
        self.transfers += 1
        self._granted.add(start_s, due_s)
        self._taken.add(start_s, max(arrived_s, due_s))

    def report(self) -> LinkReport:
        """The figures so far. A late flow is accounted as if it had been in time, beside others: rates end at the capacity all the same."""
        granted_s, taken_s = self._granted.length_s, self._taken.length_s
        least_s = self.bytes_moved / self.capacity_bytes_per_s
        return LinkReport(
            self.name,
            self.source,
            self.target,
            self.capacity_bytes_per_s,
            self.bytes_moved / max(granted_s, least_s) if self.bytes_moved else 0.0,
            self.bytes_moved / max(taken_s, least_s) if self.bytes_moved else 0.0,
            taken_s <= granted_s * (1 + TOLERANCE) + self.transfers * LAUNCH_S,
            self.bytes_moved,
            self.transfers,
        )
