"""``struct hmm``, the one object that v25 keeps for each address space (mm/hmm.c of Linux 4.14): a counter, the mirrors, the ranges.

Where today every driver has a sequence for each interval, v25 had one object and three rules:

- the *start* of an invalidation counts, and that is all: nothing is told, nothing is dropped;
- its *end* marks every tracked range that overlaps as no longer valid, and wipes what the driver has read there out of its array;
- then every mirror is called, whatever it mirrors.

A driver that has read a range asks in the end, under its own lock, whether it still holds (`hmm_vma_range_done`). Between start and end
the page table changes and the ranges do not know it yet; therefore the invalidations in progress are kept, and a range that one of them
overlaps does not hold either. The counter makes that question cheap: it has moved, or there is nothing to look at.

This file is the arithmetic; `order.py` waits and calls. Places are page numbers here.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import numpy as np

from hmmnet.errors import KernelError
from hmmnet.pages import PAGE_SHIFT, Words


class HmmUpdate(Enum):
    """enum hmm_update_type."""

    INVALIDATE = "invalidate"


HMM_UPDATE_INVALIDATE = HmmUpdate.INVALIDATE


class HmmMirrorOps(Protocol):
    """struct hmm_mirror_ops: a driver's callback."""

    def sync_cpu_device_pagetables(self, mirror: HmmMirror, update: HmmUpdate, start: int, end: int) -> Awaitable[None] | None:
        """The device uses no translation of addresses [start, end) any more, and its TLB holds none: return (or have awaited) then.

        It may wait for the device, and must not take the mmap lock, which whoever changes the page table may hold.
        """
        ...


@dataclass(frozen=True)
class Hardware:
    """What v25 takes for granted of a device (its cover letter names these four); one that lacks something is refused."""

    preempts: bool = True
    """Its page table can be updated at any time, also while a job runs."""
    read_only: bool = True
    """It can map a page without the right to write."""
    tracks_writes: bool = True
    """It can tell which pages it has written."""
    page_bytes: int = 1 << PAGE_SHIFT
    """The smallest page that it can map."""

    def check(self) -> None:
        """Raises KernelError(EOPNOTSUPP) naming everything that is missing."""
        lacks = [
            text
            for missing, text in (
                (not self.preempts, "its page table cannot be updated while a job runs (preempts)"),
                (not self.read_only, "it cannot map a page read-only (read_only)"),
                (not self.tracks_writes, "it cannot tell which pages it has written (tracks_writes)"),
                (self.page_bytes > 1 << PAGE_SHIFT, f"its smallest page has {self.page_bytes} bytes, not {1 << PAGE_SHIFT} (page_bytes)"),
            )
            if missing
        ]
        if lacks:
            raise KernelError(errno.EOPNOTSUPP, "hmm_mirror_register", f"this device cannot mirror an address space: {'; '.join(lacks)}")


@dataclass(eq=False)
class HmmMirror:
    """struct hmm_mirror: a driver's hold on one address space. `hardware` is what its device can do."""

    ops: HmmMirrorOps | None
    hardware: Hardware = field(default_factory=Hardware)
    hmm: Hmm | None = None
    """Of the address space that it is registered with."""


@dataclass(eq=False)
class HmmRange:
    """struct hmm_range: what a driver has read of a page table, as long as it is tracked. `pfns` is the driver's array."""

    start: int = 0
    end: int = 0
    pfns: Words = field(default_factory=lambda: np.zeros(0, np.uint64))
    valid: bool = False
    hmm: Hmm | None = None
    """By whom it is tracked; None before the first call and after `hmm_vma_range_done`."""
    sequence: int = 0
    """The counter when it began, if no invalidation was in progress; else -1."""


class Hmm:
    """The mirrors and the tracked ranges of one address space."""

    def __init__(self) -> None:
        self.sequence = 0
        """How many invalidations have begun."""
        self.mirrors: list[HmmMirror] = []
        self.ranges: list[HmmRange] = []
        self.in_progress: list[tuple[int, int]] = []
        """Page ranges between their start and the moment at which the last mirror has let go."""

    def range_start(self, start: int, end: int) -> None:
        """hmm_invalidate_range_start."""
        self.sequence += 1
        self.in_progress.append((start, end))

    def invalidate(self, start: int, end: int) -> None:
        """hmm_invalidate_range, up to the callbacks."""
        for tracked in self.ranges:
            if start < tracked.end and tracked.start < end:
                tracked.valid = False
                tracked.pfns[max(start, tracked.start) - tracked.start : min(end, tracked.end) - tracked.start] = 0

    def range_end(self, start: int, end: int) -> None:
        """Every mirror has been called and has let go."""
        self.in_progress.remove((start, end))

    def track(self, tracked: HmmRange, start: int, end: int, pfns: Words) -> None:
        """Track what is read of [start, end) into `pfns` from now on. Raises KernelError(EBUSY) for a range that is tracked already."""
        if tracked.hmm is not None:
            why = f"pages [0x{tracked.start:x}, 0x{tracked.end:x}) are tracked by this range; end that with hmm_vma_range_done first"
            raise KernelError(errno.EBUSY, "hmm_vma_get_pfns", why)
        tracked.start, tracked.end, tracked.pfns, tracked.valid, tracked.hmm = start, end, pfns, True, self
        tracked.sequence = -1 if self.in_progress else self.sequence
        self.ranges.append(tracked)

    def done(self, tracked: HmmRange) -> bool:
        """Track it no more; whether what was read holds. Raises KernelError(EINVAL) for one that is not tracked."""
        if tracked.hmm is not self:
            why = "this range is not tracked: it takes one call after each that succeeded, and no other"
            raise KernelError(errno.EINVAL, "hmm_vma_range_done", why)
        tracked.hmm = None
        self.ranges.remove(tracked)
        return tracked.valid and (tracked.sequence == self.sequence or not self.is_changing(tracked.start, tracked.end))

    def is_changing(self, start: int, end: int) -> bool:
        """Whether an invalidation in progress overlaps [start, end)."""
        return any(low < end and start < high for low, high in self.in_progress)
