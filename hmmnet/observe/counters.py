"""Counters of the kind that a GPU profiler prints: how often, how large, how long.

Each kind keeps five numbers (count, total, smallest and largest bytes, seconds), so recording is O(1) and a run of any length costs the
same memory. Seconds are emulated. The kinds are those of the unified-memory section of nvprof and nsys; others may be recorded under any
name and then appear after them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

HOST_TO_DEVICE = "host_to_device"
DEVICE_TO_HOST = "device_to_host"
DEVICE_TO_DEVICE = "device_to_device"
CPU_FAULT = "cpu_fault"
GPU_FAULT_GROUP = "gpu_fault_group"

KINDS = (HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE, CPU_FAULT, GPU_FAULT_GROUP)


class Counter:
    """One kind: bytes and seconds of `count` occurrences. Bytes stay 0 for kinds that move none."""

    __slots__ = ("count", "max_bytes", "min_bytes", "seconds", "total_bytes")

    def __init__(self) -> None:
        self.count = 0
        self.total_bytes = 0
        self.min_bytes = 0
        self.max_bytes = 0
        self.seconds = 0.0

    @property
    def mean_bytes(self) -> float:
        """Average size, 0 when nothing was recorded."""
        return self.total_bytes / self.count if self.count else 0.0

    def add(self, other: Counter) -> None:
        """Take `other`'s occurrences in."""
        if other.count == 0:
            return
        self.min_bytes = min(self.min_bytes, other.min_bytes) if self.count else other.min_bytes
        self.max_bytes = max(self.max_bytes, other.max_bytes)
        self.count += other.count
        self.total_bytes += other.total_bytes
        self.seconds += other.seconds

    def as_json(self) -> dict[str, Any]:
        """Plain data; the form that `Profile.from_json` reads."""
        return {
            "count": self.count,
            "mean_bytes": self.mean_bytes,
            "min_bytes": self.min_bytes,
            "max_bytes": self.max_bytes,
            "total_bytes": self.total_bytes,
            "seconds": self.seconds,
        }


class Profile:
    """Counters by kind, and optionally by device within a kind."""

    def __init__(self) -> None:
        self._counters: dict[tuple[str, str], Counter] = {}

    def record(self, kind: str, nbytes: int, seconds: float, device: str = "", count: int = 1) -> None:
        """One occurrence of `kind` that moved `nbytes` in emulated `seconds`; or `count` equal ones that did so *together*."""
        counter = self._counters.get((kind, device))
        if counter is None:
            counter = self._counters[kind, device] = Counter()
        each = nbytes if count == 1 else nbytes // max(count, 1)
        if counter.count == 0 or each < counter.min_bytes:
            counter.min_bytes = each
        if each > counter.max_bytes:
            counter.max_bytes = each
        counter.count += count
        counter.total_bytes += nbytes
        counter.seconds += seconds

    def counter(self, kind: str, device: str | None = None) -> Counter:
        """The counter of `kind` for one device, or the sum over all devices; a fresh one when nothing was recorded."""
        if device is not None:
            return self._counters.get((kind, device), Counter())
        total = Counter()
        for (name, _), counter in self._counters.items():
            if name == kind:
                total.add(counter)
        return total

    def kinds(self) -> tuple[str, ...]:
        """Kinds that were recorded: the profiler's first, in their order, then others as they came."""
        seen = dict.fromkeys(kind for kind, _ in self._counters)
        return tuple(kind for kind in KINDS if kind in seen) + tuple(kind for kind in seen if kind not in KINDS)

    def devices(self) -> tuple[str, ...]:
        """Devices that something was recorded for, in name order; without the empty name."""
        return tuple(sorted({device for _, device in self._counters if device}))

    def items(self) -> Iterator[tuple[str, str, Counter]]:
        """Every (kind, device, counter), in order of kinds and names."""
        order = {kind: i for i, kind in enumerate(self.kinds())}
        for kind, device in sorted(self._counters, key=lambda key: (order[key[0]], key[1])):
            yield kind, device, self._counters[kind, device]

    def merge(self, other: Profile) -> None:
        """Take another profile's occurrences in."""
        for kind, device, counter in other.items():
            self._counters.setdefault((kind, device), Counter()).add(counter)

    def since(self, earlier: Profile) -> Profile:
        """What happened after the snapshot `earlier`. Minimum and maximum are of the whole run: they cannot be taken apart."""
        out = Profile()
        for kind, device, now in self.items():
            before = earlier.counter(kind, device)
            if now.count > before.count:
                counter = out._counters[kind, device] = Counter()
                counter.count = now.count - before.count
                counter.total_bytes = now.total_bytes - before.total_bytes
                counter.seconds = now.seconds - before.seconds
                counter.min_bytes, counter.max_bytes = now.min_bytes, now.max_bytes
        return out

    def copy(self) -> Profile:
        """A snapshot."""
        out = Profile()
        out.merge(self)
        return out

    def as_json(self) -> list[dict[str, Any]]:
        """Plain data, one entry for each kind and device."""
        return [{"kind": kind, "device": device, **counter.as_json()} for kind, device, counter in self.items()]

    @classmethod
    def from_json(cls, rows: list[Mapping[str, Any]]) -> Profile:
        """The profile that `as_json` wrote (another process's, or a file's)."""
        profile = cls()
        for row in rows:
            counter = profile._counters[str(row["kind"]), str(row["device"])] = Counter()
            counter.count = int(row["count"])
            counter.total_bytes = int(row["total_bytes"])
            counter.min_bytes = int(row["min_bytes"])
            counter.max_bytes = int(row["max_bytes"])
            counter.seconds = float(row["seconds"])
        return profile
