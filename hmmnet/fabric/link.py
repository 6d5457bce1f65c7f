"""One direction of an interconnect link: what it can carry, and what it has carried. Pure arithmetic; the caller owns time.

Two times are kept for what crossed a link. *Granted* is the time the model says it took: the union of the intervals that the arbiter gave out.
*Taken* is the time it took: from the same starts to the moments when the data had really arrived. Bytes over the first is what the model
asked for, over the second what the emulation reached; where they differ by more than `TOLERANCE` the emulation did not keep up, and
the run's times are not to be trusted (a smaller rate of the clock mends it).
"""

from __future__ import annotations

from dataclasses import dataclass

TOLERANCE = 0.05


class Stretch:
    """The length of a union of intervals that begin in roughly ascending order."""

    def __init__(self) -> None:
        self.length_s = 0.0
        self._until_s = float("-inf")

    def add(self, start_s: float, end_s: float) -> None:
        """Count ``[start_s, end_s)``, less what was counted before."""
        start_s = max(start_s, self._until_s)
        if end_s > start_s:
            self.length_s += end_s - start_s
            self._until_s = end_s


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
        self.bytes_moved = 0
        self.transfers = 0
        self._granted = Stretch()
        self._taken = Stretch()

    def record(self, nbytes: int, start_s: float, due_s: float, arrived_s: float) -> None:
        """A transfer of `nbytes` was granted ``[start_s, due_s)`` and had arrived at `arrived_s`."""
        self.bytes_moved += nbytes
        self.transfers += 1
        self._granted.add(start_s, due_s)
        self._taken.add(start_s, max(arrived_s, due_s))

    def report(self) -> LinkReport:
        """The figures so far."""
        asked = self.bytes_moved / self._granted.length_s if self._granted.length_s else 0.0
        reached = self.bytes_moved / self._taken.length_s if self._taken.length_s else 0.0
        kept_up = reached >= asked * (1 - TOLERANCE)
        return LinkReport(
            self.name, self.source, self.target, self.capacity_bytes_per_s, asked, reached, kept_up, self.bytes_moved, self.transfers
        )
